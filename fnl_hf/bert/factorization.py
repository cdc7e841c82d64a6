# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""The mathematics of products of two or three factors: views, norms, spectral initialization.

Pure functions on tensors. A product of a multi-head attention layer is a batch of H products U_h V_hᵀ.
Shapes: H heads, r rank of a product, m and n outer sizes of its two outer factors, E = H·r. No m×n matrix is ever
formed: the QR decomposition of both factors leaves an r×r core with the same singular values.

This file travels with checkpoints, so it imports nothing of ``fnl_hf``.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

# kind -> the dimension of each stored weight along which its rank runs. ``torch.nn.Linear`` stores (out, in), so query,
# key and value have their rank E = H·r in dimension 0, and the output projection has it in dimension 1. The middle
# factor of a triple has two ranks; its entry is the one that it shares with the left factor.
RANK_DIMS = {
    "qk": (0, 0),  # Q (E, m), K (E, n)
    "vo": (0, 1),  # V (E, n), O (m, E)
    "linear": (1, 0),  # U (m, r), Vᵀ (r, n): two Linear layers in a row, the later one first
    "uv": (1, 1),  # U (m, r), V (n, r), as the paper writes them
    "conv": (0, 0),  # Uᵀ (E, m, k, 1), Vᵀ (E, n, 1, k): convolutions in a row, the later one transposed, H groups
    "deep": (1, 0, 0),  # U (m, E), M (E, s), Vᵀ (H·s, n): three Linear layers in a row, the last one first
    "deep_conv": (0, 0, 0),  # Uᵀ (E, m, k, 1), M (E, s), Vᵀ (H·s, n, 1, k)
}


