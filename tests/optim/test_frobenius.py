"""Frobenius decay against the gradient of ½‖W‖²_F of dense products, by autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fnl_hf import RANK_DIMS, FrobeniusAdamW, FrobeniusSGD
from fnl_hf.optim import frobenius
from fnl_hf.optim.local_factors import LocalProduct


def second_ranks(r, m):
    """The slice of a triple's second ranks of the head whose first ranks are the slice r."""
    head, s = r.start // (r.stop - r.start), m.shape[1]
    return slice(head * s, (head + 1) * s)


# The product of one head, whose ranks are the slice r, from the stored weights.
DENSE = {
    "qk": lambda r, q, k: q[r].T @ k[r],
    "vo": lambda r, v, o: v[r].T @ o[:, r].T,
    "linear": lambda r, u, vt: u[:, r] @ vt[r],
    "uv": lambda r, u, v: u[:, r] @ v[:, r].T,
    "conv": lambda r, u, v: u[r].flatten(1).T @ v[r].flatten(1),
    "deep": lambda r, u, m, vt: u[:, r] @ m[r] @ vt[second_ranks(r, m)],
    "deep_conv": lambda r, u, m, v: u[r].flatten(1).T @ m[r] @ v[second_ranks(r, m)].flatten(1),
}
# Shapes for outer sizes m and n, all ranks e of all h heads, and the second rank s of a triple.
SHAPES = {
    "qk": lambda m, n, e, s, h=1: [(e, m), (e, n)],
    "vo": lambda m, n, e, s, h=1: [(e, m), (n, e)],
    "linear": lambda m, n, e, s, h=1: [(m, e), (e, n)],
    "uv": lambda m, n, e, s, h=1: [(m, e), (n, e)],
    "conv": lambda m, n, e, s, h=1: [(e, m, 2, 1), (e, n, 1, 3)],
    "deep": lambda m, n, e, s, h=1: [(m, e), (e, s), (h * s, n)],
    "deep_conv": lambda m, n, e, s, h=1: [(e, m, 2, 1), (e, s), (h * s, n, 1, 3)],
}
KINDS = pytest.mark.parametrize("kind", sorted(SHAPES))
# With zero gradients and a fresh state the optimizers leave the factors alone: their step is the decay alone.
STEPS = {
    "adamw": lambda groups, **kwargs: FrobeniusAdamW(groups, weight_decay=0.0, **kwargs),
    "adamw fused": lambda groups, **kwargs: FrobeniusAdamW(groups, weight_decay=0.0, fused=True, **kwargs),
    "sgd": FrobeniusSGD,
    "sgd decoupled": lambda groups, **kwargs: FrobeniusSGD(groups, decoupled=True, **kwargs),
}


def reference_gradients(weights, kind, heads=1):
    leaves = [w.detach().double().requires_grad_() for w in weights]
    rank = leaves[0].shape[RANK_DIMS[kind][0]] // heads
    dense = [DENSE[kind](slice(h * rank, (h + 1) * rank), *leaves) for h in range(heads)]
    return torch.autograd.grad(0.5 * sum(w.square().sum() for w in dense), leaves)


def draw_weights(shapes, dtype=torch.float64, seed=3, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_zero_gradients(weights):
    for weight in weights:
        weight.grad = torch.zeros_like(weight)


def products_in(group):
    size = len(RANK_DIMS[group["product"]])
    return [group["params"][i : i + size] for i in range(0, len(group["params"]), size)]


def decayed(group):
    """Every factor after one step of decay, in float64; those without a gradient or frozen stay."""
    step = group["lr"] * group["frobenius_decay"]
    return [
        w.detach().double() - (step * gradient if w.grad is not None and w.requires_grad else 0.0)
        for weights in products_in(group)
        for w, gradient in zip(weights, reference_gradients(weights, group["product"], group["num_heads"]))
    ]


def assert_close_to(weight, expected, start):
    """Within rounding of the sizes of the factor and of its step; a factor that is not to move stays bitwise."""
    step = expected - start.double()
    if not step.any():
        assert torch.equal(weight, start)
    size = start.double().norm() + step.norm()
    assert (weight.detach().double() - expected).norm() <= size * (1e-6 if weight.dtype == torch.float32 else 1e-13)


def check_step(groups, step):
    """``step`` moves the factors of the groups as the reference does."""
    weights = [w for group in groups for w in group["params"]]
    start = [w.detach().clone() for w in weights]
    expected = [value for group in groups for value in decayed(group)]
    step()
    for weight, value, before in zip(weights, expected, start):
        assert_close_to(weight, value, before)


@st.composite
def product_groups(draw):
    """One to three products of a kind, alike in heads only; factors move, have no gradient or are frozen."""
    kind = draw(st.sampled_from(sorted(RANK_DIMS)))
    heads = draw(st.integers(1, 3))
    sizes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 5))
    shapes = [
        shape
        for m, n, r, s in draw(st.lists(sizes, min_size=1, max_size=3))
        for shape in SHAPES[kind](m, n, heads * r, s, heads)
    ]
    params = draw_weights(shapes, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(0, 99)))
    set_zero_gradients(params)
    for param in params:
        state = draw(st.sampled_from(["moves", "moves", "no gradient", "frozen", "frozen with a gradient"]))
        param.requires_grad_("frozen" not in state)
        if state in ("no gradient", "frozen"):
            param.grad = None
    decay, lr = draw(st.sampled_from([0.0, 0.05, 0.2])), draw(st.sampled_from([0.1, 0.03]))
    return {"params": params, "product": kind, "num_heads": heads, "frobenius_decay": decay, "lr": lr}


