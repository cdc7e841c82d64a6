"""Steps inside autocast and torch.compile, with other gradients and rates: what works, and what is refused before
anything moves."""

import copy

import pytest
import torch

from fnl_hf import FrobeniusAdamW, FrobeniusLamb, FrobeniusSGD, Lamb, frobenius_param_groups
from tests.optim.test_frobenius import SHAPES, draw_weights, set_zero_gradients
from tests.optim.test_lamb import KERNELS, random_parameters, set_gradients
from tests.optim.test_optim import ALL, CASES, DECAY, LR, Net, loss_of, make, make_plain, same


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_step_inside_autocast_equals_one_outside(case, dtype, half):
    model = Net(dtype)
    twin = copy.deepcopy(model)
    for net, is_inside in ((model, True), (twin, False)):
        optimizer = make(case, net)
        for seed in range(2):
            net.zero_grad()
            loss_of(net, seed).backward()
            with torch.autocast("cpu", half, enabled=is_inside):
                optimizer.step()
    assert same(model, twin)


@ALL
def test_a_closure_keeps_its_autocast(case):
    model = Net(torch.float32)
    seen = []

    def closure():
        seen.append(model.down(torch.ones(2, 5)).dtype)
        with torch.autocast("cpu", enabled=False):
            loss = loss_of(model)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        make(case, model).step(closure)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("case", ["adamw", "sgd", "sgd-decoupled", "lamb", "lamb-in-ratio"])
def test_a_compiled_step_does_not_compile_again_and_equals_an_eager_one(case):
    """Whatever becomes of the base class's part, ours is not traced: each group would be a trace of its own."""
    torch._dynamo.reset()
    model = Net()
    twin = copy.deepcopy(model)
    compiled, eager = make(case, model), make(case, twin)
    step, graphs = torch.compile(compiled.step, backend=lambda graph, inputs: graphs.append(graph) or graph), []
    compiled_by = []
    for seed in range(4):
        for net, take_step in ((model, step), (twin, eager.step)):
            net.zero_grad()
            loss_of(net, seed).backward()
            take_step()
        compiled_by.append(len(graphs))
    assert compiled_by[1:] == compiled_by[1:2] * 3  # SGD makes its momentum in the first step
    assert not case.startswith("lamb") or graphs == []
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # compiled, torch corrects Adam's bias in float32
    torch._dynamo.reset()


DIFFERENTIABLE = pytest.mark.parametrize("case", ["adamw", "sgd", "sgd-decoupled"])


@DIFFERENTIABLE
def test_a_differentiable_step_is_refused_where_it_would_drop_the_decay(case):
    model = Net()
    with pytest.raises(ValueError, match="group 'linear': .*differentiable.*frobenius_decay"):
        make(case, model, differentiable=True)
    optimizer = make(case, model)
    optimizer.param_groups[0]["differentiable"] = True
    loss_of(model).backward()
    start = copy.deepcopy(model)
    with pytest.raises(ValueError, match="group 'linear': .*differentiable"):
        optimizer.step()
    assert same(model, start)


@DIFFERENTIABLE
def test_without_decay_a_step_is_as_differentiable_as_the_base_class_has_it(case):
    derivatives = []
    for build in (lambda net: make(case, net, decay=0.0, differentiable=True), None):
        torch.manual_seed(5)
        net = Net()
        rate = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = make_plain(case, net, differentiable=True) if build is None else build(net)
        for group in optimizer.param_groups:
            group["params"] = [p * rate for p in group["params"]]
            for p in group["params"]:
                p.retain_grad()
                p.grad = p.detach().cos()
        optimizer.step()
        total = sum(p.square().sum() for group in optimizer.param_groups for p in group["params"])
        derivatives.append(torch.autograd.grad(total, rate)[0])
    assert torch.equal(*derivatives) and derivatives[0] != 0


# --- Sparse gradients -------------------------------------------------------------------------------------------------


def sparse_gradient(weight):
    dense = torch.zeros_like(weight)
    dense[1] = 1.0
    return dense.to_sparse()


def moved_by(optimizer, params):
    """Which parameters a refused step moved, and whether it made a state."""
    start = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="does not support sparse gradients.*of shape"):
        optimizer.step()
    return [i for i, p in enumerate(params) if not torch.equal(p, start[i])], len(optimizer.state)


