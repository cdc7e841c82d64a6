"""Linear layers whose weight is a product."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fnl_hf.layers.base import FactorizedLayer, rows_to_expect


class FactorizedLinear(FactorizedLayer):
    """y = x (U Vᵀ)ᵀ + b, or x (U M Vᵀ)ᵀ + b.

    Parameters: ``left`` U (out_features, r), ``middle`` M (r, r) or None, ``right`` Vᵀ (r, in_features), ``bias``
    (out_features,) or None. The layer applies the factors one after the other, or multiplies them first, whichever
    takes fewer operations for the number of rows of x.
    """

    kinds = ("linear", "deep")
    dense_class: type[nn.Module] = nn.Linear

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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        m, n, r = self.out_features, self.in_features, self.rank
        rows = rows_to_expect(input.numel() // n)
        # Multiplications for M: applied to the input between the other two, or folded into the smaller of them.
        apply_cost, fold_cost = (0, 0) if self.middle is None else (rows * r * r, r * r * min(m, n))
        factors_cost = rows * r * (m + n) + min(apply_cost, fold_cost)
        dense_cost = rows * m * n + r * m * n + fold_cost  # of the product first, then of one dense layer
        if factors_cost <= dense_cost and self.middle is not None and apply_cost <= fold_cost:
            return F.linear(F.linear(F.linear(input, self.right), self.middle), self.left, self.bias)
        left, right = self._fold_middle()
        if factors_cost > dense_cost:
            return F.linear(input, left @ right, self.bias)
        return F.linear(F.linear(input, right), left, self.bias)

    def _fold_middle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """U (m, r) and Vᵀ (r, n), with M, if there is one, multiplied into the smaller of them."""
        if self.middle is None:
            return self.left, self.right
        if self.out_features <= self.in_features:
            return self.left @ self.middle, self.right
        return self.left, self.middle @ self.right

    @property
    def fan_in(self) -> int:
        return self.in_features

    @classmethod
    def like(cls, layer: Any, rank: int, deep: bool, **factory: Any) -> "FactorizedLinear":
        return cls(layer.in_features, layer.out_features, rank, layer.bias is not None, deep, **factory)

    def new_dense(self, **factory: Any) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **factory)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, deep={self.deep}"
        )


class FactorizedConv1D(FactorizedLinear):
    """:class:`FactorizedLinear` for the Conv1D of GPT-2, a Linear layer that stores its weight as
    (in_features, out_features)."""

    dense_class = Conv1D

    def to_weight(self, matrices: torch.Tensor) -> torch.Tensor:
        return matrices[0].T

    def to_matrices(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T[None]

    @classmethod
    def like(cls, layer: Any, rank: int, deep: bool, **factory: Any) -> "FactorizedConv1D":
        return cls(layer.nx, layer.nf, rank, True, deep, **factory)

    def new_dense(self, **factory: Any) -> nn.Module:
        with torch.device(factory.get("device") or torch.get_default_device()):
            return Conv1D(self.out_features, self.in_features).to(dtype=factory.get("dtype"))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        layer: Any = super().merged()
        if self.bias is None:  # Conv1D always has one
            layer.bias = nn.Parameter(layer.weight.new_zeros(self.out_features), requires_grad=False)
        return layer
