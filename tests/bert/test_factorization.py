"""The mathematics against dense products in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fnl_hf.bert.factorization import factor_views, gram, head_rows, product_norms, spectral_factors


def draw(heads, m, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(heads, m, k, generator=generator, dtype=torch.float64),
        torch.randn(heads, n, k, generator=generator, dtype=torch.float64),
    )


def test_head_rows_are_the_slice_of_each_head():
    query = torch.arange(6.0 * 5).reshape(6, 5)  # Linear(5, 6): three heads of rank 2
    output = torch.arange(5.0 * 6).reshape(5, 6)  # Linear(6, 5)
    for head in range(3):
        rows = slice(2 * head, 2 * head + 2)
        assert torch.equal(head_rows(query, 3, 0)[head], query[rows])
        assert torch.equal(head_rows(output, 3, 1)[head], output[:, rows].T)
    head_rows(query, 3, 0)[1] = 0.0
    assert query[2:4].abs().sum() == 0 and query[:2].abs().sum() > 0, "a view, not a copy"


def test_factor_views_give_the_products_of_attention():
    """x Q_h K_hᵀ xᵀ and x V_h O_hᵀ computed as a Linear layer does."""
    heads, rank, size = 3, 2, 5
    query, key, value = (torch.randn(heads * rank, size, dtype=torch.float64) for _ in range(3))
    output = torch.randn(size, heads * rank, dtype=torch.float64)
    x = torch.randn(7, size, dtype=torch.float64)
    q, k = factor_views((query, key), "qk", heads)
    scores = torch.einsum("si,hir,hjr,tj->hst", x, q, k, x)
    per_head = [(x @ query.T)[:, 2 * h : 2 * h + 2] @ (x @ key.T)[:, 2 * h : 2 * h + 2].T for h in range(heads)]
    torch.testing.assert_close(scores, torch.stack(per_head))
    v, o = factor_views((value, output), "vo", heads)
    torch.testing.assert_close(torch.einsum("si,hir,hjr->sj", x, v, o), (x @ value.T) @ output.T)


def test_factor_views_give_the_products_of_layers():
    """U Vᵀ and U M Vᵀ as Linear layers in a row compute them, and two convolutions, 1×3 and 3×1."""
    u, m, vt = torch.randn(7, 2), torch.randn(2, 3), torch.randn(3, 5)
    x = torch.randn(11, 5)
    up, middle, down = factor_views((u, m, vt), "deep", 1)
    torch.testing.assert_close(x @ (up @ middle @ down.mT)[0].T, x @ vt.T @ m.T @ u.T)
    up, down = factor_views((u, vt[:2]), "linear", 1)
    torch.testing.assert_close(x @ (up @ down.mT)[0].T, x @ vt[:2].T @ u.T)
    up, down = factor_views((u, vt[:2].T.contiguous()), "uv", 1)
    torch.testing.assert_close((up @ down.mT)[0], u @ vt[:2])
    first, second = torch.randn(2, 5, 1, 3), torch.randn(7, 2, 3, 1)
    image = torch.randn(1, 5, 4, 6)
    up, down = factor_views((second, first), "linear", 1)
    kernel = (up @ down.mT).view(7, 3, 5, 3).permute(0, 2, 1, 3)  # (c_out·k) x (c_in·k) back to (c_out, c_in, k, k)
    both = torch.conv2d(torch.conv2d(image, first), second)
    torch.testing.assert_close(torch.conv2d(image, kernel), both, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 11))
def test_product_norms_equal_the_dense_ones(heads, m, n, k):
    u, v = draw(heads, m, n, k)
    dense = torch.block_diag(*(u @ v.mT))
    norms = product_norms(u, v)
    torch.testing.assert_close(norms["frobenius"], torch.linalg.matrix_norm(dense, "fro"))
    torch.testing.assert_close(norms["nuclear"], torch.linalg.matrix_norm(dense, "nuc"))
    torch.testing.assert_close(norms["bound"], 0.5 * (u.square().sum() + v.square().sum()))
    assert norms["nuclear"] <= norms["bound"] * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(2, 9), st.data())
def test_spectral_factors_are_the_best_approximation_and_balanced(heads, m, n, k, data):
    u, v = draw(heads, m, n, k)
    rank = data.draw(st.integers(1, min(m, n, k)))
    left, right = spectral_factors(u, v, rank)
    assert left.shape == (heads, m, rank) and right.shape == (heads, n, rank)
    p, sigma, qh = torch.linalg.svd(u @ v.mT, full_matrices=False)
    truncated = p[..., :rank] @ torch.diag_embed(sigma[..., :rank]) @ qh[..., :rank, :]
    torch.testing.assert_close(left @ right.mT, truncated, atol=1e-10, rtol=1e-8)
    for factor in (left, right):  # UᵀU = VᵀV = Σ_r: split evenly
        torch.testing.assert_close(gram(factor), torch.diag_embed(sigma[..., :rank]), atol=1e-10, rtol=1e-8)


def test_spectral_factors_inside_autocast_are_those_outside():
    u, v = (factor.float() for factor in draw(2, 5, 7, 3))
    outside = spectral_factors(u, v, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spectral_factors(u, v, 2)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


def test_spectral_factors_refuse_a_rank_that_products_cannot_have():
    with pytest.raises(ValueError, match=r"rank \(4\) must be between 1 and 3"):
        spectral_factors(*draw(2, 5, 7, 3), rank=4)
