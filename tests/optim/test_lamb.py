"""LAMB against pytorch_optimizer, examples worked by hand and a float64 reference written from You et al.'s formula."""

import copy
import functools
import math
import pickle

import pytest
import pytorch_optimizer
import torch

from fnl_hf import FrobeniusAdamW
from fnl_hf.optim import buckets
from fnl_hf.optim.lamb import FrobeniusLamb, Lamb

INFINITY = float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
KERNELS = pytest.mark.parametrize(
    "kernel",
    [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}],
    ids=["fused", "foreach", "neither"],
)


def parameter(values, gradient=None, dtype=torch.float64):
    """A parameter with these values and this gradient."""
    weight = torch.nn.Parameter(torch.as_tensor(values, dtype=dtype))
    weight.grad = None if gradient is None else torch.as_tensor(gradient, dtype=dtype).clone()
    return weight


def random_parameters(shapes, dtype=torch.float64, seed=3):
    """Drawn in float32, so that all dtypes start from equal values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in parameters:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def worst_error(actual, expected):
    """The largest relative error, in norm, over the parameters."""
    return max(((a.detach() - e).norm() / e.norm()).item() for a, e in zip(actual, expected))


# --- Against another implementation -----------------------------------------------------------------------------------


def twins(dtype, decay, max_norm, eps):
    """Ours and pytorch_optimizer's on equal parameters. Theirs has no full bias correction (``adam_debias`` leaves the
    step size at lr), always clamps ‖w‖ at 10 and takes vectors without decay and ratio only in a group of their own."""
    mine = random_parameters([(2, 3), (5, 7), (3, 2, 5), (7,), ()], dtype)
    mine[1].data.mul_(5)
    assert mine[1].norm() > 2 * 10 > 10 > mine[0].norm()  # the clamp acts on one of them
    theirs = copy.deepcopy(mine)
    ours = Lamb(
        mine, lr=0.02, eps=eps, weight_decay=0.1, decay=decay, bias_correction=False, weight_norm_clamp=(0.0, 10.0),
        max_grad_norm=max_norm,
    )  # fmt: skip
    other = pytorch_optimizer.Lamb(
        [{"params": theirs[:3], "weight_decay": 0.1}, {"params": theirs[3:], "adam": True}],
        lr=0.02, eps=eps, adam_debias=True, weight_decouple=decay == "decoupled",
        pre_norm=max_norm is not None, max_grad_norm=max_norm or 0.0,
    )  # fmt: skip
    return (mine, ours), (theirs, other)


# Theirs divides by ‖u‖ + ε, ours by ‖u‖, so ε is tiny. When it clips, its scale is max/(‖g‖ + ε) in float32, ours
# max/(‖g‖ + 1e-6): there ε is 1e-6, and ‖u‖ of 2 or more leaves 5e-7 of each update between them.
@pytest.mark.parametrize("max_norm, eps, tolerance", [(None, 1e-13, 1e-13), (2.0, 1e-6, 1e-6)], ids=["free", "clipped"])
@pytest.mark.parametrize("decay", ["in_trust_ratio", "decoupled"])
@DTYPES
def test_thirty_steps_equal_another_implementation(dtype, decay, max_norm, eps, tolerance):
    pairs = twins(dtype, decay, max_norm, eps)
    start = [p.detach().clone() for p in pairs[0][0]]
    for step in range(30):
        for parameters, optimizer in pairs:
            set_gradients(parameters, step)
            optimizer.step()
    (mine, ours), (theirs, _) = pairs
    assert worst_error(mine, [p.detach() for p in theirs]) < (tolerance if dtype == torch.float64 else 2e-6)
    assert all((p - s).norm() > 0.05 * s.norm() for p, s in zip(mine, start))
    assert all(state["step"] == 30 for state in ours.state.values())  # without bias correction too


# --- Against the formula, 200 steps -----------------------------------------------------------------------------------

# Three heads of rank 2 (5 × 7), a product of three (5 × 2, 2 × 3, 3 × 7), a matrix and a vector.
SHAPES = [(6, 5), (6, 7), (5, 2), (2, 3), (3, 7), (7, 3), (7,)]
BETA1, BETA2, EPS = 0.8, 0.97, 1e-4
FROBENIUS, WEIGHT = 0.02, 0.3  # λ of the products, λ of the matrix
MAX_NORM = 15.0
RATES = [0.03 * min((t + 1) / 20, (200 - t) / 180) for t in range(200)]


def penalty(weights):
    """Its gradient is the decay: half the squared norms of the products, head by head, and of the matrix."""
    query, key, left, middle, right, matrix, _ = weights
    products = [q.T @ k for q, k in zip(query.split(2), key.split(2))] + [left @ middle @ right]
    return 0.5 * FROBENIUS * sum(p.square().sum() for p in products) + 0.5 * WEIGHT * matrix.square().sum()


def training_gradients(weights, step):
    """A pull to 1 and noise that is stronger in some steps than in others: clipping acts in part of them."""
    noise = random_parameters(SHAPES, seed=1000 + step)
    return [w.detach() - 1 + (step % 4) * n.detach().to(w.dtype) for w, n in zip(weights, noise)]


@functools.lru_cache
def reference(inside=(), trust=True, max_norm=None, decays=True):
    """The formula, one parameter after another. The decay of the parameters ``inside`` is part of u, that of the others
    comes first. Returns the weights after each step and the number of steps that were clipped."""
    weights = [w.detach() for w in random_parameters(SHAPES)]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    clipped, path = 0, []
    for t, rate in enumerate(RATES, 1):
        grads = training_gradients(weights, t)
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        if max_norm is not None and norm + 1e-6 > max_norm:
            grads, clipped = [g * max_norm / (norm + 1e-6) for g in grads], clipped + 1
        leaves = [w.clone().requires_grad_() for w in weights]
        pulls = torch.autograd.grad(decays * penalty(leaves), leaves, allow_unused=True, materialize_grads=True)
        for i, (g, pull) in enumerate(zip(grads, pulls)):
            m[i] = BETA1 * m[i] + (1 - BETA1) * g
            v[i] = BETA2 * v[i] + (1 - BETA2) * g.square()
            u = m[i] / (1 - BETA1**t) / ((v[i] / (1 - BETA2**t)).sqrt() + EPS)
            w = weights[i] if i in inside else weights[i] - rate * pull
            u = u + pull if i in inside else u
            ratio = w.norm() / u.norm() if trust and w.dim() >= 2 else 1.0
            weights[i] = w - rate * ratio * u
        path.append(list(weights))
    return path, clipped


def groups_of(weights, vector_decay):
    product = {"frobenius_decay": FROBENIUS, "weight_decay": 0.0}
    return [
        {"params": weights[:2], "product": "qk", "num_heads": 3, **product},
        {"params": weights[2:5], "product": "deep", **product},
        {"params": weights[5:6], "weight_decay": WEIGHT},
        {"params": weights[6:], "weight_decay": vector_decay},
    ]


def train(optimizer, weights, expected):
    """All steps, at the rates that torch's scheduler sets. Returns the worst error against the expected path."""
    errors = []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: RATES[min(t, 199)])
    for t in range(1, 201):
        for weight, gradient in zip(weights, training_gradients(weights, t)):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
        errors.append(worst_error(weights, expected[t - 1]))
    return max(errors)


