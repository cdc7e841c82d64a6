"""A product as far as it lies in this process: which rows of which heads, and where their gradients go.

Shapes are rank first: (H, r, n) for H heads of rank r and an outer size n. An unsharded factor is a single block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fnl_hf.bert.factorization import head_rows
from fnl_hf.optim.sharding import RowPieces, cut_of, local, split_heads

ALL = slice(None)


class Block(NamedTuple):
    """Rows ``rows`` of each of the heads ``heads``: those ``start`` to ``stop`` of the rows that lie here."""

    heads: slice
    rows: slice
    start: int
    stop: int
    base: torch.Tensor  # (h, r, n): all r rows of these heads
    is_view: bool  # of the weight; a copy if gathered from other processes, or if n is spread over several dimensions


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
        self._own_targets: list[torch.Tensor] | None = None
        if not self.cut_in_rank:
            view = head_rows(self.weight, num_heads, rank_dim)
            base = view if view.dim() == 3 else view.flatten(2)
            self.blocks = [Block(ALL, ALL, 0, num_heads * self.rank, base, base.data_ptr() == view.data_ptr())]
            self.whole = base if self.cut is None else None

    def request(self) -> RowPieces:
        """The rows that other processes need, of a factor cut along its rank."""
        assert self.cut is not None
        rows = self.weight.movedim(self.rank_dim, 0).flatten(1)
        return RowPieces(rows, self.cut, self.cut.size if self.everywhere else self.rank, self.everywhere)

    def set_blocks(self, gathered: dict[int, torch.Tensor]) -> None:
        """Blocks of a factor cut along its rank: whole heads, and the parts of heads in ``gathered`` {head: (r, n)}."""
        request = self.request()
        start, stop = request.cut.range_of(request.cut.rank)
        if self.everywhere:
            self.whole = gathered[0].unflatten(0, (self.num_heads, -1))
            gathered = dict(enumerate(self.whole))
        first, last = (0, 0) if self.everywhere else split_heads(start, stop, self.rank)[0]
        if first < last:
            begin, end = first * self.rank - start, last * self.rank - start
            base = request.rows[begin:end].unflatten(0, (last - first, self.rank))
            self.blocks.append(Block(slice(first, last), ALL, begin, end, base, True))
        for a, b in self._pieces(start, stop):
            head, base = a // self.rank, gathered[a // self.rank][None]
            rows = slice(a - head * self.rank, b - head * self.rank)
            self.blocks.append(Block(slice(head, head + 1), rows, a - start, b - start, base, False))

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The rows ``start`` to ``stop`` without the whole heads, unless all are wanted piece by piece."""
        if not self.everywhere:
            return split_heads(start, stop, self.rank)[1]
        heads = range(start // self.rank, -(-stop // self.rank))
        return [(max(start, head * self.rank), min(stop, (head + 1) * self.rank)) for head in heads]

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

    def own_targets(self) -> list[torch.Tensor]:
        """:meth:`targets` in the weight itself."""
        if self._own_targets is None:
            self._own_targets = self.targets(self.weight)
        return self._own_targets

    def targets(self, out: torch.Tensor) -> list[torch.Tensor]:
        """For each block the view (h, rows, ...) of ``out``, a tensor like the local weight, that it stands for."""
        if not self.cut_in_rank:
            return [head_rows(out, self.num_heads, self.rank_dim)]
        rows = out.movedim(self.rank_dim, 0)
        return [
            rows[block.start : block.stop].unflatten(0, (block.heads.stop - block.heads.start, -1))
            for block in self.blocks
        ]


class LocalProduct:
    """One product as far as it lies here, and what is to be added to what: for each of its factors that is ``moving``

        out += scale · gradient of ½‖W‖²_F,

    where ``outs`` are tensors like the factors' local parts, or None for these themselves (decoupled decay).
    """

    def __init__(self, weights: Sequence[torch.Tensor], rank_dims: Sequence[int], num_heads: int):
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
        self.ends = (self.factors[0], self.factors[-1])
        self.sharded = any(factor.cut is not None for factor in self.factors)
        # Two factors cut alike along their rank: a Gram matrix is needed only where its rows are.
        self.grams_stay = not inner and all(end.cut_in_rank for end in self.ends) and self._cut_alike()
        self.grams: Sequence[torch.Tensor] = ()
        self.moving = [True] * len(weights)
        self.outs: Sequence[torch.Tensor | None] | None = None
        self.scale: float | torch.Tensor = 1.0
        blocks = [block for factor in self.factors for block in factor.blocks]
        self.lasts = not self.sharded and all(block.is_view for block in blocks)
        self._made_for = self._identity(weights, rank_dims, num_heads) if self.lasts else None

    @staticmethod
    def _identity(weights, rank_dims, num_heads):
        return [(w.data_ptr(), w.shape, w.stride()) for w in weights], rank_dims, num_heads

    def is_still(self, weights: Sequence[torch.Tensor], rank_dims: Sequence[int], num_heads: int) -> bool:
        """Whether this, made in an earlier step, would be made the same now: its views are of the same memory."""
        return self.lasts and self._made_for == self._identity(weights, rank_dims, num_heads)

    def forget(self) -> None:
        """Drop what belongs to one step."""
        self.grams, self.outs = (), None
        for factor in self.factors:
            factor.copy = None

    def _cut_alike(self) -> bool:
        left, right = (end.cut for end in self.ends)
        return left is not None and right is not None and left[1:] == right[1:]

    @property
    def middle(self) -> torch.Tensor | None:
        """M (H, r, s) of a triple."""
        return self.factors[1].whole if len(self.factors) == 3 else None

    @property
    def nbytes(self) -> int:
        return sum(factor.weight.nbytes for factor in self.factors)
