"""Several processes go on, and end, together, whatever one of them alone sees or fails at."""

import json
import subprocess
import sys

import pytest

from fnl_hf.errors import UserInputError
from fnl_hf.runs.processes import decide_on_first_process
from tests.conftest import RESUMES_ON_CPUS, assert_same_weights, launch, pretraining


@RESUMES_ON_CPUS
def test_processes_fail_together_and_go_on_from_the_same_checkpoint(corpus, tmp_path):
    """Each process would otherwise wait for another one, or go on from elsewhere."""
    flags = {
        "per_device_train_batch_size": 4, "max_steps": 7, "save_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "load_best_model_at_end": "true", "metric_for_best_model": "loss", "ddp_timeout": 60,
    }  # fmt: skip
    launch("run_pretrain.py", *pretraining(corpus, tmp_path / "whole", **flags), processes=2)
    launch("tests/runs/processes_worker.py", tmp_path, *pretraining(corpus, tmp_path / "out", **flags), processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["checkpoints"] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert first["second sees none"] == first["goes on"] == "done"
    for name, folder in (("fails", "checkpoint-5"), ("fails at the end", "out")):
        for process in ("first", "second"):
            said = f"{folder} could not be written: the disk is full ([Errno 28] No space"
            assert said in first[f"{process} {name}"]
    assert (tmp_path / "out" / "all_results.json").is_file()
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    for rank in range(2):
        assert "gloo" not in (tmp_path / f"threads-{rank}.json").read_text()


@pytest.mark.parametrize("error, said", [
    (PermissionError(13, "Permission denied", "/out"), "^/out: Permission denied$"),
    (OSError(28, "No space left on device"), "No space left on device$"),
])  # fmt: skip
def test_a_disk_that_fails_is_bad_input_to_all(error, said):
    def decide():
        raise error

    with pytest.raises(UserInputError, match=said):
        decide_on_first_process(decide)


# A thread of gloo that frees the tensors of the last collective waits for the interpreter, here for longer than it has.
END_OF_A_RUN = """
import gc, sys, torch
from fnl_hf.runs.command_line import run_script

def run(argv):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    wrapped.itself = wrapped
    del wrapped
    sys.setswitchinterval(1000)
    torch.distributed.all_reduce(torch.ones(1000))

gc.freeze()
for _ in range(20):
    sys.setswitchinterval(0.005)
    run_script(run)
"""


def test_a_wrapped_model_that_ends_leaves_the_interpreter_to_gloo():
    subprocess.run([sys.executable, "-c", END_OF_A_RUN], check=True, timeout=120)
