"""Training curves from a Trainer's log history."""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from fnl_hf.training.callbacks import NORM_PREFIX

# diagnostic -> title, whether the axis is logarithmic
PANELS = {
    "frobenius": ("Frobenius norm", False),
    "nuclear": ("nuclear norm; dashed: its bound", False),
    "effective_step": ("effective step η/‖W‖²", True),
    "non_orthogonality": ("non-orthogonality of the factors", False),
}
KIND_TITLES = {"qk": "$QK^T$", "vo": "$VO^T$", "linear": "$UV^T$", "uv": "$UV^T$", "deep": "$UMV^T$"}
MOST_LABELS = 12


def series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    entries = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    return [step for step, _ in entries], [value for _, value in entries]


def logged_products(log_history: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the products whose diagnostics were logged, in the model's order, by kind."""
    found: dict[str, list[str]] = {}
    for key in (key for entry in log_history for key in entry if key.startswith(NORM_PREFIX)):
        kind, name = key.removeprefix(NORM_PREFIX).split("/")[:2]
        if name not in found.setdefault(kind, []):
            found[kind].append(name)
    return found


def plot_training(log_history: list[dict[str, Any]], file: str | Path, unigram_entropy: float | None = None) -> None:
    """Write a PNG: the loss and, for each kind of product, its diagnostics over the steps, one curve a product."""
    kinds = logged_products(log_history)
    figure = plt.figure(figsize=(6 + 3.6 * len(PANELS) * bool(kinds), 3.8 * max(1, len(kinds))), layout="constrained")
    grid = figure.add_gridspec(max(1, len(kinds)), 3 + 2 * len(PANELS) * bool(kinds))
    _plot_loss(figure.add_subplot(grid[:, :3]), log_history, unigram_entropy)
    for row, (kind, names) in enumerate(kinds.items()):
        for column, panel in enumerate(PANELS):
            axes = figure.add_subplot(grid[row, 3 + 2 * column : 5 + 2 * column])
            plot_products(axes, log_history, kind, names, panel)
            if row == len(kinds) - 1:
                axes.set_xlabel("step")
            if (row, column) == (0, 0) and len(names) <= MOST_LABELS:
                axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_products(axes, log_history: list[dict[str, Any]], kind: str, names: list[str], panel: str) -> None:
    """One diagnostic (a key of ``PANELS``) of products of one kind over training; the nuclear norm with its bound.

    "nuclear" is figure 2 of the article on Khodak et al.: under weight decay on the factors the bound is tight.
    """
    colors = plt.get_cmap("viridis")
    title, logarithmic = PANELS[panel]
    for index, name in enumerate(names):
        color = colors(0.9 * index / max(1, len(names) - 1))
        stem = f"{NORM_PREFIX}{kind}/{name}"
        axes.plot(*series(log_history, f"{stem}/{panel}"), color=color, label=_label(name))
        if panel == "nuclear":
            axes.plot(*series(log_history, f"{stem}/bound"), color=color, linestyle="--")
    axes.set_title(f"{KIND_TITLES.get(kind, kind)}: {title}", fontsize=10)
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")  # a rate of 0, before warm-up and at the end
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _label(name: str) -> str:
    """ "layer 3" for attention's products, otherwise the product's name."""
    layer = re.search(r"\blayer\.(\d+)\.attention\b", name)
    return f"layer {layer[1]}" if layer else name


def _plot_loss(axes, log_history, unigram_entropy):
    axes.plot(*series(log_history, "loss"), label="training", alpha=0.6)
    axes.plot(*series(log_history, "eval_loss"), "o-", label="held out", markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle=":", label="unigram entropy (held out)")
    axes.set_title("loss (nats)", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