# Reached: 6e-16 and 5e-7.
TOLERANCES = {torch.float64: 5e-15, torch.float32: 3e-6}


@pytest.mark.parametrize("decay", ["in_trust_ratio", "decoupled", "mixed"])
@KERNELS
@DTYPES
def test_200_steps_follow_the_formula(dtype, kernel, decay):
    weights = random_parameters(SHAPES, dtype)
    groups = groups_of(weights, vector_decay=WEIGHT)  # of the vector: LAMB has to ignore it
    inside = {"in_trust_ratio": (0, 1, 2, 3, 4, 5), "decoupled": (), "mixed": (2, 3, 4)}[decay]
    if decay == "mixed":
        groups[1]["decay"] = "in_trust_ratio"
    optimizer = FrobeniusLamb(
        groups, lr=1.0, betas=(BETA1, BETA2), eps=EPS, decay="decoupled" if decay == "mixed" else decay,
        max_grad_norm=MAX_NORM, **kernel,
    )  # fmt: skip
    expected, clipped = reference(inside, True, MAX_NORM)
    assert train(optimizer, weights, expected) < TOLERANCES[dtype]
    # What the test can see: steps of both kinds, and each decay by far more than the tolerance.
    assert 50 < clipped < 150
    without = reference(inside, True, MAX_NORM, decays=False)[0]
    assert all((e - w).norm() > 0.01 * e.norm() for e, w in zip(expected[-1][:6], without[-1]))


@pytest.mark.parametrize("fused", [False, True])
@DTYPES
def test_200_steps_of_adamw_follow_the_formula(dtype, fused):
    weights = random_parameters(SHAPES, dtype)
    optimizer = FrobeniusAdamW(groups_of(weights, 0.0), lr=1.0, betas=(BETA1, BETA2), eps=EPS, fused=fused)
    assert train(optimizer, weights, reference(trust=False)[0]) < TOLERANCES[dtype]


