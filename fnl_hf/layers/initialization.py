"""Factors of a dense weight by its SVD: spectral initialization and its overcomplete counterpart.

Pure functions on batches of matrices. Shapes: G matrices (groups of a convolution) W (G, m, n) of full rank
k = min(m, n), rank r, factors U (G, m, r), M (G, r, r) of a deep product, V (G, n, r); W ≈ U Vᵀ or U M Vᵀ.
"""

import math

import torch
from torch.nn import functional

# From this size on, a randomized SVD is used if the rank is below half of the full rank.
RANDOMIZED_FROM = 1024
OVERSAMPLING = 16
POWER_ITERATIONS = 6
# Singular values whose root is less than this share of the mean are not split evenly, because such factors hardly move.
SMALLEST_SHARE = 1e-2


def spectral_initialization(
    weight: torch.Tensor, rank: int, deep: bool = False, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Factors whose product is the best approximation of rank ``rank`` of each weight, or equals it where it can.

    With W = P Σ Qᵀ: U = P_r Σ_r^½ and V = Q_r Σ_r^½ (Khodak et al., section 3.1), deep: the cube root in all three.
    Where σ is (nearly) 0, factors of that size would not move, so U (deep: U and V) has ordinary columns there and the
    other factor makes up for it.

    Beyond full rank k = min(m, n) the paper has no such initialization (our choice). Zeros would be directions that
    never receive a gradient, so the remaining r − k columns of Ũ = [P Σ^½, X, 0] and Ṽ = [Q Σ^½, 0, Y] hold random
    directions X and Y, orthogonal to P and Q as long as there are any; U = Ũ R and V = Ṽ R with a random orthogonal R
    keep the product, and each column of both moves. Deep: Ũ = [P Σ^⅓, X], Ṽ = [Q Σ^⅓, Y], M = Rᵀ diag(Σ^⅓, 0) S.

    Args:
        weight: (G, m, n), float32 or float64.
        rank: r, any positive number.
        seed: of what is drawn; the result is the same on every device up to rounding.

    Returns:
        U, V or U, M, V.
    """
    generator = torch.Generator().manual_seed(seed)
    full_rank = min(weight.shape[1:])
    p, sigma, q = truncated_svd(weight, min(rank, full_rank), generator)  # (G, m, r), (G, r), (G, n, r), r at most k
    root = sigma.pow(1 / 3 if deep else 1 / 2)  # (G, r)
    mean = root.mean(dim=1, keepdim=True)  # (G, 1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    # The norms of U's columns; V's columns have the rest of σ (deep: V's are U's, and the rest is on the diagonal of
    # M).
    size = torch.where(root > SMALLEST_SHARE * mean, root, mean)  # (G, r)
    left, middle, right = p * size[:, None], sigma / size**2, q * (size if deep else sigma / size)[:, None]
    extra = max(0, rank - full_rank)
    if extra and deep:
        left, right = (  # (G, m, r), (G, n, r)
            torch.cat([factor, _draw_directions(basis, extra, mean, generator)], dim=2)
            for factor, basis in ((left, p), (right, q))
        )
        first, second = (_draw_rotation(rank, weight, generator) for _ in range(2))  # (r, r) each
        zeros = middle.new_zeros(len(middle), extra)
        diagonal = torch.diag_embed(torch.cat([middle, zeros], dim=1))  # (G, r, r)
        return left @ first, first.T @ diagonal @ second, right @ second
    if extra:
        # Where U has a new direction, V has zeros, and the other way round, so the product does not change; the
        # rotation spreads both over all columns, so that each has a gradient.
        x = _draw_directions(p, (extra + 1) // 2, mean, generator)
        y = _draw_directions(q, extra // 2, mean, generator)
        left = torch.cat([left, x, torch.zeros_like(x)[..., : extra // 2]], dim=2)
        right = torch.cat([right, y.new_zeros(*y.shape[:2], (extra + 1) // 2), y], dim=2)
        rotation = _draw_rotation(rank, weight, generator)  # (r, r)
        return left @ rotation, right @ rotation
    return (left, torch.diag_embed(middle), right) if deep else (left, right)


def studied_initialization(
    weight: torch.Tensor, rank: int, init: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variants of the spectral initialization of low rank, U (G, m, r) and V (G, n, r), that a study compares.

    "ones": all singular values are one, U = P_r, V = Q_r (Kamalakara et al. 2022, arXiv 2209.13569). "rates": the same
    product as spectral, U √(r/n) and V √(n/r). To an optimizer whose steps do not depend on the size of the gradient,
    as Adam's do not, that is a rate of U n/r times that of V (arXiv 2402.12354 and 2406.06248 want it higher), with
    their geometric mean as before.
    """
    left, right = spectral_initialization(weight, rank, seed=seed)
    if init == "ones":
        return functional.normalize(left, dim=1), functional.normalize(right, dim=1)
    scale = (weight.shape[2] / rank) ** 0.5
    return left / scale, right * scale


def truncated_svd(weight: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """P (G, m, r), Σ (G, r) and Q (G, n, r); the largest entry of each column of P is positive.

    Randomized for small ranks of large weights (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    width = rank + OVERSAMPLING  # l
    if min(weight.shape[1:]) < RANDOMIZED_FROM or 2 * width > min(weight.shape[1:]):
        p, sigma, qh = torch.linalg.svd(weight, full_matrices=False)
    else:
        basis = torch.linalg.qr(weight @ _draw_normal(weight.shape[2], width, weight, generator)).Q  # (G, m, l)
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
        small, sigma, qh = torch.linalg.svd(basis.mT @ weight, full_matrices=False)  # of (G, l, n)
        p = basis @ small
    p, q = p[..., :rank], qh.mT[..., :rank]
    # An SVD does not determine the sign of each pair of columns, and libraries differ.
    signs = p.gather(1, p.abs().argmax(dim=1, keepdim=True)).sign()  # (G, 1, r)
    return p * signs, sigma[..., :rank], q * signs


def _draw_directions(basis: torch.Tensor, count: int, size: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``count`` random columns of norm ``size`` (G, 1), orthogonal to ``basis`` (G, m, k) if possible."""
    _, rows, known = basis.shape
    drawn = _draw_normal(rows, count, basis, generator).expand(len(basis), -1, -1)  # (G, m, count)
    if known + count <= rows:
        drawn = torch.linalg.qr(torch.cat([basis, drawn], dim=2)).Q[..., known:]
    else:
        drawn = drawn / math.sqrt(rows)  # columns of norm about 1
    return drawn * size[..., None]


def _draw_rotation(size: int, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(_draw_normal(size, size, like, generator)).Q


def _draw_normal(rows: int, columns: int, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator, device="cpu").to(like)
