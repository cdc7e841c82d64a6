"""Training curves from a Trainer's log history."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from fnl_hf.training.callbacks import NORM_PREFIX

NORM_TITLES = {"frobenius": "Frobenius norm", "nuclear": "nuclear norm; dashed: ½(‖U‖²+‖V‖²)"}
KIND_TITLES = {"qk": "$QK^T$", "vo": "$VO^T$"}


def series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    entries = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    return [step for step, _ in entries], [value for _, value in entries]


def plot_training(log_history: list[dict[str, Any]], file: str | Path, unigram_entropy: float | None = None) -> None:
    """Write a PNG: loss and, for each kind of product, the norms per layer, over the steps."""
    figure = plt.figure(figsize=(14, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    _plot_loss(figure.add_subplot(grid[:, 0]), log_history, unigram_entropy)
    layers = 1 + max(
        (int(key.split("/")[1].split("_")[1]) for entry in log_history for key in entry if key.startswith(NORM_PREFIX)),
        default=-1,
    )
    colors = plt.get_cmap("viridis")
    for row, kind in enumerate(KIND_TITLES):
        for column, norm in enumerate(NORM_TITLES):
            axes = figure.add_subplot(grid[row, column + 1])
            for layer in range(layers):
                color = colors(0.9 * layer / max(1, layers - 1))
                stem = f"{NORM_PREFIX}layer_{layer}/{kind}"
                axes.plot(*series(log_history, f"{stem}_{norm}"), color=color, label=f"layer {layer}")
                if norm == "nuclear":
                    axes.plot(*series(log_history, f"{stem}_bound"), color=color, linestyle="--")
            axes.set_title(f"{KIND_TITLES[kind]}: {NORM_TITLES[norm]}", fontsize=10)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            if 0 < layers <= 12 and (row, column) == (0, 0):
                axes.legend(fontsize=8)
            if row == 1:
                axes.set_xlabel("step")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _plot_loss(axes, log_history, unigram_entropy):
    axes.plot(*series(log_history, "loss"), label="training", alpha=0.6)
    axes.plot(*series(log_history, "eval_loss"), "o-", label="held out", markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle=":", label="unigram entropy (held out)")
    axes.set_title("loss (nats)", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