# --- Each option, by hand ---------------------------------------------------------------------------------------------

ROOT2 = math.sqrt(2)
# w = (3, 4), g = (2, −½), η = 0.1, first step: ‖w‖ = 5 and, with ε = 0, u = (1, −1).
BY_HAND = [
    ({}, (1, -1), 5 / ROOT2),
    ({"weight_norm_clamp": (0.0, 3.0)}, (1, -1), 3 / ROOT2),
    ({"weight_norm_clamp": (6.0, INFINITY)}, (1, -1), 6 / ROOT2),
    ({"trust_clamp": (0.0, 2.0)}, (1, -1), 2),
    ({"trust_clamp": (4.0, INFINITY)}, (1, -1), 4),
    ({"weight_norm_clamp": (0.0, 3.0), "trust_clamp": (0.0, 2.5)}, (1, -1), 3 / ROOT2),
    ({"eps": 1.0}, (2 / 3, -1 / 3), 5 / (math.sqrt(5) / 3)),
    ({"weight_decay": 0.5}, (2.5, 1), 5 / math.sqrt(7.25)),
    # (1 − ηλ)w = (2.85, 3.8) first, whose norm is 4.75.
    ({"weight_decay": 0.5, "decay": "decoupled"}, (1, -1), 4.75 / ROOT2),
    # m = 0.1 g and v = 0.001 g² as they are: u is √10 times as long, and the ratio cancels just that.
    ({"bias_correction": False}, (math.sqrt(10), -math.sqrt(10)), 5 / math.sqrt(20)),
    ({"bias_correction": False, "trust_clamp": (1.0, 1.0)}, (math.sqrt(10), -math.sqrt(10)), 1),
    # m = ½ g and v = 0.2 g²: u = ±½/√0.2.
    ({"bias_correction": False, "betas": (0.5, 0.8), "trust_clamp": (1.0, 1.0)}, (0.5 / 0.2**0.5, -0.5 / 0.2**0.5), 1),
]


