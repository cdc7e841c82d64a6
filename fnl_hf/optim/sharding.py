"""The local part of a sharded parameter, and the few collectives that decay and norms need (FSDP2).

FSDP2 (``fully_shard``) makes each parameter a DTensor that is split along one dimension into as many chunks as there
are processes; the last ones may be empty. optim/local_factors.py computes Gram matrices and gradients from a chunk.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch.nn import functional as F

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Sharding(NamedTuple):
    """How a tensor is sharded: its ``size`` rows in dimension ``dim`` are distributed to the processes of ``group``."""

    dim: int
    size: int
    process: int  # this one's place in the group; "rank" is that of a product here
    num_processes: int
    group: Any

    @property
    def chunk_size(self) -> int:
        """Rows of each process except the last ones, which may have fewer or none, as with ``torch.chunk``."""
        return -(-self.size // self.num_processes)

    def rows_of(self, process: int) -> tuple[int, int]:
        """Start and stop of a process's rows."""
        return min(process * self.chunk_size, self.size), min((process + 1) * self.chunk_size, self.size)

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's rows of an unsharded tensor."""
        start, stop = self.rows_of(self.process)
        return whole.narrow(self.dim, start, stop - start)

    def splits_heads(self, rank: int) -> bool:
        """Whether any head, ``rank`` consecutive rows, has rows on two processes."""
        return self.chunk_size < self.size and self.chunk_size % rank != 0


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, gradient or state, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():  # otherwise autograd would record ``to_local``
        return tensor.to_local()


def sharding_of(tensor: torch.Tensor) -> Sharding | None:
    """How a tensor is sharded, or None if each process has all of it.

    Raises:
        ValueError: sharded over several mesh dimensions (FSDP with tensor parallelism), or pending a reduction.
    """
    if not isinstance(tensor, DTensor):
        return None
    split = [(dim, placement) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not split:
        return None
    mesh_dim, placement = split[0]
    if len(split) > 1 or type(placement) is not Shard:
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} has placements {tuple(tensor.placements)}: at most one mesh "
            "dimension may shard a parameter, the others must replicate it (FSDP2, also hybrid; not tensor parallelism)"
        )
    mesh, dim = tensor.device_mesh, placement.dim % tensor.dim()
    group = mesh.get_group(mesh_dim)
    return Sharding(dim, tensor.shape[dim], mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim), group)


def gather_rows(parts: Sequence[torch.Tensor], shardings: Sequence[Sharding]) -> list[torch.Tensor]:
    """All rows (size, n) of each tensor, from this process's ``parts`` (rows, n).

    One packed all-gather for each process group and dtype.
    """
    gathered = list(parts)
    for group, indices in _by_group(zip(parts, shardings)):
        # All processes must send equally much: chunks are padded to the size of the first one.
        filled = [F.pad(parts[i], (0, 0, 0, shardings[i].chunk_size - len(parts[i]))) for i in indices]
        sent = torch.cat([part.reshape(-1) for part in filled])
        received = sent.new_empty(shardings[indices[0]].num_processes, len(sent))
        _all_gather(received.view(-1), sent, group=group)
        for i, chunks in zip(indices, received.split([part.numel() for part in filled], dim=1)):
            gathered[i] = chunks.reshape(-1, parts[i].shape[1])[: shardings[i].size]
    return gathered


def sum_over_processes(tensors: Sequence[torch.Tensor], shardings: Sequence[Sharding | None]) -> list[torch.Tensor]:
    """Each tensor summed over the processes that share it (None: unchanged).

    One packed all-reduce for each process group and dtype.
    """
    summed = list(tensors)
    for group, indices in _by_group(zip(tensors, shardings)):
        packed = torch.cat([tensors[i].reshape(-1) for i in indices])
        dist.all_reduce(packed, group=group)
        for i, part in zip(indices, packed.split([tensors[i].numel() for i in indices])):
            summed[i] = part.view(tensors[i].shape)
    return summed


def _by_group(members: Iterable[tuple[torch.Tensor, Sharding | None]]) -> list[tuple[Any, list[int]]]:
    """Positions for each process group and dtype, in order of first appearance; unsharded tensors have none."""
    found: dict[Any, tuple[Any, list[int]]] = {}
    for index, (tensor, sharding) in enumerate(members):
        if sharding is not None:
            found.setdefault((id(sharding.group), tensor.dtype), (sharding.group, []))[1].append(index)
    return list(found.values())
