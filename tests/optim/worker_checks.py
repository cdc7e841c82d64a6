"""Checks that run on several processes: each process runs them all and writes its figures as JSON, a test asserts."""

import json
import time
import traceback
from datetime import timedelta
from functools import partial

import torch.distributed as dist

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def check_each(*names):
    """A check for each name, "function[name]", with the name as its first argument."""

    def decorate(function):
        CHECKS.update({f"{function.__name__}[{name}]": partial(function, name) for name in names})
        return function

    return decorate


def run_checks(folder):
    # A check that fails on one process leaves the others waiting for it.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    four = dist.get_world_size() == 4
    for name, function in CHECKS.items():
        if (name == "four_processes") != four:
            continue
        started = time.perf_counter()
        try:
            results[name] = function(folder)
        except Exception:
            results[name] = {"traceback": traceback.format_exc()}
        print(f"{name}: {time.perf_counter() - started:.2f} s", flush=True)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()
