"""The rank of each layer that is to be factorized.

Shapes: G groups (of a convolution, else 1) of matrices m x n, full rank min(m, n).
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fnl_hf.layers import (
    FactorizedConv1D,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLayer,
    FactorizedLinear,
)
from fnl_hf.surgery.config import DEFAULT_RANK_SCALES, FactorizationConfig, name_matches

FACTORIZED: dict[type[nn.Module], type[FactorizedLayer]] = {
    layer_class.dense_class: layer_class
    for layer_class in (FactorizedLinear, FactorizedConv1D, FactorizedConv2d, FactorizedEmbedding)
}
TYPE_NAMES = {kind.__name__: kind for kind in FACTORIZED}


def matches_layer(entry: str, name: str, layer: nn.Module) -> bool:
    """Whether a type or pattern of a :class:`FactorizationConfig` means this layer."""
    return type(layer) is TYPE_NAMES[entry] if entry in TYPE_NAMES else name_matches(name, entry)


class LayerSize:
    """Sizes of a dense layer as G matrices m x n, without its weights."""

    def __init__(self, layer: Any):
        smallest = FACTORIZED[type(layer)].like(layer, 1, False, device="meta")
        self.groups, (self.m, self.n) = smallest.groups, smallest.matrix_shape()
        self.full = min(self.m, self.n)
        self.bias = 0 if getattr(layer, "bias", None) is None else layer.bias.numel()

    def parameters(self, rank: int | None, deep: bool = False) -> int:
        """Of the factorized layer, or of the dense one (None)."""
        if rank is None:
            return self.groups * self.m * self.n + self.bias
        return self.groups * rank * (self.m + self.n + (rank if deep else 0)) + self.bias

    def scale_rank(self, rank_scale: float, mode: str) -> int:
        """max(1, round(rank_scale · full rank)), within what the mode allows."""
        rank = max(1, round(rank_scale * self.full))
        return min(rank, self.full) if mode == "low_rank" else max(rank, self.full)


def choose_ranks(layers: Mapping[str, nn.Module], config: FactorizationConfig) -> dict[str, int]:
    """Name -> rank of each layer.

    Raises:
        ValueError: weights on the meta device or not finite, of which ``energy`` cannot be known.
    """
    sizes = {name: LayerSize(layer) for name, layer in layers.items()}
    if config.ranks is not None:
        return {
            name: next(rank for entry, rank in config.ranks.items() if matches_layer(entry, name, layer))
            for name, layer in layers.items()
        }
    if config.target_ratio is not None:
        return _ranks_of_ratio(sizes, config.target_ratio, config.mode)
    if config.energy is not None:
        return {name: _rank_of_energy(name, layer, config.energy) for name, layer in layers.items()}
    scale = DEFAULT_RANK_SCALES[config.mode] if config.rank_scale is None else config.rank_scale
    return {name: size.scale_rank(scale, config.mode) for name, size in sizes.items()}


def _ranks_of_ratio(sizes: Mapping[str, LayerSize], ratio: float, mode: str) -> dict[str, int]:
    """As many parameters as ``ratio`` allows: ranks in proportion, then one more where there is room for it."""
    deep = mode == "deep"
    dense = sum(size.parameters(None) for size in sizes.values())
    budget = int(ratio * dense + 1e-6)

    def ranks_at(scale):
        return {name: size.scale_rank(scale, mode) for name, size in sizes.items()}

    def parameters(ranks):
        return sum(sizes[name].parameters(rank, deep) for name, rank in ranks.items())

    low, high = 0.0, 1.0  # scales of the rank: at full rank or below, but for "wide" and "deep"
    while mode != "low_rank" and parameters(ranks_at(high)) <= budget:
        high *= 2
    least, most = parameters(ranks_at(low)), parameters(ranks_at(high))
    if least > budget:
        what = f"target_ratio ({ratio}) is below {least / dense:.3g}, what the smallest ranks take"
        warnings.warn(what, stacklevel=4)
    if most < budget:
        what = f"target_ratio ({ratio}) is above {most / dense:.3g}, what the largest ranks take"
        warnings.warn(what, stacklevel=4)
    for _ in range(60):  # halvings, down to the precision of a float
        scale = (low + high) / 2
        low, high = (scale, high) if parameters(ranks_at(scale)) <= budget else (low, scale)
    ranks = ranks_at(low)
    # Who comes nearest to its next rank gets it first.
    for name in sorted(sizes, key=lambda name: ranks[name] - high * sizes[name].full):
        more = {**ranks, name: ranks[name] + 1}
        if (mode != "low_rank" or more[name] <= sizes[name].full) and parameters(more) <= budget:
            ranks = more
    return ranks


@torch.no_grad()
def _rank_of_energy(name: str, layer: Any, energy: float) -> int:
    """The smallest rank that keeps this share of Σσ² in every group."""
    if layer.weight.is_meta:
        raise ValueError(f"energy ({energy}): {name} is on the meta device, so its singular values are not known")
    if not layer.weight.isfinite().all():
        raise ValueError(f"{name}: its weight has values that are not finite")
    layer_class = FACTORIZED[type(layer)]
    matrices = layer_class.like(layer, 1, False, device="meta").to_matrices(layer.weight.float())  # (G, m, n)
    squares = torch.linalg.svdvals(matrices).double().square()  # (G, min(m, n))
    # Less by what float32 cannot tell.
    wanted = (energy - 1e-7) * squares.sum(dim=1, keepdim=True)  # (G, 1)
    needed = (squares.cumsum(dim=1) < wanted).sum(dim=1).max().item() + 1
    return min(int(needed), squares.shape[1])
