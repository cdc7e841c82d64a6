"""Paired differences with Student's t, by the standard library alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """Mean of ``count`` paired differences, its 95% interval, and the smallest difference that could have been seen."""

    count: int
    mean: float
    low: float
    high: float
    detectable: float


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Of ``values`` minus ``reference``, on the seeds that both have; None with fewer than two.

    With n pairs, mean d̄ and standard deviation s of their differences, and t(q) the quantile of Student's t with n − 1
    degrees of freedom, the interval is d̄ ± t(0.975) s/√n. The smallest difference that the study could have seen is
    that which the two-sided test at 5% finds with a probability of 80%, in the usual approximation

        δ = (t(0.975) + t(0.8)) s/√n.
    """
    seeds = sorted(values.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    mean, error, freedom = fmean(differences), stdev(differences) / math.sqrt(len(seeds)), len(seeds) - 1
    critical = t_quantile((1 + CONFIDENCE) / 2, freedom)
    detectable = (critical + t_quantile(POWER, freedom)) * error
    return Difference(len(seeds), mean, mean - critical * error, mean + critical * error, detectable)


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with ``freedom`` degrees of freedom stays below with a probability of at least ½."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t, for a whole number of degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if freedom == 1:
        total = 0.0
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + within) / 2
