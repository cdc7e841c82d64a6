"""The dense twin: feed-forward layers dense, and from the same weights on the same batches as products of full rank."""

from studies.study import Comparison, Study, overcomplete, recipe

# The mode decays the attention's products, too: each has a dense run of its own, whose attention is decayed likewise.
# Without decay of the products no matrix is decayed, that of the dense layers neither.
DECAYS = {"none": 0.0, "weight": 0.1, "frobenius": 0.1}
DISTURBANCE = 0.001  # of λ: what is left of likeness where a dense run is disturbed by as little
INITS = ("spectral", "default")


STUDY = Study(
    question="Does a product of full rank train as the dense layer does, with each decay?",
    script="run_pretrain.py",
    base={name: value for name, value in recipe("configs/quickstart.yaml").items() if name != "save_total_limit"}
    | {"save_steps": 500},
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
            "A product's weights are as far from the dense ones as those of a dense run that was disturbed",
            "wide-spectral",
            "dense-disturbed",
            expected="same",
        ),
        Comparison("From the dense weights they stay nearer than from others", "wide-spectral", "wide-default"),
    ),
    metric="twin/distance",
    label="distance to the dense weights (over their norm)",
    seeds=(1, 2, 3),
    measures={
        "of the dense weights": {"cosine": "twin/cosine", "norm": "twin/norm"},
        "held-out loss": {"nats": "metrics/eval_loss"},
    },
    courses={
        "distance to the dense weights": {"": "curves/twin/distance"},
        "cosine with the dense weights": {"": "curves/twin/cosine"},
        "norm, over that of the dense weights": {"": "curves/twin/norm"},
    },
    spectra=False,
    twin="dense",
)
