#!/usr/bin/env python
"""Kill a pretraining run repeatedly, at random moments and during saves; compare it with an undisturbed run.

    .venv/bin/python benchmarks/chaos.py --kills 20 --seed 1

After each kill, the same command with ``--resume_from_checkpoint auto`` resumes the run. Half of the kills wait for a
save to start. Flags of run_pretrain.py may follow; by default the run trains a tiny model on the embedded corpus.
Prints when each kill happened and whether the final weights are bit-identical; the exit status is 1 if they are not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FLAGS = {
    "max_steps": 600, "save_steps": 20, "save_total_limit": 3, "logging_steps": 100, "eval_strategy": "no",
    "report_to": "none", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "warmup_steps": 0,
    "max_train_samples": 2000, "max_eval_samples": 64, "config_overrides": "hidden_dropout_prob=0.1",
    "product_norms_steps": 1000, "disable_tqdm": "true", "resume_from_checkpoint": "auto",
}  # fmt: skip


def start(folder, further):
    flags = [word for key, value in FLAGS.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "run_pretrain.py"), *flags, *further, "--output_dir", str(folder)]
    log = open(folder.parent / f"{folder.name}.log", "ab")  # noqa: SIM115  the process keeps it
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})


def newest(folder):
    steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
    return max(steps, default=0)


def wait_for(process, condition, limit):
    """Wait until the condition is true, the process has ended, or the time is over."""
    deadline = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.0005)


def is_saving(process, folder):
    """Stop the run (SIGSTOP); returns whether a save is in progress."""
    process.send_signal(signal.SIGSTOP)
    return (folder / "_incomplete").exists()


def kill_once(folder, further, generator, during_save):
    """Start or resume the run, let it make some progress, and kill it; None if it ended first."""
    process, before = start(folder, further), newest(folder)
    wait_for(process, lambda: newest(folder) >= before + 20 * generator.randint(1, 2), 120)
    time.sleep(generator.uniform(0, 0.5))
    saving = is_saving(process, folder)
    while during_save and not saving and process.poll() is None:
        process.send_signal(signal.SIGCONT)
        wait_for(process, (folder / "_incomplete").exists, 60)
        time.sleep(generator.uniform(0, 0.01))
        saving = is_saving(process, folder)  # it may be over already
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return f"after checkpoint {newest(folder)}" + (", during a save" if saving else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output_dir", default="output/chaos")
    args, further = parser.parse_known_args()
    folder, generator = Path(args.output_dir).absolute(), random.Random(args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    alone, killed = start(folder / "alone", further), []
    while len(killed) < args.kills:
        where = kill_once(folder / "killed", further, generator, during_save=len(killed) % 2 == 1)
        if where is None:
            break
        killed.append(where)
        print(f"kill {len(killed)}: {where}", flush=True)
    for name, process in (("alone", alone), ("killed", start(folder / "killed", further))):
        if process.wait():
            sys.exit(f"a run failed: see {folder}/{name}.log")
    first, second = (load_file(folder / name / "model.safetensors") for name in ("alone", "killed"))
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    saves = sum("during a save" in where for where in killed)
    log = (folder / "killed.log").read_text(encoding="utf-8", errors="replace")
    steps = json.loads((folder / "killed" / "trainer_state.json").read_text())["global_step"]
    skipped = log.count("skipping ")
    print(f"{len(killed)} kills, {saves} of them during a save; {skipped} incomplete checkpoints skipped;", end=" ")
    print(f"{steps} steps; weights {'bit-identical' if equal else 'DIFFERENT'}")
    sys.exit(0 if equal and len(killed) == args.kills else 1)


if __name__ == "__main__":
    main()
