"""Fixtures shared by the tests. Sizes are distinct, so that a swapped axis fails."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).parent.parent
DIMENSIONS = {
    "vocab_size": 53,
    "hidden_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 35,
    "max_position_embeddings": 19,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def dimensions():
    """BERT dimensions: head size 14 at E = d."""
    return dict(DIMENSIONS)


@pytest.fixture
def batch():
    """Token ids and a padding mask, (5, 11)."""
    ids = torch.randint(5, DIMENSIONS["vocab_size"], (5, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def launch(script, *arguments, processes=1, check=True, timeout=600, **environment):
    """Run a script as a user does. ``accelerate launch --cpu`` starts one process whatever it is told, so several
    CPU processes take torchrun."""
    if processes == 1:
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", *launcher, str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    if check:
        assert result.returncode == 0, result.stderr[-4000:]
    return result