@settings(max_examples=300, deadline=None)
@given(st.lists(product_groups(), min_size=1, max_size=3), st.sampled_from(sorted(STEPS)))
def test_a_step_is_the_gradient_of_the_penalty_on_dense_products(groups, name):
    bystander = draw_weights([(3, 2)])
    set_zero_gradients(bystander)
    start = bystander[0].detach().clone()
    check_step(groups, STEPS[name]([*groups, {"params": bystander}], lr=0.5, frobenius_decay=0.7).step)
    assert torch.equal(bystander[0], start)


@KINDS
@pytest.mark.parametrize("name", sorted(STEPS))
def test_all_factors_are_decayed_with_the_values_before_the_step(kind, name):
    """With a step as large as the factors it would show if a factor saw its partner decayed already."""
    params = draw_weights(SHAPES[kind](5, 7, 2, 3) * 2)
    set_zero_gradients(params)
    group = {"params": params, "product": kind, "num_heads": 1, "frobenius_decay": 2.0, "lr": 0.5}
    first = products_in(group)[0]
    late = [w - g for w, g in zip(first, reference_gradients(first, kind))][:-1] + [first[-1]]
    right, wrong = reference_gradients(first, kind)[-1], reference_gradients(late, kind)[-1]
    assert (right - wrong).norm() > 0.5 * right.norm(), "the order matters"
    check_step([group], STEPS[name]([group]).step)


def mixed_groups():
    """Pairs of heads, triples and convolutions; some shapes alike within and across groups, some factors unmoved."""
    pairs = draw_weights([*SHAPES["qk"](5, 7, 6, 0), *SHAPES["qk"](7, 5, 6, 0), *SHAPES["qk"](2, 5, 9, 0)], seed=1)
    halves = draw_weights([*SHAPES["vo"](5, 7, 4, 0), *SHAPES["vo"](5, 3, 6, 0)], seed=2)
    singles = draw_weights([*SHAPES["uv"](5, 7, 2, 0), *SHAPES["uv"](7, 7, 2, 0)], torch.float32, seed=3)
    triples = draw_weights([*SHAPES["deep"](5, 7, 2, 3), *SHAPES["deep"](7, 5, 3, 2)], seed=4)
    groups = [
        {"params": pairs, "product": "qk", "num_heads": 3},
        {"params": halves, "product": "vo", "num_heads": 2},
        {"params": singles, "product": "uv", "num_heads": 1},
        {"params": triples, "product": "deep", "num_heads": 1},
    ]
    for index, group in enumerate(groups):
        group |= {"lr": 0.1 * (index + 1), "frobenius_decay": 0.3}
        set_zero_gradients(group["params"])
    pairs[1].grad = triples[3].grad = None
    halves[2].requires_grad_(False)
    return groups


def stack_on_the_cpu(monkeypatch):
    """Chunks as on an accelerator: several products, here always all of them. Returns the chunks' sizes."""
    one_at_a_time, sizes = frobenius._chunks, []

    def chunks(decays):
        chunk = [product for single in one_at_a_time(decays) for product in single]
        if chunk:
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(frobenius, "_chunks", chunks)
    return sizes


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_stacked_products_are_decayed_alike(name, tensor_lr, monkeypatch):
    """``name`` because factors are overwritten by decoupled decay only."""
    sizes = stack_on_the_cpu(monkeypatch)
    groups = mixed_groups()
    lrs = [torch.tensor(g["lr"], dtype=torch.float64) if tensor_lr else g["lr"] for g in groups]
    check_step(groups, STEPS[name]([g | {"lr": lr} for g, lr in zip(groups, lrs)]).step)
    assert sizes == [9]


