"""Training on a CPU: memory that is kept, and all cores."""

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
    """Let glibc keep what tensors free for those that come next; True if it does from now on.

    By default each large tensor is mapped anew from the kernel, which clears its pages, and unmapped when freed: in
    every step, for all activations and gradients. ``benchmarks/pretraining_throughput.py`` measures what that costs.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(mallopt(parameter, value) for parameter, value in settings)


def warn_of_idle_cores() -> None:
    """Say so if the processes of this machine leave cores idle; ``accelerate launch`` gives each one thread."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads * processes < cores:
        logger.warning(
            f"only {threads * processes} of {cores} cores are used: set OMP_NUM_THREADS={cores // processes}, or "
            f"accelerate launch --num_cpu_threads_per_process {cores // processes}"
        )
