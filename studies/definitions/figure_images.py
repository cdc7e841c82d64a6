"""The article's second figure, for a ResNet on Fashion-MNIST: nuclear norm and its bound during training, with
convolutions of ranks from 3⁻³ to 3² times the full rank."""

from dataclasses import replace
from typing import Any

from studies.definitions import figure, overcomplete_images
from studies.study import Comparison


def arms_of(inits: tuple[str, ...], **flags: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{decay}-{init}": {"factor_init": init, "decay_mode": decay, **flags}
        for init in inits
        for decay in figure.DECAYS
    }


ranks = {f"rank {1 / part:.3g}": arms_of(("default", "spectral"), method="low_rank", rank_scale=1 / part)
         for part in (1, 3, 9, 27)}  # fmt: skip
ranks |= {f"rank {scale}": arms_of(("default",), method="wide", rank_scale=scale) for scale in (3, 9)}

STUDY = replace(
    figure.STUDY,
    script=overcomplete_images.IMAGES,
    base=overcomplete_images.RECIPE | {"num_train_epochs": 8},  # Σηλ/(1 − μ) is 0.8
    arms=ranks,
    reference="none-default",
    comparisons=(
        Comparison(
            "With weight decay, the nuclear norm of convolutions is closer to its bound than with Frobenius decay",
            "weight-default",
            "frobenius-default",
            article=True,
        ),
        Comparison(
            "With Frobenius decay, it is closer to its bound than without decay", "frobenius-default", "none-default"
        ),
    ),
    metric="norms/conv/tightness",
    label="nuclear norm of convolutions / its bound",
    measures={"accuracy on test images": {"": "metrics/eval_accuracy"}},
    courses={
        "convolutions in training": {"nuclear norm": "curves/norms/conv/nuclear", "bound": "curves/norms/conv/bound"},
        "Frobenius norm": {"": "curves/norms/conv/frobenius"},
        "effective step": {"": "curves/norms/conv/effective_step"},
    },
    places={"idx_dir": "FASHION_MNIST"},
)
