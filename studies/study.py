"""What a study is: arms as flags of an existing script, the metric, and what would count as an effect."""

import fnmatch
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results"
WORK = ROOT / "output" / "studies"
Flags = Mapping[str, Any]
FEED_FORWARD = ("layer.[0-9].intermediate.dense", "layer.[0-9].output.dense")  # of a BERT with ten layers at most


@dataclass(frozen=True)
class Comparison:
    """A claim that a study puts to the test, in each of its groups.

    Args:
        claim: one sentence.
        arm, reference: patterns of names within a group; of several that match, the best on the tuning seeds counts.
        expected: whether by the claim ``arm`` is "better" than ``reference`` or the "same".
        article: whether the article claims it.
    """

    claim: str
    arm: str
    reference: str
    expected: str = "better"
    article: bool = False


@dataclass(frozen=True)
class Study:
    """Arms over a common base, with what is measured.

    Args:
        question: one sentence.
        script: a script of the repository, which is launched for each run.
        base: flags that all arms have in common, with those of the recipe (:func:`recipe`).
        arms: group -> name -> flags. Groups are run and reported one after the other, "group/name" is an arm.
        reference: the name of the arm, in each group, that all others are compared with.
        effect: the smallest difference of the metric that would count.
        metric: where in a recorded line it is found, its parts separated by "/".
        label: what the metric is, with its unit; ``digits`` behind the point are reported.
        better: whether the "lower" or the "higher" value of the metric is.
        seeds: reported. One seed gives all arms the same batches.
        tuning_seeds: never reported: on them the best of several arms is chosen.
        measures: what else is reported, title -> {name: where in a line}.
        courses: what is drawn over the steps, of the arms that are compared, title -> {name: where in a line}.
        axis: the flag that plots have on their axis; arms "curve-value" are a curve. None for one place an arm.
        spectra: whether a run leaves a model whose products are to be measured.
        twin: the name of the arm, in each group, whose weights those of the others are measured against on their way.
        costs: name -> recipes in ``configs/`` for the phases of a run on GPUs, whose cost is reported.
        places: flag -> environment variable, for files and folders that are elsewhere on each machine.
    """

    question: str
    script: str
    base: Flags
    arms: Mapping[str, Mapping[str, Flags]]
    reference: str
    effect: float
    comparisons: Sequence[Comparison] = ()
    metric: str = "metrics/eval_loss"
    label: str = "held-out loss (nats)"
    digits: int = 3
    better: str = "lower"
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    tuning_seeds: Sequence[int] = ()
    measures: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    courses: Mapping[str, Mapping[str, str]] = field(
        default_factory=lambda: {"held-out loss in training": {"": "curves/eval_loss"}}
    )
    axis: str | None = None
    spectra: bool = True
    twin: str | None = None
    costs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def flags(self, arm: str) -> dict[str, Any]:
        """All flags of "group/name" but the seed."""
        group, _, name = arm.partition("/")
        return {**self.base, **self.arms[group][name]}

    def names(self, pattern: str = "*") -> list[str]:
        """The arms, as "group/name", that match a shell pattern."""
        names = [f"{group}/{name}" for group, arms in self.arms.items() for name in arms]
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]

    def lacking_places(self) -> list[str]:
        """The environment variables that a run needs and that are not set."""
        return [variable for variable in self.places.values() if not os.environ.get(variable)]

    def curves(self, group: str) -> dict[str, list[tuple[float | None, str]]]:
        """Curve -> the arms of a group with their places on the axis, None for those without the flag.

        Without an axis each arm is a curve, and its place a number.
        """
        curves: dict[str, list[tuple[float | None, str]]] = {}
        for index, name in enumerate(self.arms[group]):
            arm = f"{group}/{name}"
            if self.axis is None:
                curves[name] = [(index, arm)]
            else:
                curves.setdefault(name.rpartition("-")[0] or name, []).append((self.flags(arm).get(self.axis), arm))
        return curves

    def ordered_seeds(self) -> list[int]:
        """Reported and tuning seeds in turns: neither tells anything without the other."""
        pairs = itertools.zip_longest(self.seeds, self.tuning_seeds)
        return [seed for pair in pairs for seed in pair if seed is not None]


@dataclass(frozen=True)
class Run:
    """One run of a study; two are the same if all of this is."""

    study: str
    arm: str
    seed: int
    flags: Flags

    @property
    def identity(self) -> str:
        return identity(vars(self))

    @property
    def folder(self) -> str:
        """A name for its work folder, another one when a flag changes."""
        digest = hashlib.sha256(self.identity.encode()).hexdigest()[:8]
        return f"{self.arm.replace('/', '-')}-seed-{self.seed}-{digest}"


def twin_of(study: Study, run: Run) -> Run | None:
    """The run that this one is measured against."""
    group, _, name = run.arm.partition("/")
    if study.twin in (None, name):
        return None
    twin = f"{group}/{study.twin}"
    return Run(run.study, twin, run.seed, study.flags(twin))


def identity(line: Mapping[str, Any]) -> str:
    """What tells a run, or its recorded line, from others."""
    return json.dumps([line[name] for name in ("study", "arm", "seed", "flags")], sort_keys=True)


def recipe(file: str) -> dict[str, Any]:
    """The flags of a file in ``configs/`` by value, so that a run is not taken for done when the recipe has changed."""
    flags = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    return {name: value for name, value in flags.items() if name != "output_dir"}


def overcomplete(mode: str) -> dict[str, Any]:
    """Flags of run_pretrain.py: feed-forward layers are "wide" or "deep" products from the first step on."""
    return {"factorize_at_step": 0, "factorize_mode": mode, "factorize_include": FEED_FORWARD}


def runs_of(name: str, study: Study, seeds: Sequence[int] | None = None, pattern: str = "*") -> list[Run]:
    """The runs in the order of what they can tell: group by group, seed by seed, all arms."""
    seeds = study.ordered_seeds() if seeds is None else seeds
    chosen = study.names(pattern)
    groups = [[arm for arm in chosen if arm.partition("/")[0] == group] for group in study.arms]
    return [Run(name, arm, seed, study.flags(arm)) for arms in groups for seed in seeds for arm in arms]
