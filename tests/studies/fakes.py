"""A script that leaves what a run leaves, a study over it, and the runner's command with that study alone.

``fakes.py`` with flags is the script; ``fakes.py FOLDER ARGUMENTS...`` the command, whose files are in FOLDER.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from studies.__main__ import main
from studies.study import Study

LOSSES = {"low": 3.25, "high": 4.5, "broken": 0.0, "empty": 0.0, "stopped": 0.0, "nan": float("nan")}
PROVENANCE = {"starts": [{"versions": {"torch": "2", "transformers": "5"}, "devices": ["CPU"]}]}


def fake_study(folder, **changes):
    """Two groups; a run appends its start to ``starts`` and ends when the file ``gate`` is there."""
    base = {"starts": str(folder / "starts"), "gate": str(folder / "gate")}
    values = {
        "question": "Is it lower?",
        "script": __file__,
        "base": base,
        "arms": {"A": {"low": {"arm": "low"}, "high": {"arm": "high"}}, "B": {"low": {"arm": "low", "width": [2, 3]}}},
        "reference": "high",
        "effect": 0.1,
        "seeds": (1, 2),
        "tuning_seeds": (11,),
        "spectra": False,
    }
    return Study(**values | changes)


def flags_of(words):
    flags = {}
    for word in words:
        if word.startswith("--"):
            flags[word[2:]] = values = []
        else:
            values.append(word)
    return {name: values[0] if len(values) == 1 else values for name, values in flags.items()}


def save_and_stop(folder):
    """What a script does on SIGTERM."""
    (folder / "checkpoint").touch()
    sys.exit(75)


def script(flags):
    folder = Path(flags["output_dir"])
    resumed = (folder / "checkpoint").exists() and flags["resume_from_checkpoint"] == "auto"
    folder.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: save_and_stop(folder))
    start = [flags["arm"], flags["seed"], flags.get("width"), os.environ["OMP_NUM_THREADS"], resumed, os.getpid()]
    with open(flags["starts"], "a") as file:
        file.write(json.dumps(start) + "\n")
    if flags["arm"] == "broken":
        sys.exit("first\n" * 50 + "what is wrong")
    while not Path(flags["gate"]).exists():
        time.sleep(0.02)
    if flags["arm"] == "stopped":
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
        sys.exit(3)  # as a script whose losses are not finite
    if flags["arm"] != "empty":
        write_results(folder, LOSSES[flags["arm"]] + int(flags["seed"]) / 64, len(flags.get("folder", "")))
    if "scale" in flags:
        write_checkpoint(folder / "checkpoint-1000", float(flags["scale"]))


def write_checkpoint(folder, scale):
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"encoder.layer.0.intermediate.dense.weight": scale * torch.ones(2, 3)}, folder / "model.safetensors")


def write_results(folder, loss, length):
    losses = [{"step": step, "eval_loss": loss + 1000 - step} for step in range(100, 1001, 100)]
    norms = {"norms/qk/a.qk/nuclear": 2.0, "norms/qk/b.qk/nuclear": 5.0, "norms/vo/a.vo/bound": 7.0}
    norms |= {"norms/qk/a.qk/bound": 4.0, "norms/qk/b.qk/bound": 5.0}
    history = [{"step": 0, **dict.fromkeys(norms, 0.5)}, *losses, {"step": 1000, **norms}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    (folder / "all_results.json").write_text(
        json.dumps({"eval_loss": loss, "note": "of no number"} | ({"folder": length} if length else {}))
    )


def command(folder, *arguments, **changes):
    """The runner's command in this process; returns the exit status."""
    study = fake_study(folder, **changes)
    return main(["fake", "--workers", "1", *arguments], {"fake": study}, folder / "results", folder / "work")


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        script(flags_of(sys.argv[1:]))
    else:
        sys.exit(command(Path(sys.argv[1]), *sys.argv[2:]))
