"""A two-dimensional convolution whose kernel is a product of a horizontal and a vertical one.

Shapes: B batch, c_in and c_out channels, G groups, r rank in each of them, k_h and k_w kernel, h and w sizes of the
input, h' and w' of the output. The kernel of a group is seen as a matrix m x n, m = c_out/G·k_h and n = c_in/G·k_w.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fnl_hf.layers.base import FactorizedLayer, rows_to_expect, to_default_strides

OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")


class FactorizedConv2d(FactorizedLayer):
    """A 1×k convolution to r channels and a k×1 convolution (Khodak et al., figure 1), for each of G groups.

    The kernel is the (c_out/G·k_h) × (c_in/G·k_w) matrix U Vᵀ or U M Vᵀ of each group. Parameters: ``left`` Uᵀ
    (G·r, c_out/G, k_h, 1), ``middle`` M (G·r, r) or None, ``right`` Vᵀ (G·r, c_in/G, 1, k_w), ``bias`` (c_out,) or
    None. The layer applies the factors one after the other, or one convolution with the product, whichever takes fewer
    operations for the input.

    The arguments are those of ``nn.Conv2d``, plus the rank and ``deep``.
    """

    kinds = ("conv", "deep_conv")
    dense_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        *,
        bias: bool = True,
        deep: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, device="meta", **options)
        super().__init__(rank, dense.groups)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.padding_mode = dense.padding, dense.padding_mode
        self._padding_around = tuple(dense._reversed_padding_repeated_twice)  # left, right, top, bottom
        height, width = self.kernel_size
        left = (self.groups * rank, out_channels // self.groups, height, 1)
        right = (self.groups * rank, in_channels // self.groups, 1, width)
        self._add_parameters(left, right, deep, out_channels if bias else None, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, padding = input, self.padding  # (B, c_in, h, w)
        if self.padding_mode != "zeros":  # as torch does, whose own convolution only pads with zeros
            x, padding = F.pad(x, self._padding_around, self.padding_mode), (0, 0)
        way = self._choose_way(x, padding)
        if way == "one convolution":
            kernel = to_default_strides(self._product(self.factors()))  # (c_out, c_in/G, k_h, k_w)
            return F.conv2d(x, kernel, self.bias, self.stride, padding, self.dilation, self.groups)
        # Padding, stride and dilation along w belong to the 1×k_w kernel, those along h to the k_h×1 kernel.
        along_h, along_w = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        (stride_h, stride_w), (dilation_h, dilation_w) = self.stride, self.dilation
        x = F.conv2d(x, self.right, None, (1, stride_w), along_w, (1, dilation_w), self.groups)  # (B, G·r, h, w')
        left, *middle, _ = self.factors()  # (G, m, r), (G, r, r)
        if way == "with the middle":
            x = F.conv2d(x, self.middle[..., None, None], groups=self.groups)  # type: ignore[index]
        elif middle:
            left = left @ middle[0]
        vertical = left.reshape(self.out_channels, self.kernel_size[0], self.rank).mT[..., None]  # (c_out, r, k_h, 1)
        vertical = to_default_strides(vertical)
        return F.conv2d(x, vertical, self.bias, (stride_h, 1), along_h, (dilation_h, 1), self.groups)

    def _choose_way(self, x: torch.Tensor, padding: str | tuple[int, ...]) -> str:
        """Choose by the number of multiplications per group: "factor by factor", "with the middle" factor applied to
        the input, too, instead of multiplied into the left one, or "one convolution" with the product."""
        batch, height = rows_to_expect(math.prod(x.shape[:-3])), x.shape[-2]
        new_height, new_width = (self._output_size(x.shape[axis - 2], padding, axis) for axis in (0, 1))
        m, n = self.matrix_shape()
        fold_cost = self.rank**2 * m if self.deep else 0
        apply_cost = height * new_width * batch * self.rank**2 if self.deep else 0
        factors_cost = (height * n + new_height * m) * new_width * batch * self.rank + min(fold_cost, apply_cost)
        product_cost = m * n * self.rank + fold_cost
        dense_cost = new_height * new_width * batch * (self.out_channels // self.groups) * n * self.kernel_size[0]
        if factors_cost > dense_cost + product_cost:
            return "one convolution"
        return "with the middle" if apply_cost < fold_cost else "factor by factor"

    def _output_size(self, size: int, padding: str | tuple[int, ...], axis: int) -> int:
        """h' for axis 0, w' for axis 1, of h or w."""
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        around = {"valid": 0, "same": reach}[padding] if isinstance(padding, str) else 2 * padding[axis]
        return (size + around - reach - 1) // self.stride[axis] + 1

    @property
    def fan_in(self) -> int:
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def to_weight(self, matrices: torch.Tensor) -> torch.Tensor:
        # The rows of a matrix are (output channel, k_h), its columns (input channel, k_w).
        height, width = self.kernel_size
        split = matrices.reshape(self.groups, self.out_channels // self.groups, height, -1, width)
        return split.transpose(2, 3).reshape(self.out_channels, -1, height, width)

    def to_matrices(self, weight: torch.Tensor) -> torch.Tensor:
        split = weight.unflatten(0, (self.groups, -1)).transpose(2, 3)  # (G, c_out/G, k_h, c_in/G, k_w)
        return split.reshape(self.groups, -1, self.in_channels // self.groups * self.kernel_size[1])

    @classmethod
    def like(cls, layer: Any, rank: int, deep: bool, **factory: Any) -> "FactorizedConv2d":
        options = {name: getattr(layer, name) for name in OPTIONS}
        bias = layer.bias is not None
        return cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, rank, bias=bias, deep=deep, **options, **factory
        )

    def new_dense(self, **factory: Any) -> nn.Conv2d:
        kernel: Any = self.kernel_size
        options = {name: getattr(self, name) for name in OPTIONS} | factory
        return nn.Conv2d(self.in_channels, self.out_channels, kernel, bias=self.bias is not None, **options)

    def extra_repr(self) -> str:
        dense = self.new_dense(device="meta").extra_repr()
        return f"{dense}, rank={self.rank}, deep={self.deep}"
