"""States that another optimizer saved: what of them counts, and which are refused before anything is changed."""

import copy
import math

import pytest
import torch

from fnl_hf import FrobeniusAdamW, FrobeniusLamb, FrobeniusSGD, Lamb
from tests.optim.test_frobenius import draw_weights, reference_gradients

DECAY, LR = 0.3, 0.05
ADAMW, SGD, ADAM = torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam
# Our class, one whose states it continues, what that one is given.
CASES = {
    "adamw": (FrobeniusAdamW, ADAMW, {}),
    "adamw-fused": (FrobeniusAdamW, ADAMW, {"fused": True}),
    "adam": (FrobeniusAdamW, ADAM, {"weight_decay": 0.2}),
    "sgd": (FrobeniusSGD, SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "lamb": (FrobeniusLamb, ADAMW, {}),
    "lamb-of-lamb": (FrobeniusLamb, Lamb, {"decay": "in_trust_ratio"}),
}
ALL = pytest.mark.parametrize("case", CASES)


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def layout(params):
    """Two products of a kind, a matrix and a bias."""
    return [params[:4], params[4:5], params[5:]]


def parameters():
    return draw_weights([(6, 5), (6, 7), (6, 5), (6, 7), (3, 7), (7,)])


def our_groups(params):
    pairs, matrices, biases = layout(params)
    return [
        {"params": pairs, "product": "qk", "num_heads": 3, "frobenius_decay": DECAY, "weight_decay": 0.0, "name": "qk"},
        {"params": matrices, "weight_decay": 0.1, "name": "decay"},
        {"params": biases, "weight_decay": 0.0, "name": "plain"},
    ]


def saved_by(optimizer_class, params, groups=layout, steps=2, **options):
    """A state after some steps that end at other weights."""
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = optimizer_class([{"params": group} for group in groups(twins)], lr=LR, **options)
    for step in range(steps):
        set_gradients(twins, step)
        optimizer.step()
    return optimizer.state_dict()


@ALL
def test_all_decay_stays_as_it_is_here_and_moments_and_rate_are_the_states(case):
    ours, other, options = CASES[case]
    params = parameters()
    optimizer = ours(our_groups(params), lr=0.7)
    state = saved_by(other, params, **options)
    optimizer.load_state_dict(copy.deepcopy(state))
    found = [(g["name"], g["product"], g["frobenius_decay"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [("qk", "qk", DECAY, 0.0), ("decay", None, 0.0, 0.1), ("plain", None, 0.0, 0.0)]
    assert all(group["lr"] == LR for group in optimizer.param_groups)
    assert optimizer.param_groups[0].get("decay") == ("decoupled" if ours is FrobeniusLamb else None)
    name = "momentum_buffer" if ours is FrobeniusSGD else "exp_avg"
    assert all(torch.equal(optimizer.state[p][name], state["state"][i][name]) for i, p in enumerate(params))


def test_the_next_step_decays_products_once_and_biases_not_at_all():
    """With gradients of zero and no first moments the decay is the whole step."""
    params = parameters()
    optimizer = FrobeniusAdamW(our_groups(params))
    optimizer.load_state_dict(saved_by(ADAMW, params, steps=0, weight_decay=0.01))
    start = [p.detach().clone() for p in params]
    decays = [g for i in (0, 2) for g in reference_gradients(params[i : i + 2], "qk", 3)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = [w - LR * DECAY * g for w, g in zip(start, decays)] + [start[4] * (1 - LR * 0.1), start[5]]
    for p, value in zip(params, expected):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lamb", [Lamb, FrobeniusLamb])
@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, {"fused": False}], ids=str)
def test_lamb_goes_on_from_states_of_older_versions(lamb, kernel):
    """They count steps in numbers and lack the entries that came later; which kernel runs is not theirs to say."""
    params, twins = parameters(), parameters()
    new = saved_by(ADAM, params)
    old = copy.deepcopy(new)
    for entries in old["state"].values():
        entries["step"] = int(entries["step"])
    for group in old["param_groups"]:
        for name in set(group) - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params"}:
            del group[name]
    for weights, state in ((params, old), (twins, new)):
        optimizer = lamb([{"params": group} for group in layout(weights)], **kernel)
        optimizer.load_state_dict(copy.deepcopy(state))
        set_gradients(weights, 5)
        optimizer.step()
        assert all(entries["step"].item() == 3 for entries in optimizer.state.values())
        assert all(group["fused"] == kernel.get("fused", False) for group in optimizer.param_groups)
        assert all(set(entries) == {"step", "exp_avg", "exp_avg_sq"} for entries in optimizer.state.values())
    assert all(torch.equal(a, b) for a, b in zip(params, twins))


def test_lamb_keeps_its_own_state_entries_and_leaves_amsgrads():
    params = parameters()
    optimizer = Lamb([{"params": group} for group in layout(params)], weight_decay=0.3, trust_clamp=(0.0, 2.0))
    optimizer.load_state_dict(saved_by(ADAMW, params, amsgrad=True))
    assert {tuple(sorted(entries)) for entries in optimizer.state.values()} == {("exp_avg", "exp_avg_sq", "step")}
    assert [(g["weight_decay"], g["trust_clamp"]) for g in optimizer.param_groups] == [(0.3, (0.0, 2.0))] * 3
    own = Lamb([{"params": group} for group in layout(params)], weight_decay=0.9)
    own.load_state_dict(optimizer.state_dict())
    assert [(g["weight_decay"], g["trust_clamp"]) for g in own.param_groups] == [(0.3, (0.0, 2.0))] * 3


def all_in_one(params):
    return [params]


def other_split(params):
    return [params[:3], params[3:5], params[5:]]


def reordered(params):
    """As many parameters in each group, with other shapes."""
    return [[params[1], params[0], *params[2:4]], params[4:5], params[5:]]


REFUSED = {
    "one group": (ADAMW, all_in_one, {}, r"1 parameter group\(s\), this optimizer 3 \(qk, decay, plain\)"),
    "other sizes": (ADAMW, other_split, {}, "parameter group 'qk' has 4 parameters, .* 3"),
    "another order": (ADAMW, reordered, {}, r"parameter group 'qk', parameter 0, .*\(6, 5\).* exp_avg .*\(6, 7\)"),
    "sgd": (SGD, layout, {"momentum": 0.9}, "parameter group 'qk', parameter 0, .* no step, exp_avg, exp_avg_sq"),
    "sgd without a state": (SGD, layout, {}, "parameter group 'qk': .* no betas"),
    "adamax": (torch.optim.Adamax, layout, {}, "parameter group 'qk', parameter 0, .* no exp_avg_sq"),
}


@pytest.mark.parametrize("ours", [FrobeniusAdamW, FrobeniusLamb])
@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(ours, case):
    other, groups, options, message = REFUSED[case]
    assert_refused(ours, saved_by(other, parameters(), groups, **options), message)


def assert_refused(ours, state, message, **options):
    params = parameters()
    optimizer = ours(our_groups(params), lr=0.7, **options)
    set_gradients(params, 0)
    optimizer.step()
    before, copied = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == copied["param_groups"]
    assert all(after["state"][i] is entries for i, entries in before["state"].items())
    optimizer.step()


@pytest.mark.parametrize("ours, other", [(FrobeniusAdamW, ADAMW), (FrobeniusSGD, SGD), (FrobeniusAdamW, None)])
@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling_goes_on_with_the_kernels_of_the_state(ours, other, overflow):
    """The state of an optimizer that is not fused, into one that is: GradScaler asks how it was made."""
    params, twins = parameters(), parameters()
    scale = torch.amp.GradScaler("cpu", init_scale=8.0)
    scale.scale(torch.zeros(()))
    optimizer, twin = ours(our_groups(params), lr=0.7, fused=True), ours(our_groups(twins), lr=0.7)
    state = saved_by(other, params) if other else ours(our_groups(twins), lr=0.7).state_dict()
    for each in (optimizer, twin):
        each.load_state_dict(copy.deepcopy(state))
    set_gradients(params, 5)
    set_gradients(twins, 5)
    for p in params:
        p.grad *= math.inf if overflow else 8.0
    scale.step(optimizer)
    if not overflow:
        twin.step()
    for a, b in zip(params, twins):
        torch.testing.assert_close(a, b)


def test_sgd_takes_no_state_of_adam():
    ours = FrobeniusAdamW(our_groups(parameters())).state_dict()
    for state in (saved_by(ADAMW, parameters()), ours):
        assert_refused(FrobeniusSGD, state, "parameter group 'qk': .* no dampening, momentum")


@pytest.mark.parametrize("ours", [Lamb, FrobeniusLamb])
def test_lamb_does_not_minimize_what_the_state_maximizes(ours):
    params = parameters()
    optimizer = ours([{"params": group} for group in layout(params)], lr=0.7)
    with pytest.raises(ValueError, match="parameter group 0: .* maximize"):
        optimizer.load_state_dict(saved_by(ADAMW, params, maximize=True))
    assert optimizer.param_groups[0]["lr"] == 0.7 and not optimizer.state


def test_a_state_is_held_to_the_bounds_of_a_group():
    state = saved_by(ADAMW, parameters(), differentiable=True, steps=0)
    assert_refused(FrobeniusAdamW, state, "group 'qk': .*differentiable")
    state = saved_by(ADAM, parameters())
    state["param_groups"][1]["lr"] = torch.tensor([0.1, 0.1])
    for ours in (FrobeniusAdamW, FrobeniusLamb):
        assert_refused(ours, copy.deepcopy(state), r"lr \(tensor\(\[0.1000, 0.1000\]\)\) must be one number")


def test_a_hook_may_rearrange_the_groups_of_a_state():
    """torch's way to load a state of other groups."""
    params = parameters()
    optimizer = FrobeniusAdamW(our_groups(params))

    def split(optimizer, state):
        (group,) = state["param_groups"]
        return state | {"param_groups": [group | {"params": ids} for ids in layout(group["params"])]}

    optimizer.register_load_state_dict_pre_hook(split)
    optimizer.load_state_dict(saved_by(ADAMW, params, all_in_one))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1, 0.0]
