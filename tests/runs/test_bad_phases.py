"""Phases in a config file that run_pretrain.py refuses."""

import pytest

from tests.bad_inputs import assert_refused, config


def phases(content):
    return config(f"phases: {content}", max_steps=None)


# name -> what makes the bad input, and what the message says of it
PHASES = {
    "no list": (phases("few"), "c.yaml: phases must be a list of mappings of flags to values$"),
    "own folder": (phases("[{output-dir: x}]"), "phase 1 cannot set output_dir: it follows"),
    "another state": (
        phases("[{}, {optimizer_state: keep}]"), r"phase 2: optimizer_state \(keep\) must be one of .*carry.*reset"
    ),
    "unknown key": (phases("[{max_steps: 1}, {max_stops: 5}]"), "^unknown argument: --max_stops 5$"),
    "bad value": (phases("[{max_steps: 1}, {warmup_steps: -1}]"), r"^--warmup_steps \(-1.0\) must be at least"),
    "too long at last": (
        config("phases: [{max_steps: 1}, {max_steps: 1, max_seq_length: 513}]", max_seq_length=None),
        r"^--max_seq_length \(513\) exceeds the model's max_position_embeddings \(512\)$",
    ),
    "no file at last": (
        config("phases: [{max_steps: 1}, {max_steps: 1, train_file: /no/such.txt}]", train_file=None),
        "^/no/such.txt: no such file$",
    ),
    "nothing to carry": (
        config("phases: [{max_steps: 1}, {max_steps: 1}]", save_strategy="no"), "carry from .*_phase-1 needs its checkp"
    ),
    "another precision": (
        phases("[{max_steps: 1}, {max_steps: 1, bf16: true}]"),
        "^--bf16 is False in the phase of .*/out/_phase-1 and True in that of .*/out: it must be the same in all phase",
    ),
    "compiled at last": (phases("[{max_steps: 1}, {max_steps: 1, torch_compile: true}]"), "^--torch_compile i"),
    "another optimizer": (
        phases("[{max_steps: 1}, {max_steps: 1, optimizer: lamb}]"), "is adamw, that of the next lamb$"
    ),
    "no folder": (
        lambda workspace: [*config("phases: [{}]")(workspace)[:1]],
        r"phases need --output_dir \(None\), the name of a folder$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PHASES)
def test_bad_phases_are_refused_in_one_line_and_change_nothing(workspace, name):
    assert_refused(workspace, *PHASES[name])