@pytest.mark.parametrize("options, update, ratio", BY_HAND, ids=[str(options) for options, *_ in BY_HAND])
@pytest.mark.parametrize("as_group", [False, True], ids=["argument", "group"])
def test_one_step_by_hand(options, update, ratio, as_group):
    """The matrix as written, a vector of the same values without decay and ratio; as argument and as group entry."""
    matrix, vector = parameter([[3, 4]], [[2, -0.5]]), parameter([3, 4], [2, -0.5])
    options = {"eps": 0.0, "weight_decay": 0.0, **options}
    group = {"params": [matrix, vector], **(options if as_group else {})}
    Lamb([group], lr=0.1, max_grad_norm=None, **({} if as_group else options)).step()
    decoupled = 0.05 if options.get("decay") == "decoupled" else 0.0
    expected = [w * (1 - decoupled) - 0.1 * ratio * u for w, u in zip((3, 4), update)]
    torch.testing.assert_close(matrix.data, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=0)
    direction = update if options["weight_decay"] == 0.0 else (1, -1)
    expected = [w - 0.1 * u for w, u in zip((3, 4), direction)]
    torch.testing.assert_close(vector.data, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@KERNELS
@DTYPES
@pytest.mark.parametrize("max_norm, scale", [(1.0, 1 / 13), (26.0, 1.0), (None, 1.0)])
def test_gradients_are_clipped_in_place_to_one_norm_over_all_groups(dtype, kernel, max_norm, scale):
    """Gradients of norm 3, 4 and 12, together 13: one number for all of them, and 1 leaves every bit."""
    gradients = [torch.tensor([[0, 3.0]]), torch.tensor([4.0, 0, 0]), torch.full((2, 2, 1), 6.0)]
    params = [parameter(torch.ones(g.shape), g, dtype) for g in gradients]
    optimizer = Lamb([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=max_norm, **kernel)
    optimizer.step()
    for p, g in zip(params, gradients):
        torch.testing.assert_close(p.grad, g.to(dtype) * scale, rtol=2e-7 if max_norm == 1.0 else 0, atol=0)


@KERNELS
@pytest.mark.parametrize("decay", ["in_trust_ratio", "decoupled"])
def test_zero_weights_and_zero_gradients_have_ratio_1(kernel, decay):
    zero_weight, zero_gradient, zero_both = (
        parameter([[0, 0]], [[2, -0.5]]), parameter([[3, 4]], [[0, 0]]), parameter([[0, 0]], [[0, 0]])
    )  # fmt: skip
    params = [zero_weight, zero_gradient, zero_both]
    # A lower bound above 0 must not move what the ratio leaves alone.
    Lamb(params, lr=0.1, eps=1e-12, weight_decay=0.0, decay=decay, weight_norm_clamp=(2.0, 3.0),
         trust_clamp=(0.0, 0.5), **kernel).step()  # fmt: skip
    torch.testing.assert_close(zero_weight.data, torch.tensor([[-0.1, 0.1]], dtype=torch.float64), rtol=1e-10, atol=0)
    assert zero_gradient.tolist() == [[3, 4]] and zero_both.tolist() == [[0, 0]]


def test_parameters_without_gradient_are_untouched_and_have_no_state():
    shapes = [(2, 3), (5, 7), (7,), (6, 5), (6, 7)]
    params = random_parameters(shapes)
    start = [p.detach().clone() for p in params]
    product = {"params": params[3:], "product": "qk", "num_heads": 3, "frobenius_decay": 0.5}
    optimizer = FrobeniusLamb([{"params": params[:3]}, product], weight_decay=0.5, lr=0.1)
    set_gradients(params[:1], 0)
    optimizer.step()
    assert not torch.equal(params[0], start[0])
    assert all(torch.equal(p, s) for p, s in zip(params[1:], start[1:]))
    assert list(optimizer.state) == params[:1]


@pytest.mark.parametrize("dtype, value", [(torch.bfloat16, 3.0), (torch.float16, 300.0)], ids=["bf16", "fp16"])
@KERNELS
def test_norms_of_half_precision_are_float32(dtype, value, kernel):
    """u is 1, so ‖w‖/‖u‖ = 257·value/257 and a step of η = 1 ends at 0. With norms in bfloat16, 772 and 256, it would
    end at −0.0156; in float16 257·300 is infinite."""
    weight = parameter(torch.full((257, 257), value), torch.ones(257, 257), dtype)
    Lamb([weight], lr=1.0, betas=(0.5, 0.75), eps=0.0, weight_decay=0.0, max_grad_norm=None, **kernel).step()
    assert not weight.any()
    # The norm of all gradients too: 257 ones, scaled to 1.
    weight.grad = torch.ones_like(weight)
    Lamb([weight], max_grad_norm=1.0, **kernel).step()
    torch.testing.assert_close(weight.grad.float(), torch.full((257, 257), 1 / 257), rtol=2e-3, atol=0)


# --- Arguments, layouts and buckets -----------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("decay", ["in_trust_ratio", "decoupled"])
def test_a_rate_in_a_tensor_is_the_rate(decay, kernel):
    results = []
    for rate in (0.03, torch.tensor(0.03, dtype=torch.float64)):
        weights = random_parameters(SHAPES)
        optimizer = FrobeniusLamb(groups_of(weights, WEIGHT), lr=rate, decay=decay, **kernel)
        for step in range(5):
            set_gradients(weights, step)
            optimizer.step()
        results.append([w.detach() for w in weights])
    assert worst_error(*results) < 1e-15


@KERNELS
@pytest.mark.parametrize("decay", ["in_trust_ratio", "decoupled"])
def test_buckets_do_not_change_the_result(decay, kernel, monkeypatch):
    results = []
    for size in (1, 2**40):
        monkeypatch.setattr(buckets, "BUCKET_BYTES", {"cpu": size})
        weights = random_parameters(SHAPES + SHAPES[-2:] * 3, torch.float32)
        optimizer = FrobeniusLamb([*groups_of(weights[:7], WEIGHT), {"params": weights[7:]}], decay=decay, **kernel)
        for step in range(5):
            set_gradients(weights, step)
            optimizer.step()
        results.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@KERNELS
@pytest.mark.parametrize("gradients_too", [True, False], ids=["gradients-too", "weights-alone"])
def test_the_layout_of_a_parameter_does_not_matter(kernel, gradients_too):
    """Strides of the weights, with gradients laid out like them, as autograd makes them, or not."""
    shapes = [(5, 7), (2, 3, 5), *SHAPES[:2]]
    plain, turned = random_parameters(shapes, torch.float32), random_parameters(shapes, torch.float32)
    turned = [torch.nn.Parameter(w.detach().mT.contiguous().mT) for w in turned]
    for weights in (plain, turned):
        product = {"params": weights[2:], "product": "qk", "num_heads": 3, "frobenius_decay": 0.1}
        optimizer = FrobeniusLamb([{"params": weights[:2]}, product], lr=0.05, decay="in_trust_ratio", **kernel)
        for step in range(5):
            set_gradients(weights, step)
            if weights is turned and gradients_too:
                for w in weights:
                    w.grad = w.grad.mT.contiguous().mT
            optimizer.step()
    assert not any(w.is_contiguous() for w in turned)
    # Norms and matrix products sum in another order.
    assert worst_error(turned, [p.detach() for p in plain]) < 1e-6


@pytest.mark.parametrize("max_norm", [1.0, None])
def test_sparse_gradients_are_refused_before_anything_changes(max_norm):
    embedding = torch.nn.Embedding(7, 3, sparse=True)
    embedding(torch.tensor([2, 5])).sum().backward()
    dense = parameter([[3, 4]], [[3, 4]])
    optimizer = Lamb([dense, embedding.weight], weight_decay=0.5, decay="decoupled", max_grad_norm=max_norm)
    with pytest.raises(RuntimeError, match="Lamb does not support sparse gradients"):
        optimizer.step()
    assert dense.tolist() == dense.grad.tolist() == [[3, 4]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": -0.1}, r"lr \(-0.1\) must be finite and at least 0"),
        ({"lr": INFINITY}, r"lr \(inf\) must be finite"),
        ({"eps": -1e-6}, r"eps \(-1e-06\) must be finite and at least 0"),
        ({"weight_decay": float("nan")}, r"weight_decay \(nan\) must be finite and at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas \(\(0.9, 1.0\)\) must be two numbers, at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas \(\(-0.1, 0.9\)\)"),
        ({"betas": (0.9,)}, r"betas \(\(0.9,\)\)"),
        ({"decay": "coupled"}, r"decay must be one of \('decoupled', 'in_trust_ratio'\), not 'coupled'"),
        ({"weight_norm_clamp": (2.0, 1.0)}, r"weight_norm_clamp \(\(2.0, 1.0\)\) must be two numbers, 0 <= lower"),
        ({"trust_clamp": (-1.0, 1.0)}, r"trust_clamp \(\(-1.0, 1.0\)\) must be two numbers"),
        ({"trust_clamp": 10.0}, r"trust_clamp \(10.0\) must be two numbers"),
        ({"trust_clamp": (1.0,)}, r"trust_clamp \(\(1.0,\)\) must be two numbers"),
        ({"trust_clamp": (None, 10)}, r"trust_clamp \(\(None, 10\)\) must be two numbers"),
        ({"foreach": True, "fused": True}, "group [01]: foreach and fused cannot both be True"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Lamb([parameter([[3, 4]])], **change)
    optimizer = Lamb([parameter([[3, 4]])])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter([3, 4])], **change})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", [0, -1.0, INFINITY, float("nan")])
def test_a_bad_norm_is_refused(value):
    with pytest.raises(ValueError, match=rf"max_grad_norm \({value}\) must be positive and finite, or None"):
        Lamb([parameter([[3, 4]])], max_grad_norm=value)


def test_a_state_of_adamw_continues_under_lamb():
    weight = parameter([[3, 4]], [[1, -1]])
    adamw = torch.optim.AdamW([weight], lr=0.1)
    adamw.step()
    for optimizer in (Lamb([weight], trust_clamp=(0.0, 2.0)), FrobeniusLamb([weight], trust_clamp=(0.0, 2.0))):
        optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
        optimizer.step()
        assert optimizer.state[weight]["step"].item() == 2
        assert optimizer.param_groups[0]["trust_clamp"] == (0.0, 2.0) and optimizer.param_groups[0]["lr"] == 0.1


def test_groups_can_be_added_after_a_refused_one_and_to_a_copy():
    """The check for flattened parameters knows the dimensions of each group; they must stay in step with the groups."""
    optimizer = FrobeniusLamb([parameter([[3, 4]], [[1, 1]])], max_grad_norm=5.0)
    with pytest.raises(ValueError, match="a factor is missing"):
        optimizer.add_param_group({"params": [parameter([[3, 4]])], "product": "qk"})
    again = pickle.loads(pickle.dumps(optimizer))
    for one in (optimizer, again):
        one.add_param_group({"params": [parameter([3, 4], [3, 4])]})
        one.param_groups[0]["params"][0].grad = torch.tensor([[0.0, 12.0]], dtype=torch.float64)
        one.step()
        clipped = one.param_groups[1]["params"][0].grad
        torch.testing.assert_close(clipped, torch.tensor([15 / 13, 20 / 13]).double(), rtol=1e-6, atol=0)
