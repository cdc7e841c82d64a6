"""Overcomplete feed-forward layers of BERT: products of full rank during training, merged afterwards."""

from typing import Any

from studies.study import Comparison, Study, overcomplete, quickstart

LAMBDAS = (0.1, 0.3)
# Steps of a dense run in the time of the 4,000 steps of a wide and of a deep run, measured on one thread.
DENSE_STEPS = {"wide": 4400, "deep": 4600}


def products(kind: str, mode: str, value: float) -> dict[str, Any]:
    return {"decay_mode": mode, "weight_decay": value, "frobenius_decay": value, **overcomplete(kind)}


def arms_of(kind: str) -> dict[str, dict[str, Any]]:
    # The mode also decays the attention products, so there are dense runs with both modes.
    arms = {
        f"dense-{mode}-{value}": {"decay_mode": mode, "frobenius_decay": value, "weight_decay": value}
        for mode in ("weight", "frobenius")
        for value in LAMBDAS
    }
    arms |= {name.replace("dense", "longer"): flags | {"max_steps": DENSE_STEPS[kind]} for name, flags in arms.items()}
    for mode in ("weight", "frobenius"):
        arms |= {f"product-{mode}-{value}": products(kind, mode, value) for value in LAMBDAS}
    return arms


STUDY = Study(
    question="Do feed-forward layers reach a lower held-out loss if they are wide or deep products in training and are "
    "merged afterwards?",
    script="run_pretrain.py",
    base=quickstart(),
    arms={kind: arms_of(kind) for kind in DENSE_STEPS},
    reference="dense-weight-0.1",
    effect=0.05,  # 5% of the perplexity
    comparisons=tuple(
        Comparison(*claim, article=True)
        for claim in (
            (
                "With Frobenius decay, overcomplete layers beat dense layers trained for as many steps",
                "product-frobenius-*",
                "dense-*",
            ),
            (
                "With Frobenius decay, they beat dense layers trained for the same time",
                "product-frobenius-*",
                "longer-*",
            ),
            ("With weight decay, they are worse than dense layers", "dense-*", "product-weight-*"),
        )
    ),
    tuning_seeds=(101, 102),
    measures={"training": {"seconds": "metrics/train_runtime"}},
    axis="frobenius_decay",
    spectra=False,
)