def test_a_stack_is_forgotten_after_the_step(monkeypatch):
    """A frozen factor's copy in the stack must not come back when it has moved meanwhile."""
    sizes = stack_on_the_cpu(monkeypatch)
    first, second = draw_weights([(6, 5), (6, 7)], seed=1), draw_weights([(6, 5), (6, 7)], seed=2)
    first[0].requires_grad_(False)
    group = {"params": [*first, *second], "product": "qk", "num_heads": 2, "frobenius_decay": 0.3}
    set_zero_gradients(group["params"])
    optimizer = FrobeniusSGD([group], lr=0.1, decoupled=True)
    optimizer.step()
    first[0].requires_grad_(True).data.mul_(2.0)
    for weight in second:
        weight.grad = None
    check_step([group | {"lr": 0.1}], optimizer.step)
    assert sizes == [2, 1]


def conv_pair(memory_format, dtype=torch.float64):
    """A k×1 convolution after a 1×k one: c_in 5, r 2, c_out 7, k 3."""
    pair = [w.detach().to(memory_format=memory_format) for w in draw_weights([(7, 2, 3, 1), (2, 5, 1, 3)], dtype)]
    pair = [torch.nn.Parameter(w) for w in pair]
    set_zero_gradients(pair)
    return pair


@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stacked", [False, True])
def test_factors_of_a_convolution(name, memory_format, stacked, monkeypatch):
    """The penalty is that of the k×k kernel: the dense (c_out·k) × (c_in·k) product."""
    if stacked:
        stack_on_the_cpu(monkeypatch)
    params = conv_pair(memory_format) + conv_pair(memory_format)
    leaves = [w.detach().clone().requires_grad_() for w in params]
    kernels = [torch.einsum("orxa,rcay->ocxy", *leaves[i : i + 2]) for i in (0, 2)]
    gradients = torch.autograd.grad(0.5 * sum(kernel.square().sum() for kernel in kernels), leaves)
    STEPS[name]([{"params": params, "product": "linear"}], lr=0.1, frobenius_decay=0.5).step()
    for weight, leaf, gradient in zip(params, leaves, gradients):
        torch.testing.assert_close(weight.detach(), leaf.detach() - 0.05 * gradient, rtol=1e-12, atol=1e-14)
        assert weight.is_contiguous(memory_format=memory_format)


def test_chunks_hold_one_product_on_a_cpu_and_are_bounded_in_bytes_elsewhere(monkeypatch):
    def decays(device, sizes, moves=True):
        for n in sizes:
            pair = tuple(torch.empty(2, n, device=device) for _ in range(2))
            yield LocalProduct(pair, pair if moves else (None, None), (0, 0), 1)

    def lengths(*args, **kwargs):
        return [len(chunk) for chunk in frobenius._chunks(list(decays(*args, **kwargs)))]

    monkeypatch.setattr(frobenius, "STACK_BYTES", 2 * 2 * 4 * 10)  # a pair has 2·2·n numbers of four bytes
    assert lengths("meta", [5, 5, 3, 7, 1, 11, 2]) == [2, 2, 1, 1, 1], "sums 10, 10, then 1, 11 and 2 alone"
    assert lengths("cpu", [5, 5, 3]) == [1, 1, 1]
    assert lengths("meta", [5, 5], moves=False) == lengths("cpu", [5], moves=False) == []


@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_learning_rate_may_be_a_tensor(name, shape):
    groups = mixed_groups()
    lrs = [torch.full(shape, g["lr"], dtype=torch.float64) for g in groups]
    check_step(groups, STEPS[name]([g | {"lr": lr} for g, lr in zip(groups, lrs)]).step)


@pytest.mark.parametrize("name", ["adamw fused", "sgd", "sgd decoupled"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_an_overflow_under_loss_scaling_skips_the_decay(name, found):
    """``found_inf`` and ``grad_scale`` as torch.amp.GradScaler sets them for a kernel that looks at them itself."""
    params = draw_weights(SHAPES["linear"](5, 7, 2, 0), torch.float32)
    set_zero_gradients(params)
    group = {"params": params, "product": "linear", "num_heads": 1, "frobenius_decay": 0.3, "lr": 0.1}
    optimizer = STEPS[name]([dict(group)], **({"fused": True} if name != "adamw fused" else {}))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(found)
    if found:
        group["frobenius_decay"] = 0.0  # of the reference alone
        params[0].grad[0, 0] = float("inf")
    check_step([group], optimizer.step)


def test_overflows_on_two_devices_do_not_turn_the_decay_around():
    """Then ``found_inf`` is 2, their sum."""
    params = draw_weights(SHAPES["linear"](5, 7, 2, 0), torch.float32)
    set_zero_gradients(params)
    start = [weight.detach().clone() for weight in params]
    optimizer = STEPS["adamw fused"]([{"params": params, "product": "linear", "frobenius_decay": 0.3}], lr=0.1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(2.0)
    optimizer.step()
    assert all(torch.equal(weight, before) for weight, before in zip(params, start))
