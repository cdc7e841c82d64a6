"""Products whose factors are parts of parameters: fused projections, keys that several heads share, rotary pairs.

A factor of attention is the rows of H heads in one dimension of a parameter. Heads that share a key (or value) are one
product: Q_1 ... Q_J are stacked, because Σ_j ‖Q_j Kᵀ‖²_F = ‖[Q_1; ...; Q_J] Kᵀ‖²_F.

Rotary embeddings rotate pairs of rows b by an angle that depends on the distance of two positions, so the score is Q R
Kᵀ. The decay uses the mean over independent uniform angles::

    E‖Q R Kᵀ‖²_F = Σ_b ½‖Q_b‖²_F ‖K_b‖²_F = Σ_b ‖u_b v_bᵀ‖²_F,    u_b = vec(Q_b), v_b = vec(K_b)/√2

one product of rank 1 for each pair. Rows that are not rotated are a product of their own: the mean of a rotation is 0.

Shapes: G groups of heads that share a key, J heads in a group (1 of what is shared), r rows of a head, n the other
dimension of the parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from fnl_hf.bert.factorization import Product

VIEWS = "attention"  # ``product`` of a parameter group whose ``layout`` says where the factors lie
REGISTRY = "_registered_products"  # on a module: attributes of parameters would not survive FSDP2
HALVES, INTERLEAVED = "halves", "interleaved"  # row i is rotated with row i + r/2; row 2i with row 2i + 1
PAIRINGS = ("", HALVES, INTERLEAVED)


class FactorView(NamedTuple):
    """The place of a factor's rows: row i of head j of group g is ``start + g·group_stride + j·head_stride + i``.

    ``parameter`` is the index of the parameter among those of its product; rows run along its dimension ``dim``.
    """

    parameter: int
    dim: int
    start: int
    groups: int
    group_stride: int
    heads: int
    head_stride: int
    rank: int

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The factor as a view (G, J, r, n) of the parameter; for a vector with a number per row (G, J, r)."""
        moved = weight.movedim(self.dim, 0) if weight.dim() > 1 else weight
        stride, *rest = moved.stride()
        size = (self.groups, self.heads, self.rank, *moved.shape[1:])
        strides = (self.group_stride * stride, self.head_stride * stride, stride, *rest)
        return moved.as_strided(size, strides, moved.storage_offset() + self.start * stride)

    def part(self, start: int, rank: int) -> "FactorView":
        """Rows ``start`` to ``start + rank`` of each head."""
        return self._replace(start=self.start + start, rank=rank)

    def indices(self) -> set[int]:
        """Indices of all its rows in the parameter."""
        steps = product(range(self.groups), range(self.heads), range(self.rank))
        return {self.start + g * self.group_stride + j * self.head_stride + i for g, j, i in steps}

    def meets(self, other: "FactorView") -> bool:
        """Whether two views of one parameter overlap."""
        return self.dim != other.dim or not self.indices().isdisjoint(other.indices())

    @property
    def num_rows(self) -> int:
        return self.groups * self.heads * self.rank

    @property
    def end(self) -> int:
        """One more than the last row."""
        last = (self.groups - 1) * self.group_stride + (self.heads - 1) * self.head_stride
        return self.start + last + self.rank


class ViewPair(NamedTuple):
    """Two factors of a product, and how their rows are paired by rotation (one of ``PAIRINGS``)."""

    left: FactorView
    right: FactorView
    pairing: str

    @property
    def views(self) -> tuple[FactorView, FactorView]:
        return self.left, self.right

    def plain(self) -> tuple:
        """As tuples of numbers and a string, which every format of a state_dict keeps."""
        return (tuple(self.left), tuple(self.right), self.pairing)

    @classmethod
    def of(cls, plain: Sequence) -> "ViewPair":
        left, right, pairing = plain
        return cls(FactorView(*left), FactorView(*right), pairing)


def pair_rows(rows: torch.Tensor, pairing: str) -> torch.Tensor:
    """(..., r) -> (..., r/2, 2): rows that are rotated together become adjacent."""
    if pairing == HALVES:
        return rows.unflatten(-1, (2, -1)).transpose(-2, -1)
    return rows.unflatten(-1, (-1, 2))


@dataclass(frozen=True)
class ViewProduct(Product):
    """H products whose factors are the views ``pair`` of ``weights``, which may be one parameter twice.

    ``num_heads`` is H, of the queries. ``kind`` is "qk" or "vo", or "rotary" of rows that are rotated.
    """

    pair: ViewPair

    def split(self, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """U (G, J·m, r) and V (G, n, r), of values the other way round; "rotary": U (G·r/2, J·2m, 1), V likewise/√2."""
        left, right, pairing = self.pair
        rows = [view.rows(weight) for view, weight in zip((left, right), weights)]  # (G, J, r, n)
        if not pairing:
            u, v = (each.transpose(1, 2).flatten(2).mT for each in rows)
            return u, v
        # (G, J, n, r/2, 2) -> (G, r/2, J, 2, n)
        paired = [pair_rows(each.mT, pairing).permute(0, 3, 1, 4, 2) for each in rows]
        u, v = (each.flatten(0, 1).flatten(1).unsqueeze(-1) for each in paired)
        return u, v * 0.5**0.5
