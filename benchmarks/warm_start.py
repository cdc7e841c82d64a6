#!/usr/bin/env python
"""Compare ways to carry over the optimizer's moments in a warm start, by the loss of a short quickstart.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.warm_start --seeds 1 2

Runs the quickstart for 1,500 steps. After a quarter of the steps, the encoder's layers become products with half of
their parameters. Prints the training loss of the first steps after the switch and the held-out loss at the end.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import run_pretrain
from fnl_hf.training import warm_start
from studies.study import WITHOUT_DROPOUT

ROOT = Path(__file__).resolve().parents[1]
STEPS, SWITCH, EVERY = 1500, 0.25, 25
# arm -> what of fnl_hf.training.warm_start is another function in it; None: dense to the end
ARMS = {
    "dense to the end": None,
    "moments projected": {},
    "moments of the factors reset": {"project_moments": lambda entries, left, right: ({}, {})},
    "all moments reset": {"carry_state": lambda state, before, model: {}},
}


def run(arm, seed, folder):
    """Run once unless it is finished; returns the log history and results."""
    flags = {
        "output_dir": folder,
        "config_overrides": WITHOUT_DROPOUT,  # and with BERT's initializer_range, as the recorded runs
        "seed": seed,
        "max_steps": STEPS,
        "logging_steps": EVERY,
        "eval_steps": STEPS,
        "save_strategy": "no",
        "resume_from_checkpoint": "auto",
        "report_to": "none",
        "use_cpu": "true",
    }
    if ARMS[arm] is not None:
        flags |= {"factorize_at_step": SWITCH}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with ExitStack() as patches:
        for name, function in (ARMS[arm] or {}).items():
            patches.enter_context(patch.object(warm_start, name, function))
        run_pretrain.run([str(ROOT / "configs" / "quickstart.yaml"), *words])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return history, json.loads((folder / "all_results.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--output_dir", default="output/warm_start")
    args = parser.parse_args()
    shown = [int(SWITCH * STEPS) + EVERY * count for count in (1, 2, 4)]
    rows = {}
    for seed in args.seeds:
        for arm in args.arms:
            rows[arm, seed] = run(arm, seed, Path(args.output_dir) / f"{arm.replace(' ', '-').replace(',', '')}-{seed}")
    print(f"\n| | {' | '.join(f'loss at step {step}' for step in shown)} | held-out loss, {len(args.seeds)} seeds |")
    print("|---|" + "---|" * (len(shown) + 1))
    for arm in args.arms:
        losses = [
            statistics.mean(
                next(entry["loss"] for entry in rows[arm, seed][0] if entry["step"] == step and "loss" in entry)
                for seed in args.seeds
            )
            for step in shown
        ]
        held_out = [rows[arm, seed][1]["eval_loss"] for seed in args.seeds]
        cells = [*(f"{loss:.3f}" for loss in losses), ", ".join(f"{loss:.3f}" for loss in held_out)]
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
