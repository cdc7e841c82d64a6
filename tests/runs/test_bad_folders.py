"""Checkpoints and output folders that run_pretrain.py refuses."""

import shutil

import pytest

import run_pretrain
from tests.bad_inputs import (
    TEXT,
    assert_launch_refused,
    assert_refused,
    contents,
    corpus,
    edit,
    flags,
    flip_a_bit,
    from_checkpoint,
    holding,
    itself,
    linked,
    moved,
    other_text_under_the_same_name,
    overwriting,
    prepared,
    replaced_by,
    resumed,
    somebody_elses,
    unrecorded,
    without,
    write,
)


def card_beside_its_checkpoint(out):
    """A run that has not come to its end, and a card that is none of its own."""
    for path in out.iterdir():
        if path.is_file() and path.name != "run_arguments.json":
            path.unlink()
    holding("README.md")(out)


def ended_without_a_checkpoint(out):
    shutil.rmtree(out / "checkpoint-2")
    (out / "all_results.json").write_text("{}")


# name -> what makes the bad input, and what the message says of it
FOLDERS = {
    "none": (flags(resume_from_checkpoint="/no/such"), "^--resume_from_checkpoint /no/such: no such folder"),
    "a run's folder": (
        resumed(resume_from_checkpoint="<here>/out"), "not a complete checkpoint: trainer_state.json is missing$"
    ),
    "ended without a checkpoint": (
        resumed(ended_without_a_checkpoint, max_steps=9), "the run in .*out has ended and left no checkpoint to conti"
    ),
    "bit flipped": (
        from_checkpoint(flip_a_bit), "optimizer.pt was changed after it was written: its checksum"
    ),
    "bit flipped, no other one": (
        resumed(flip_a_bit), "out has no complete checkpoint: checkpoint-2: optimizer.pt was .* --overwrite_output_d"
    ),
    "checksums emptied": (
        from_checkpoint(write("checkpoint-2/checksums.json", "{}")),
        "checksums.json does not list trainer_state.json$",
    ),
    "torn weights": (
        from_checkpoint(write("checkpoint-2/model.safetensors", "torn")),
        "not a complete checkpoint: model.safetensors cannot be read",
    ),
    "torn optimizer": (
        from_checkpoint(write("checkpoint-2/optimizer.pt", "torn")), "optimizer.pt is truncated$"
    ),
    "torn random state": (
        from_checkpoint(write("checkpoint-2/rng_state.pth", "")), "rng_state.pth is truncated$"
    ),
    "empty state": (
        from_checkpoint(write("checkpoint-2/trainer_state.json", "{}")),
        "trainer_state.json cannot be read$",
    ),
    "configuration, a list": (resumed(write("checkpoint-2/config.json", "[]")), "^no tokenizer in .*checkpoint-2: "),
    "other architecture": (
        resumed(unrecorded, attention_embedding_size=8),
        "belongs to another model: attention_embedding_size is None in the checkpoint and 8 in this model$",
    ),
    "other objective": (
        resumed(unrecorded, objective="mlm_nsp"), "architectures is .*MaskedLM.* and .*PreTr"
    ),
    "other dropout": (
        resumed(edit("checkpoint-2/config.json", hidden_dropout_prob=0.3)),
        "checkpoint-2 belongs to another model: hidden_dropout_prob is 0.3 in the checkpoint and 0.1 in this model$",
    ),
    "other schedule": (
        resumed(lr_scheduler_kwargs='{"num_cycles": 2}'), "lr_scheduler_kwargs was None and is now {'num_cycles': 2}"
    ),
    "other noise": (resumed(neftune_noise_alpha=5), "neftune_noise_alpha was None and is now 5.0"),
    "data from the start": (resumed(ignore_data_skip="true"), "ignore_data_skip was False and is now True"),
    "other seed": (resumed(seed=8), "out contains another run: seed was 7 and is now 8. Choose another"),
    "other optimizer": (resumed(optimizer="sgd"), "contains another run: optimizer was adamw and is now sgd"),
    "other batch": (
        resumed(per_device_train_batch_size=4), "another run: per_device_train_batch_size was 8 and is now 4"
    ),
    "other batch, arguments torn": (
        resumed(write("run_arguments.json", "{"), per_device_train_batch_size=4), "batch_size was 8 and is now 4"
    ),
    "other batch, moved": (moved(per_device_train_batch_size=4), "checkpoint-2 contains another run: per_device_tr"),
    "other world size": (
        resumed(edit("run_arguments.json", world_size=3)), r"on 3 process\(es\) .* --gradient_accumulation_steps 3$"
    ),
    "other file": (corpus("c.txt", TEXT, resume_from_checkpoint="<run>/checkpoint-2"), "another run: train_file was "),
    "other text": (
        resumed(other_text_under_the_same_name, train_file="<here>/corpus.txt"), "on other data: the fingerprint was "
    ),
    "stream: other text": (
        resumed(other_text_under_the_same_name, stream=True, train_file="<here>/corpus.txt"), "on other data: the fi"
    ),
    "stream: no state of a process": (
        resumed(without("checkpoint-2/stream_state_0.json"), stream=True),
        "checkpoint-2 has no stream_state_0.json: the position of its stream is lost$",
    ),
    "stream: state of one of two": (
        resumed(edit("checkpoint-2/stream_state_0.json", consumed=4), stream=True),
        "shard 0 of 1 is at micro-batch 2 instead of 4; the states of all processes are needed$",
    ),
    "stream: torn state": (
        resumed(write("checkpoint-2/stream_state_0.json", "{"), stream=True), "_state_0.json is not the state of a str"
    ),
    "stream: other buffer": (resumed(stream=True, shuffle_buffer_size=28), "buffer_size was 21 and is now 28"),
    "folder in use": (resumed(resume_from_checkpoint=None), "out is not empty: choose another folder, resume its run"),
    "folder in use, no run": (resumed(replaced_by(somebody_elses)), "out is not empty and contains no run to resume"),
    "folder in use, of another run": (
        resumed(replaced_by(somebody_elses), resume_from_checkpoint="<run>/checkpoint-2"),
        "out is not empty, and is not the folder that contains .*checkpoint-2: choose",
    ),
    "folder is a file": (prepared(write("out", "mine")), "--output_dir .*: .*/out is not a folder$"),
    "folder is a link to itself": (prepared(write("out", itself)), "--output_dir .*/out: Too many levels of symbolic"),
    "folder below a file": (flags(output_dir="<corpus>/x"), "--output_dir .*/x: .*corpus.txt is not a folder$"),
    "folder with too long a name": (flags(output_dir="<here>/" + "x" * 300), "--output_dir .*: File name too long$"),
    "optimizer state of nothing": (flags(optimizer_state_from="/no/such"), "_from /no/such: no complete checkpoint"),
    "optimizer state torn": (
        resumed(write("checkpoint-2/optimizer.pt", "torn"), resume_from_checkpoint=None, output_dir="<here>/new",
                optimizer_state_from="<here>/out"),
        "^--optimizer_state_from .*/out: no complete checkpoint in this folder$",
    ),
    "optimizer state of no model": (
        resumed(edit("checkpoint-2/config.json", hidden_dropout_prob="much"), resume_from_checkpoint=None,
                output_dir="<here>/new", optimizer_state_from="<here>/out"),
        "checkpoint-2: config.json cannot be read: .*'hidden_dropout_prob' with value 'much'",
    ),
    "optimizer state of another one": (
        flags(optimizer_state_from="<run>", optimizer="lamb"), "uses --optimizer adamw, this one lamb: use the same$"
    ),
    "optimizer state of other shapes": (
        flags(optimizer_state_from="<run>", attention_embedding_size=8), "size is None in the checkpoint and 8"
    ),
    "optimizer state to be deleted": (
        overwriting(optimizer_state_from="<here>/out"),
        "^--optimizer_state_from .*/out is the --output_dir, which --overwrite_output_dir would delete: choose another",
    ),
    # Somebody else's files are never overwritten.
    "overwriting a card": (
        overwriting(replaced_by(holding("README.md"))), "^--output_dir .*/out: README.md was not written by a run"
    ),
    "overwriting a model": (
        overwriting(replaced_by(holding("config.json", "model.safetensors", "vocab.txt", "z/a", "tokenizer.json",
                                      "attention_fnl_bert.py"))),
        "/out: attention_fnl_bert.py, config.json, model.safetensors and 2 more was not written by a run",
    ),
    "overwriting a checkpoint": (
        overwriting(replaced_by(holding("checkpoint-2024/photo"))),
        "out: checkpoint-2024 was",
    ),
    "overwriting a checkpoint beside a run's": (
        overwriting(holding("checkpoint-2024/photo")),
        "out: checkpoint-2024 was",
    ),
    "overwriting a file in a run's checkpoint": (
        overwriting(holding("checkpoint-2/photo")),
        "out: checkpoint-2/photo ",
    ),
    "overwriting a file named as a checkpoint": (
        overwriting(holding("checkpoint-7")),
        "out: checkpoint-7 was not",
    ),
    "overwriting what no checkpoint's link leads to": (
        overwriting(linked("checkpoint-7", "/no")),
        "out: checkpoint-7 ",
    ),
    "overwriting links to another's": (
        overwriting(replaced_by(lambda out: [holding("notes")(out), linked("config.json", "notes")(out)])),
        "out: config.json was not",
    ),
    "overwriting a staging folder": (
        overwriting(replaced_by(holding("_incomplete/a"))),
        "out: _incomplete was not",
    ),
    "overwriting a card that was edited": (
        overwriting(holding("README.md")),
        "out: README.md was not written by a run",
    ),
    "overwriting answers": (
        overwriting(replaced_by(holding("all_results.json")), do_eval="true"), "out: all_results.json was not"
    ),
    "going on over a card": (
        resumed(card_beside_its_checkpoint), "out: README.md was not"
    ),
    "going on over a card, from a checkpoint": (
        from_checkpoint(card_beside_its_checkpoint), "out: README.md was not"
    ),
    "checkpoint with too long a name": (flags(resume_from_checkpoint="x" * 300), "x: no such folder"),
    "model with too long a name": (flags(model_name_or_path="x" * 300, config_overrides=None), "no tokenizer in xxxx"),
    # What is advised is not refused in its turn.
    "folder in use, advice": (
        resumed(resume_from_checkpoint=None),
        "choose another folder, resume its run with --resume_from_checkpoint auto, or replace it with --overwrite_"
        "output_dir true$",
    ),
    "folder in use, to evaluate, advice": (
        resumed(resume_from_checkpoint=None, do_eval="true"),
        "empty: choose another folder, or replace it with --overwrite_out",
    ),
    "folder in use, no run, advice": (
        resumed(replaced_by(somebody_elses), resume_from_checkpoint=None),
        "not empty: choose another folder, or keep its files next to the new run with --overwrite_output_dir true$",
    ),
    "folder in use, a card, advice": (
        resumed(replaced_by(holding("README.md")), resume_from_checkpoint=None),
        r"out is not empty: choose another folder \(README.md in it was not written by a run, or was changed since\)$",
    ),
    "other seed, advice": (
        resumed(seed=8), "Choose another folder, or replace it with --overwrite_output_dir true instead of --resume_"
    ),
    "other seed, a card, advice": (
        resumed(holding("README.md"), seed=8),
        r"Choose another folder \(README.md in it was not written by a run, or was changed since\)$",
    ),
    "other batch, moved, advice": (
        moved(per_device_train_batch_size=4), "Resume with the arguments that the run was started with$"
    ),
    "bit flipped, another's checkpoint": (
        resumed(lambda out: [flip_a_bit(out), holding("checkpoint-9/a")(out)]),
        r"another folder \(checkpoint-9 in it was",
    ),
    # What is overwritten is overwritten only when nothing more can be refused.
    "overwriting, no data": (
        overwriting(max_train_samples=2), "fewer than one global b"
    ),
    "overwriting, no optimizer": (
        overwriting(optimizer="sgd", optim_args="momentum=-1"),
        "--optim_args momentum=-1: Invalid momentum",
    ),
    "overwriting, no schedule": (
        overwriting(lr_scheduler_type="cosine_with_min_lr"),
        "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs None: One of min_lr",
    ),
    "overwriting, no tracker": (
        overwriting(report_to="no_such_tracker"), "no_such_tracker"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_is_refused_in_one_line_and_nothing_is_changed(workspace, name):
    assert_refused(workspace, *FOLDERS[name])


def test_what_no_run_writes_stays_where_a_run_starts_anew(workspace):
    """Also what a link of a checkpoint's name leads to, and a run of the same name that was overwritten is gone."""
    command, out = overwriting(max_steps=1, save_strategy="no", do_train="true")(workspace), workspace.here / "out"
    (out / "checkpoint-2").rename(workspace.here / "elsewhere")
    (out / "checkpoint-2").symlink_to("../elsewhere")
    holding("thesis.tex", "figures/checkpoint-2")(out)
    before = contents(workspace.here / "elsewhere")
    run_pretrain.run(command)
    assert contents(workspace.here / "elsewhere") == before and before
    assert not list(out.glob("checkpoint-*")) and (out / "all_results.json").is_file()
    assert {(out / name).read_text() for name in ("thesis.tex", "figures/checkpoint-2")} == {"mine"}
    run_pretrain.run(command)


def test_the_launched_script_prints_the_line_and_no_traceback(workspace):
    assert_launch_refused(workspace, *FOLDERS["other batch"])
