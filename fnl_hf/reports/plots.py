"""Pictures of training runs: the report of one, and several in one picture, from their Trainers' log histories."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

from fnl_hf.reports.callbacks import NORM_PREFIX
from fnl_hf.reports.history import KINDS, LogHistory, logged_products, mean_diagnostic, series

REPORT_FILE = "training_report.png"
CREATOR = "fnl_hf training report"  # in the metadata of a picture
# diagnostic -> title, whether its axis is logarithmic
PANELS = {
    "frobenius": ("Frobenius norm", False),
    "nuclear": ("nuclear norm; dashed: its bound", False),
    "effective_step": ("effective step η/‖W‖²", True),
    "non_orthogonality": ("non-orthogonality of the factors", False),
}
# what several runs are compared by, where it was logged -> title, whether the axis begins at 0
COMPARED = {
    "loss": ("training loss", False),
    "eval_loss": ("held-out loss", False),
    "eval_validation_loss": ("validation loss", False),
    "eval_f1": ("held-out F1 (%)", False),
    "eval_accuracy": ("held-out accuracy", False),
    "eval_validation_accuracy": ("validation accuracy", False),
    "tokens_per_second": ("throughput (tokens per second)", True),
    "images_per_second": ("throughput (images per second)", True),
}
COMPARED_NORMS = ("frobenius", "nuclear")
# Okabe and Ito's, without the yellow that is faint on white; told apart with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", ":")  # dashed is the bound
MOST_RUNS = len(COLORS) * len(LINE_STYLES)
# logged counts of what a loss curve does not show -> marker, label
EVENTS = {
    "skipped_steps": ("x", "skipped steps"),
    "spikes": ("^", "spikes"),
    "factorized_layers": ("|", "layers become products"),
}
MOST_LABELS = 6  # in a legend: of more products, the first, the last and some between are named
WIDTH, NARROW, ROW, LINE = 12.0, 10.2, 2.7, 0.21  # inches: four columns and two; a row of panels, a legend's line
LEGEND_WIDTH = 115  # characters
Panel = Callable[[Any], None]  # draws on axes


def plot_report(
    log_history: LogHistory,
    file: str | Path,
    unigram_entropy: float | None = None,
    title: str | None = None,
) -> None:
    """Write a picture of one run: loss, learning rate and throughput; below, for each kind of product, its diagnostics
    over the steps, one curve a product. ``title`` says which run it is."""
    rows: list[list[Panel]] = [
        [
            partial(plot_loss, log_history=log_history, unigram_entropy=unigram_entropy),
            partial(plot_optimizer, log_history=log_history),
            partial(plot_throughput, log_history=log_history),
        ]
    ]
    for kind, names in logged_products(log_history).items():
        rows.append(
            [partial(plot_products, log_history=log_history, kind=kind, names=names, panel=panel) for panel in PANELS]
        )
    _draw(rows, [log_history], file, WIDTH, title)


def plot_comparison(
    runs: Mapping[str, LogHistory], file: str | Path, unigram_entropies: Sequence[float | None] = ()
) -> None:
    """Write a picture of several runs, each in a color of its own: loss, scores and throughput, and for each kind of
    product the norms, which are means over the run's products of this kind.

    Args:
        runs: names for the legend -> log histories, of ``MOST_RUNS`` runs at most.
        unigram_entropies: of the held-out texts, as far as they are known; one that is the same for all is a line.
    """
    histories = list(runs.values())
    entropies = {round(entropy, 6) for entropy in unigram_entropies if entropy is not None}
    shared = entropies.pop() if len(entropies) == 1 else None
    logged = {key for history in histories for entry in history for key in entry}
    panels: list[Panel] = [
        partial(compare_runs, histories=histories, key=key, unigram_entropy=shared if key == "eval_loss" else None)
        for key in COMPARED
        if key in logged
    ]
    rows = [panels[index : index + 2] for index in range(0, len(panels), 2)]
    products = [logged_products(history) for history in histories]
    for kind in dict.fromkeys(kind for kinds in products for kind in kinds):
        names = [kinds.get(kind, []) for kinds in products]
        rows.append(
            [partial(compare_norms, histories=histories, kind=kind, names=names, norm=n) for n in COMPARED_NORMS]
        )
    _draw(rows, histories, file, NARROW, legend=list(runs))


# ---- the panels of one run ----


def plot_loss(axes, log_history: LogHistory, unigram_entropy: float | None = None) -> None:
    """Training and held-out loss; where steps were skipped or the loss had spikes, marks at the bottom."""
    _plot(axes, log_history, "loss", label="training", color=COLORS[0], alpha=0.7)
    if any("eval_loss" in entry for entry in log_history):
        _plot(axes, log_history, "eval_loss", label="held out", color=COLORS[1], marker="o", markersize=4)
    _plot_entropy(axes, unigram_entropy)
    for row, (key, (marker, label)) in enumerate(EVENTS.items()):
        marked = [step for step, count in zip(*series(log_history, key)) if count]
        if marked:
            heights = [0.03 + 0.05 * row] * len(marked)
            axes.plot(marked, heights, marker, color="tab:red", label=label, transform=axes.get_xaxis_transform())
    axes.set_title(f"loss{_loss_unit([log_history])}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_optimizer(axes, log_history: LogHistory) -> None:
    """Learning rate on the left axis, norm of the gradient before clipping on the right one."""
    _plot_from_zero(axes, log_history, "learning_rate", "learning rate", COLORS[0])
    _plot_from_zero(axes.twinx(), log_history, "grad_norm", "gradient norm", COLORS[1], headroom=1.25)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.set_title("optimizer", fontsize=10)
    axes.grid(alpha=0.3)


def plot_throughput(axes, log_history: LogHistory) -> None:
    """Non-padding tokens, or images, a second on the left axis, share of the time waiting for data on the right one."""
    right = axes.twinx()
    unit = "images" if any("images_per_second" in entry for entry in log_history) else "tokens"
    _plot_from_zero(axes, log_history, f"{unit}_per_second", f"{unit} per second", COLORS[0])
    _plot_from_zero(right, log_history, "data_wait", "time waiting for data", COLORS[1], headroom=1.25)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.yaxis.set_major_formatter(lambda share, position: f"{100 * share:.3g}%")
    axes.set_title("throughput", fontsize=10)
    axes.grid(alpha=0.3)


def plot_products(axes, log_history: LogHistory, kind: str, names: list[str], panel: str) -> None:
    """One diagnostic (a key of ``PANELS``) of products of one kind over training; the nuclear norm with its bound.

    "nuclear" is figure 2 of the article on Khodak et al.: under weight decay on the factors the bound is tight.
    """
    colors = plt.get_cmap("viridis")
    is_logarithmic = PANELS[panel][1]
    every = -(-len(names) // MOST_LABELS)
    for index, name in enumerate(names):
        color = colors(0.9 * index / max(1, len(names) - 1))
        stem = f"{NORM_PREFIX}{kind}/{name}"
        label = _label(name) if index % every == 0 or index == len(names) - 1 else None
        _plot(axes, log_history, f"{stem}/{panel}", is_logarithmic, color=color, label=label)
        if panel == "nuclear":
            _plot(axes, log_history, f"{stem}/bound", color=color, linestyle="--")
    _finish_products(axes, kind, panel)
    if panel == next(iter(PANELS)):
        axes.legend(fontsize=8)


# ---- the panels of several runs ----


def compare_runs(axes, histories: Sequence[LogHistory], key: str, unigram_entropy: float | None = None) -> None:
    """One quantity (a key of ``COMPARED``), a curve for each run that has logged it."""
    title, begins_at_zero = COMPARED[key]
    points = {"marker": "o", "markersize": 3.5} if key.startswith("eval_") else {}
    for style, history in zip(_run_styles(len(histories)), histories):
        _plot(axes, history, key, **style, **points)
    _plot_entropy(axes, unigram_entropy)
    if unigram_entropy is not None:
        axes.legend(fontsize=8)
    if begins_at_zero:
        _begin_at_zero(axes)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(title + (_loss_unit(histories) if key.endswith("loss") else ""), fontsize=10)
    axes.grid(alpha=0.3)


def compare_norms(axes, histories: Sequence[LogHistory], kind: str, names: Sequence[Sequence[str]], norm: str) -> None:
    """A norm's mean over each run's products of one kind, whose names are given; the nuclear norm with its bound."""
    for style, history, own in zip(_run_styles(len(histories)), histories, names):
        _plot(axes, mean_diagnostic(history, kind, own, norm), norm, **style)
        if norm == "nuclear":
            _plot(axes, mean_diagnostic(history, kind, own, "bound"), "bound", **style | {"linestyle": "--"})
    _finish_products(axes, kind, norm, "mean ")


def _loss_unit(histories: Sequence[LogHistory]) -> str:
    """Part of a title; "" with a distillation among the runs, whose loss has a relative squared error in it."""
    return "" if any("eval_hidden_loss" in entry for history in histories for entry in history) else " (nats)"


def _run_styles(count: int) -> list[dict[str, Any]]:
    """One for each run; the earlier is the wider, so that it shows below one that runs along it."""
    widths = np.linspace(min(1.2 + 0.4 * (count - 1), 2.4), 1.2, count).tolist()
    looks = [(style, color) for style in LINE_STYLES for color in COLORS]
    return [{"color": color, "linestyle": style, "linewidth": w} for (style, color), w in zip(looks, widths)]


# ---- what all pictures share ----


def _draw(
    rows: Sequence[Sequence[Panel]],
    histories: Sequence[LogHistory],
    file: str | Path,
    width: float,
    title: str | None = None,
    legend: Sequence[str] = (),
) -> None:
    """Rows of panels against the steps of the longest run; above them a title or the legend of the runs."""
    names = [fill(name, LEGEND_WIDTH) for name in legend]
    columns = next((n for n in (3, 2) if max(map(len, names), default=0) < LEGEND_WIDTH / n), 1)
    lines = sum(name.count("\n") + 1 for name in names) / columns
    heights = [LINE * (lines + 2)] * bool(names) + [ROW] * len(rows)
    figure = plt.figure(figsize=(width, sum(heights)))
    figure.set_layout_engine("constrained", w_pad=0.08)
    if title is not None:
        figure.suptitle(title, fontsize=11, parse_math=False)  # a folder's name may have dollar signs
    strips = figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0].tolist()
    if names:
        handles = [plt.Line2D([], [], **style, label=name) for style, name in zip(_run_styles(len(names)), names)]
        for text in strips.pop(0).legend(handles=handles, loc="center", ncols=columns, fontsize=9).get_texts():
            text.set_parse_math(False)
    last = max((entry["step"] for history in histories for entry in history), default=0) or 1
    for strip, panels in zip(strips, rows):
        for axes, panel in zip(strip.subplots(1, len(panels), squeeze=False)[0], panels):
            panel(axes)
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.set_xlim(-0.04 * last, 1.04 * last)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(file, dpi=125, metadata={"Creator": CREATOR})
    plt.close(figure)


def _finish_products(axes, kind: str, panel: str, which: str = "") -> None:
    title, is_logarithmic = PANELS[panel]
    axes.set_title(f"{KINDS[kind][0] if kind in KINDS else kind}: {which}{title}", fontsize=9.5)
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
    """One logged quantity; values without neighbors, of which no line can be drawn, are points.

    On a logarithmic axis what is not positive is left out: a rate of 0, before warm-up and at the end.
    """
    steps, values = series(log_history, key)
    drawn = np.array(values, dtype=float)
    drawn[~np.isfinite(drawn) | (is_logarithmic & (drawn <= 0))] = np.nan
    is_drawn = np.pad(np.isfinite(drawn), 1)
    alone = np.flatnonzero(is_drawn[1:-1] & ~is_drawn[:-2] & ~is_drawn[2:])
    points = {"marker": ".", "markevery": alone.tolist()} if len(alone) else {}
    axes.plot(steps, drawn, **points | style)


def _plot_entropy(axes, unigram_entropy: float | None) -> None:
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle=":", label="unigram entropy (held out)")


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
