"""Optimizers: each at its best of four rates, with and without Frobenius decay of the attention products.

At the λ of the other matrices, decay of the products hardly has an effect in a run as short as the quickstart, so
theirs is ten times as large.
"""

from typing import Any

from studies.study import SMALL_WEIGHTS, Comparison, Study, quickstart

# name -> flags and rates. λ matches the size of the steps: LAMB's rates are about ten times those of AdamW, and its
# own decay, inside of the trust ratio, is scaled down accordingly. To add an optimizer, add an entry here.
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, (5e-4, 1e-3, 2e-3, 4e-3)),
    "lamb": ({"optimizer": "lamb", "weight_decay": 0.01}, (5e-3, 1e-2, 2e-2, 4e-2)),
    "lamb-inside": (
        {"optimizer": "lamb", "optim_args": "decay=in_trust_ratio", "weight_decay": 0.1},
        (5e-3, 1e-2, 2e-2, 4e-2),
    ),
    "muon": ({"optimizer": "muon", "weight_decay": 0.1}, (2e-3, 4e-3, 8e-3, 1.6e-2)),
}


def decay_of(mode: str, value: float) -> dict[str, Any]:
    return {"decay_mode": mode} | ({"frobenius_decay": 10 * value} if mode == "frobenius" else {})


def arms_with(**common: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{name}-{decay}-{rate}": common | flags | decay_of(decay, flags["weight_decay"]) | {"learning_rate": rate}
        for name, (flags, rates) in OPTIMIZERS.items()
        for decay in ("none", "frobenius")
        for rate in rates
    }


STUDY = Study(
    question="Which optimizer reaches the lowest held-out loss, each at its best rate, and does Frobenius decay of the "
    "attention products help each of them?",
    script="run_pretrain.py",
    base=quickstart(),
    arms={"E128-range-0.05": arms_with(), "E128": arms_with(**SMALL_WEIGHTS)},
    reference="adamw-none-0.002",
    effect=0.05,  # 5% of the perplexity
    comparisons=(
        *(
            Comparison(f"{name} reaches a lower loss than AdamW", f"{name}-[nf]*", "adamw-*")
            for name in reversed(OPTIMIZERS)
            if name != "adamw"
        ),
        *(
            Comparison(f"With {name}, Frobenius decay beats no decay", f"{name}-frobenius-*", f"{name}-none-*")
            for name in OPTIMIZERS
        ),
    ),
    seeds=(1, 2, 3, 4, 5),
    tuning_seeds=(101,),
    measures={"training": {"seconds": "metrics/train_runtime"}},
    axis="learning_rate",
)
