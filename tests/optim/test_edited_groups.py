"""Groups that are changed after the optimizer was made, frozen products, and tensors without values."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fnl_hf import (
    FnlBertConfig,
    FnlBertModel,
    FrobeniusAdamW,
    FrobeniusMuon,
    FrobeniusSGD,
    frobenius_param_groups,
    register_attention,
)
from tests.optim.test_frobenius import draw_weights
from tests.products.test_products import OPTIMIZERS


def pairs(count=4, device="cpu", **entries):
    """Pairs q0, k0, q1, k1, ... of equal shapes, with gradients."""
    params = [weight.to(device) for weight in draw_weights([(4, 6)] * 2 * count)]
    params = [nn.Parameter(weight.detach()) for weight in params]
    for weight in params:
        weight.grad = torch.ones_like(weight)
    return {"params": params, "product": "qk", "num_heads": 2, "frobenius_decay": 0.3, **entries}


def assert_refused(optimizer, message):
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = copy.deepcopy(weights)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, weights, before))


@OPTIMIZERS
def test_a_group_that_lost_its_keys_is_not_decayed_in_wrong_pairs(optimizer_class):
    """Without them [q0, k0, q1, k1, ...] is [q0, q1, ...], whose shapes fit as well."""
    optimizer = optimizer_class([pairs(4)], lr=0.1)
    group = optimizer.param_groups[0]
    whole = group["params"]
    group["params"] = whole[::2]
    assert_refused(optimizer, r"group 0: .*\(8, because its num_products is 4\), but has 4")
    group["params"] = [*whole, torch.ones(4, 6)]
    assert_refused(optimizer, "but has 9")
    group["params"] = whole
    optimizer.step()


def test_a_layer_that_lost_a_parameter_is_refused():
    layers = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    register_attention(layers, *(f"{index}.weight" for index in range(4)), num_heads=3, num_key_value_heads=3,
                       rotary="halves")  # fmt: skip
    optimizer = FrobeniusAdamW(frobenius_param_groups(layers, 0.1), lr=0.1)
    (group,) = [group for group in optimizer.param_groups if group["product"] == "attention"]
    group["params"] = group["params"][:-1]
    assert_refused(optimizer, r"group 'attention': its attention layers have \d parameters each, but \d are given")


@OPTIMIZERS
@pytest.mark.parametrize("decay", [-0.5, float("nan"), float("inf")])
def test_an_edited_decay_is_held_to_its_bounds(optimizer_class, decay):
    optimizer = optimizer_class([pairs()], lr=0.1)
    optimizer.param_groups[0]["frobenius_decay"] = decay
    assert_refused(optimizer, rf"group 0: frobenius_decay \({decay}\) must be finite and at least 0")


def test_frozen_attention_trains_on_with_a_decay_of_the_optimizer():
    """As when only a head is fine-tuned: ``frobenius_param_groups`` has warned of it."""
    sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 10}
    model = FnlBertModel(FnlBertConfig(vocab_size=11, **sizes))
    model.encoder.layer[0].attention.requires_grad_(False)
    optimizer = FrobeniusAdamW(frobenius_param_groups(model, 0.1), lr=0.1, frobenius_decay=0.1)
    model(torch.ones(1, 3, dtype=torch.long)).pooler_output.sum().backward()
    before = copy.deepcopy(model.pooler.dense.weight)
    optimizer.step()
    assert not torch.equal(model.pooler.dense.weight, before)


@pytest.mark.parametrize("optimizer_class", [FrobeniusAdamW, FrobeniusSGD])
def test_a_differentiable_step_would_drop_the_decay_of_rows_too(optimizer_class):
    layers = nn.Sequential(nn.Linear(6, 18, bias=False), nn.Linear(6, 6, bias=False))
    register_attention(layers, *["0.weight"] * 3, "1.weight", num_heads=3, rotary="halves")
    groups = frobenius_param_groups(layers, 0.5, decay_mode="none", decay_rotary=False)
    assert [group["row_decay"] for group in groups if group["product"]] == [(0.0, 0.5)]
    with pytest.raises(ValueError, match=r"differentiable \(True\) needs row_decay None, not \(0.0, 0.5\)"):
        optimizer_class(groups, lr=0.1, differentiable=True)


@OPTIMIZERS
@pytest.mark.parametrize("fake", [False, True])
def test_tensors_without_values_take_a_step(optimizer_class, fake):
    """As estimators of memory and of operations use them."""
    if fake:
        with FakeTensorMode():
            optimizer_class([pairs()], lr=0.1).step()
        return
    group = pairs(device="meta")
    optimizer_class([group], lr=0.1, **({} if optimizer_class is FrobeniusMuon else {"fused": False})).step()


@OPTIMIZERS
def test_what_is_no_group_is_named(optimizer_class):
    optimizer = optimizer_class([pairs()], lr=0.1)
    with pytest.raises(TypeError, match="param_group must be a dict, not list"):
        optimizer.add_param_group([torch.ones(2, 3)])
    assert len(optimizer.param_groups) == 1