@dataclass(frozen=True)
class Product:
    """H products of two factors, U_h V_hᵀ, or of three, U_h M_h V_hᵀ, h = 1..H.

    ``kind`` is a key of ``RANK_DIMS``. ``weights`` are the stored parameters from left to right, and ``weight_names``
    are their names in the model. ``name`` is the name of the product ("bert.encoder.layer.0.attention.qk").
    """

    name: str
    kind: str
    num_heads: int
    weights: tuple[torch.nn.Parameter, ...]
    weight_names: tuple[str, ...]

    def factors(self) -> tuple[torch.Tensor, ...]:
        """U (H, m, r) and V (H, n, r), or U (H, m, r), M (H, r, s) and V (H, n, s), outside autograd.

        They are views of the weights, or copies if an outer size spans several dimensions (convolutions).
        """
        return self.split(tuple(w.detach() for w in self.weights))

    def split(self, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The factors in tensors that stand in for the weights: gathered copies, or copies in another dtype."""
        return factor_views(weights, self.kind, self.num_heads)


def head_rows(weight: torch.Tensor, num_heads: int, rank_dim: int) -> torch.Tensor:
    """A weight with H·r entries in ``rank_dim`` as a view (H, r, ...) with that dimension in front, split by heads."""
    return weight.movedim(rank_dim, 0).unflatten(0, (num_heads, -1))


def factor_views(weights: tuple[torch.Tensor, ...], kind: str, num_heads: int) -> tuple[torch.Tensor, ...]:
    """The factors of a product of this ``kind``, shaped as :meth:`Product.factors` has them."""
    dims = RANK_DIMS[kind]
    left, *middle, right = (head_rows(w, num_heads, dim).flatten(2) for w, dim in zip(weights, dims, strict=True))
    return (left.transpose(1, 2), *middle, right.transpose(1, 2))  # M's rows (H, r, s) are M itself


def validate_product(weights: tuple[torch.Tensor, ...], kind: str, num_heads: int, where: str) -> None:
    """Check that the stored weights are factors of a product of this ``kind``.

    Raises:
        ValueError: naming the product (``where``), the shapes and what they would have to be.
    """
    if kind not in RANK_DIMS:
        raise ValueError(f"{where}: kind must be one of {sorted(RANK_DIMS)}, not {kind!r}")
    dims, shapes = RANK_DIMS[kind], [tuple(weight.shape) for weight in weights]
    if len(weights) != len(dims):
        raise ValueError(f"{where}: products of kind {kind!r} have {len(dims)} factors, but {len(weights)} are given")
    if len({id(weight) for weight in weights}) < len(weights):
        raise ValueError(f"{where}: two factors are the same parameter")
    if any(len(shape) < 2 for shape in shapes):
        raise ValueError(
            f"{where}: factors must be matrices, but have the shapes {shapes}. FSDP1 and DeepSpeed ZeRO flatten "
            "parameters: use FSDP2 (fully_shard) instead"
        )
    ranks = [shape[dim] for shape, dim in zip(shapes, dims)]
    is_valid = ranks[0] == ranks[1] and num_heads >= 1 and ranks[0] % num_heads == 0 and min(ranks) >= 1
    needed = f"share one size, a multiple of num_heads ({num_heads}) above 0, in dimensions {dims}"
    if len(dims) == 3:  # the middle factor M (H·r, s) carries both ranks
        is_valid = is_valid and len(shapes[1]) == 2 and shapes[1][1] * num_heads == ranks[2]
        needed = f"match as U (m, r), M (r, s), Vᵀ (s, n) of each of num_heads ({num_heads}), r and s above 0"
    if not is_valid:
        raise ValueError(f"{where}: shapes {' and '.join(map(str, shapes))} must {needed}")


def gram(factor: torch.Tensor) -> torch.Tensor:
    """Fᵀ F of each head: (H, n, r) -> (H, r, r)."""
    return factor.transpose(-2, -1) @ factor


def core(left: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """A small matrix with the singular values of each product: R_U R_Vᵀ or R_U M R_Vᵀ of the QR decompositions.

    U (H, m, r), V (H, n, r) -> (H, min(m, r), min(n, r)); U, M (H, r, s), V (H, n, s) likewise.
    """
    small = torch.linalg.qr(left, mode="r").R  # (H, min(m, r), r)
    for middle in rest[:-1]:
        small = small @ middle  # (H, min(m, r), s)
    return small @ torch.linalg.qr(rest[-1], mode="r").R.transpose(-2, -1)


def singular_values(cores: torch.Tensor) -> torch.Tensor:
    """Singular values of a batch of matrices (..., n, r): (..., min(n, r)), all NaN for a matrix that is not finite.

    LAPACK refuses such a matrix, and the whole batch with it. They are replaced without synchronizing with the host.
    """
    is_finite = cores.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(torch.where(is_finite[..., None, None], cores, 0.0))
    return torch.where(is_finite[..., None], values, torch.nan)


def without_autocast(tensors: Iterable[torch.Tensor]) -> ExitStack:
    """A context in which products of these tensors are computed in their own dtype."""
    stack = ExitStack()
    for device in {tensor.device.type for tensor in tensors} - {"meta"}:  # autocast does not know this device
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def bound(left: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """½(‖U‖²_F + ‖V‖²_F) over all heads, or ½(‖U M‖²_F + ‖V‖²_F): at least the nuclear norm of the product."""
    for middle in rest[:-1]:
        left = left @ middle
    return 0.5 * (left.square().sum() + rest[-1].square().sum())


def product_norms(*factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Norms of H products taken together as one block-diagonal matrix, as 0-d tensors on the factors' device.

    The factors are U (H, m, r) and V (H, n, r), or U, M (H, r, s) and V (H, n, s), as :meth:`Product.factors` returns
    them. ``frobenius``: (Σ_h ‖U_h V_hᵀ‖²_F)^½. ``nuclear``: Σ_h ‖U_h V_hᵀ‖_*. ``bound``: ½(‖U‖²_F + ‖V‖²_F), the
    penalty of weight decay on the factors (Khodak et al., section 4); for three factors ½(‖U M‖²_F + ‖V‖²_F).
    The first two are NaN if a factor is not finite.
    """
    with without_autocast(factors):
        values = singular_values(core(*factors))
        return {"frobenius": values.square().sum().sqrt(), "nuclear": values.sum(), "bound": bound(*factors)}


def spectral_factors(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectral initialization: the best rank-``rank`` factors of each product, Σ split evenly.

    With U_h V_hᵀ = P Σ Qᵀ the result is P_r Σ_r^½ and Q_r Σ_r^½: (H, m, k), (H, n, k) -> (H, m, r), (H, n, r). At r = k
    this keeps the products and balances their factors (Khodak et al., section 3.1).

    The computation uses the dtype of the factors, even inside autocast.

    Raises:
        ValueError: ``rank`` is above min(m, n, k), the largest rank that the products can have.
    """
    largest = min(left.shape[-2], right.shape[-2], left.shape[-1])
    if not 1 <= rank <= largest:
        raise ValueError(f"rank ({rank}) must be between 1 and {largest}, the largest rank that the products can have")
    with without_autocast((left, right)):
        left_basis, left_core = torch.linalg.qr(left)  # (H, m, min(m, k)), (H, min(m, k), k)
        right_basis, right_core = torch.linalg.qr(right)
        p, sigma, qh = torch.linalg.svd(left_core @ right_core.transpose(-2, -1), full_matrices=False)
        root = sigma[..., None, :rank].sqrt()  # (H, 1, r)
        return left_basis @ (p[..., :rank] * root), right_basis @ (qh.transpose(-2, -1)[..., :rank] * root)


__all__ = [
    "RANK_DIMS",
    "Product",
    "bound",
    "core",
    "factor_views",
    "gram",
    "head_rows",
    "product_norms",
    "singular_values",
    "spectral_factors",
    "validate_product",
    "without_autocast",
]
