"""Parameters that LAMB updates together: their decay, norms, trust ratios and updates.

Parameters are updated in buckets, so that the updates of all parameters are never in memory together, unless they are
sharded: then one all-reduce sums the norms of all buckets over the processes.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fnl_hf.optim.checked import get_lr
from fnl_hf.optim.sharding import local, sharding_of, sum_over_processes

# Bytes of parameters handled together. On a CPU, a bucket that fits into the caches is read once.
BUCKET_BYTES = {"cpu": 4 * 2**20}
DEFAULT_BUCKET_BYTES = 64 * 2**20

Unit = tuple[torch.Tensor, ...]  # parameters that must be in the same bucket


class Bucket:
    """Parameters of one group, device and dtype that are updated together.

    ``parameters`` are those with a gradient, ``weights`` their local parts, ``matrices`` the indices of those with two
    or more dimensions; ``updates`` become −u.
    """

    def __init__(self, group: dict[str, Any], units: Sequence[Unit]):
        self.group, self.units = group, units
        self.parameters = [p for unit in units for p in unit if p.grad is not None]
        self.weights = [local(p) for p in self.parameters]
        self.matrices = [i for i, p in enumerate(self.parameters) if p.dim() >= 2]
        self.updates: list[torch.Tensor] = []

    def lr(self, found_inf: torch.Tensor | None) -> float | torch.Tensor:
        """The group's learning rate, or 0 in a skipped step."""
        lr = get_lr(self.group)
        if isinstance(lr, torch.Tensor) and self.weights:  # foreach kernels do not accept a number on another device
            lr = lr.to(self.weights[0].device, non_blocking=True)
        return lr if found_inf is None else (found_inf == 0) * lr

    def decay(self, lr: float | torch.Tensor) -> None:
        """Ordinary decay: decoupled, applied immediately; otherwise added to the updates as −λw, from which Adam's
        direction is subtracted."""
        weight_decay = self.group["weight_decay"] if self.matrices else 0.0
        weights = [self.weights[i] for i in self.matrices]
        updates: dict[int, torch.Tensor] = {}
        if weight_decay != 0.0 and self.group["decay"] == "in_trust_ratio":
            updates = dict(zip(self.matrices, torch._foreach_mul(weights, -weight_decay)))
        elif weight_decay != 0.0:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        zeros = {i: torch.empty_like(weight) for i, weight in enumerate(self.weights) if i not in updates}
        if zeros:
            torch._foreach_zero_(list(zeros.values()))
        updates |= zeros
        self.updates = [updates[i] for i in range(len(self.weights))]

    def apply(self, ratios: torch.Tensor, lr: float | torch.Tensor) -> None:
        """w ← w − η · ratio · u, with a ratio for each matrix; 1 for vectors."""
        if self.matrices:
            factors = (ratios * lr).to(self.weights[0].dtype)
            for i, factor in zip(self.matrices, factors.unbind()):
                self.weights[i].addcmul_(self.updates[i], factor)
        vectors = [i for i, weight in enumerate(self.weights) if weight.dim() < 2]
        if vectors:
            updates = [self.updates[i] for i in vectors]
            torch._foreach_mul_(updates, lr)
            torch._foreach_add_([self.weights[i] for i in vectors], updates)


def split_by_kind(units: Sequence[Unit]) -> list[list[Unit]]:
    """The units of each device and dtype."""
    kinds: dict[Any, list[Unit]] = {}
    for unit in units:
        kinds.setdefault((unit[0].device, unit[0].dtype), []).append(unit)
    return list(kinds.values())


def split_by_size(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Consecutive units of one kind, in lists of at most the number of bytes that suits their device, or of one
    unit."""
    bucket: list[Unit] = []
    size = 0
    for unit in units:
        nbytes = sum(p.nbytes for p in unit)
        if bucket and size + nbytes > BUCKET_BYTES.get(unit[0].device.type, DEFAULT_BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += nbytes
    if bucket:
        yield bucket


def compute_norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Euclidean norms as 0-d tensors, in float32 for half precision; independent of the other tensors."""
    is_half = [t.dtype in (torch.float16, torch.bfloat16) for t in tensors]
    others = [t for t, half in zip(tensors, is_half) if not half]
    norms = iter(torch._foreach_norm(others) if others else ())
    return [
        torch.linalg.vector_norm(t, dtype=torch.float32) if half else next(norms) for t, half in zip(tensors, is_half)
    ]


def trust_ratios(buckets: Sequence[Bucket]) -> Iterator[torch.Tensor]:
    """φ(‖w‖)/‖u‖ of each bucket's matrices, (matrices,) per bucket; one all-reduce for all sharded ones."""
    weights = [bucket.weights[i] for bucket in buckets for i in bucket.matrices]
    updates = [bucket.updates[i] for bucket in buckets for i in bucket.matrices]
    shardings = [sharding_of(bucket.parameters[i]) for bucket in buckets for i in bucket.matrices]
    norms = compute_norms(weights) + compute_norms(updates)
    if any(shardings):
        squares = sum_over_processes([norm.square() for norm in norms], shardings * 2)
        norms = [square.sqrt() for square in squares]
    weight_norms, update_norms = iter(norms[: len(weights)]), iter(norms[len(weights) :])
    for bucket in buckets:
        count = len(bucket.matrices)
        if count == 0:
            yield torch.empty(0)
            continue
        stacked = [torch.stack(list(itertools.islice(norms, count))) for norms in (weight_norms, update_norms)]
        yield _trust_ratio(bucket.group, *stacked)


def _trust_ratio(group: dict[str, Any], weight_norms: torch.Tensor, update_norms: torch.Tensor) -> torch.Tensor:
    """The ratio for 1-d tensors of norms, with the group's clamps; 1 if either norm is 0."""
    phi = weight_norms
    if group["weight_norm_clamp"] is not None:
        phi = phi.clamp(*group["weight_norm_clamp"])
    ratio = phi / update_norms
    if group["trust_clamp"] is not None:
        ratio = ratio.clamp(*group["trust_clamp"])
    return torch.where((weight_norms > 0) & (update_norms > 0), ratio, 1.0)
