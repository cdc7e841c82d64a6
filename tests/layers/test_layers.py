"""Factorized layers against dense ones in float64, over shapes, strides, groups, ranks and modes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from fnl_hf import find_products, frobenius_param_groups
from fnl_hf.layers import FactorizedConv1D, FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, initialization
from fnl_hf.layers.initialization import spectral_initialization, studied_initialization, truncated_svd

CLASSES = {
    nn.Linear: FactorizedLinear,
    Conv1D: FactorizedConv1D,
    nn.Conv2d: FactorizedConv2d,
    nn.Embedding: FactorizedEmbedding,
}
MODES = pytest.mark.parametrize("mode", ["low_rank", "wide", "deep"])


def factorized(layer, *args, **options):
    return CLASSES[type(layer)].from_dense(layer, *args, **options)


def seeded(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer.double()


def assert_close(actual, expected, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@st.composite
def convolutions(draw):
    """A layer, an input that is large enough for it, and m and n of its groups."""
    groups, kernel = draw(st.integers(1, 3)), (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    out_channels, in_channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, (1, 0), (2, 3), "valid", "same"]))
    stride = 1 if padding == "same" else (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    layer = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    batch = draw(st.sampled_from([(), (1,), (5,)]))
    x = torch.randn(*batch, in_channels, draw(st.integers(8, 11)), draw(st.integers(7, 12)), dtype=torch.float64)
    shape = out_channels // groups * kernel[0], in_channels // groups * kernel[1]
    return seeded(layer, draw(st.integers(0, 99))), x, shape


@st.composite
def ranks(draw, shape):
    """A mode and a rank that suits it and gives the weight exactly."""
    mode = draw(st.sampled_from(["low_rank", "wide", "deep"]))
    full = min(shape)
    return mode, full if mode == "low_rank" else draw(st.integers(full, 2 * full + 3))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_convolution_at_full_rank_is_the_dense_one_in_either_way(data):
    layer, x, shape = data.draw(convolutions())
    mode, rank = data.draw(ranks(shape))
    new = factorized(layer, rank, mode)
    if data.draw(st.booleans()):
        new.to(memory_format=torch.channels_last)
    if x.dim() == 4 and data.draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = layer(x)
    direction = torch.randn_like(expected)
    [gradient] = torch.autograd.grad(expected, x, direction)
    assert_close(new(x), expected)
    for way in ("factor by factor", "one convolution", *(["with the middle"] if mode == "deep" else [])):
        new._choose_way = lambda x, padding, way=way: way
        y = new(x)
        assert_close(y, expected)
        factors = [parameter for parameter in (new.left, new.middle, new.right) if parameter is not None]
        found, *gradients = torch.autograd.grad(y, [x, *factors], direction)
        assert_close(found, gradient)
        # Each factor's gradient, in the direction of the factor, is that of the product.
        inner = [(factor * own).sum() for factor, own in zip(factors, gradients)]
        without_bias = expected - (0 if layer.bias is None else layer.bias[:, None, None])
        assert_close(torch.stack(inner), (without_bias * direction).sum().expand(len(inner)), 1e-7)
    assert_close(new.weight, layer.weight)
    back = new.to_dense()
    assert repr(back.layer) == repr(layer) and back.largest_error == 0.0
    assert_close(back.layer(x), expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.booleans(), st.sampled_from([(), (1,), (2, 40)]), st.data())
def test_linear_and_embedding_at_full_rank_are_the_dense_ones(n, m, bias, batch, data):
    mode, rank = data.draw(ranks((m, n)))
    x = torch.randn(*batch, n, dtype=torch.float64)
    for layer in (seeded(nn.Linear(n, m, bias)), seeded(Conv1D(m, n))):
        new = factorized(layer, rank, mode)
        assert_close(new(x), layer(x))
        assert_close(new.weight, layer.weight)
        back = new.to_dense().layer
        assert repr(back) == repr(layer)
        assert_close(back(x), layer(x))
    table, ids = seeded(nn.Embedding(n, m)), torch.randint(n, (3, 2))
    assert_close(factorized(table, rank, mode)(ids), table(ids))
    assert_close(factorized(table, rank, mode).to_dense().layer(ids), table(ids))


@pytest.mark.parametrize("layer, groups", [(nn.Linear(7, 5), 1), (nn.Conv2d(6, 10, (3, 2), groups=2), 2)])
def test_below_full_rank_it_is_the_closest_matrix_of_that_rank(layer, groups):
    """By Eckart and Young, what is left has the norm of the singular values that were cut off."""
    seeded(layer)
    matrices = layer.weight[None]
    if groups == 2:  # rows (output channel, k_h), columns (input channel, k_w)
        rows = [[g[c, :, k].flatten() for c in range(5) for k in range(3)] for g in layer.weight.split(5)]
        matrices = torch.stack([torch.stack(group) for group in rows])
    sigma = torch.linalg.svdvals(matrices)
    new = factorized(layer, 2)
    lost = sigma[:, 2:].square().sum().sqrt()
    assert_close((new.weight - layer.weight).norm(), lost)
    assert new.error == pytest.approx((lost / layer.weight.norm()).item())
    for factor in new.factors():  # Σ is split evenly
        assert_close(torch.linalg.svdvals(factor), sigma[:, :2].sqrt())


def least_gradient(layer, x):
    """Over all directions of the ranks, the smallest norm of the gradients of the factors on both sides."""
    (layer(x) ** 3).sum().backward()
    twin = copy.deepcopy(layer)
    for name in ("left", "middle", "right"):
        if getattr(layer, name) is not None:
            setattr(twin, name, nn.Parameter(getattr(layer, name).grad))
    left, *middle, right = twin.factors()
    if middle:
        spaces = left.mT @ left + middle[0] @ middle[0].mT, right.mT @ right + middle[0].mT @ middle[0]
    else:
        spaces = (left.mT @ left + right.mT @ right,)
    return min(torch.linalg.eigvalsh(space).min().clamp(min=0).item() for space in spaces) ** 0.5


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(5, 7), torch.randn(11, 5, generator=torch.Generator().manual_seed(1))),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 7, 5, generator=torch.Generator().manual_seed(1))),
    ],
)
@pytest.mark.parametrize("mode, rank", [("wide", 6), ("wide", 9), ("deep", 6), ("deep", 9), ("wide", 40), ("deep", 40)])
@pytest.mark.parametrize("kept", [0, 3, 5])
def test_what_exceeds_the_rank_of_the_weight_is_exact_and_moves(layer, x, mode, rank, kept):
    """Also for weights that are zero or of lower rank themselves. In a deep layer a gradient of rank 5 moves 5
    directions and, through a weight of rank 3, 3 others."""
    layer = seeded(copy.deepcopy(layer))
    whole = factorized(layer, 3 if kept == 3 else min(layer.weight.shape[0], 5)) if kept else None
    with torch.no_grad():
        layer.weight.copy_(whole.weight if kept else torch.zeros_like(layer.weight))
    new = factorized(layer, rank, mode)
    assert_close(new.weight, layer.weight)
    if kept and rank <= kept + 5:
        assert least_gradient(new, x.double()) > 1e-2


@pytest.mark.parametrize("mode", ["low_rank", "wide", "deep"])
@pytest.mark.parametrize("largest", [1.0, 30.0])
def test_small_singular_values_are_kept(mode, largest):
    """In float32, with singular values from ``largest`` down to a millionth of it."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 60, generator=generator).double()).Q for size in (500, 60))
    weight = ((u * torch.logspace(0, -6, 60, dtype=torch.float64) * largest) @ v.T).float()
    left, *middle, right = spectral_initialization(weight[None], 60 if mode == "low_rank" else 70, mode == "deep")
    product = left.double() @ (middle[0].double() if middle else torch.eye(left.shape[2]).double()) @ right.double().mT
    assert_close(product[0], weight.double(), 1e-6 * largest)


