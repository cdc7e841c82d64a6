"""Learning rates of the two factors: products of low rank from scratch, U with n/r times the rate of V at an equal
mean."""

from typing import Any

from studies.definitions.low_rank import factorized
from studies.study import Comparison, Study, quickstart

RATES = (1e-3, 2e-3, 4e-3)


def products(ratio: float, init: str) -> dict[str, Any]:
    """Without decay, because it would be stronger for factors of different scales."""
    return {"decay_mode": "none", **factorized(ratio, init)}


STUDY = Study(
    question="Do products train better if U has a higher learning rate than V, each variant at its best rate?",
    script="run_pretrain.py",
    base=quickstart(),
    arms={
        name: {
            f"{kind}-{rate}": products(ratio, init) | {"learning_rate": rate}
            for kind, init in (("equal", "spectral"), ("apart", "rates"))
            for rate in RATES
        }
        for name, ratio in (("half", 0.5), ("quarter", 0.25))
    },
    reference="equal-0.002",
    effect=0.05,  # 5% of the perplexity
    comparisons=(
        Comparison(
            "A rate of U that is n/r times that of V reaches a lower loss than one rate for both", "apart-*", "equal-*"
        ),
    ),
    seeds=(1, 2, 3),
    tuning_seeds=(101, 102),
    axis="learning_rate",
    spectra=False,
)
