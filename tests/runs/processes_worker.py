"""Two processes of which one alone sees a thing, or fails at it: started by test_processes.py."""

import atexit
import errno
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

from transformers import Trainer

import run_pretrain
from fnl_hf import UserInputError
from fnl_hf.runs import plan as runs
from fnl_hf.runs.command_line import run_script

RANK = int(os.environ["RANK"])


def run(command):
    """What the process says at the end."""
    try:
        run_pretrain.run(command)
    except UserInputError as error:
        return str(error)
    return "done"


def in_a_full_disk(method, rank, command, at_the_end=False):
    """The disk is full for one process at step 5, or when training has ended, in one part of the save."""
    original = getattr(Trainer, method)

    def failing(self, *args, **kwargs):
        now = self._staging is None if at_the_end else self.state.global_step == 5
        if now and rank == RANK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args, **kwargs)

    with patch.object(Trainer, method, failing):
        return run(command)


def without_checkpoints(rank, command):
    """The disk shows one process no checkpoint."""
    if rank != RANK:
        return run(command)
    with patch.object(runs, "newest_complete_checkpoint", lambda folder: None):
        return run(command)


def say(argv):
    """Write what this process says in each of these cases."""
    folder, command = Path(argv[0]), argv[1:]
    auto = [*command, "--resume_from_checkpoint", "auto"]
    said = {
        "first fails": in_a_full_disk("_save", 0, command),
        "checkpoints": sorted(path.name for path in (folder / "out").glob("*checkpoint*")),
        "second fails": in_a_full_disk("_save_rng_state", 1, auto),
        "second sees none": without_checkpoints(1, auto),
    }
    for name, method, rank in (("first", "_save", 0), ("second", "save_model", 1)):
        (folder / "out" / runs.RESULTS_FILE).unlink(missing_ok=True)
        said[f"{name} fails at the end"] = in_a_full_disk(method, rank, auto, at_the_end=True)
    said["goes on"] = run(auto)
    (folder / f"{RANK}.json").write_text(json.dumps(said), encoding="utf-8")


def write_threads():
    """A thread of gloo that is left when the interpreter ends may abort the process."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    Path(sys.argv[1], f"threads-{RANK}.json").write_text(json.dumps(names), encoding="utf-8")


if __name__ == "__main__":
    atexit.register(write_threads)
    run_script(say)
