"""The part of a product on this process: which rows of its factors it has, and what is added to them.

Shapes are rank first, as ``torch.nn.Linear`` stores most: H heads, r rank, n outer size (of the middle factor of three
its second rank s), h heads that have rows here. A factor's H·r rows are held in one of three ways:

- Unsharded, or sharded along the outer size: all rows, or a part of each. h = H, and Gram matrices of parts are summed
  over the processes.
- Sharded along the rank, heads whole: the rows of h heads.
- Sharded along the rank, heads split: some of the rows of h heads. A gradient needs all rows of its head, so the factor
  is gathered from all processes, and each adds to the rows that it has.

FSDP2 shards along dimension 0, the rank of query, key and value, and splits heads where E over the number of processes
is no multiple of r, as 12 heads on 8 processes. Its ``shard_placement_fn`` avoids that, but Accelerate and Trainer do
not let one be passed.
"""

from collections.abc import Sequence

import torch

from fnl_hf.optim.sharding import local, sharding_of

ALL = slice(None)


class LocalFactor:
    """The local part of one factor.

    Args:
        weight: the stored parameter.
        target: what its gradient is added to: the weight itself, a tensor like it, or None for nothing.
        num_heads, rank_dim: H, and the dimension of the weight that H·r runs along.
        is_middle: it is M of U M Vᵀ, of which every process needs all rows.

    Raises:
        ValueError: a middle factor that is sharded along its second rank.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        target: torch.Tensor | None,
        num_heads: int,
        rank_dim: int,
        is_middle: bool = False,
    ):
        self.sharding = sharding = sharding_of(weight)
        self.num_heads, self.rank_dim, self.rank = num_heads, rank_dim, weight.shape[rank_dim] // num_heads
        self.is_sharded_along_rank = self.is_gathered = False
        self.heads = self.local_rows = ALL  # those with rows here; which of these heads' rows are here
        if sharding is not None and sharding.dim == rank_dim:
            self.is_sharded_along_rank = True
            self.is_gathered = is_middle or sharding.splits_heads(self.rank)
            start, stop = sharding.rows_of(sharding.process)
            first, last = start // self.rank, -(-stop // self.rank)
            self.heads = slice(first, last)
            self.local_rows = slice(start - first * self.rank, stop - first * self.rank)
        elif sharding is not None and is_middle:
            raise ValueError(
                f"the middle factor of shape {tuple(weight.shape)} is sharded along dimension 1: shard it along "
                "dimension 0, as fully_shard does, or replicate it"
            )
        self.weight = self._rank_first(weight)
        self.is_in_place = target is weight
        self.target = self.weight if self.is_in_place else None if target is None else self._rank_first(target)
        # For heads with rows here (h, r, n), and for all heads (H, r, n), where known.
        self.rows: torch.Tensor
        self.all_rows: torch.Tensor | None = None
        if not self.is_gathered:
            self.rows = self.weight if self.weight.dim() == 3 else self.weight.flatten(2)
            self.all_rows = self.rows if self.heads is ALL else None

    def _rank_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view (h, r, ...) of the local part of the weight or a tensor like it; of a gathered factor (rows, ...).

        The outer size may be spread over several dimensions (convolutions).
        """
        rows = local(tensor)
        if self.rank_dim != 0:
            rows = rows.movedim(self.rank_dim, 0)
        return rows if self.is_gathered else rows.view(len(rows) // self.rank, self.rank, *rows.shape[1:])

    def set_gathered(self, rows: torch.Tensor) -> None:
        """Take all rows (H·r, n) of a factor whose heads are split."""
        self.all_rows = rows.unflatten(0, (self.num_heads, self.rank))
        self.rows = self.all_rows[self.heads]

    def gram(self) -> torch.Tensor:
        """FᵀF (H, r, r), or this process's summand of it: zero for heads without rows here."""
        if self.all_rows is not None:
            return torch.bmm(self.all_rows, self.all_rows.mT)
        grams = self.rows.new_zeros(self.num_heads, self.rank, self.rank)
        grams[self.heads] = self.rows @ self.rows.mT
        return grams


class LocalProduct:
    """One product as far as it lies here, for one step: to each factor's target is added

        scale · gradient of ½‖W‖²_F with respect to the factor.

    Args:
        weights: the stored parameters, from left to right.
        targets: as in :class:`LocalFactor`, one for each.
        rank_dims, num_heads: how the parameters are stored: :data:`fnl_hf.RANK_DIMS`, and H.
        scale: a number or a 0-d tensor.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor | None],
        rank_dims: Sequence[int],
        num_heads: int,
        scale: float | torch.Tensor = 1.0,
    ):
        self.weights = weights
        inner = range(1, len(weights) - 1)
        self.factors = [
            LocalFactor(weight, target, num_heads, dim, is_middle=i in inner)
            for i, (weight, target, dim) in enumerate(zip(weights, targets, rank_dims, strict=True))
        ]
        self.scale = scale
        self.outer_factors = left, right = self.factors[0], self.factors[-1]
        self.is_sharded = any(factor.sharding is not None for factor in self.factors)
        self.is_updated = any(factor.target is not None for factor in self.factors)
        # If both factors are sharded alike along the rank, a head's Gram matrices are only needed where its rows are.
        self.has_local_grams = False
        if not inner and left.is_sharded_along_rank and right.is_sharded_along_rank:
            assert left.sharding is not None and right.sharding is not None
            self.has_local_grams = left.sharding[1:] == right.sharding[1:]

    @property
    def middle(self) -> torch.Tensor | None:
        """M (H, r, s) of a triple."""
        return self.factors[1].all_rows if len(self.factors) == 3 else None

    @property
    def nbytes(self) -> int:
        return sum(factor.weight.nbytes for factor in self.factors)
