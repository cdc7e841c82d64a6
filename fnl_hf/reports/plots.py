"""The report of a training run: one picture, made from a Trainer's log history."""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

from fnl_hf.reports.callbacks import NORM_PREFIX

REPORT_FILE = "training_report.png"
# diagnostic -> title, whether its axis is logarithmic
PANELS = {
    "frobenius": ("Frobenius norm", False),
    "nuclear": ("nuclear norm; dashed: its bound", False),
    "effective_step": ("effective step η/‖W‖²", True),
    "non_orthogonality": ("non-orthogonality of the factors", False),
}
KIND_TITLES = {
    "qk": "$QK^T$",
    "vo": "$VO^T$",
    "rotary": "$QRK^T$",
    "linear": "$UV^T$",
    "uv": "$UV^T$",
    "deep": "$UMV^T$",
}
# logged counts of what a loss curve does not show -> marker, label
EVENTS = {
    "skipped_steps": ("x", "skipped steps"),
    "spikes": ("^", "spikes"),
    "factorized_layers": ("|", "layers become products"),
}
MOST_LABELS = 6  # in a legend: of more products, the first, the last and some between are named


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


def plot_report(
    log_history: list[dict[str, Any]],
    file: str | Path,
    unigram_entropy: float | None = None,
    title: str | None = None,
) -> None:
    """Write a PNG: loss, learning rate and throughput; below, for each kind of product, its diagnostics over the steps,
    one curve a product. ``title`` says which run it is."""
    kinds = logged_products(log_history)
    figure = plt.figure(figsize=(16, 3.6 * (1 + len(kinds))), layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=11)
    top, *below = figure.subfigures(1 + len(kinds), squeeze=False)[:, 0]
    axes = top.subplots(1, 3)
    plot_loss(axes[0], log_history, unigram_entropy)
    plot_optimizer(axes[1], log_history)
    plot_throughput(axes[2], log_history)
    for row, (kind, names) in zip(below, kinds.items()):
        for axes, panel in zip(row.subplots(1, len(PANELS)), PANELS):
            plot_products(axes, log_history, kind, names, panel)
        row.axes[0].legend(fontsize=8)
    last = max((entry["step"] for entry in log_history), default=0) or 1
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.set_xlim(-0.04 * last, 1.04 * last)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_loss(axes, log_history: list[dict[str, Any]], unigram_entropy: float | None = None) -> None:
    """Training and held-out loss; where steps were skipped or the loss had spikes, marks at the bottom."""
    _plot(axes, log_history, "loss", label="training", alpha=0.6)
    if any("eval_loss" in entry for entry in log_history):
        _plot(axes, log_history, "eval_loss", label="held out", marker="o", markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle=":", label="unigram entropy (held out)")
    for row, (key, (marker, label)) in enumerate(EVENTS.items()):
        marked = [step for step, count in zip(*series(log_history, key)) if count]
        if marked:
            heights = [0.03 + 0.05 * row] * len(marked)
            axes.plot(marked, heights, marker, color="tab:red", label=label, transform=axes.get_xaxis_transform())
    axes.set_title("loss (nats)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_optimizer(axes, log_history: list[dict[str, Any]]) -> None:
    """Learning rate on the left axis, norm of the gradient before clipping on the right one."""
    _plot_from_zero(axes, log_history, "learning_rate", "learning rate", "tab:blue")
    _plot_from_zero(axes.twinx(), log_history, "grad_norm", "gradient norm", "tab:orange", headroom=1.25)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.set_title("optimizer", fontsize=10)
    axes.grid(alpha=0.3)


def plot_throughput(axes, log_history: list[dict[str, Any]]) -> None:
    """Non-padding tokens, or images, a second on the left axis, share of the time waiting for data on the right one."""
    right = axes.twinx()
    unit = "images" if any("images_per_second" in entry for entry in log_history) else "tokens"
    _plot_from_zero(axes, log_history, f"{unit}_per_second", f"{unit} per second", "tab:blue")
    label = "share of the time waiting for data"
    _plot_from_zero(right, log_history, "data_wait", label, "tab:orange", headroom=1.25)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.yaxis.set_major_formatter(lambda share, position: f"{100 * share:.3g}%")
    axes.set_title("throughput", fontsize=10)
    axes.grid(alpha=0.3)


def plot_products(axes, log_history: list[dict[str, Any]], kind: str, names: list[str], panel: str) -> None:
    """One diagnostic (a key of ``PANELS``) of products of one kind over training; the nuclear norm with its bound.

    "nuclear" is figure 2 of the article on Khodak et al.: under weight decay on the factors the bound is tight.
    """
    colors = plt.get_cmap("viridis")
    title, is_logarithmic = PANELS[panel]
    every = -(-len(names) // MOST_LABELS)
    for index, name in enumerate(names):
        color = colors(0.9 * index / max(1, len(names) - 1))
        stem = f"{NORM_PREFIX}{kind}/{name}"
        label = _label(name) if index % every == 0 or index == len(names) - 1 else None
        _plot(axes, log_history, f"{stem}/{panel}", is_logarithmic, color=color, label=label)
        if panel == "nuclear":
            _plot(axes, log_history, f"{stem}/bound", color=color, linestyle="--")
    axes.set_title(f"{KIND_TITLES.get(kind, kind)}: {title}", fontsize=10)
    if is_logarithmic:
        axes.set_yscale("log")
        if not any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            axes.text(0.5, 0.5, "the learning rate is 0 in all logged steps", ha="center", transform=axes.transAxes)
    else:
        _begin_at_zero(axes)
    axes.grid(alpha=0.3)


def _label(name: str) -> str:
    """ "layer 3" for attention's products, otherwise the product's name."""
    layer = re.search(r"\blayer\.(\d+)\.attention\b", name)
    return f"layer {layer[1]}" if layer else name


def _plot(axes, log_history, key, is_logarithmic=False, **style):
    """One logged quantity; values without neighbours, of which no line can be drawn, are points.

    On a logarithmic axis what is not positive is left out: a rate of 0, before warm-up and at the end.
    """
    steps, values = series(log_history, key)
    drawn = np.array(values, dtype=float)
    drawn[~np.isfinite(drawn) | (is_logarithmic & (drawn <= 0))] = np.nan
    is_drawn = np.pad(np.isfinite(drawn), 1)
    alone = np.flatnonzero(is_drawn[1:-1] & ~is_drawn[:-2] & ~is_drawn[2:])
    points = {"marker": ".", "markevery": alone.tolist()} if len(alone) else {}
    axes.plot(steps, drawn, **points | style)


def _begin_at_zero(axes, headroom=1.0):
    """An axis that begins at 0, a little below, so that a line of zeros does not lie on the frame."""
    axes.axhline(0.0, alpha=0.0)  # so that the margins are those of the whole height
    top = headroom * axes.get_ylim()[1]
    axes.set_ylim(-0.04 * top, top)


def _plot_from_zero(axes, log_history, key, label, color, headroom=1.0):
    """On an axis of its own in its color; other ``headroom`` keeps it from lying on what another axis shows."""
    _plot(axes, log_history, key, color=color, alpha=0.8)
    _begin_at_zero(axes, headroom)
    axes.set_ylabel(label, color=color, fontsize=9)
    axes.tick_params(axis="y", labelcolor=color)