# What our class is given, the sparse parameter's place, its group's own entries.
REFUSED = {
    "adamw": (FrobeniusAdamW, {}, 2, {}),
    "adamw, a factor": (FrobeniusAdamW, {}, 1, {}),
    "lamb": (FrobeniusLamb, {}, 2, {}),
    "lamb, a factor": (FrobeniusLamb, {"decay": "in_trust_ratio"}, 0, {}),
    "sgd, weight decay": (FrobeniusSGD, {}, 2, {"weight_decay": 0.1}),
    "sgd, fused": (FrobeniusSGD, {"fused": True}, 2, {}),
    "sgd, coupled": (FrobeniusSGD, {"momentum": 0.9}, 0, {}),
    "sgd, decoupled, weight decay": (FrobeniusSGD, {"decoupled": True}, 2, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sparse_gradients_are_refused_before_anything_moves(case):
    ours, options, place, entries = REFUSED[case]
    params = draw_weights([*SHAPES["uv"](5, 7, 2, 0), (3, 2)], torch.float32)
    set_zero_gradients(params)
    product = {"params": params[:2], "product": "uv", "frobenius_decay": 0.3}
    optimizer = ours([product, {"params": params[2:]} | entries], lr=0.1, **options)
    params[place].grad = sparse_gradient(params[place].detach())
    assert moved_by(optimizer, params) == ([], 0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("options, place", [({}, 2), ({"decoupled": True}, 2), ({"decoupled": True}, 0)], ids=str)
def test_sgd_takes_the_sparse_gradients_that_torchs_takes(options, place, momentum):
    """Beside decayed products, and of a factor whose decay is outside the gradient."""
    results = []
    for is_sparse in (True, False):
        params = draw_weights([*SHAPES["uv"](5, 7, 2, 0), (3, 2)])
        set_zero_gradients(params)
        gradient = sparse_gradient(params[place].detach())
        params[place].grad = gradient if is_sparse else gradient.to_dense()
        product = {"params": params[:2], "product": "uv", "frobenius_decay": 0.3}
        FrobeniusSGD([product, {"params": params[2:]}], lr=0.1, momentum=momentum, **options).step()
        results.append(params)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# --- What LAMB is given -----------------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("decay", ["in_trust_ratio", "decoupled"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float32, torch.bfloat16),
    ],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_dtypes_in_one_group_step_as_in_groups_of_their_own(dtypes, decay, kernel):
    results = []
    for is_one in (True, False):
        weights = [w for i, d in enumerate(dtypes) for w in random_parameters([(5, 7), (7,)], d, seed=i)]
        groups = [{"params": weights}] if is_one else [{"params": [weight]} for weight in weights]
        optimizer = Lamb(groups, lr=0.03, weight_decay=0.1, decay=decay, max_grad_norm=None, **kernel)
        for step in range(3):
            set_gradients(weights, step)
            optimizer.step()
        results.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("lamb", [Lamb, FrobeniusLamb])
def test_lamb_refuses_complex_parameters_when_it_is_made(lamb):
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))]
    with pytest.raises(ValueError, match=r"parameter 1, of shape \(2, 3\), has dtype torch.complex64: .*real"):
        lamb(weights)
    optimizer = lamb(weights[:1])
    with pytest.raises(ValueError, match="parameter 0, .*torch.complex64"):
        optimizer.add_param_group({"params": weights[1]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("ours", [FrobeniusAdamW, FrobeniusSGD, FrobeniusLamb])
def test_frobenius_decay_refuses_complex_factors_by_their_dtype(ours):
    pair = [torch.nn.Parameter(torch.zeros(6, n, dtype=torch.complex64)) for n in (5, 7)]
    with pytest.raises(ValueError, match="torch.complex64.*real") as refusal:
        ours([{"params": pair, "product": "qk", "frobenius_decay": 0.1}])
    assert "half precision" not in str(refusal.value)


TWO_RATES = torch.tensor([0.1, 0.1])


@pytest.mark.parametrize("ours", [FrobeniusAdamW, FrobeniusSGD, FrobeniusLamb, Lamb])
def test_a_rate_of_two_numbers_is_one_clear_error(ours):
    """In the constructor (torch words it), in a group, and in a group when it is too late for that."""
    params = draw_weights([*SHAPES["uv"](5, 7, 2, 0), (3, 2)])
    set_zero_gradients(params)
    with pytest.raises(ValueError, match=r"lr.*must be (1-element|one number)"):
        ours(params, lr=TWO_RATES)
    message = r"lr \(tensor\(\[0.1000, 0.1000\]\)\) must be one number"
    decay = {} if ours is Lamb else {"product": "uv", "frobenius_decay": 0.3}
    optimizer = ours([{"params": params[:2]} | decay], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[2:], "lr": TWO_RATES})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[2:]})
    optimizer.param_groups[1]["lr"] = TWO_RATES
    start = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, before) for p, before in zip(params, start)) and not optimizer.state


def test_a_rate_that_torchs_kernel_does_not_take_moves_nothing():
    params = draw_weights(SHAPES["uv"](5, 7, 2, 0))
    set_zero_gradients(params)
    rate = torch.tensor(0.1)
    optimizer = FrobeniusAdamW([{"params": params, "product": "uv", "lr": rate}], frobenius_decay=0.3, foreach=True)
    start = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"group 0: lr \(0.1.*\) must be a float for foreach=True"):
        optimizer.step()
    assert all(torch.equal(p, before) for p, before in zip(params, start)) and not optimizer.state


BAD_NUMBERS = [("lr", "0.1"), ("eps", None), ("weight_decay", TWO_RATES), ("frobenius_decay", TWO_RATES)]


@pytest.mark.parametrize("name, value", BAD_NUMBERS, ids=[name for name, _ in BAD_NUMBERS])
def test_what_is_no_number_is_refused_by_its_name(name, value):
    pair = draw_weights(SHAPES["uv"](5, 7, 2, 0))
    with pytest.raises(ValueError, match=rf"{name} \(.*\) must be one number"):
        FrobeniusLamb([{"params": pair, "product": "uv"}], **{name: value})


@pytest.mark.parametrize("betas", [0.9, ("0.9", 0.99), (torch.tensor([0.9, 0.9]), 0.99)], ids=str)
def test_bad_betas_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas \(.*\) must be two numbers"):
        Lamb(draw_weights([(3, 2)]), betas=betas)


def test_the_groups_of_a_model_take_all_of_this(monkeypatch):
    """The errors above come for groups of ``frobenius_param_groups`` as for those by hand."""
    model = Net(torch.float32)
    optimizer = CASES["adamw"][0](frobenius_param_groups(model, 0.1, DECAY), lr=LR)
    loss_of(model).backward()
    model.readout.weight.grad = sparse_gradient(model.readout.weight.detach())
    start = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"sparse gradients: parameter group 'decay', parameter 0, of shape \(3"):
        optimizer.step()
    assert same(model, start) and not optimizer.state
