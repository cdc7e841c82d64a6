"""The common base of the factorized layers: factors, product, and conversion from and to a dense layer.

Shapes: G matrices m x n, one for each group of a convolution, else one; r rank; U (G, m, r), M (G, r, r) of a deep
layer, V (G, n, r).
"""

import math
from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fnl_hf.bert.factorization import RANK_DIMS, factor_views
from fnl_hf.layers.initialization import spectral_initialization, studied_initialization
from fnl_hf.products.discovery import register_product

INITS = ("spectral", "default")
# Under study (studies/definitions/low_rank.py): variants that are not better will be removed.
STUDIED_INITS = ("ones", "rates")
MODES = ("low_rank", "wide", "deep")


class Dense(NamedTuple):
    """A dense layer, and the largest difference of an entry of its weight from the exact product of the factors."""

    layer: nn.Module
    largest_error: float


class FactorizedLayer(nn.Module):
    """A layer whose weight is a product, W = U Vᵀ, or W = U M Vᵀ if it is deep (Khodak et al., ICLR 2021).

    The weight consists of G matrices m x n: one for each group of a convolution, otherwise one. U (m x r) is in the
    parameter ``left``, V (n x r) in ``right`` and M (r x r) in ``middle``, which is None in a product of two. The
    subclass defines how they are stored. They are registered as a product (:func:`fnl_hf.register_product`), so
    :func:`fnl_hf.frobenius_param_groups` and the diagnostics find them.
    """

    kinds: tuple[str, str]  # how a pair and a triple are stored: keys of fnl_hf.RANK_DIMS
    dense_class: type[nn.Module]
    left: nn.Parameter
    middle: nn.Parameter | None
    right: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, rank: int, groups: int = 1):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank ({rank}) must be at least 1")
        self.rank, self.groups = index(rank), groups
        #: ‖W − U Vᵀ‖_F/‖W‖_F of the dense weight that :meth:`from_dense` began with
        self.error: float | None = None

    def _add_parameters(
        self, left: Sequence[int], right: Sequence[int], deep: bool, bias: int | None, **factory: Any
    ) -> None:
        if 0 in (*left, *right):
            raise ValueError(f"sizes must be at least 1, but the factors would be {tuple(left)} and {tuple(right)}")
        middle = (self.groups * self.rank, self.rank) if deep else None
        shapes = {"left": left, "middle": middle, "right": right, "bias": None if bias is None else (bias,)}
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **factory)))
        names = ("left", "middle", "right") if deep else ("left", "right")
        register_product(self, self.kinds[deep], *names, num_heads=self.groups)
        if not self.left.is_meta:
            self.reset_parameters()

    @property
    def deep(self) -> bool:
        return self.middle is not None

    def factors(self) -> tuple[torch.Tensor, ...]:
        """U (G, m, r), M (G, r, r) if deep, and V (G, n, r): views of the parameters."""
        return factor_views(self._parameters_of_factors(), self.kinds[self.deep], self.groups)

    def _parameters_of_factors(self) -> tuple[torch.Tensor, ...]:
        return tuple(parameter for parameter in (self.left, self.middle, self.right) if parameter is not None)

    def _factor_shapes(self) -> list[torch.Size]:
        """The shapes of :meth:`factors`, whose views need not exist if the parameters are sharded."""
        alike = tuple(torch.empty(parameter.shape, device="meta") for parameter in self._parameters_of_factors())
        return [factor.shape for factor in factor_views(alike, self.kinds[self.deep], self.groups)]

    def matrix_shape(self) -> tuple[int, int]:
        """m and n."""
        left, *_, right = self._factor_shapes()
        return left[1], right[1]

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in the dtype of the factors, inside autocast too; gradients flow through it."""
        return self.multiply_out(self.left.dtype)

    def _product(self, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        left, *middle, right = factors
        return self.to_weight(left @ middle[0] @ right.mT if middle else left @ right.mT)

    def to_weight(self, matrices: torch.Tensor) -> torch.Tensor:
        """(G, m, n) in the shape of the dense layer's weight: here (m, n), with G = 1."""
        return matrices[0]

    def to_matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """A dense layer's weight as (G, m, n)."""
        return weight[None]

    def default_stds(self, std: float) -> tuple[float, float]:
        """Standard deviations of U and V that correspond to ``std`` of a dense weight: each factor has the dense
        weight's gain."""
        gain = std * math.sqrt(self.fan_in)
        return gain / math.sqrt(self.rank), gain / math.sqrt(self.matrix_shape()[1])

    @property
    def fan_in(self) -> int:
        """The number of inputs of each output of the dense layer."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw factors and bias from the global generator."""
        self.draw_factors((3 * self.fan_in) ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.fan_in**-0.5), self.fan_in**-0.5)

    @torch.no_grad()
    def draw_factors(self, std: float, generator: torch.Generator | None = None) -> None:
        """The default initialization, which is the paper's baseline: U and Vᵀ are normal, each drawn like a separate
        Linear layer, and M is the identity.

        If the dense weight has He et al.'s variance 2/fan_in, U has 2/r and V has 2/n, as in the authors' code, in
        convolutions too.

        Args:
            std: standard deviation of the dense weight; √fan_in times it is the gain of U and V.
        """
        left, *middle, right = self._factor_shapes()
        # On the CPU, so that the same seed draws the same layer on every device.
        u, v = (
            factor_std * torch.randn(shape, generator=generator, device="cpu")
            for shape, factor_std in zip((left, right), self.default_stds(std), strict=True)
        )
        self.set_factors(u, *(torch.eye(self.rank, device="cpu").expand(len(u), -1, -1) for _ in middle), v)

    @torch.no_grad()
    def set_factors(self, *factors: torch.Tensor) -> None:
        """Write U (G, m, r), M (G, r, r) if deep, and V (G, n, r) into the parameters, however these are stored."""
        rank_dims = RANK_DIMS[self.kinds[self.deep]]
        for parameter, factor, rank_dim in zip(self._parameters_of_factors(), factors, rank_dims, strict=True):
            # For M (G, r, r), the entry is one of two ranks; M is stored as it is.
            is_rank_first = rank_dim == 0 and parameter is not self.middle
            whole = (factor.mT if is_rank_first else factor).reshape(parameter.shape)
            parameter.copy_(sharded_like(parameter, whole))

    @classmethod
    def like(cls, layer: Any, rank: int, deep: bool, **factory: Any) -> "FactorizedLayer":
        """A factorized layer with the sizes and options of a dense one.

        Raises:
            ValueError: an option that a factorized layer does not support.
        """
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, layer: Any, rank: int, mode: str = "low_rank", init: str = "spectral", seed: int = 0
    ) -> "FactorizedLayer":
        """The factorized layer that replaces a dense one, on the same device, in the same dtype and with its bias.

        Args:
            layer: a ``dense_class`` with random or pretrained weights. On the meta device nothing is computed.
            rank: r; at most min(m, n) for "low_rank", at least min(m, n) for "wide" and "deep".
            mode: "low_rank" and "wide" have two factors, "deep" has three.
            init: "spectral" (:func:`~fnl_hf.layers.initialization.spectral_initialization`) or "default"
                (:meth:`draw_factors`). Experimental, for "low_rank" only: "ones" and "rates"
                (``studied_initialization`` in ``layers/initialization.py``).
            seed: seed of the random draws.

        Raises:
            ValueError: the rank does not suit the mode, or an option of the layer or its dtype cannot be factorized.
        """
        if init not in INITS + STUDIED_INITS:
            raise ValueError(f"init must be one of {INITS}, not {init!r}")
        if init in STUDIED_INITS and mode != "low_rank":
            raise ValueError(f"init {init!r} needs mode 'low_rank', not {mode!r}")
        dense = layer.weight
        if not dense.is_floating_point():
            raise ValueError(f"its weight has dtype {dense.dtype}: only real floating-point weights can be factorized")
        # On the meta device first, so that a wrong rank is refused before anything is drawn.
        new = cls.like(layer, rank, mode == "deep", device="meta", dtype=dense.dtype)
        check_rank(rank, new.matrix_shape(), mode)
        new.to_empty(device=dense.device)
        new.requires_grad_(dense.requires_grad).train(layer.training)
        if getattr(layer, "bias", None) is not None:
            new.bias = layer.bias
        if dense.device.type == "meta":
            return new
        exact = dense if dense.dtype == torch.float64 else dense.float()
        if not exact.isfinite().all():
            raise ValueError("its weight has values that are not finite")
        with torch.autocast(dense.device.type, enabled=False):
            new.initialize_from(exact, init, seed)
        return new

    def initialize_from(self, weight: torch.Tensor, init: str, seed: int) -> None:
        """Set the factors, and ``error``, from a dense weight in float32 or float64."""
        if init == "spectral":
            self.set_factors(*spectral_initialization(self.to_matrices(weight), self.rank, self.deep, seed))
        elif init in STUDIED_INITS:
            self.set_factors(*studied_initialization(self.to_matrices(weight), self.rank, init, seed))
        else:
            std = weight.square().mean().sqrt().item()
            self.draw_factors(std or (3 * self.fan_in) ** -0.5, torch.Generator().manual_seed(seed))
            if not std:  # a layer of zeros stays one, but one of its factors has a gradient
                self.left.zero_()
        norm = weight.norm()
        self.error = ((weight - self.multiply_out(weight.dtype)).norm() / norm).item() if norm else 0.0

    def multiply_out(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, computed in ``dtype``."""
        device = "cpu" if self.left.is_meta else self.left.device.type  # autocast does not know the meta device
        with torch.autocast(device, enabled=False):
            return self._product(tuple(factor.to(dtype) for factor in self.factors()))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The dense layer with the same outputs; the product is computed in float32 (float64 factors: in float64)."""
        product = self.multiply_out(torch.float64 if self.left.dtype == torch.float64 else torch.float32)
        layer = self.new_dense(device="meta", dtype=self.left.dtype)
        is_trainable = any(parameter.requires_grad for parameter in self._parameters_of_factors())
        layer.weight = nn.Parameter(to_default_strides(product.to(self.left.dtype)), requires_grad=is_trainable)
        if self.bias is not None:
            layer.bias = self.bias
        return layer.train(self.training)

    @torch.no_grad()
    def to_dense(self) -> Dense:
        """:meth:`merged`, and the largest difference of its weight from the product in float64."""
        layer: Any = self.merged()
        return Dense(layer, (layer.weight.double() - self.multiply_out(torch.float64)).abs().max().item())

    def new_dense(self, **factory: Any) -> Any:
        """A dense layer with the sizes and options of this one."""
        raise NotImplementedError


def check_rank(rank: int, shape: tuple[int, int], mode: str) -> None:
    """
    Raises:
        ValueError: an unknown mode, or a rank that does not suit it.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    full = min(shape)
    if mode == "low_rank" and not 1 <= rank <= full:
        raise ValueError(f"rank ({rank}) of a low_rank layer must be between 1 and {full}, the smaller size of {shape}")
    if mode != "low_rank" and rank < full:
        raise ValueError(f"rank ({rank}) of a {mode} layer must be at least {full}, the smaller size of {shape}")


def to_default_strides(weight: torch.Tensor) -> torch.Tensor:
    """Restore torch's default layout, including strides that are arbitrary because a size is 1: torch's convolutions on
    the CPU misread some of those strides and give wrong results, or crash."""
    return weight.reshape(-1).view(weight.shape)


def sharded_like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``whole``, sharded as ``parameter`` is. All processes get the values of the first one of the mesh."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device, parameter.dtype)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def rows_to_expect(rows: int) -> int:
    """The number of rows for choosing the order of multiplication: ``rows``, or a large number in an export, whose
    program must work for any number."""
    return 2**30 if torch.compiler.is_exporting() else rows
