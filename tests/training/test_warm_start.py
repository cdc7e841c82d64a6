"""Dense up to a step, then products: the switch, the optimizer's state, and runs that stop on either side of it."""

import json
import shutil

import pytest
import torch

import run_pretrain
from tests.conftest import TINY, assert_same_weights, pretraining, weights

FLAGS = {"max_train_samples": 61, "max_steps": 12, "save_steps": 1, "logging_steps": 1, "factorize_at_step": 4,
         "learning_rate": 1e-2}  # fmt: skip


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **FLAGS | flags)])
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Twelve steps, seven an epoch, with dropout; the layers are products after the fourth."""
    return run(corpus, tmp_path_factory.mktemp("warm") / "whole")


def history(folder):
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "data_wait", "peak_memory", "mfu")
    return [{key: value for key, value in row.items() if not any(t in key for t in timed)} for row in rows]


@pytest.mark.parametrize("stopped", [3, 4, 5, 8])
def test_a_run_goes_on_from_either_side_of_the_switch_to_the_last_bit(whole, corpus, tmp_path, stopped):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "all_results.json").unlink()
    for step in range(stopped + 1, 13):
        shutil.rmtree(out / f"checkpoint-{step}")
    run(corpus, out, resume_from_checkpoint="auto")
    assert_same_weights(whole, out)
    assert history(whole)[:-2] == history(out)[:-2]
    for file in ("optimizer.pt", "scheduler.pt"):
        there, here = (torch.load(folder / "checkpoint-12" / file, weights_only=True) for folder in (whole, out))
        assert there.get("param_groups") == here.get("param_groups")
        torch.testing.assert_close(there.get("state", there), here.get("state", here), rtol=0, atol=0)
