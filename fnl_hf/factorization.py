# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""The mathematics of products of two factors: head views, norms, spectral initialization.

Pure functions on tensors. A product of a multi-head attention layer is a batch of H products U_h V_hᵀ.
Shapes: H heads, r rank of a product, m and n outer sizes of the two factors, E = H·r. No m×n matrix is ever formed:
the QR decomposition of both factors leaves an r×r core with the same singular values.

This file travels with checkpoints, so it imports nothing of ``fnl_hf``.
"""

from dataclasses import dataclass

import torch

# kind -> the dimension of each stored weight that E = H·r runs along. ``torch.nn.Linear`` stores (out, in), so query,
# key and value hold their rank in dimension 0 and the output projection holds it in dimension 1.
RANK_DIMS = {"qk": (0, 0), "vo": (0, 1)}


@dataclass(frozen=True)
class FactorPair:
    """One layer's H products: Q_h K_hᵀ (``kind="qk"``) or V_h O_hᵀ (``kind="vo"``), h = 1..H.

    ``left`` and ``right`` are the stored weights, ``left_name`` and ``right_name`` their names in the model, ``name``
    the product's own ("bert.encoder.layer.0.attention.qk").
    """

    name: str
    kind: str
    num_heads: int
    left: torch.nn.Parameter
    right: torch.nn.Parameter
    left_name: str
    right_name: str

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views U (H, m, r) and V (H, n, r) of the two weights, without copying and outside autograd."""
        return pair_views(self.left.detach(), self.right.detach(), self.kind, self.num_heads)


def head_view(weight: torch.Tensor, num_heads: int, rank_dim: int) -> torch.Tensor:
    """The factors of all heads as one view (H, n, r) of a weight (E, n) (``rank_dim=0``) or (n, E) (``rank_dim=1``)."""
    if rank_dim == 0:
        return weight.unflatten(0, (num_heads, -1)).transpose(1, 2)
    return weight.unflatten(1, (num_heads, -1)).transpose(0, 1)


def pair_views(left: torch.Tensor, right: torch.Tensor, kind: str, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views U (H, m, r) and V (H, n, r) of the two stored weights of a product of this ``kind``."""
    left_dim, right_dim = RANK_DIMS[kind]
    return head_view(left, num_heads, left_dim), head_view(right, num_heads, right_dim)


def gram(factor: torch.Tensor) -> torch.Tensor:
    """Fᵀ F of each head: (H, n, r) -> (H, r, r)."""
    return factor.transpose(-2, -1) @ factor


def singular_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Singular values of each product U_h V_hᵀ, descending: (H, m, r), (H, n, r) -> (H, min(m, n, r))."""
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right, mode="r").R.transpose(-2, -1)
    return torch.linalg.svdvals(core)


def product_norms(left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
    """Norms of H products taken together as one block-diagonal matrix, as 0-d tensors on the factors' device.

    ``frobenius``: (Σ_h ‖U_h V_hᵀ‖²_F)^½. ``nuclear``: Σ_h ‖U_h V_hᵀ‖_*. ``bound``: ½(‖U‖²_F + ‖V‖²_F) >= nuclear, what
    weight decay on the factors penalizes (Khodak et al., section 4).
    """
    values = singular_values(left, right)
    return {
        "frobenius": values.square().sum().sqrt(),
        "nuclear": values.sum(),
        "bound": 0.5 * (left.square().sum() + right.square().sum()),
    }


def spectral_factors(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectral initialization: the best rank-``rank`` factors of each product, Σ split evenly.

    With U_h V_hᵀ = P Σ Qᵀ: P_r Σ_r^½ and Q_r Σ_r^½, so (H, m, k), (H, n, k) -> (H, m, r), (H, n, r). At r = k the
    products are kept and their factors balanced (Khodak et al., section 3.1).

    Raises:
        ValueError: ``rank`` above the rank min(m, n, k) that the products can have.
    """
    largest = min(left.shape[-2], right.shape[-2], left.shape[-1])
    if not 1 <= rank <= largest:
        raise ValueError(f"rank ({rank}) must be between 1 and {largest}, the largest rank the products can have")
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right)
    p, sigma, qh = torch.linalg.svd(left_core @ right_core.transpose(-2, -1), full_matrices=False)
    root = sigma[..., None, :rank].sqrt()
    return left_basis @ (p[..., :rank] * root), right_basis @ (qh.transpose(-2, -1)[..., :rank] * root)


__all__ = [
    "RANK_DIMS",
    "FactorPair",
    "gram",
    "head_view",
    "pair_views",
    "product_norms",
    "singular_values",
    "spectral_factors",
]
