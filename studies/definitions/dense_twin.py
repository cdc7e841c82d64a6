"""The dense twin: feed-forward layers dense, and from the same weights on the same batches as products of full rank."""

from typing import Any

from studies.study import FEED_FORWARD, Comparison, Study, recipe

# The mode decays the attention's products, too: each has a dense run of its own, whose attention is decayed likewise.
# Without decay of the products no matrix is decayed, that of the dense layers neither.
DECAYS = {"none": 0.0, "weight": 0.1, "frobenius": 0.1}
DISTURBANCE = 0.001  # of λ: what is left of likeness where a dense run is disturbed by as little
INITS = ("spectral", "default")


def wide(init: str) -> dict[str, Any]:
    return {"factorize_at_step": 0, "factorize_mode": "wide", "factorize_init": init, "factorize_include": FEED_FORWARD}


STUDY = Study(
    question="Does a product of full rank train like the dense layer, for each decay?",
    script="run_pretrain.py",
    base={name: value for name, value in recipe("configs/quickstart.yaml").items() if name != "save_total_limit"}
    | {"save_steps": 500},
    arms={
        decay: {
            name: {"decay_mode": decay, "weight_decay": value, **flags}
            for name, flags in (
                ("dense", {}),
                ("dense-disturbed", {"weight_decay": value + DISTURBANCE}),
                *((f"wide-{init}", wide(init)) for init in INITS),
            )
        }
        for decay, value in DECAYS.items()
    },
    reference="dense-disturbed",
    effect=0.05,
    comparisons=(
        Comparison(
            "The weights of the products are as far from the dense weights as those of a slightly changed dense run",
            "wide-spectral",
            "dense-disturbed",
            expected="same",
        ),
        Comparison(
            "Products initialized from the dense weights stay closer to them than other products",
            "wide-spectral",
            "wide-default",
        ),
    ),
    metric="twin/distance",
    label="relative distance from the dense weights",
    seeds=(1, 2, 3),
    measures={
        "compared with the dense weights": {"cosine": "twin/cosine", "norm": "twin/norm"},
        "held-out loss": {"nats": "metrics/eval_loss"},
    },
    courses={
        "distance to the dense weights": {"": "curves/twin/distance"},
        "cosine with the dense weights": {"": "curves/twin/cosine"},
        "norm relative to the dense weights": {"": "curves/twin/norm"},
    },
    spectra=False,
    twin="dense",
)
