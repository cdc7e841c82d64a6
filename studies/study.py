"""What a study is: arms as flags of an existing script, the metric, and what would count as an effect."""

import fnmatch
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results"
WORK = ROOT / "output" / "studies"
Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A claim that a study puts to the test, in each of its groups.

    Args:
        claim: one sentence.
        arm, reference: patterns of names within a group; of several that match, the best on the tuning seeds counts.
        expected: whether by the claim ``arm`` is "better" than ``reference`` or the "same".
    """

    claim: str
    arm: str
    reference: str
    expected: str = "better"


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
        label: what the metric is, with its unit.
        better: whether the "lower" or the "higher" value of the metric is.
        seeds: reported. One seed gives all arms the same batches.
        tuning_seeds: never reported: on them the best of several arms is chosen.
        measures: what else is reported, title -> {name: where in a line}.
        axis: the flag that plots have on their axis, None for one place an arm; ``curve`` the flag that tells curves.
        spectra: whether a run leaves a model whose products are to be measured.
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
    better: str = "lower"
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    tuning_seeds: Sequence[int] = ()
    measures: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    axis: str | None = None
    curve: str | None = None
    spectra: bool = True

    def flags(self, arm: str) -> dict[str, Any]:
        """All flags of "group/name" but the seed."""
        group, _, name = arm.partition("/")
        return {**self.base, **self.arms[group][name]}

    def names(self, pattern: str = "*") -> list[str]:
        """The arms, as "group/name", that match a shell pattern."""
        names = [f"{group}/{name}" for group, arms in self.arms.items() for name in arms]
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]

    def curves(self, group: str) -> dict[str, list[tuple[float | None, str]]]:
        """Curve -> the arms of a group with their places on the axis, None for those without the flag."""
        curves: dict[str, list[tuple[float | None, str]]] = {}
        for index, name in enumerate(self.arms[group]):
            flags = self.flags(f"{group}/{name}")
            place = index if self.axis is None else flags.get(self.axis)
            curve = "" if self.curve is None else str(flags[self.curve])
            curves.setdefault(curve, []).append((place, f"{group}/{name}"))
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


def identity(line: Mapping[str, Any]) -> str:
    """What tells a run, or its recorded line, from others."""
    return json.dumps([line[name] for name in ("study", "arm", "seed", "flags")], sort_keys=True)


def recipe(file: str) -> dict[str, Any]:
    """The flags of a file in ``configs/`` by value, so that a run is not taken for done when the recipe has changed."""
    flags = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    return {name: value for name, value in flags.items() if name != "output_dir"}


def runs_of(name: str, study: Study, seeds: Sequence[int] | None = None, pattern: str = "*") -> list[Run]:
    """The runs in the order of what they can tell: group by group, seed by seed, all arms."""
    seeds = study.ordered_seeds() if seeds is None else seeds
    chosen = study.names(pattern)
    groups = [[arm for arm in chosen if arm.partition("/")[0] == group] for group in study.arms]
    return [Run(name, arm, seed, study.flags(arm)) for arms in groups for seed in seeds for arm in arms]
