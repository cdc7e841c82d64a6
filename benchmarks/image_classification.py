#!/usr/bin/env python
"""Compare dense, low-rank, wide, deep and pruned ResNet20 on Fashion-MNIST, over several seeds.

    .venv/bin/python benchmarks/image_classification.py --idx_dir fashion-mnist --seeds 1 2 3 --epochs 10

All arms see the same images and differ only in the flags below. During training, runs are evaluated on 1,000 held-out
images of the training data; the test images are used once, at the end. Prints a table (mean and standard deviation over
the seeds) and writes the accuracy on the held-out images over the epochs to a PNG. Finished runs are kept. Flags that
this script does not know are passed on to every run. On a GPU: --max_train_samples 59000 --epochs 200
--weight_decay 1e-4.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
import transformers

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from fnl_hf.reports.history import series

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "image_classification" / "train.py"
ARMS = {
    "dense": "",
    "low rank, plain": "--method low_rank --factor_init default --decay_mode weight",
    "low rank, SI": "--method low_rank --decay_mode weight",
    "low rank, FD": "--method low_rank --factor_init default",
    "low rank, SI + FD": "--method low_rank",
    "wide, weight decay": "--method wide --decay_mode weight",
    "wide, FD": "--method wide",
    "deep, FD": "--method deep",
    "pruning": "--method pruning --do_eval true",
    "pruning, fine-tuned": "--method pruning --learning_rate 0.01",
}
RATIO = "0.1"  # of the factorized layers' parameters, for low rank and pruning
FINE_TUNING = 4  # the share 1/4 of the epochs, rounded down, after all of those of the dense run


def folder_of(args, arm, seed):
    return Path(args.output_dir) / f"{arm.replace(', ', '-').replace(' ', '_').replace('_+_', '+')}-{seed}"


def run(arm, seed, args):
    """Launch a run unless it is finished; returns its log history, if it trains, and its results."""
    folder, flags = folder_of(args, arm, seed), ARMS[arm].split()
    command = [sys.executable, str(SCRIPT), "--idx_dir", args.idx_dir, "--seed", str(seed), "--output_dir", str(folder)]
    command += ["--max_train_samples", str(args.max_train_samples), "--weight_decay", str(args.weight_decay)]
    command += [*flags, *args.flags]
    epochs = args.epochs
    if "low_rank" in flags or "pruning" in flags:
        command += ["--target_ratio", RATIO]
    if "pruning" in flags:
        command += ["--model_name_or_path", str(folder_of(args, "dense", seed))]
        epochs = fine_tuning_epochs(args)
    trains = "--do_eval" not in flags
    command += ["--validation_samples", "1000", "--eval_strategy", "epoch"] if trains else []
    command += ["--num_train_epochs", str(epochs)]
    command += ["--resume_from_checkpoint", "auto"] if trains else ["--overwrite_output_dir", "true"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    history = []
    if trains:
        state = json.loads((folder / "trainer_state.json").read_text())
        history = state["log_history"]
        if state["num_train_epochs"] != epochs:
            sys.exit(
                f"{folder} contains a run of {state['num_train_epochs']} epochs instead of {epochs}: choose another "
                "--output_dir"
            )
    return history, json.loads((folder / "all_results.json").read_text())


def fine_tuning_epochs(args):
    return max(1, args.epochs // FINE_TUNING)


def spread(values, pattern):
    deviation = f" ± {pattern.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{pattern.format(statistics.mean(values))}{deviation}"


def row(arm, results, dense):
    """One line of the table; ``dense`` are the results of the dense runs, seed by seed, if there are any."""
    merged = ["merged_accuracy" in result for result in results]
    accuracies = [100 * result["eval_accuracy"] for result in results]
    cells = [spread(accuracies, "{:.2f}")]
    references = [100 * result["eval_accuracy"] for result in dense]
    cells.append(", ".join(f"{own - other:+.2f}" for own, other in zip(accuracies, references)))
    cells.append(spread([100 * result["merged_accuracy"] for result in results], "{:.2f}") if all(merged) else "")
    cells.append(f"{results[0]['eval_parameters']:,}")
    cells.append(f"{results[0]['merged_parameters']:,}" if all(merged) else "")
    return f"| {arm} | {' | '.join(cells)} |"


def plot(histories, file):
    """Accuracy on the held-out images over the epochs, mean over the seeds."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm, runs in histories.items():
        curves = [series(history, "eval_validation_accuracy")[1] for history in runs]
        if not all(curves):
            continue
        means = [100 * statistics.mean(values) for values in zip(*curves)]
        axes.plot(range(1, len(means) + 1), means, label=arm)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on held-out images (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--idx_dir", required=True, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--max_train_samples", type=int, default=6000)
    parser.add_argument(
        "--epochs", type=int, default=12, help="12 epochs take about four minutes per run on one thread"
    )
    parser.add_argument(
        "--weight_decay", type=float, default=5e-4, help="the authors' 1e-4 has no visible effect in so few steps"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output_dir", default="output/image_classification")
    args, args.flags = parser.parse_known_args()
    rows = {arm: [run(arm, seed, args) for seed in args.seeds] for arm in args.arms}
    file = Path(args.output_dir) / "image_classification.png"
    plot({arm: [history for history, _ in runs] for arm, runs in rows.items()}, file)
    print(f"\n{args.max_train_samples} images, {args.epochs} epochs, λ = {args.weight_decay}, seeds {args.seeds}")
    print(f"flags {args.flags}")
    print(f"pruning, fine-tuned: {fine_tuning_epochs(args)} additional epochs at rate 0.01 after the dense run")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}; plot in {file}\n")
    print("| method | accuracy (%) | minus dense, per seed | merged (%) | nonzero parameters | after merge |")
    print("|---|---|---|---|---|---|")
    dense = [results for _, results in rows.get("dense", [])]
    for arm, runs in rows.items():
        print(row(arm, [results for _, results in runs], dense))


if __name__ == "__main__":
    main()
