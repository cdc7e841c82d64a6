"""The picture of a study: a column for each group, with the metric, the other measures and the courses one below the
other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullLocator

from studies.verdicts import Outcome

STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")  # of the parts of one measure
MARKERS = ("o", "s", "^")
# inches: width of all columns, minimum and maximum width of a column, height of a row
WIDTH, COLUMNS, ROW = 10.0, (3.0, 5.0), 2.8
COLORS = matplotlib.color_sequences["tab10"] + matplotlib.color_sequences["Dark2"]


def plot_study(outcome: Outcome, file: Path) -> None:
    """Write a PNG: against the study's axis means with their standard deviations, a dot for each run of the metric; one
    legend for all panels. Without an axis each arm has a place and a color of its own."""
    study = outcome.study
    panels = {study.label: {"": study.metric}, **study.measures}
    groups, rows = outcome.groups, len(panels) + len(study.courses)
    colors = curve_colors(outcome)
    column_width = min(max(COLUMNS[0], WIDTH / len(groups)), COLUMNS[1])
    size = (column_width * len(groups) + 0.09 * max(map(len, colors)) + 0.6, ROW * rows)
    figure, axes = plt.subplots(rows, len(groups), figsize=size, squeeze=False, sharey="row", layout="constrained")
    for column, group in zip(axes.T, groups):
        for axis, (title, parts) in zip(column, panels.items()):
            plot_panel(axis, outcome, group, parts, colors)
            axis.set_title(titled(title, parts), fontsize=9)
        for axis, (title, parts) in zip(column[len(panels) :], study.courses.items()):
            plot_courses(axis, outcome, group, parts, colors)
            axis.set_title(titled(title, parts), fontsize=9)
        column[0].set_title(f"{group}\n{study.label}", fontsize=9)
    for axis in axes[1 : len(panels), 0]:  # after all columns of the row, which share it, are drawn
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    if len(colors) > 1:
        lines = [Line2D([], [], color=color, marker=".", label=name) for name, color in colors.items()]
        figure.legend(handles=lines, loc="outside right upper", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90, metadata={"Software": None})
    plt.close(figure)


def titled(title: str, parts: Mapping[str, str]) -> str:
    """The title with the name of the part, if there is only one and it has a name."""
    return f"{title} ({next(iter(parts))})" if [*parts] != [""] and len(parts) == 1 else title


def curve_colors(outcome: Outcome) -> dict[str, tuple[float, float, float]]:
    """Colors for the curves of all groups that have values, or for the arms if the study has no axis."""
    names = dict.fromkeys(
        curve
        for group in outcome.study.arms
        for curve, places in outcome.study.curves(group).items()
        if any(outcome.values(arm) for _, arm in places)
    )
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}


def plot_panel(axis, outcome: Outcome, group: str, parts: Mapping[str, str], colors: Mapping) -> None:
    """One measure, with a color for each curve; each part has its own line style and marker."""
    study = outcome.study
    curves = {curve: places for curve, places in study.curves(group).items() if curve in colors}
    for index, (curve, places) in enumerate(curves.items()):
        for style, marker, path in zip(STYLES, MARKERS, parts.values()):
            found = [(place, list(outcome.values(arm, path).values())) for place, arm in places]
            found = [(beside(place, index, study.axis), values) for place, values in found if values]
            plot_curve(axis, found, colors[curve], style, marker)
            if path == study.metric:
                dots = [(x, value) for x, values in found if x is not None for value in values]
                axis.plot(*zip(*dots) if dots else ([], []), ".", color=colors[curve], alpha=0.3, markersize=4)
    if study.axis is None:
        axis.set_xticks([])
        axis.margins(x=0.1)
    else:
        places = {place for of in curves.values() for place, arm in of if place is not None and outcome.values(arm)}
        axis.set_xscale("log")
        axis.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
        axis.margins(x=0.2)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(study.axis)
    if len(parts) > 1:
        kinds = zip(STYLES, MARKERS, parts)
        lines = [Line2D([], [], color="black", linestyle=s, marker=m, markersize=4, label=p) for s, m, p in kinds]
        axis.legend(handles=lines, fontsize=8)
    axis.grid(alpha=0.3)


def beside(place: float | None, index: int, flag: str | None) -> float | None:
    """A place on the axis, shifted a little for each curve, so that error bars do not overlap."""
    return place if place is None or flag is None else place * 1.04**index


def plot_curve(
    axis, found: Sequence[tuple[float | None, list[float]]], color: tuple[float, ...], style: str, marker: str
) -> None:
    """Means with standard deviations; an arm without a place on the axis is a horizontal line."""
    for _, values in [entry for entry in found if entry[0] is None]:
        mean, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
        axis.axhline(mean, color=color, linestyle=style)
        axis.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.08, linewidth=0)
    placed = sorted((x, values) for x, values in found if x is not None)
    if placed:
        deviations = [stdev(values) if len(values) > 1 else 0.0 for _, values in placed]
        means = [fmean(values) for _, values in placed]
        places = [x for x, _ in placed]
        looks = {"color": color, "linestyle": style, "marker": marker, "markersize": 4, "elinewidth": 0.8}
        axis.errorbar(places, means, deviations, **looks)


def plot_courses(axis, outcome: Outcome, group: str, parts: Mapping[str, str], colors: Mapping) -> None:
    """A measure over the steps, the mean over the seeds, of the arm of each curve that is compared first; its parts in
    lines of their own."""
    compared = [outcome.compare(group, comparison)[:2] for comparison in outcome.study.comparisons]
    names = [f"{group}/{name}" for pair in compared for name in pair if name is not None]
    for curve, places in outcome.study.curves(group).items():
        for arm in [name for name in names if name in {arm for _, arm in places}][:1]:
            for style, path in zip(STYLES, parts.values()):
                courses = list(outcome.values(arm, path).values())
                if courses:
                    steps = [step for step, _ in courses[0]]
                    means = [fmean(value for _, value in points) for points in zip(*courses)]
                    axis.plot(steps[: len(means)], means, color=colors[curve], linestyle=style, marker=".")
    axis.set_xlabel("step")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    if len(parts) > 1:
        lines = [Line2D([], [], color="black", linestyle=style, label=part) for style, part in zip(STYLES, parts)]
        axis.legend(handles=lines, fontsize=8)
