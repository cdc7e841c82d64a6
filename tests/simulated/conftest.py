"""The simulation stands in for torch's CUDA; a build with the real one asks its driver."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_build_without_cuda():
    if torch.version.cuda is not None:
        pytest.skip(f"torch {torch.__version__} is built with CUDA, which asks its driver: install a build for CPUs")
