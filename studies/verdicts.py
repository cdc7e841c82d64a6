"""Recorded lines evaluated: values by arm and seed, the best of several arms, and the fixed rule for a verdict."""

import functools
import operator
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from studies.intervals import Difference, paired_difference
from studies.study import Comparison, Study, identity, runs_of

UNKNOWN = "undecided at this scale"
TOO_FEW = "too few runs so far"
# Expectation of a claim -> verdict on the arm -> verdict on the claim.
CLAIMS = {
    "better": {
        "better": "confirmed here",
        "worse": "not confirmed here: worse",
        "same": "not confirmed here: as good",
    },
    "same": {
        "same": "confirmed here",
        "better": "not confirmed here: better",
        "worse": "not confirmed here: worse",
    },
}


class Outcome:
    """The lines of one study that belong to its current definition."""

    def __init__(self, name: str, study: Study, lines: Sequence[dict[str, Any]]):
        self.name, self.study = name, study
        present = {run.identity for run in runs_of(name, study, sorted({line["seed"] for line in lines}))}
        self.lines = [line for line in lines if identity(line) in present]
        self.finite = [line for line in self.lines if "diverged" not in line]

    @property
    def reported_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["seed"] not in self.study.tuning_seeds]

    @property
    def groups(self) -> list[str]:
        """The groups with reported runs."""
        found = {line["arm"].partition("/")[0] for line in self.reported_lines}
        return [group for group in self.study.arms if group in found]

    def groups_of(self, comparison: Comparison) -> list[str]:
        """The groups of a comparison with reported runs."""
        return [group for group in self.groups if group in (comparison.groups or self.study.arms)]

    def values(self, arm: str, path: str | None = None, tuning: bool = False) -> dict[int, Any]:
        """{seed: value} of an arm, by default of the metric, on the reported seeds or the tuning seeds; diverged runs
        have none."""
        path = path or self.study.metric
        return {
            line["seed"]: functools.reduce(operator.getitem, path.split("/"), line)
            for line in self.finite
            if line["arm"] == arm and (line["seed"] in self.study.tuning_seeds) == tuning
        }

    def count_diverged(self, arm: str) -> int:
        """On the reported seeds."""
        return sum(line["arm"] == arm and "diverged" in line for line in self.reported_lines)

    def best(self, arms: Sequence[str]) -> str | None:
        """The arm with the best mean on the tuning seeds, among the arms that have run on all of them and have not
        diverged."""
        if len(arms) < 2:
            return arms[0] if arms else None
        found = {arm: self.values(arm, tuning=True) for arm in arms}
        complete = {*self.study.tuning_seeds}
        means = {arm: fmean(values.values()) for arm, values in found.items() if values and values.keys() == complete}
        return self.pick(means, key=means.__getitem__) if means else None

    @property
    def pick(self):
        return min if self.study.better == "lower" else max

    def compare(self, group: str, comparison: Comparison) -> tuple[str | None, str | None, Difference | None]:
        """The names of the two arms and their difference, each None if there are too few runs so far."""
        arm, reference = (
            self.best(self.study.names(f"{group}/{side}")) for side in (comparison.arm, comparison.reference)
        )
        if arm is None or reference is None:
            return None, None, None
        difference = paired_difference(self.values(arm), self.values(reference))
        return arm.partition("/")[2], reference.partition("/")[2], difference

    def compared_arms(self) -> set[str]:
        """The arms in comparisons, and the references; if a pattern matches several, the best, once it is known."""
        sides = {side for comparison in self.study.comparisons for side in (comparison.arm, comparison.reference)}
        best = {
            self.best(self.study.names(f"{group}/{side}"))
            for group in self.study.arms
            for side in {*sides, self.study.reference}
        }
        return {arm for arm in best if arm is not None}

    def rule(self, difference: Difference | None) -> str:
        """The verdict on a difference, by a fixed rule.

        "same" if the 95% interval lies within ± the smallest effect that counts; else "better" or "worse" if it does
        not include zero; else undecided.
        """
        if difference is None:
            return TOO_FEW
        if max(-difference.low, difference.high) < self.study.effect:
            return "same"
        if difference.low <= 0 <= difference.high:
            return UNKNOWN
        return "better" if (difference.mean < 0) == (self.study.better == "lower") else "worse"

    def claim(self, comparison: Comparison, difference: Difference | None) -> str:
        """The verdict on a claim."""
        said = self.rule(difference)
        return CLAIMS[comparison.expected].get(said, said)