def test_a_zero_weight_of_low_rank_can_learn():
    """Zeros in both factors would stay zeros for ever."""
    layer, goal = nn.Linear(5, 7, bias=False), torch.randn(7, 5)
    nn.init.zeros_(layer.weight)
    new = factorized(layer, 4)
    assert not new.weight.abs().max() > 1e-7
    optimizer = torch.optim.SGD(new.parameters(), lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        (new.weight - goal).square().sum().backward()
        optimizer.step()
    best = torch.linalg.svdvals(goal)[4:].norm()
    assert (new.weight - goal).norm().item() == pytest.approx(best.item(), rel=0.02, abs=1e-3)


def test_the_randomized_decomposition_is_near_the_best(monkeypatch):
    """On a spectrum that falls slowly, 1/√i, and against the full decomposition's error."""
    monkeypatch.setattr(initialization, "RANDOMIZED_FROM", 100)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(size, 200, generator=generator)).Q for size in (230, 210))
    weight = ((u * torch.arange(1, 201).rsqrt()) @ v.T)[None]
    p, sigma, q = truncated_svd(weight, 20, torch.Generator().manual_seed(3))
    assert p.shape == (1, 230, 20) and q.shape == (1, 210, 20)
    best = (1 / torch.arange(21, 201)).sum().sqrt()
    assert ((p * sigma[:, None]) @ q.mT - weight).norm() == pytest.approx(best.item(), rel=1e-3)
    state = torch.get_rng_state()
    again = truncated_svd(weight, 20, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    assert all(torch.equal(a, b) for a, b in zip(again, (p, sigma, q)))


def test_seeds_choose_what_is_drawn():
    layer = seeded(nn.Linear(5, 7))
    for options in ((9, "wide", "spectral"), (3, "low_rank", "default")):
        first, same, other = (factorized(layer, *options, seed).left for seed in (1, 1, 2))
        assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("mode, rank", [("low_rank", 90), ("deep", 200)])
def test_the_default_draws_each_factor_as_a_matrix_of_its_own(mode, rank):
    """As the authors do: nn.init.kaiming_normal_ of U (m, r) and of Vᵀ (r, n), where the dense layer has it."""
    convolution = nn.Conv2d(50, 70, 3)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    new = factorized(convolution, rank, mode, "default")
    left, *middle, right = new.factors()
    for factor, own in ((left[0], torch.empty(210, rank)), (right[0].T, torch.empty(rank, 150))):
        assert factor.shape == own.shape
        assert factor.std().item() == pytest.approx(nn.init.kaiming_normal_(own).std().item(), rel=0.05)
    assert len(middle) == (mode == "deep") and all(torch.equal(m[0], torch.eye(rank)) for m in middle)
    table = nn.Embedding(400, 300)
    assert factorized(table, 30, init="default").weight.std().item() == pytest.approx(1.0, rel=0.05)


@MODES
def test_a_new_layer_begins_like_a_dense_one(mode):
    """Bias and default gain of nn.Linear and nn.Conv2d, whose weights have variance 1/(3·fan_in)."""
    torch.manual_seed(0)
    deep = mode == "deep"
    layer = FactorizedConv2d(20, 40, 3, 60, groups=2, deep=deep)
    assert layer.right.var().item() == pytest.approx(1 / (3 * 30), rel=0.1)
    assert layer.left.var().item() == pytest.approx(1 / (3 * 60), rel=0.1)
    assert 0 < layer.bias.abs().max() <= 90**-0.5
    linear = FactorizedLinear(200, 70, 60, deep=deep)
    assert linear.right.var().item() == pytest.approx(1 / 600, rel=0.1)
    assert 0 < linear.bias.abs().max() <= 200**-0.5
    table = FactorizedEmbedding(300, 200, 60, padding_idx=2, deep=deep)
    assert not table(torch.tensor([2])).any() and table.weight.std().item() == pytest.approx(1.0, rel=0.1)


def test_state_dict_names_and_shapes():
    def shapes(layer):
        return {name: tuple(p.shape) for name, p in layer.state_dict().items()}

    expected = {"left": (14, 3, 3, 1), "middle": (14, 7), "right": (14, 2, 1, 5), "bias": (6,)}
    assert shapes(FactorizedConv2d(4, 6, (3, 5), 7, groups=2, deep=True)) == expected
    expected = {"left": (7, 3), "middle": (3, 3), "right": (3, 5), "bias": (7,)}
    assert shapes(FactorizedLinear(5, 7, 3, deep=True)) == expected
    assert shapes(FactorizedLinear(5, 7, 3, bias=False)) == {"left": (7, 3), "right": (3, 5)}
    assert shapes(FactorizedConv1D(5, 7, 3)) == {"left": (7, 3), "right": (3, 5), "bias": (7,)}
    assert shapes(FactorizedEmbedding(5, 7, 3)) == {"left": (5, 3), "right": (3, 7)}


def test_representation():
    assert repr(FactorizedLinear(5, 7, 3)) == (
        "FactorizedLinear(in_features=5, out_features=7, rank=3, bias=True, deep=False)"
    )
    assert "rank=3" in repr(FactorizedEmbedding(5, 7, 3, 1)) and "padding_idx=1" in repr(
        FactorizedEmbedding(5, 7, 3, 1)
    )
    assert repr(FactorizedConv2d(4, 6, 3, 2, stride=2, padding=1, bias=False, deep=True)) == (
        "FactorizedConv2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False, rank=2, deep=True)"
    )


def test_the_cheaper_way_is_taken():
    """Counted by torch's own counter, over sizes on both sides of the border."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(layer, x):
        with FlopCounterMode(display=False) as counter:
            layer(x)
        return counter.get_total_flops()

    seen, chosen = set(), set()
    for rows in (1, 5, 60):
        for rank in (3, 20, 70):
            layer = FactorizedLinear(40, 30, rank)
            ways = 2 * rows * rank * 70, 2 * (rows + rank) * 1200
            assert flops(layer, torch.randn(rows, 40)) == min(ways)
            seen.add(ways[0] < ways[1])
            for m, n in ((30, 40), (40, 30)):
                fold = 2 * rank**2 * 30  # M with the smaller of the other factors
                ways = [2 * rows * rank * 70 + 2 * rows * rank**2, 2 * rows * rank * 70 + fold]
                ways += [2 * (rows + rank) * 1200 + fold]
                assert flops(FactorizedLinear(n, m, rank, deep=True), torch.randn(rows, n)) == min(ways)
                chosen.add(ways.index(min(ways)))
            image, convolution = torch.randn(2, 4, rows + 4, 9), FactorizedConv2d(4, 6, 3, rank, padding=1, stride=2)
            height, width = (rows + 4 + 1) // 2, 5
            two = 2 * 2 * width * rank * 3 * ((rows + 4) * 4 + height * 6)
            one = 2 * 18 * rank * 12 + 2 * 2 * height * width * 6 * 4 * 9
            assert flops(convolution, image) == min(one, two)
            seen.add(two < one)
    assert seen == {True, False} and chosen == {0, 1, 2}


def test_a_convolution_exports_for_any_batch():
    """Between 2 and 100 images of 3x3 the cheaper way changes at rank 30."""
    layer, x = FactorizedConv2d(8, 8, 3, 30, padding=1).eval(), torch.randn(70, 8, 3, 3)
    sizes = ({0: torch.export.Dim("batch", min=2, max=100)},)
    assert {layer._choose_way(x[:rows], (1, 1)) for rows in (2, 70)} == {"factor by factor", "one convolution"}
    with torch.no_grad():
        assert_close(torch.export.export(layer, (x[:2],), dynamic_shapes=sizes).module()(x), layer(x), 1e-5)


def test_channels_last_and_half_precision():
    layer = nn.Conv2d(6, 10, 3, padding=1).to(memory_format=torch.channels_last)
    new = factorized(layer, 18).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 7, 5).to(memory_format=torch.channels_last)
    assert_close(new(x), layer(x), 1e-5)
    assert new(x).is_contiguous(memory_format=torch.channels_last)
    # Where strides are ambiguous torch's grouped convolutions in float32 gave other results, not an error.
    grouped, x = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2), torch.randn(4, 16, 2, 2)
    new = factorized(grouped, 24)
    new._choose_way = lambda x, padding: "factor by factor"
    assert_close(new(x.to(memory_format=torch.channels_last)), grouped(x), 1e-5)
    # ... and so did merged ones.
    grouped, x = nn.Conv2d(6, 2, (3, 1), groups=2, padding=(1, 0)), torch.randn(1, 6, 5, 7)
    assert_close(factorized(grouped, 3).to_dense().layer(x), grouped(x), 1e-5)
    half = factorized(nn.Linear(40, 40).bfloat16(), 40, "deep")
    dense, error = half.to_dense()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} == {dense.weight.dtype}
    exact = half.left.double() @ half.middle.double() @ half.right.double()
    assert error == (dense.weight.double() - exact).abs().max().item() > 0
    assert ((dense.weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all(), "rounded once"


def test_what_a_layer_carries_over():
    layer = nn.Linear(5, 7)
    layer.weight.requires_grad_(False)
    layer.eval()
    new = factorized(layer, 3)
    assert not new.training and new.bias is layer.bias
    assert [name for name, p in new.named_parameters() if p.requires_grad] == ["bias"]
    back = new.to_dense().layer
    assert not back.training and not back.weight.requires_grad and back.bias is layer.bias
    assert factorized(nn.Linear(5, 7), 3).to_dense().layer.weight.requires_grad
    new = factorized(nn.Linear(5, 7), 7, "deep")
    new.left.requires_grad_(False), new.right.requires_grad_(False)
    assert new.merged().weight.requires_grad, "its middle factor is trained"
    unbiased = FactorizedConv1D(5, 7, 3, bias=False, dtype=torch.float64)
    x = torch.ones(2, 5, dtype=torch.float64)
    assert_close(unbiased.merged()(x), unbiased(x))
    meta = factorized(nn.Conv2d(4, 6, 3, device="meta"), 3, "low_rank")
    assert all(p.is_meta for p in meta.parameters()) and meta.error is None
    assert meta.merged().weight.is_meta
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert_close(twin.weight, new.weight)
        assert len(find_products(twin)) == 1


def test_what_is_set_around_it_does_not_matter():
    """Autocast, a default device; channels last in memory; no number is drawn from the global generator."""
    layer = seeded(nn.Linear(5, 7)).float()
    whole, state = factorized(layer, 9, "wide"), torch.get_rng_state()
    expected = whole.left
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(factorized(layer, 9, "wide").left, expected)
        weight = whole.weight
    assert_close(weight, layer.weight, 1e-5)
    weight.sum().backward()
    assert_close(whole.left.grad, whole.right.detach().sum(1).expand(7, 9), 1e-5)
    with torch.device("meta"):
        assert torch.equal(factorized(layer, 9, "wide").left, expected)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert FactorizedLinear(5, 7, 1, deep=True, device="cpu").middle.item() == 1.0
    convolution = FactorizedConv2d(4, 6, 3, 2).to(memory_format=torch.channels_last)
    before = convolution.left.clone()
    convolution.reset_parameters()
    assert not torch.equal(convolution.left, before)


def test_zeros_are_no_dead_end():
    layer = nn.Linear(5, 7)
    nn.init.zeros_(layer.weight)
    for mode, rank in (("low_rank", 3), ("deep", 5)):
        new = factorized(layer, rank, mode, "default")
        new(torch.randn(11, 5)).square().sum().backward()
        assert not new.weight.any() and new.left.grad.any()


def test_a_padding_row_of_zeros_stays_zero():
    table = nn.Embedding(7, 5, padding_idx=2)
    new = factorized(table, 9, "wide")
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    new(torch.arange(7)).sum().backward()
    optimizer.step()
    assert not new(torch.tensor([2])).any() and new(torch.tensor([3])).any()


@MODES
def test_a_layer_is_a_product(mode):
    model = nn.Sequential(factorized(nn.Conv2d(4, 6, 3, groups=2), 6, mode), factorized(nn.Linear(5, 5), 5, mode))
    products = find_products(model)
    count = 3 if mode == "deep" else 2
    assert [(p.name, p.num_heads, len(p.weights)) for p in products] == [("0", 2, count), ("1", 1, count)]
    for product, layer in zip(products, model):
        for factor, own in zip(product.factors(), layer.factors()):
            assert torch.equal(factor, own)
    names = [group["name"] for group in frobenius_param_groups(model)]
    assert names == (["deep_conv", "deep", "plain"] if mode == "deep" else ["conv", "linear", "plain"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: factorized(nn.Linear(5, 7), 6), r"rank \(6\) of a low_rank layer must be between 1 and 5"),
        (lambda: factorized(nn.Linear(5, 7), 4, "wide"), r"rank \(4\) of a wide layer must be at least 5"),
        (lambda: factorized(nn.Conv2d(4, 6, 3, groups=2), 5, "deep"), r"rank \(5\) of a deep layer must be at least 6"),
        (lambda: factorized(nn.Linear(5, 7), 3, "narrow"), "mode must be one of .*, not 'narrow'"),
        (lambda: factorized(nn.Linear(5, 7), 3, init="svd"), "init must be one of .*, not 'svd'"),
        (lambda: factorized(nn.Linear(5, 7), 0), r"rank \(0\) must be at least 1"),
        (lambda: FactorizedLinear(0, 4, 1), r"sizes must be at least 1, .* \(4, 1\) and \(1, 0\)"),
        (lambda: factorized(nn.Linear(5, 7, dtype=torch.complex64), 3), "its weight has dtype torch.complex64"),
        (lambda: factorized(nn.Embedding(5, 7, max_norm=1.0), 3), "Embedding with max_norm=1.0 cannot be factorized"),
        (lambda: factorized(nn.Embedding(5, 7, sparse=True), 3), "Embedding with sparse=True"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_spectral_initialization_in_float32():
    """The issue's bound: a full-rank product within 1e-5."""
    weight = torch.randn(2, 60, 40, generator=torch.Generator().manual_seed(0))
    for deep, rank in ((False, 40), (False, 90), (True, 40), (True, 90)):
        left, *middle, right = spectral_initialization(weight, rank, deep)
        assert_close(left @ middle[0] @ right.mT if deep else left @ right.mT, weight, 1e-5)


def test_studied_initializations():
    """U 5 x 2, V 7 x 2: "ones" of singular values one, "rates" the spectral product, whose factors are √(7/2) away from
    their balance."""
    weight = torch.randn(1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, sigma, qh = torch.linalg.svd(weight)
    left, right = studied_initialization(weight, 2, "ones")
    torch.testing.assert_close(left @ right.mT, p[..., :2] @ qh[:, :2])
    torch.testing.assert_close(left.mT @ left, torch.eye(2, dtype=torch.float64)[None])
    left, right = studied_initialization(weight, 2, "rates")
    torch.testing.assert_close(left @ right.mT, p[..., :2] * sigma[:, None, :2] @ qh[:, :2])
    torch.testing.assert_close((left.mT @ left).diagonal(dim1=1, dim2=2), sigma[:, :2] * 2 / 7)
    torch.testing.assert_close((right.mT @ right).diagonal(dim1=1, dim2=2), sigma[:, :2] * 7 / 2)
