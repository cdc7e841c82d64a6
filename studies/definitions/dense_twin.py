"""The dense twin: feed-forward layers as products of full rank, from the same weights and on the same batches as a
dense run."""

from studies.study import Comparison, Study, overcomplete, quickstart

# The mode also decays the attention products: each mode has its own dense run, whose attention is decayed alike.
# Without decay of the products, no matrix is decayed, including those of the dense layers.
DECAYS = {"none": 0.0, "weight": 0.1, "frobenius": 0.1}
DISTURBANCE = 0.001  # change of λ: shows how similar a dense run stays after such a small disturbance
INITS = ("spectral", "default")


STUDY = Study(
    question="Does a product of full rank train like the dense layer, for each decay?",
    script="run_pretrain.py",
    base={name: value for name, value in quickstart().items() if name != "save_total_limit"} | {"save_steps": 500},
    arms={
        decay: {
            name: {"decay_mode": decay, "weight_decay": value, **flags}
            for name, flags in (
                ("dense", {}),
                ("dense-disturbed", {"weight_decay": value + DISTURBANCE}),
                *((f"wide-{init}", overcomplete("wide") | {"factorize_init": init}) for init in INITS),
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
