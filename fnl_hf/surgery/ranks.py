"""Chooses the rank of each layer to factorize.

Shapes: G groups (of a convolution, else 1) of matrices m x n, full rank min(m, n).
"""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
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
# Matrix kernels process this many numbers at a time: at rank 45 a layer of 384 takes as long as at 48, at 57 longer
# than at 64 (float32, AVX2; half precision on GPUs has the same step).
RANK_STEP = 8
SMALLEST_STEPPED = 64  # full rank; below it, a step is too coarse for a budget


def matches_layer(entry: str, name: str, layer: nn.Module) -> bool:
    """Whether a type or pattern of a :class:`FactorizationConfig` matches this layer."""
    return type(layer) is TYPE_NAMES[entry] if entry in TYPE_NAMES else name_matches(name, entry)


class LayerSize:
    """Sizes of a dense layer as G matrices m x n, without its weights."""

    def __init__(self, layer: Any):
        smallest = FACTORIZED[type(layer)].like(layer, 1, False, device="meta")
        self.groups, (self.m, self.n) = smallest.groups, smallest.matrix_shape()
        self.full = min(self.m, self.n)
        self.bias = 0 if getattr(layer, "bias", None) is None else layer.bias.numel()

    def parameters(self, rank: int | None, deep: bool = False) -> int:
        """Parameters of the factorized layer, or of the dense one (None)."""
        if rank is None:
            return self.groups * self.m * self.n + self.bias
        return self.groups * rank * (self.m + self.n + (rank if deep else 0)) + self.bias

    @property
    def step(self) -> int:
        """With a budget, ranks are multiples of this number, below it, or the full rank."""
        return RANK_STEP if self.full >= SMALLEST_STEPPED else 1

    def whole_steps(self, rank: int) -> int:
        """The largest rank up to this one that is possible with a budget."""
        return rank if rank in (self.full, rank % self.step) else rank - rank % self.step

    def next_rank(self, rank: int) -> int:
        return min((rank // self.step + 1) * self.step, self.full)

    def scale_rank(self, rank_scale: float, mode: str) -> int:
        """max(1, round(rank_scale · full rank)), within what the mode allows."""
        rank = max(1, round(rank_scale * self.full))
        return min(rank, self.full) if mode == "low_rank" else max(rank, self.full)


def choose_ranks(
    layers: Mapping[str, nn.Module],
    config: FactorizationConfig,
    model_parameters: tuple[int, int] = (0, 0),
    losses: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, int]:
    """Name -> rank of each layer.

    Args:
        model_parameters: of the whole model, and those that do not depend on the ranks, for ``model_ratio``.
        losses: of calibrated layers, what leaving out each direction costs (min(m, n),), descending. ``target_ratio``
            and ``energy`` then go by them; a layer that stays dense because its budget would pay for it is left out.
            Layers that no output depends on have none.

    Raises:
        ValueError: weights on the meta device or not finite, of which ``energy`` cannot be known; a ``model_ratio``
            that what is not factorized exceeds.
    """
    sizes = {name: LayerSize(layer) for name, layer in layers.items()}
    if config.ranks is not None:
        return {
            name: next(rank for entry, rank in config.ranks.items() if matches_layer(entry, name, layer))
            for name, layer in layers.items()
        }
    ratio = config.target_ratio
    if config.model_ratio is not None:
        ratio = _ratio_of_layers(sizes, config.model_ratio, *model_parameters)
    if ratio is not None:
        return _ranks_of_losses(sizes, losses, ratio) if losses else _ranks_of_ratio(sizes, ratio, config.mode)
    if config.energy is not None:
        return {
            name: _rank_that_keeps(losses[name][None], config.energy)
            if name in losses
            else _rank_of_energy(name, layer, config.energy)
            for name, layer in layers.items()
        }
    scale = DEFAULT_RANK_SCALES[config.mode] if config.rank_scale is None else config.rank_scale
    return {name: size.scale_rank(scale, config.mode) for name, size in sizes.items()}


def _ratio_of_layers(sizes: Mapping[str, LayerSize], model_ratio: float, model_parameters: int, rest: int) -> float:
    """The ``target_ratio`` at which the whole model has ``model_ratio`` of its parameters."""
    dense = sum(size.parameters(None) for size in sizes.values())
    smallest = sum(size.parameters(1) for size in sizes.values())
    if model_ratio * model_parameters < rest + smallest:
        raise ValueError(
            f"model_ratio ({model_ratio}) must be at least {(rest + smallest) / model_parameters:.3g}: {rest:,} of "
            f"{model_parameters:,} parameters are in layers that are not factorized, or are also theirs (include "
            "more layers, for example 'Embedding')"
        )
    return (model_ratio * model_parameters - rest) / dense


def _ranks_of_losses(
    sizes: Mapping[str, LayerSize], losses: Mapping[str, torch.Tensor], ratio: float
) -> dict[str, int]:
    """Ranks with as many parameters as ``ratio`` allows, spent where a parameter saves the most loss, in steps of
    several directions.

    A direction of a layer costs m + n parameters. If the directions would cost as much as the layer itself, it stays
    dense and is left out. Layers without a loss, on which the outputs do not depend, each get ``ratio``.
    """
    ranks = {name: 1 for name in sizes if name in losses}
    idle = {name: size for name, size in sizes.items() if name not in ranks}
    fixed = {name: _ranks_of_ratio({name: size}, ratio, "low_rank")[name] for name, size in idle.items()}
    budget = ratio * sum(size.parameters(None) for size in sizes.values()) + 1e-6
    used = sum(sizes[name].parameters(rank) for name, rank in (ranks | fixed).items())
    if used > budget:
        warnings.warn(
            f"target_ratio ({ratio}) is below what the smallest ranks need: the calibrated layers get rank 1",
            stacklevel=4,
        )
    steps = sorted(
        (-saved.mean().item() / (sizes[name].m + sizes[name].n) / sizes[name].groups, name)
        for name in ranks
        for saved in _split_into_steps(losses[name], sizes[name].step)
    )
    dense, full = set(), set()
    for _, name in steps:
        size = sizes[name]
        if name in dense or name in full:
            continue
        rank = size.next_rank(ranks[name])
        is_dense = size.parameters(rank) >= size.parameters(None)
        added = size.parameters(None if is_dense else rank) - size.parameters(ranks[name])
        if used + added > budget:
            full.add(name)
            continue
        used += added
        ranks[name] = rank
        if is_dense:
            dense.add(name)
    return {name: rank for name, rank in (ranks | fixed).items() if name not in dense}


def _split_into_steps(losses: torch.Tensor, step: int) -> list[torch.Tensor]:
    """The saving of each step of the rank above 1."""
    first, *rest = losses.split(step)
    return [saved for saved in (first[1:], *rest) if len(saved)]


def _ranks_of_ratio(sizes: Mapping[str, LayerSize], ratio: float, mode: str) -> dict[str, int]:
    """Ranks with as many parameters as ``ratio`` allows: proportional to the full ranks, then one more step where there
    is room."""
    deep = mode == "deep"
    dense = sum(size.parameters(None) for size in sizes.values())
    budget = int(ratio * dense + 1e-6)

    def next_rank(name, rank):
        return sizes[name].next_rank(rank) if mode == "low_rank" else rank + 1

    def ranks_at(scale):
        ranks = {name: size.scale_rank(scale, mode) for name, size in sizes.items()}
        if mode == "low_rank":
            ranks = {name: sizes[name].whole_steps(rank) for name, rank in ranks.items()}
        return ranks

    def parameters(ranks):
        return sum(sizes[name].parameters(rank, deep) for name, rank in ranks.items())

    low, high = 0.0, 1.0  # scales of the rank: at most 1, except for "wide" and "deep"
    while mode != "low_rank" and parameters(ranks_at(high)) <= budget:
        high *= 2
    least = parameters(ranks_at(low))
    if least > budget:
        what = (
            f"target_ratio ({ratio}) is below {least / dense:.3g}, which the smallest ranks need: all layers get these"
        )
        warnings.warn(what, stacklevel=4)
    for _ in range(60):  # halvings, down to the precision of a float
        scale = (low + high) / 2
        low, high = (scale, high) if parameters(ranks_at(scale)) <= budget else (low, scale)
    ranks = ranks_at(low)
    # Layers closest to their next rank get it first.
    for name in sorted(sizes, key=lambda name: next_rank(name, ranks[name]) - high * sizes[name].full):
        more = {**ranks, name: next_rank(name, ranks[name])}
        if parameters(more) <= budget:
            ranks = more
    return ranks


@torch.no_grad()
def _rank_of_energy(name: str, layer: Any, energy: float) -> int:
    """The smallest rank that keeps this share of Σσ² in every group."""
    if layer.weight.is_meta:
        raise ValueError(f"energy ({energy}): {name} is on the meta device, so its singular values are unknown")
    if not layer.weight.isfinite().all():
        raise ValueError(f"{name}: its weight has values that are not finite")
    layer_class = FACTORIZED[type(layer)]
    matrices = layer_class.like(layer, 1, False, device="meta").to_matrices(layer.weight.float())  # (G, m, n)
    return _rank_that_keeps(torch.linalg.svdvals(matrices).double().square(), energy)


def _rank_that_keeps(squares: torch.Tensor, energy: float) -> int:
    """The same for Σσ² (G, min(m, n)), in every group."""
    # Minus the rounding error of float32.
    wanted = (energy - 1e-7) * squares.sum(dim=1, keepdim=True)  # (G, 1)
    needed = (squares.cumsum(dim=1) < wanted).sum(dim=1).max().item() + 1
    return min(int(needed), squares.shape[1])
