import math

import pytest

from studies.intervals import paired_difference, t_cdf, t_quantile

# Percentage points of Student's t, as printed tables have them.
TABLE = {(1, 0.975): 12.706, (2, 0.975): 4.303, (3, 0.975): 3.182, (4, 0.975): 2.776, (7, 0.975): 2.365,
         (10, 0.995): 3.169, (29, 0.95): 1.699, (1, 0.8): 1.376, (4, 0.8): 0.941, (5, 0.8): 0.920}  # fmt: skip


@pytest.mark.parametrize("freedom, probability", TABLE)
def test_quantiles_are_those_of_the_table(freedom, probability):
    assert t_quantile(probability, freedom) == pytest.approx(TABLE[freedom, probability], abs=6e-4)


def test_cdf_in_closed_form():
    assert t_cdf(1.0, 1) == pytest.approx(0.75)  # Cauchy
    assert t_cdf(2.0, 2) == pytest.approx(0.5 + 1 / math.sqrt(6))  # ½ + t / 2√(2 + t²)
    assert t_cdf(math.sqrt(3), 3) == pytest.approx(0.5 + (math.pi / 4 + 1 / 2) / math.pi)  # θ = π/4, sin θ cos θ = ½


def test_paired_difference_by_hand():
    found = paired_difference({1: 3.7, 2: 4.15, 3: 4.3, 7: 9.0}, {1: 4.0, 2: 4.25, 3: 4.5, 5: 0.0})
    error = 0.1 / math.sqrt(3)  # differences -0.3, -0.1, -0.2
    assert (found.count, found.mean) == (3, pytest.approx(-0.2))
    # Two degrees of freedom: t(p) = (2p - 1) / √(2p(1 - p)), so t(0.975) = 4.30265 and t(0.8) = 1.06066.
    assert (found.low, found.high) == pytest.approx((-0.2 - 4.30265 * error, -0.2 + 4.30265 * error), abs=1e-6)
    assert found.detectable == pytest.approx(5.36331 * error, abs=1e-6)


def test_one_pair_is_no_difference():
    assert paired_difference({1: 2.0, 2: 3.0}, {2: 5.0, 3: 7.0}) is None
