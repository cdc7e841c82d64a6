"""Compression of images: ResNet8 on Fashion-MNIST with a tenth of the convolutions' parameters."""

from dataclasses import replace
from typing import Any

from studies.definitions import overcomplete_images
from studies.study import Comparison

TENTH = {"method": "low_rank", "target_ratio": 0.1}

arms: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "plain": TENTH | {"factor_init": "default", "decay_mode": "weight"},
    "SI": TENTH | {"decay_mode": "weight"},
    "FD": TENTH | {"factor_init": "default"},
    "SI + FD": TENTH,
}
sparse: dict[str, Any] = {"method": "pruning", "target_ratio": 0.1}
arms |= {sparsity: sparse | {"sparsity": sparsity} for sparsity in ("fixed", "dynamic")}
# The rate starts again for what is left after half of the steps; low rank is compared under the same schedule.
TWICE: dict[str, Any] = {
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
}
arms |= {sparsity: sparse | TWICE | {"sparsity": sparsity} for sparsity in ("magnitude", "lottery")}
arms |= {"SI + FD twice": TENTH | TWICE, "dense twice": {"method": "dense"} | TWICE}

STUDY = replace(
    overcomplete_images.STUDY,
    question="How much accuracy does a ResNet lose with a tenth of the parameters of its convolutions, for each "
    "initialization and decay, and compared with sparse networks of the same size?",
    arms={"ResNet8": arms},
    comparisons=(
        Comparison("With a tenth of the parameters, accuracy is lower", "dense", "SI + FD"),
        Comparison(
            "Spectral initialization with Frobenius decay beats the default initialization with weight decay",
            "SI + FD",
            "plain",
            article=True,
        ),
        Comparison("With spectral initialization, Frobenius decay beats weight decay", "SI + FD", "SI", article=True),
        Comparison("With Frobenius decay, spectral initialization beats the default", "SI + FD", "FD", article=True),
        Comparison("Low rank beats magnitude pruning", "SI + FD twice", "magnitude", article=True),
        Comparison("Low rank beats a lottery ticket", "SI + FD twice", "lottery", article=True),
        Comparison("Low rank beats dynamic sparsity", "SI + FD", "dynamic", article=True),
        Comparison("Low rank beats a fixed random sparsity pattern", "SI + FD", "fixed", article=True),
        Comparison("Spectral initialization without Frobenius decay lowers accuracy", "plain", "SI", article=True),
        Comparison("Frobenius decay without spectral initialization lowers accuracy", "plain", "FD", article=True),
    ),
    seeds=(1, 2, 3),
)
