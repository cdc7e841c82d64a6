"""Studies: arms as flags of an existing script, the metric, and the smallest effect that counts."""

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
WITHOUT_DROPOUT = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
# BERT's initializer_range of 0.02. The quickstart has a larger one since a study (low_rank) showed what that gains.
SMALL_WEIGHTS = {"config_overrides": WITHOUT_DROPOUT}
FEED_FORWARD = ("layer.[0-9].intermediate.dense", "layer.[0-9].output.dense")  # of a BERT with ten layers at most


@dataclass(frozen=True)
class Comparison:
    """A claim that a study tests.

    Args:
        claim: one sentence.
        arm, reference: name patterns within a group; if several arms match, the best on the tuning seeds is compared.
        expected: whether the claim says that ``arm`` is "better" than ``reference`` or the "same".
        article: whether it is a claim of the article.
        groups: the groups that have both arms; empty: all of the study.
    """

    claim: str
    arm: str
    reference: str
    expected: str = "better"
    article: bool = False
    groups: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """Arms over common flags, and what is measured.

    Args:
        question: one sentence.
        script: the script of the repository that each run launches.
        base: flags that all arms share, including those of the recipe (:func:`recipe`).
        arms: group -> name -> flags. Groups are run and reported one after the other; an arm is called "group/name".
        reference: the name of the arm in each group with which all others are compared.
        effect: the smallest difference of the metric that counts.
        metric: its path in a recorded line, separated by "/".
        label: the metric and its unit, reported with ``digits`` decimal places.
        better: whether a "lower" or a "higher" value of the metric is better.
        seeds: the reported seeds. All arms with one seed have the same batches.
        tuning_seeds: seeds on which the best of several arms is chosen; never reported.
        measures: what else is reported, title -> {name: path in a line}.
        courses: what is drawn over the steps for the compared arms, title -> {name: path in a line}.
        axis: the flag on the axis of plots; arms named "curve-value" form a curve. None: each arm has one place.
        spectra: whether the products of a run's model are measured.
        twin: the name of the arm in each group with whose weights those of the other arms are compared during training.
        costs: name -> recipes in ``configs/`` for the phases of a run on GPUs; their cost is reported.
        places: flag -> environment variable, for files and folders whose paths depend on the machine.
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
        """All flags of "group/name" except the seed."""
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
        """Curve -> the arms of a group with their places on the axis, None for arms without the flag.

        Without an axis, each arm is a curve and its place is its index.
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
        """Reported and tuning seeds, alternating: results need both."""
        pairs = itertools.zip_longest(self.seeds, self.tuning_seeds)
        return [seed for pair in pairs for seed in pair if seed is not None]


@dataclass(frozen=True)
class Run:
    """One run of a study; two runs are the same if all fields are equal."""

    study: str
    arm: str
    seed: int
    flags: Flags

    @property
    def identity(self) -> str:
        return identity(vars(self))

    @property
    def folder(self) -> str:
        """The name of its work folder, which changes with the flags."""
        digest = hashlib.sha256(self.identity.encode()).hexdigest()[:8]
        return f"{self.arm.replace('/', '-')}-seed-{self.seed}-{digest}"


def twin_of(study: Study, run: Run) -> Run | None:
    """The run with which this one is compared."""
    group, _, name = run.arm.partition("/")
    if study.twin in (None, name):
        return None
    twin = f"{group}/{study.twin}"
    return Run(run.study, twin, run.seed, study.flags(twin))


def identity(line: Mapping[str, Any]) -> str:
    """Identifies a run, or its recorded line."""
    return json.dumps([line[name] for name in ("study", "arm", "seed", "flags")], sort_keys=True)


def recipe(file: str) -> dict[str, Any]:
    """The flags of a file in ``configs/`` by value, so that a changed recipe makes new runs."""
    flags = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    return {name: value for name, value in flags.items() if name != "output_dir"}


def quickstart() -> dict[str, Any]:
    """The recipe of the quickstart."""
    return recipe("configs/quickstart.yaml")


def decay_arms(values: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Arms without decay of the products, and with decay of the factors or of the products at each λ."""
    arms: dict[str, dict[str, Any]] = {"none": {"decay_mode": "none"}}
    for mode in ("weight", "frobenius"):
        arms |= {f"{mode}-{value}": {"decay_mode": mode, "frobenius_decay": value} for value in values}
    return arms


def overcomplete(mode: str) -> dict[str, Any]:
    """Flags of run_pretrain.py: feed-forward layers are "wide" or "deep" products from the first step on."""
    return {"factorize_at_step": 0, "factorize_mode": mode, "factorize_include": FEED_FORWARD}


def runs_of(name: str, study: Study, seeds: Sequence[int] | None = None, pattern: str = "*") -> list[Run]:
    """The runs in an order that soon gives results: group by group, seed by seed, all arms."""
    seeds = study.ordered_seeds() if seeds is None else seeds
    chosen = study.names(pattern)
    groups = [[arm for arm in chosen if arm.partition("/")[0] == group] for group in study.arms]
    return [Run(name, arm, seed, study.flags(arm)) for arms in groups for seed in seeds for arm in arms]
