#!/usr/bin/env python
"""Compare the decays of the attention products on the quickstart: held-out loss and norms, over several seeds.

    .venv/bin/python benchmarks/decay_modes.py --frobenius_decay 0.5 --seeds 1 2 3 \\
        --config_overrides hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0

All other decays are the same in all arms. Prints a table (mean and spread over the seeds) and writes the norm curves of
the first seed to a PNG.
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

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from fnl_hf.reports.history import series

ROOT = Path(__file__).parent.parent
MODES = ("frobenius", "weight", "none")
NORMS = ("frobenius", "nuclear", "bound")


def run(mode, seed, args):
    """Launch a run unless it is finished; returns its log history and results."""
    folder = Path(args.output_dir) / f"{mode}-{seed}"
    command = [sys.executable, str(ROOT / "run_pretrain.py"), "--decay_mode", mode, "--seed", str(seed)]
    command += ["--frobenius_decay", str(args.frobenius_decay), "--output_dir", str(folder)]
    command += ["--resume_from_checkpoint", "auto", "--save_strategy", "no", *args.flags]
    subprocess.run(command, check=True, cwd=ROOT)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return history, json.loads((folder / "all_results.json").read_text())


def final_norms(history):
    """Mean over the products of the last logged norms."""
    last = [entry for entry in history if "norms/qk/bert.encoder.layer.0.attention.qk/nuclear" in entry][-1]
    return {norm: statistics.mean(v for key, v in last.items() if key.endswith(f"/{norm}")) for norm in NORMS}


def spread(values, digits=3):
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def plot(histories, file, decay):
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for axis, (kind, norm) in zip(axes, [(k, n) for k in ("qk", "vo") for n in ("frobenius", "nuclear")]):
        stem = f"norms/{kind}/bert.encoder.layer.0.attention.{kind}"
        for mode, history in histories.items():
            (line,) = axis.plot(*series(history, f"{stem}/{norm}"), label=mode)
            if norm == "nuclear":
                bound = series(history, f"{stem}/bound")
                axis.plot(*bound, color=line.get_color(), linestyle="--")
        product = {"qk": "$QK^T$", "vo": "$VO^T$"}[kind]
        axis.set_title(f"layer 0, {product}: {norm} norm" + (" (bound dashed)" if norm == "nuclear" else ""))
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(title=f"decay_mode, λ = {decay}")
    figure.savefig(file, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--frobenius_decay", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", default="output/decay_modes")
    args, args.flags = parser.parse_known_args()
    rows = {mode: [run(mode, seed, args) for seed in args.seeds] for mode in MODES}
    file = Path(args.output_dir) / "decay_modes.png"
    plot({mode: runs[0][0] for mode, runs in rows.items()}, file, args.frobenius_decay)
    print(f"\nλ = {args.frobenius_decay} on the attention products, seeds {args.seeds}, flags {args.flags}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; plot in {file}\n")
    entropy = rows["none"][0][1]["unigram_entropy"]
    print(f"| decay_mode | held-out loss (unigram entropy {entropy:.3f}) | Frobenius | nuclear | bound |")
    print("|---|---|---|---|---|")
    for mode, runs in rows.items():
        norms = [final_norms(history) for history, _ in runs]
        cells = [spread([results["eval_loss"] for _, results in runs])]
        cells += [spread([norm[name] for norm in norms], 1) for name in NORMS]
        print(f"| {mode} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
