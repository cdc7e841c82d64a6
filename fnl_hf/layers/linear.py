"""A Linear layer whose weight is a product."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fnl_hf.layers.base import FactorizedLayer, fan_in_stds


class FactorizedLinear(FactorizedLayer):
    """y = x (U Vᵀ)ᵀ + b, or x (U M Vᵀ)ᵀ + b.

    Parameters: ``left`` U (out_features, r), ``middle`` M (r, r) or None, ``right`` Vᵀ (r, in_features), ``bias``
    (out_features,) or None. Computed as two layers, or as one with the product, whichever costs fewer operations for
    the number of rows of x.
    """

    kinds = ("linear", "deep")
    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        deep: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(rank)
        self.in_features, self.out_features = in_features, out_features
        shapes = (out_features, rank), (rank, in_features)
        self._add_parameters(*shapes, deep, out_features if bias else None, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.left if self.middle is None else self.left @ self.middle
        rows, dense = x.numel() // self.in_features, self.in_features * self.out_features
        if rows * self.rank * (self.in_features + self.out_features) <= (rows + self.rank) * dense:
            return F.linear(F.linear(x, self.right), left, self.bias)
        return F.linear(x, left @ self.right, self.bias)

    def reset_parameters(self) -> None:
        self.draw_factors((3 * self.in_features) ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    def default_stds(self, std: float) -> tuple[float, float, float]:
        return fan_in_stds(std, self.in_features, left=self.rank, rank=self.rank, right=self.in_features)

    def to_weight(self, matrices: torch.Tensor) -> torch.Tensor:
        return matrices[0]

    def to_matrices(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[None]

    @classmethod
    def like(cls, layer: Any, rank: int, deep: bool, **factory: Any) -> "FactorizedLinear":
        return cls(layer.in_features, layer.out_features, rank, layer.bias is not None, deep, **factory)

    def new_dense(self, **factory: Any) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **factory)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, deep={self.deep}"
        )
