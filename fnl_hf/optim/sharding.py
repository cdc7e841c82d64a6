"""What a process holds of a sharded parameter, and the few collectives that decay and norms need (FSDP2).

FSDP2 (``fully_shard``) makes each parameter a DTensor cut along one dimension into as many chunks as there are
processes; the last ones may be empty. Factors are worked on where they lie, as rows: a weight with its rank dimension
in front, E = H·r rows, r to a head. Cut along another dimension, every process has a part of each row, and Gram
matrices are sums over the processes. Cut along the rank dimension, a process has whole heads and, at the ends of its
range, parts of heads that straddle processes: only the rows of those are gathered.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Cut(NamedTuple):
    """A tensor's rows ``start`` to ``stop`` of ``size`` in dimension ``dim``: the ``rank``-th of ``world`` chunks."""

    dim: int
    size: int
    rank: int
    world: int
    group: Any

    def range_of(self, rank: int) -> tuple[int, int]:
        """Start and stop of a process's chunk; chunks are cut as ``torch.chunk`` does."""
        chunk = -(-self.size // self.world)
        return min(rank * chunk, self.size), min((rank + 1) * chunk, self.size)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, gradient or state, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():  # otherwise ``to_local`` would be an operation of autograd's
        return tensor.to_local()


def cut_of(tensor: torch.Tensor) -> Cut | None:
    """How a tensor is cut, or None if each process has it whole.

    Raises:
        ValueError: cut along several mesh dimensions (FSDP with tensor parallelism), or pending a reduction.
    """
    if not isinstance(tensor, DTensor):
        return None
    cuts = [(dim, placement) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not cuts:
        return None
    mesh_dim, placement = cuts[0]
    if len(cuts) > 1 or type(placement) is not Shard:
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} has placements {tuple(tensor.placements)}: at most one mesh "
            "dimension may shard a parameter, the others must replicate it (FSDP2, also hybrid; not tensor parallelism)"
        )
    mesh, dim = tensor.device_mesh, placement.dim % tensor.dim()
    group = mesh.get_group(mesh_dim)
    return Cut(dim, tensor.shape[dim], mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim), group)


def split_heads(start: int, stop: int, rank: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Whole heads (first, last) within the rows ``start`` to ``stop``, and the ranges of rows of the cut ones."""
    first, last = -(-start // rank), stop // rank
    if first > last:  # all within one head
        return (0, 0), [(start, stop)]
    pieces = [(start, first * rank), (last * rank, stop)]
    return (first, last), [piece for piece in pieces if piece[0] < piece[1]]


class RowPieces(NamedTuple):
    """Rows of one weight that several processes need: (rows, n) here, cut as ``cut``, ``rank`` rows to a head."""

    rows: torch.Tensor
    cut: Cut
    rank: int
    everything: bool  # gather all rows, not only those of heads that straddle

    def pieces(self, process: int) -> list[tuple[int, int]]:
        start, stop = self.cut.range_of(process)
        if self.everything:
            return [(start, stop)] if start < stop else []
        return split_heads(start, stop, self.rank)[1]


def gather_pieces(requests: Sequence[RowPieces]) -> list[dict[int, torch.Tensor]]:
    """For each request {head: all its rows (r, n)}, of the straddling heads.

    One packed all-gather for each process group and dtype.
    """
    gathered: list[dict[int, torch.Tensor]] = [{} for _ in requests]
    for group, indices in _by_group([(request.rows, request.cut) for request in requests]):
        members = [requests[i] for i in indices]
        world, own = members[0].cut.world, members[0].cut.rank
        counts = [[sum(b - a for a, b in m.pieces(k)) for m in members] for k in range(world)]
        width = max(sum(n * m.rows.shape[1] for n, m in zip(count, members)) for count in counts)
        if width == 0:
            continue
        parts = [m.rows[a - offset : b - offset].reshape(-1) for m in members
                 for offset in (m.cut.range_of(own)[0],) for a, b in m.pieces(own)]  # fmt: skip
        sent = members[0].rows.new_zeros(width)
        if parts:
            packed = torch.cat(parts)
            sent[: packed.numel()] = packed
        received = sent.new_empty(world * width)
        _all_gather(received, sent, group=group)
        received = received.view(world, width)
        offsets = [0] * world
        for position, (index, member) in enumerate(zip(indices, members)):
            size, chunks = member.rows.shape[1], []
            for k in range(world):
                count = counts[k][position] * size
                chunks.append(received[k, offsets[k] : offsets[k] + count])
                offsets[k] += count
            heads = sorted({a // member.rank for k in range(world) for a, _ in member.pieces(k)})
            rows = torch.cat(chunks).view(len(heads), member.rank, size)
            gathered[index] = dict(zip(heads, rows))
    return gathered


def sum_over_processes(tensors: Sequence[torch.Tensor], cuts: Sequence[Cut | None]) -> list[torch.Tensor]:
    """Each tensor summed over the processes that share it (None: as it is).

    One packed all-reduce for each process group and dtype.
    """
    summed = list(tensors)
    for group, indices in _by_group(zip(tensors, cuts)):
        packed = torch.cat([tensors[i].reshape(-1) for i in indices])
        dist.all_reduce(packed, group=group)
        for i, part in zip(indices, packed.split([tensors[i].numel() for i in indices])):
            summed[i] = part.view(tensors[i].shape)
    return summed


def _by_group(members: Iterable[tuple[torch.Tensor, Cut | None]]) -> list[tuple[Any, list[int]]]:
    """Positions of each process group and dtype, in order of first appearance; what is not cut has none."""
    found: dict[Any, tuple[Any, list[int]]] = {}
    for index, (tensor, cut) in enumerate(members):
        if cut is not None:
            found.setdefault((id(cut.group), tensor.dtype), (cut.group, []))[1].append(index)
    return list(found.values())
