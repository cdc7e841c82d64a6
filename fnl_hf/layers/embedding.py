"""An embedding whose table is a product."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fnl_hf.layers.base import FactorizedLayer, rows_to_expect, sharded_like


class FactorizedEmbedding(FactorizedLayer):
    """An embedding whose table is U Vᵀ, or U M Vᵀ.

    Parameters: ``left`` U (num_embeddings, r), ``middle`` M (r, r) or None, ``right`` Vᵀ (r, embedding_dim). As in
    torch, the row of ``padding_idx`` in ``left`` gets no gradient and is zero in a new layer. If this row is zero in
    the dense table, it stays zero; any other value changes with ``right``.
    """

    kinds = ("linear", "deep")
    dense_class = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        deep: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(rank)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        shapes = (num_embeddings, rank), (rank, embedding_dim)
        self._add_parameters(*shapes, deep, None, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(input, self.left, self.padding_idx)
        if self.middle is None:
            found = rows @ self.right
        elif rows_to_expect(input.numel()) <= self.embedding_dim:
            found = rows @ self.middle @ self.right
        else:
            found = rows @ (self.middle @ self.right)
        return found.to(self.left.dtype)  # under autocast, like a dense table

    @torch.no_grad()
    def initialize_from(self, weight: torch.Tensor, init: str, seed: int) -> None:
        super().initialize_from(weight, init, seed)
        if self.padding_idx is not None and not weight[self.padding_idx].any():
            self._clear_padding()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.draw_factors(1.0)
        if self.padding_idx is not None:
            self._clear_padding()

    def _clear_padding(self) -> None:
        kept = torch.ones(self.left.shape, device=self.left.device)
        kept[self.padding_idx] = 0.0
        self.left.mul_(sharded_like(self.left, kept))  # an assignment to one row does not reach a sharded table

    def default_stds(self, std: float) -> tuple[float, float]:
        """A table has no inputs to sum over: U and V have equal size, so that the entries of the product have
        ``std``."""
        return ((std / self.rank**0.5) ** 0.5,) * 2

    @classmethod
    def like(cls, layer: Any, rank: int, deep: bool, **factory: Any) -> "FactorizedEmbedding":
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(layer, option):
                raise ValueError(
                    f"an Embedding with {option}={getattr(layer, option)} cannot be factorized: {option} is not "
                    "supported"
                )
        return cls(layer.num_embeddings, layer.embedding_dim, rank, layer.padding_idx, deep, **factory)

    def new_dense(self, **factory: Any) -> nn.Embedding:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, **factory)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}rank={self.rank}, deep={self.deep}"
