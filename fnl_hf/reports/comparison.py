"""Runs from their folders, finished or not, named by what differs between them, in one picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fnl_hf.errors import UserInputError
from fnl_hf.reports.history import LogHistory, logged_products, series
from fnl_hf.reports.overview import describe_recipe
from fnl_hf.reports.plots import COMPARED, MOST_RUNS, plot_comparison, plot_report
from fnl_hf.runs.checkpoints import STATE_FILE, list_checkpoints, read_state
from fnl_hf.runs.ownership import RESULTS_FILE, holds_run
from fnl_hf.runs.plan import (
    DATA_FINGERPRINT,
    LENGTH,
    PATHS,
    START_WEIGHTS,
    TEACHER_WEIGHTS,
    TEST_FINGERPRINT,
    VALIDATION_FINGERPRINT,
    read_started,
)

NO_FLAGS = (DATA_FINGERPRINT, VALIDATION_FINGERPRINT, TEST_FINGERPRINT, START_WEIGHTS, TEACHER_WEIGHTS)
MOST_FLAGS = 6  # in the name of a run


@dataclass(frozen=True)
class LoggedRun:
    """What a run has logged, up to its newest checkpoint or its end, and the arguments that it recorded."""

    folder: Path
    steps: int
    history: LogHistory
    arguments: dict[str, Any]
    unigram_entropy: float | None

    def last(self, key: str) -> float | None:
        """The last value of a logged quantity."""
        return next(reversed(series(self.history, key)[1]), None)


def plot_runs(folders: Sequence[str | Path], file: str | Path) -> list[str]:
    """Write one picture of the runs in output folders: losses, scores, throughput and products' norms over the steps.

    Each run has one color, and the legend names it by the flags whose values differ between the runs, or by its folder
    if none do. One run alone gets its own report, as :func:`plot_report` draws it. A run that is not finished is drawn
    up to its newest checkpoint. Runs of a stock Trainer, which record no flags, are named by their folders.

    Args:
        folders: the output folders of runs, or checkpoints.
        file: .png, .pdf or .svg; overwritten if it exists.

    Returns:
        The runs' names in the legend.

    Raises:
        UserInputError: a folder without a run, or named twice; a run that has logged nothing; more than fourteen runs.
    """
    runs = read_runs(folders)
    draw_runs(runs, file)
    return list(runs)


def read_runs(folders: Sequence[str | Path]) -> dict[str, LoggedRun]:
    """The runs in some folders by the names that tell them apart.

    Raises:
        UserInputError: see :func:`plot_runs`.
    """
    paths = [Path(folder) for folder in folders]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise UserInputError(f"{path} is given twice")
    if len(paths) > MOST_RUNS:
        raise UserInputError(f"{len(paths)} runs are given: at most {MOST_RUNS} can be told apart in one picture")
    runs = [read_run(path) for path in paths]
    return dict(zip(name_runs([run.arguments for run in runs], short_names(paths)), runs, strict=True))


def draw_runs(runs: Mapping[str, LoggedRun], file: str | Path) -> None:
    """Write the picture of :func:`plot_runs`."""
    if len(runs) > 1:
        histories = {name: run.history for name, run in runs.items()}
        plot_comparison(histories, file, [run.unigram_entropy for run in runs.values()])
        return
    ((title, run),) = runs.items()
    if "optimizer" in run.arguments:
        has_products = bool(logged_products(run.history))
        title += f": {describe_recipe(SimpleNamespace(**run.arguments), has_products)}"
    plot_report(run.history, file, run.unigram_entropy, title)


def read_run(folder: Path) -> LoggedRun:
    """
    Raises:
        UserInputError: no run is there, or it has logged nothing yet.
    """
    finished = read_state(folder)
    newest = next(filter(None, map(read_state, list_checkpoints(folder))), None)
    states = [state for state in (finished, newest) if state is not None]
    if not states:
        if holds_run(folder):
            raise UserInputError(f"{folder}: the run there has written no checkpoint yet")
        raise UserInputError(f"{folder} contains no run: neither it nor a checkpoint in it has a readable {STATE_FILE}")
    state = max(states, key=lambda state: state.global_step)
    results = _read_results(folder) if state is finished else {}
    history = list(state.log_history)
    logged = {key for entry in history for key in entry}
    at_the_end = {key: value for key, value in results.items() if key in COMPARED and key not in logged}
    if at_the_end:
        history.append(at_the_end | {"step": state.best_global_step or state.global_step})
    if not logged & COMPARED.keys() and not at_the_end:
        raise UserInputError(f"{folder}: the run has logged no loss in its {state.global_step:,} steps")
    return LoggedRun(folder, state.global_step, history, read_started(folder), results.get("unigram_entropy"))


def name_runs(arguments: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """Names for a legend, all different: the flags that differ, or the folder if none do.

    Args:
        arguments: the recorded ones of each run.
        folders: a name for the folder of each run, all different.
    """
    common = [name for name in arguments[0] if name not in NO_FLAGS and all(name in each for each in arguments)]
    differing = [name for name in common if any(each[name] != arguments[0][name] for each in arguments)]
    shown = differing if len(differing) <= MOST_FLAGS else differing[: MOST_FLAGS - 1]
    texts = {name: _texts(name, [each[name] for each in arguments]) for name in shown}
    names = [", ".join(texts[name][index] for name in shown) for index in range(len(arguments))]
    if not shown:
        return list(folders)
    if len(shown) < len(differing):
        return [f"{folder}: {name}, ..." for folder, name in zip(folders, names)]
    return [name if names.count(name) == 1 else f"{name} ({folder})" for folder, name in zip(folders, names)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole paths if two end alike."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _texts(name: str, values: Sequence[Any]) -> list[str]:
    """A flag with its value in each run; of paths the last part, if that tells them apart."""
    if name in PATHS:
        ends = [_last_parts(value) for value in values]
        values = ends if len({str(end) for end in ends}) == len({str(value) for value in values}) else values
    return [_text(value) if name == LENGTH else f"{name} {_text(value)}" for value in values]


def _last_parts(value: Any) -> Any:
    if isinstance(value, list):
        return [_last_parts(entry) for entry in value]
    return Path(value).name if isinstance(value, str) else value


def _text(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool | dict):
        return json.dumps(value)
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read_results(folder: Path) -> dict[str, Any]:
    """What a finished run was evaluated to; nothing if that is missing or torn."""
    try:
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}
