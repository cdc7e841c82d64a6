"""Where training with each decay ends, on problems whose minimisers are known, and how strong a decay is."""

import math

import pytest
import torch

from fnl_hf.optim.sgd import FrobeniusSGD

DECAY = 0.7
# Of every target: weight decay has to shrink the first four and to remove the last.
SINGULAR_VALUES = torch.tensor([2.5, 2.0, 1.5, 1.0, 0.5], dtype=torch.float64)
# Stored shapes. Ranks are above 5, so that the product can be any 5 × 7 matrix.
SHAPES = {"uv": [(5, 6), (7, 6)], "qk": [(12, 5), (12, 7)], "deep": [(5, 6), (6, 8), (8, 7)]}
HEADS = {"uv": 1, "qk": 2, "deep": 1}
KINDS = pytest.mark.parametrize("kind", SHAPES)


def targets(kind):
    """(H, 5, 7): random singular vectors, the singular values above."""
    generator = torch.Generator().manual_seed(5)
    left, _, right = torch.linalg.svd(torch.randn(HEADS[kind], 5, 7, generator=generator).double(), full_matrices=False)
    return left * SINGULAR_VALUES @ right


def products(kind, weights):
    """(H, 5, 7), written from the formulas U Vᵀ, Q_hᵀ K_h and U M Vᵀ."""
    if kind == "uv":
        return (weights[0] @ weights[1].T)[None]
    if kind == "qk":
        return torch.stack([q.T @ k for q, k in zip(weights[0].split(6), weights[1].split(6))])
    return (weights[0] @ weights[1] @ weights[2])[None]


def train(kind, **options):
    """The products after SGD on ½ Σ_h ‖W_h − T_h‖²_F."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.nn.Parameter(0.3 * torch.randn(s, generator=generator).double()) for s in SHAPES[kind]]
    group = {"params": weights, "product": kind, "num_heads": HEADS[kind]}
    optimizer = FrobeniusSGD([group], lr=0.15 * (1 - options.get("momentum", 0.0)), **options)
    goal = targets(kind)
    for _ in range(600):
        optimizer.zero_grad()
        (0.5 * (products(kind, weights) - goal).square().sum()).backward()
        optimizer.step()
    return products(kind, weights).detach()


def assert_reached(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-12)  # reached: 2e-13


# With W = U Vᵀ and ∇ = W − T, SGD with momentum stands still where its buffer b does, b = g + μb or b = g/(1 − μ):
#   coupled     g_U = ∇V + λWV, b = 0:                      (W − T + λW)V = 0,          W = T/(1 + λ)
#   decoupled   g_U = ∇V, and −ηλWV − ηb = 0 in each step:  (W − T + λ(1 − μ)W)V = 0,   W = T/(1 + λ(1 − μ))
# Nesterov's g + μb is g/(1 − μ) there too, so it changes nothing. Likewise for V, heads and U M Vᵀ.
@pytest.mark.parametrize(
    "options, strength",
    [
        ({}, 1.0),
        ({"decoupled": True}, 1.0),
        ({"momentum": 0.9}, 1.0),
        ({"momentum": 0.9, "nesterov": True}, 1.0),
        ({"momentum": 0.9, "fused": True}, 1.0),
        ({"momentum": 0.9, "decoupled": True}, 0.1),
        ({"momentum": 0.6, "nesterov": True, "decoupled": True}, 0.4),
    ],
    ids=str,
)
@KINDS
def test_frobenius_decay_shrinks_every_singular_value_alike(kind, options, strength):
    """½λ‖W‖²_F scales the target: W = T/(1 + λ)."""
    assert_reached(train(kind, frobenius_decay=DECAY, **options), targets(kind) / (1 + DECAY * strength))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize("kind", ["uv", "qk"])
def test_weight_decay_on_factors_lowers_every_singular_value_by_the_same_amount(kind, options):
    """½λ(‖U‖² + ‖V‖²) is λ times the nuclear norm of W at its least: singular values max(s − λ, 0)."""
    left, values, right = torch.linalg.svd(targets(kind), full_matrices=False)
    assert (values < DECAY).any(dim=1).all()
    expected = left * (values - DECAY).clamp(min=0).unsqueeze(1) @ right
    assert_reached(train(kind, weight_decay=DECAY, **options), expected)


def test_decoupled_decay_is_weaker_by_1_minus_momentum():
    """1,000 steps at η 0.1, λ 5e-4, momentum 0.9 without a loss: 0.61 of a weight is left coupled, 0.95 decoupled.

    With a frozen partner, V with VᵀV = I, Frobenius decay of U is ordinary weight decay: g = λU.
    """
    lr, decay, momentum, steps = 0.1, 5e-4, 0.9, 1000
    left = {}
    for decoupled in (False, True):
        partner = torch.nn.Parameter(torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64))[0], requires_grad=False)
        weight = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        start = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        group = {"params": [weight, partner], "product": "uv"}
        optimizer = FrobeniusSGD([group], lr=lr, momentum=momentum, frobenius_decay=decay, decoupled=decoupled)
        for _ in range(steps):
            optimizer.step()
        left[decoupled] = weight.norm().item() / start.norm().item()
        torch.testing.assert_close(weight.data, left[decoupled] * start, rtol=1e-12, atol=0)
    scalar, buffer = 1.0, 0.0
    for _ in range(steps):
        buffer = momentum * buffer + decay * scalar
        scalar -= lr * buffer
    assert left[False] == pytest.approx(scalar, rel=1e-12) and round(scalar, 2) == 0.61
    assert left[True] == pytest.approx((1 - lr * decay) ** steps, rel=1e-12) and round(left[True], 2) == 0.95
    # Momentum needs some ten steps to get going: hence 1%.
    assert math.log(left[True]) / math.log(left[False]) == pytest.approx(1 - momentum, rel=0.01)
