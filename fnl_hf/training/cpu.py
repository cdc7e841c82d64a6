"""Training on a CPU: reuse of freed memory, and a warning about idle cores."""

import ctypes
import os
import sys

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Let glibc keep freed tensors' memory for later tensors; returns whether it does.

    By default, the kernel maps and clears the pages of each large tensor and unmaps them when it is freed: in every
    step, for all activations and gradients. ``benchmarks/pretraining_throughput.py`` measures the cost.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(mallopt(parameter, value) for parameter, value in settings)


def warn_of_idle_cores() -> None:
    """Warn if the processes of this machine leave cores idle; ``accelerate launch`` gives each of them one thread."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads * processes < cores:
        logger.warning(
            f"only {threads * processes} of {cores} cores are used: set OMP_NUM_THREADS={cores // processes}, or "
            f"accelerate launch --num_cpu_threads_per_process {cores // processes}"
        )
