#!/usr/bin/env python
"""Measure every figure that needs a GPU, in stages of at most eight minutes.

    make gpu                                            # all stages that have not finished on this GPU yet
    .venv/bin/python benchmarks/on_gpu.py decay adamw   # some of them
    .venv/bin/python benchmarks/on_gpu.py --render      # docs/gpu.md from what was measured

Each figure is a line of benchmarks/results/gpu.jsonl with the device, the versions and the revision of the code. A
stage runs in a process of its own: if it fails or takes longer than --minutes, the next stage still runs. A stage that
has finished on a device runs there again only with --again. ``--device cpu --tiny`` runs everything at sizes too small
for meaningful figures.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu.records import RESULTS, Recorder, has_ended  # noqa: E402
from gpu.rendering import render  # noqa: E402
from gpu.stages import STAGES  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"


def run_here(name: str, args) -> None:
    """Run one stage in this process."""
    torch.manual_seed(0)
    recorder = Recorder(name, torch.device(args.device), args.tiny, Path(args.results), args)
    print(f"\n== {name}: {STAGES[name].question}", flush=True)
    with recorder:
        STAGES[name].run(recorder)


def run_apart(name: str, args) -> bool:
    """Run one stage in a process of its own; returns whether it finished."""
    command = [sys.executable, __file__, name, "--here", "--device", args.device, "--results", args.results]
    command += ["--tiny"] * args.tiny
    for flag in ("text", "squad"):
        command += [f"--{flag}", *getattr(args, flag)] if getattr(args, flag) else []
    try:
        return subprocess.run(command, cwd=ROOT, timeout=60 * args.minutes).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {args.minutes:g} minutes", flush=True)
        return False


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "stages", nargs="*", metavar="stage", help=f"stages to run, of {', '.join(STAGES)}; default: all"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the stages themselves in seconds")
    parser.add_argument("--again", action="store_true", help="also run stages that have finished on this device")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of each stage (default: %(default)s)")
    parser.add_argument("--results", default=str(RESULTS))
    parser.add_argument("--text", nargs="+", help="text files to pretrain on; default: the embedded corpus")
    parser.add_argument("--squad", nargs=2, metavar=("TRAIN", "DEV"), help="SQuAD files; default: the embedded sample")
    parser.add_argument("--render", action="store_true", help="write docs/gpu.md from the results and exit")
    parser.add_argument("--here", action="store_true", help="run in this process, without a time limit")
    args = parser.parse_args(words)
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    if args.device == "cuda" and not args.render and not torch.cuda.is_available():
        parser.error("there is no CUDA device: use --device cpu --tiny to test the stages themselves")
    return args


def main(words=None) -> int:
    args = parse(words)
    if args.render:
        PAGE.write_text(render(Path(args.results)), encoding="utf-8")
        return 0
    failed = []
    for name in args.stages or STAGES:
        if not args.again and not args.here and has_ended(name, Path(args.results), torch.device(args.device)):
            print(f"{name}: has already finished on this device")
        elif args.here:
            run_here(name, args)
        elif not run_apart(name, args):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all finished")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
