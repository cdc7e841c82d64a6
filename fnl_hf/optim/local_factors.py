"""A product as far as it lies in this process: which rows of which heads, and where their gradients go.

Shapes are rank first: (H, r, n) for H heads of rank r and an outer size n. An unsharded factor is a single block.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fnl_hf.factorization import head_rows
from fnl_hf.optim.sharding import RowPieces, cut_of, local, split_heads

ALL = slice(None)


class Block(NamedTuple):
    """Rows ``rows`` of each of the heads ``heads``: those ``start`` to ``stop`` of the rows that lie here."""

    heads: slice
    rows: slice
    start: int
    stop: int
    base: torch.Tensor  # (h, r, n): all r rows of these heads
    is_view: bool  # of the weight; rows gathered from other processes are not


class LocalFactor:
    """One factor as far as it lies here.

    Args:
        weight: the stored parameter.
        num_heads, rank_dim: H, and the dimension of the weight that H·r runs along.
        everywhere: all processes need all rows (the middle factor of three).
    """

    def __init__(self, weight: torch.Tensor, num_heads: int, rank_dim: int, everywhere: bool = False):
        self.weight, self.cut = local(weight), cut_of(weight)
        self.num_heads, self.rank_dim, self.everywhere = num_heads, rank_dim, everywhere
        self.rank = weight.shape[rank_dim] // num_heads
        self.cut_in_rank = self.cut is not None and self.cut.dim == rank_dim
        self.blocks: list[Block] = []
        self.whole: torch.Tensor | None = None  # all rows of all heads, where they are known
        self.copy: torch.Tensor | None = None  # of the only block's base, where one was made already
        if not self.cut_in_rank:
            base = head_rows(self.weight, num_heads, rank_dim)
            base = base if base.dim() == 3 else base.flatten(2)
            self.blocks = [Block(ALL, ALL, 0, num_heads * self.rank, base, True)]
            self.whole = base if self.cut is None else None

    def request(self) -> RowPieces:
        """The rows that other processes need, of a factor cut along its rank."""
        assert self.cut is not None
        return RowPieces(self.weight.movedim(self.rank_dim, 0).flatten(1), self.cut, self.rank, self.everywhere)

    def set_blocks(self, gathered: dict[int, torch.Tensor]) -> None:
        """Blocks of a factor cut along its rank: whole heads, and the parts of heads in ``gathered`` {head: (r, n)}."""
        request = self.request()
        start, stop = request.cut.range_of(request.cut.rank)
        first, last = (0, 0) if self.everywhere else split_heads(start, stop, self.rank)[0]
        if first < last:
            begin, end = first * self.rank - start, last * self.rank - start
            base = request.rows[begin:end].unflatten(0, (last - first, self.rank))
            self.blocks.append(Block(slice(first, last), ALL, begin, end, base, True))
        for a, b in request.pieces(request.cut.rank):
            head, base = a // self.rank, gathered[a // self.rank][None]
            rows = slice(a - head * self.rank, b - head * self.rank)
            self.blocks.append(Block(slice(head, head + 1), rows, a - start, b - start, base, False))
        if self.everywhere:
            self.whole = gathered[0][None]

    def gram(self, partial: bool = True) -> torch.Tensor:
        """FᵀF of each head (H, r, r). ``partial``: only the summand of this process, so that each head counts once."""
        if not self.cut_in_rank:
            base = self.blocks[0].base
            return torch.bmm(base, base.mT)
        grams = self.weight.new_zeros(self.num_heads, self.rank, self.rank)
        for block in self.blocks:
            if not partial or not block.rows.start:
                grams[block.heads] = block.base @ block.base.mT
        return grams

    def targets(self, out: torch.Tensor) -> Iterator[torch.Tensor]:
        """For each block the view (h, rows, ...) of ``out``, a tensor like the local weight, that it stands for."""
        if not self.cut_in_rank:
            yield head_rows(out, self.num_heads, self.rank_dim)
            return
        rows = out.movedim(self.rank_dim, 0)
        for block in self.blocks:
            yield rows[block.start : block.stop].unflatten(0, (block.heads.stop - block.heads.start, -1))


class LocalProduct:
    """One product as far as it lies here; ``outs`` and ``scale`` as in :class:`~fnl_hf.optim.frobenius.Decay`."""

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        rank_dims: Sequence[int],
        num_heads: int,
        outs: Sequence[torch.Tensor | None],
        scale: float | torch.Tensor,
    ):
        inner = range(1, len(weights) - 1)
        self.factors = [
            LocalFactor(weight, num_heads, dim, everywhere=i in inner)
            for i, (weight, dim) in enumerate(zip(weights, rank_dims, strict=True))
        ]
        if any(factor.everywhere and factor.cut and not factor.cut_in_rank for factor in self.factors):
            raise ValueError(
                f"the middle factor of shape {tuple(weights[1].shape)} is sharded along dimension 1: it must be "
                "sharded along dimension 0, as fully_shard does, or replicated"
            )
        self.outs, self.scale = outs, scale
        self.ends = (self.factors[0], self.factors[-1])
        self.sharded = any(factor.cut is not None for factor in self.factors)
        # Two factors cut alike along their rank: a Gram matrix is needed only where its rows are.
        self.grams_stay = not inner and all(end.cut_in_rank for end in self.ends) and self._cut_alike()
        self.grams: Sequence[torch.Tensor] = ()

    def _cut_alike(self) -> bool:
        left, right = (end.cut for end in self.ends)
        return left is not None and right is not None and left[1:] == right[1:]

    @property
    def middle(self) -> torch.Tensor | None:
        """M (1, r, s) of a triple."""
        return self.factors[1].whole if len(self.factors) == 3 else None

    @property
    def nbytes(self) -> int:
        return sum(factor.weight.nbytes for factor in self.factors)
