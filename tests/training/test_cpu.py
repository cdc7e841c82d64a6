"""Memory that is kept from step to step, and idle cores that are named."""

import os
import subprocess
import sys

import pytest

from fnl_hf.training import cpu
from tests.conftest import ROOT

COUNT_FAULTS = """
import resource, sys, torch
from fnl_hf.training.cpu import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    activations = [torch.ones(10**6) for _ in range(40)]  # 977 pages each
step()
before = faults()
step()
print(kept, faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept():
    found = {}
    for mode in ("keep", "leave"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", COUNT_FAULTS, mode]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[mode] = result.stdout.split()
    if found["keep"][0] == "False":
        pytest.skip("no glibc")
    assert int(found["keep"][1]) < int(found["leave"][1]) / 10, "the kernel is not asked for the same pages again"


@pytest.mark.parametrize("threads, processes, warned", [(1, 1, True), (2, 3, False), (1, 6, False), (2, 2, True)])
def test_idle_cores_are_named(monkeypatch, caplog, threads, processes, warned):
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda pid: range(6), raising=False)
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(cpu.logger, "propagate", True)
    cpu.warn_of_idle_cores()
    expected = f"{threads * processes} of 6 cores are used: set OMP_NUM_THREADS={6 // processes}"
    assert (expected in caplog.text) == warned
