"""How far a run's feed-forward weights are from those of the dense run that is its twin, at each checkpoint."""

import fnmatch
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from studies.study import FEED_FORWARD

WEIGHTS = "model.safetensors"


def keep_weights(run: Path, kept: Path) -> None:
    """Copy the weights of all checkpoints of a run, whole or not at all."""
    made = kept.with_name(f"{kept.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    for checkpoint in run.glob("checkpoint-*"):
        (made / checkpoint.name).mkdir(parents=True)
        shutil.copy(checkpoint / WEIGHTS, made / checkpoint.name / WEIGHTS)
    shutil.rmtree(kept, ignore_errors=True)
    made.rename(kept)


def distances_of(run: Path, twin: Path) -> dict[str, list[list[float]]]:
    """{measure: [[step, mean over the matrices], ...]} of the checkpoints that both have; see :func:`compare_weights`.

    Raises:
        ValueError: there are none.
    """
    curves: dict[str, list[list[float]]] = {}
    for checkpoint in sorted(run.glob("checkpoint-*"), key=step_of):
        if (twin / checkpoint.name).exists():
            own, other = (load_file(folder / WEIGHTS) for folder in (checkpoint, twin / checkpoint.name))
            for name, value in compare_weights(own, other).items():
                curves.setdefault(name, []).append([step_of(checkpoint), float(f"{value:.6g}")])
    if not curves:
        raise ValueError(f"{run} and {twin} have no checkpoints of the same step")
    return curves


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def compare_weights(own: Mapping[str, torch.Tensor], twin: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Of feed-forward matrices W' and W of the twin, means over them: ``distance`` ‖W' − W‖_F/‖W‖_F, ``cosine`` of the
    angle between them, ``norm`` ‖W'‖_F/‖W‖_F. Products are multiplied out."""
    found: dict[str, list[Any]] = {"distance": [], "cosine": [], "norm": []}
    for name in (name.removesuffix(".weight") for name in twin if name.endswith(".weight")):
        if not any(fnmatch.fnmatchcase(name, f"*{pattern}") for pattern in FEED_FORWARD):
            continue
        weight, other = twin[f"{name}.weight"].double(), matrix_of(own, name)
        found["distance"].append((other - weight).norm() / weight.norm())
        found["cosine"].append((other * weight).sum() / (other.norm() * weight.norm()))
        found["norm"].append(other.norm() / weight.norm())
    return {measure: fmean(map(float, values)) for measure, values in found.items()}


def matrix_of(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of a linear layer, dense or the product of its factors."""
    if f"{name}.weight" in weights:
        return weights[f"{name}.weight"].double()
    left, middle, right = (weights.get(f"{name}.{factor}") for factor in ("left", "middle", "right"))
    assert left is not None and right is not None
    return (left.double() if middle is None else left.double() @ middle.double()) @ right.double()
