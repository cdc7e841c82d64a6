"""Factors of a dense weight by its SVD: spectral initialization and its overcomplete counterpart.

Pure functions on batches of matrices. Shapes: G matrices (groups of a convolution) W (G, m, n), rank r, factors
U (G, m, r), M (G, r, r) of a deep product, V (G, n, r); W ≈ U Vᵀ or U M Vᵀ.
"""

import math
from collections.abc import Iterator

import torch

# From here on, where a small rank is wanted, a randomized SVD: seconds instead of minutes for 4096 x 4096.
RANDOMIZED_FROM = 1024
OVERSAMPLING = 16
POWER_ITERATIONS = 6


def spectral_initialization(
    weight: torch.Tensor, rank: int, deep: bool = False, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Factors whose product is the best approximation of rank ``rank`` of each weight, or equals it where it can.

    With W = P Σ Qᵀ: U = P_r Σ_r^½ and V = Q_r Σ_r^½ (Khodak et al., section 3.1), deep: the cube root in all three.

    Where r exceeds the numerical rank k of W, filling up with zeros would leave directions without a gradient for ever.
    Instead (our choice: the paper has no such initialization for overcomplete layers) the remaining r − k columns of
    Ũ = [P_k Σ_k^½, X, 0] and Ṽ = [Q_k Σ_k^½, 0, Y] hold random directions X and Y, orthogonal to P and Q as long as
    there are any, of the size of the mean singular value; U = Ũ R and V = Ṽ R with a random orthogonal R keep the
    product, and each column of both moves. Deep: Ũ = [P_k Σ_k^⅓, X], Ṽ = [Q_k Σ_k^⅓, Y], M = Rᵀ diag(Σ_k^⅓, 0) S.

    Args:
        weight: (G, m, n), float32 or float64.
        rank: r, any positive number.
        seed: of what is drawn; the result is the same on every device up to rounding.

    Returns:
        U, V or U, M, V.
    """
    generator = torch.Generator().manual_seed(seed)
    p, sigma, q = truncated_svd(weight, min(rank, *weight.shape[1:]), seed)
    tolerance = torch.finfo(sigma.dtype).eps * max(weight.shape[1:]) * sigma[:, :1]
    ranks = (sigma > tolerance).sum(dim=1).tolist()
    if all(k == rank for k in ranks):
        root = sigma.pow(1 / 3 if deep else 1 / 2)[:, None]
        return (p * root, torch.diag_embed(root[:, 0]), q * root) if deep else (p * root, q * root)
    complete = _complete_deep if deep else _complete_pair
    completed = [complete(p[g], sigma[g], q[g], k, rank, generator) for g, k in enumerate(ranks)]
    return tuple(torch.stack(factors) for factors in zip(*completed))


def truncated_svd(weight: torch.Tensor, rank: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """P (G, m, r), Σ (G, r) and Q (G, n, r); randomized (Halko et al. 2011) for small ranks of large weights."""
    width = rank + OVERSAMPLING
    if min(weight.shape[1:]) < RANDOMIZED_FROM or 4 * width > min(weight.shape[1:]):
        p, sigma, qh = torch.linalg.svd(weight, full_matrices=False)
        return p[..., :rank], sigma[..., :rank], qh.mT[..., :rank]
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        p, sigma, q = torch.svd_lowrank(weight, width, POWER_ITERATIONS)
    return p[..., :rank], sigma[..., :rank], q[..., :rank]


def _complete_pair(p, sigma, q, k, rank, generator) -> Iterator[torch.Tensor]:
    root = sigma[:k].sqrt()
    extra = rank - k
    x = _new_directions(p[:, :k], (extra + 1) // 2, root, generator)
    y = _new_directions(q[:, :k], extra // 2, root, generator)
    rotation = _rotation(rank, p, generator)
    left = torch.cat([p[:, :k] * root, x, x.new_zeros(x.shape[0], extra // 2)], dim=1)
    right = torch.cat([q[:, :k] * root, y.new_zeros(y.shape[0], (extra + 1) // 2), y], dim=1)
    yield from (left @ rotation, right @ rotation)


def _complete_deep(p, sigma, q, k, rank, generator) -> Iterator[torch.Tensor]:
    root = sigma[:k].pow(1 / 3)
    left, right = (
        torch.cat([basis[:, :k] * root, _new_directions(basis[:, :k], rank - k, root, generator)], dim=1)
        for basis in (p, q)
    )
    first, second = (_rotation(rank, p, generator) for _ in range(2))
    middle = torch.cat([root, root.new_zeros(rank - k)]).diag()
    yield from (left @ first, first.T @ middle @ second, right @ second)


def _new_directions(basis, count, sizes, generator) -> torch.Tensor:
    """``count`` random columns, of the mean of ``sizes`` (1 if there are none), orthogonal to ``basis`` if possible."""
    rows, known = basis.shape
    drawn = torch.randn(rows, count, generator=generator, dtype=torch.float64).to(basis)
    if known + count <= rows:
        drawn = torch.linalg.qr(torch.cat([basis, drawn], dim=1)).Q[:, known:]
    else:
        drawn = drawn / math.sqrt(rows)
    return drawn * (sizes.mean() if len(sizes) else 1.0)


def _rotation(size, like, generator) -> torch.Tensor:
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(like)
