"""The picture of a study: a column for each group; the metric, its course and the other measures below each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from studies.verdicts import Outcome

STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")  # of the parts of one measure
COLUMN, ROW = 5.0, 3.2  # inches


def plot_study(outcome: Outcome, file: Path) -> None:
    """Write a PNG: against the study's axis means with their standard deviations, a dot for each run of the metric."""
    study = outcome.study
    panels = {study.label: {"": study.metric}, **study.measures}
    groups, rows = list(study.arms), len(panels) + 1
    size = (COLUMN * len(groups), ROW * rows)
    figure, axes = plt.subplots(rows, len(groups), figsize=size, squeeze=False, sharey="row", layout="constrained")
    for column, group in zip(axes.T, groups):
        for axis, (title, parts) in zip(column, panels.items()):
            plot_panel(axis, outcome, group, parts)
            axis.set_title(f"{group}: {title}", fontsize=10)
        plot_courses(column[-1], outcome, group)
        if len(outcome.study.curves(groups[0])) > 1:
            column[0].legend(fontsize=8)
        for axis in column[1 : len(panels)]:
            axis.set_ylim(bottom=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90, metadata={"Software": None})
    plt.close(figure)


def plot_panel(axis, outcome: Outcome, group: str, parts: Mapping[str, str]) -> None:
    """One measure, a color for each curve; its parts in lines of their own."""
    study = outcome.study
    for index, (curve, places) in enumerate(study.curves(group).items()):
        for style, path in zip(STYLES, parts.values()):
            found = [(place, list(outcome.values(arm, path).values())) for place, arm in places]
            found = [(beside(place, index, study.axis), values) for place, values in found if values]
            plot_curve(axis, found, f"C{index}", style, curve)
            if path == study.metric:
                dots = [(x, value) for x, values in found if x is not None for value in values]
                axis.plot(*zip(*dots) if dots else ([], []), ".", color=f"C{index}", alpha=0.3, markersize=4)
    if study.axis is None:
        names = list(study.arms[group])
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    else:
        axis.set_xscale("log")
        axis.set_xlabel(study.axis)
    if len(parts) > 1:
        axis.legend(handles=[Line2D([], [], color="black", linestyle=s, label=p) for s, p in zip(STYLES, parts)])
    axis.grid(alpha=0.3)


def beside(place: float | None, index: int, flag: str | None) -> float | None:
    """A place on the axis, moved a little for each curve, so that error bars do not hide each other."""
    return place if place is None or flag is None else place * 1.06**index


def plot_curve(axis, found: Sequence[tuple[float | None, list[float]]], color: str, style: str, label: str) -> None:
    """Means with standard deviations; of an arm without a place on the axis a line across it."""
    for _, values in [entry for entry in found if entry[0] is None]:
        mean, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
        axis.axhline(mean, color=color, linestyle=style, label=label)
        axis.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.08, linewidth=0)
    placed = sorted((x, values) for x, values in found if x is not None)
    if placed:
        deviations = [stdev(values) if len(values) > 1 else 0.0 for _, values in placed]
        means = [fmean(values) for _, values in placed]
        line = style if len(placed) > 1 else "none"
        axis.errorbar(
            [x for x, _ in placed],
            means,
            deviations,
            color=color,
            linestyle=line,
            marker=".",
            elinewidth=0.8,
            label=label,
        )


def plot_courses(axis, outcome: Outcome, group: str) -> None:
    """The held-out loss in training, the mean over the seeds, of the arms that are compared."""
    compared = [outcome.compare(group, comparison)[:2] for comparison in outcome.study.comparisons]
    for name in dict.fromkeys(name for names in compared for name in names if name is not None):
        courses = list(outcome.values(f"{group}/{name}", "curves/eval_loss").values())
        if courses:
            steps = [step for step, _ in courses[0]]
            means = [fmean(loss for _, loss in points) for points in zip(*courses)]
            axis.plot(steps[: len(means)], means, marker=".", label=name)
    axis.set_title(f"{group}: held-out loss in training", fontsize=10)
    axis.set_xlabel("step")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
