"""Decay of factors that are parts of parameters: all optimizers, the rows beside them, states, registration, limits."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fnl_hf import (
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusSGD,
    Lamb,
    find_products,
    frobenius_param_groups,
    muon_param_groups,
    register_attention,
    register_product,
)
from tests.products.architectures import ARCHITECTURES, model_of
from tests.products.attention_by_hand import Attention, blocks, halves, interleaved, split

RATE, FROBENIUS, WEIGHT = 0.3, 0.25, 0.07
ON_DEVICE = torch.tensor(RATE, dtype=torch.float64)
OPTIMIZERS = {
    "adamw": lambda groups, **kwargs: FrobeniusAdamW(groups, lr=RATE, **kwargs),
    "adamw_fused": lambda groups, **kwargs: FrobeniusAdamW(groups, lr=ON_DEVICE, fused=True, **kwargs),
    "sgd": lambda groups, **kwargs: FrobeniusSGD(groups, lr=RATE, momentum=0.9, **kwargs),
    "sgd_decoupled": lambda groups, **kwargs: FrobeniusSGD(groups, lr=RATE, decoupled=True, **kwargs),
    "lamb": lambda groups, **kwargs: FrobeniusLamb(groups, lr=RATE, **kwargs),
    "lamb_in_trust_ratio": lambda groups, **kwargs: FrobeniusLamb(groups, lr=RATE, decay="in_trust_ratio", **kwargs),
}
EACH = pytest.mark.parametrize("optimizer", OPTIMIZERS)
FUSED, GROUPED = "gpt_neox", "llama"  # interleaved and partly rotated; shared keys, rotated


def set_gradients(model, step=None):
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.zeros_like(parameter)
        if step is not None:
            parameter.grad += 0.1 * (parameter.detach() + index + step).cos()


def fit(model, optimizer, steps):
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def assert_equal_weights(model, other):
    for (name, weight), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, second), name


@EACH
@pytest.mark.parametrize("name", [FUSED, GROUPED])
def test_the_first_step_is_along_the_penaltys_gradient(optimizer, name):
    """Without gradients of a loss; LAMB's trust ratio is that of the whole parameter."""
    model, reference = model_of(name), model_of(name)
    sum(attention.penalty() for attention in ARCHITECTURES[name].attentions(reference)).backward()
    set_gradients(model)
    OPTIMIZERS[optimizer](frobenius_param_groups(model, 0.0, FROBENIUS)).step()
    for (each, weight), before in zip(model.named_parameters(), reference.parameters(), strict=True):
        update = 0.0 if before.grad is None else FROBENIUS * before.grad
        if optimizer == "lamb_in_trust_ratio" and before.grad is not None:
            update = update * before.detach().norm() / update.norm()
        torch.testing.assert_close(weight.detach(), before.detach() - RATE * update, rtol=1e-11, atol=1e-13, msg=each)


@EACH
@pytest.mark.parametrize("mode", ["frobenius", "weight", "none"])
def test_rows_that_are_no_factors_keep_their_decay(optimizer, mode):
    """Queries and keys of a fused weight that are left to weight decay, beside its values."""
    model, reference = model_of("modernbert"), model_of("modernbert")
    penalties = []
    for attention in ARCHITECTURES["modernbert"].attentions(reference):
        penalties.append(WEIGHT * (attention.q.square().sum() + attention.k.square().sum()) / 2)
        if mode == "frobenius":
            penalties += [FROBENIUS * (v.T @ o).square().sum() / 2 for v, o in zip(attention.v, attention.o)]
        if mode == "weight":
            penalties.append(FROBENIUS * (attention.v.square().sum() + attention.o.square().sum()) / 2)
    sum(penalties).backward()
    set_gradients(model)
    groups = frobenius_param_groups(model, WEIGHT, FROBENIUS, mode, decay_rotary=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (group,) = (group for group in groups if group["name"] == "attention")
    expected = [f"layers.{i}.attn.{weight}.weight" for i in (0, 1) for weight in ("Wqkv", "Wo")]
    assert [names[id(parameter)] for parameter in group["params"]] == expected
    OPTIMIZERS[optimizer]([group]).step()
    for parameter in group["params"]:
        before = reference.get_parameter(names[id(parameter)])
        update = torch.zeros_like(before) if before.grad is None else before.grad
        if optimizer == "lamb_in_trust_ratio" and update.any():
            update = update * before.detach().norm() / update.norm()
        torch.testing.assert_close(parameter.detach(), before.detach() - RATE * update, rtol=1e-11, atol=1e-13)


def test_queries_and_keys_of_their_own_are_ordinary_matrices_then():
    model = model_of(GROUPED)
    groups = {group["name"]: group for group in frobenius_param_groups(model, WEIGHT, FROBENIUS, decay_rotary=False)}
    decayed = {id(p) for p in groups["decay"]["params"]}
    assert {id(m.weight) for name, m in model.named_modules() if name.endswith(("q_proj", "k_proj"))} <= decayed
    assert len(groups["attention"]["params"]) == 4 and "attention_2" not in groups


@pytest.mark.parametrize("mode, frobenius, weight", [("frobenius", 0.3, 0.0), ("weight", 0.0, 0.3), ("none", 0.0, 0.0)])
def test_decay_mode_changes_the_products_alone(mode, frobenius, weight):
    for name in (FUSED, GROUPED):
        groups = frobenius_param_groups(model_of(name), 0.1, 0.3, mode)
        for group in groups:
            is_product = group["product"] is not None
            expected = {"decay": 0.1, "plain": 0.0}.get(group["name"], weight)
            assert (group["frobenius_decay"], group["weight_decay"]) == (frobenius * is_product, expected)
            assert group.get("row_decay") is None


@pytest.mark.parametrize("name", [FUSED, GROUPED])
@pytest.mark.parametrize(
    "ours, base",
    [
        (FrobeniusAdamW, torch.optim.AdamW),
        (FrobeniusSGD, torch.optim.SGD),
        (FrobeniusLamb, lambda groups, **kwargs: Lamb(groups, decay="decoupled", **kwargs)),
    ],
)
def test_without_decay_of_products_it_is_the_base_class_to_the_last_bit(name, ours, base):
    model, other = model_of(name), model_of(name)
    optimizer = ours(frobenius_param_groups(model, 0.1, 0.0), lr=0.01)
    own = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in frobenius_param_groups(other, 0.1, 0.0)]
    fit(model, optimizer, range(3))
    fit(other, base(own, lr=0.01), range(3))
    assert_equal_weights(model, other)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_states_go_on_where_they_were_and_belong_to_their_layout(optimizer):
    def make(model):
        return OPTIMIZERS[optimizer](frobenius_param_groups(model, 0.1, FROBENIUS, decay_rotary=False))

    model, other = model_of("modernbert"), model_of("modernbert")
    first, second = make(model), make(other)
    fit(model, first, range(3))
    other.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    twin, third = pickle.loads(pickle.dumps((model, first)))
    for each, its in ((model, first), (other, second), (twin, third)):
        fit(each, its, range(3, 6))
    assert_equal_weights(model, other)
    assert_equal_weights(model, twin)
    all_rows = OPTIMIZERS[optimizer](frobenius_param_groups(other, 0.1, FROBENIUS))
    with pytest.raises(ValueError, match="parameter group 'attention' has layout .*, but the state to load "):
        all_rows.load_state_dict(second.state_dict())


def test_frozen_and_idle_factors():
    """A frozen one counts and does not move; without a gradient nothing moves."""
    model, reference = model_of(GROUPED), model_of(GROUPED)
    sum(attention.penalty() for attention in ARCHITECTURES[GROUPED].attentions(reference)).backward()
    key, query, output = (model.get_parameter(f"layers.0.self_attn.{n}_proj.weight") for n in "kqo")
    key.requires_grad_(False)
    optimizer = OPTIMIZERS["adamw"](frobenius_param_groups(model, 0.0, FROBENIUS))
    set_gradients(model)
    output.grad = key.grad = None
    optimizer.step()
    before = reference.layers[0].self_attn
    assert torch.equal(key, before.k_proj.weight) and torch.equal(output, before.o_proj.weight)
    expected = before.q_proj.weight.detach() - RATE * FROBENIUS * before.q_proj.weight.grad
    torch.testing.assert_close(query.detach(), expected, rtol=1e-11, atol=1e-13)


def test_a_decay_that_is_too_large_is_warned_of(caplog):
    for name in (GROUPED, FUSED):
        model = model_of(name)
        optimizer = OPTIMIZERS["adamw"](frobenius_param_groups(model, 0.0, 100.0))
        set_gradients(model)
        caplog.clear()
        optimizer.step()
        assert "parameter group 'attention', product 0 (attention): its Frobenius decay makes it grow" in caplog.text


def test_wrong_layouts_are_refused():
    model = model_of(FUSED)
    (group,) = (group for group in frobenius_param_groups(model, 0.1) if group["name"] == "attention")
    with pytest.raises(
        ValueError, match=r"'attention': its attention layers have 2 parameters each, but 2 are given for 2 of"
    ):
        FrobeniusAdamW([group | {"params": group["params"][::2]}])
    flat = [nn.Parameter(weight.detach().view(-1)) for weight in group["params"]]
    with pytest.raises(ValueError, match=r"parameter 0, of shape \(972,\): the rows of a factor end at .*FSDP1"):
        FrobeniusAdamW([group | {"params": flat}])
    optimizer = FrobeniusAdamW([group])
    before = [dict(each) for each in optimizer.param_groups]
    bare = {"product": "attention", "params": [nn.Parameter(torch.ones(6, 3))], "name": "mine", "frobenius_decay": 0.1}
    for layout in (None, ()):
        with pytest.raises(ValueError, match="parameter group 'mine': product 'attention' needs a layout, which says"):
            optimizer.add_param_group(bare | {"layout": layout})
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group(bare | {"layout": ((1, 2, 3),)})
    assert optimizer.param_groups == before
    half = [nn.Parameter(weight.detach().bfloat16()) for weight in group["params"]]
    with pytest.raises(ValueError, match=r"product 0 \(attention\) has dtype torch.bfloat16: .*float32"):
        FrobeniusAdamW([group | {"params": half}])


# register_attention


class Own(nn.Module):
    """Attention under names of its own: separate weights with other sizes of Q Kᵀ and V Oᵀ, and two fused ones."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(7, size, bias=False) for size in (4 * 6, 2 * 6, 2 * 5))
        self.wo = nn.Linear(4 * 5, 7, bias=False)
        self.fused, self.mix = nn.Linear(7, 3 * 12, bias=False), nn.Linear(12, 7, bias=False)
        self.grouped, self.out = nn.Linear(7, (4 + 2 * 2) * 3, bias=False), nn.Linear(12, 7, bias=False)
        separate = [f"{name}.weight" for name in ("wq", "wk", "wv", "wo")]
        register_attention(self, *separate, num_heads=4, num_key_value_heads=2, rotary="halves", rotary_size=4)
        register_attention(self, *["fused.weight"] * 3, "mix.weight", num_heads=3, name="fused")
        grouped = (*["grouped.weight"] * 3, "out.weight")
        register_attention(self, *grouped, num_heads=4, num_key_value_heads=2, by_head=True, name="grouped")
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def attentions(self):
        separate = (split(self.wq.weight, 4), split(self.wk.weight, 2), split(self.wv.weight, 2))
        yield Attention(*separate, split(self.wo.weight.T, 4), halves(4))
        yield blocks(self.fused.weight, self.mix.weight.T, 3)
        yield interleaved(self.grouped.weight, self.out.weight.T, 4, 2)


@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_registered_attention_is_found_and_decayed(change):
    model = change(Own().double())
    found = [(product.name, product.kind, product.num_heads) for product in find_products(model)]
    assert found == [
        ("rotary", "rotary", 4),
        ("qk", "qk", 4),
        ("vo", "vo", 4),
        ("fused.qk", "qk", 3),
        ("fused.vo", "vo", 3),
        ("grouped.qk", "qk", 4),
        ("grouped.vo", "vo", 4),
    ]
    reference = copy.deepcopy(model)
    sum(attention.penalty() for attention in reference.attentions()).backward()
    set_gradients(model)
    OPTIMIZERS["adamw"](frobenius_param_groups(model, 0.0, FROBENIUS)).step()
    for weight, before in zip(model.parameters(), reference.parameters(), strict=True):
        expected = before.detach() - RATE * FROBENIUS * before.grad
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": "wx.weight"}, "attention x: Own has no parameter 'wx.weight'"),
        ({"num_heads": 5}, r"rows {'q': 24, 'k': 12, 'v': 10} must split into queries for num_heads \(5\) and keys"),
        ({"num_key_value_heads": 3}, r"num_heads \(4\) and keys and values for num_key_value_heads \(3\)"),
        ({"key": "wv.weight", "value": "wk.weight"}, r"queries \(6 rows per head\) and keys \(5\) must have the same"),
        ({"rotary": "pairs"}, r"rotary \('pairs'\) must be one of \('halves', 'interleaved'\) or None"),
        ({"rotary": ""}, r"rotary \(''\) must be one of \('halves', 'interleaved'\) or None"),
        ({"rotary": "halves", "rotary_size": 8}, r"rotary_size \(8\) must be even, at least 2, and at most"),
        ({"rotary": "halves", "rotary_size": 0}, r"rotary_size \(0\) must be even, at least 2, and at most"),
        ({"rotary_size": 4}, r"attention x: rotary_size \(4\) needs rotary, one of \('halves', 'interleaved'\)"),
        ({"num_key_value_heads": 0}, r"num_heads \(4\) and keys and values for num_key_value_heads \(0\)"),
        ({"output": "mix.weight"}, r"mix.weight of shape \(7, 12\) must have num_heads \(4\) times 5 inputs"),
        ({"name": "fused"}, "Own already has an attention named 'fused': give this one another name"),
    ],
)
def test_a_wrong_registration_is_refused(change, message):
    model = Own()
    names = {"query": "wq.weight", "key": "wk.weight", "value": "wv.weight", "output": "wo.weight", "name": "x"}
    with pytest.raises(ValueError, match=message):
        register_attention(model, **{**names, "num_heads": 4, "num_key_value_heads": 2} | change)
    assert len(find_products(model)) == 7


def test_rows_in_two_products_are_refused_and_a_registration_comes_before_what_is_found():
    model = Own()
    register_attention(model, *["fused.weight"] * 3, "out.weight", num_heads=3, name="once more")
    with pytest.raises(ValueError, match="fused.weight is a factor of product once more.qk and, as fused.weight, of"):
        find_products(model)
    roberta = model_of("roberta")
    attention = roberta.encoder.layer[0].attention.self
    register_product(attention, "qk", "query.weight", "key.weight", num_heads=3, name="mine")
    names = [product.name for product in find_products(roberta)]
    stems = [f"encoder.layer.{i}.attention" for i in (0, 1)]
    assert names == [f"{stems[0]}.vo", f"{stems[1]}.qk", f"{stems[1]}.vo", f"{stems[0]}.self.mine"]


# What is not found


class StrangeAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.ask, self.answer = nn.Linear(3, 4), nn.Linear(3, 4)


def test_attention_of_an_unknown_kind_is_named_once(caplog):
    model = nn.ModuleList([StrangeAttention(), StrangeAttention(), model_of("roberta"), nn.Embedding(5, 3)])
    for _ in range(2):
        frobenius_param_groups(model, 0.0123)
    (record,) = caplog.records
    assert record.getMessage() == (
        "ModuleList: attention of an unknown kind gets ordinary weight decay: StrangeAttention. For frobenius decay, "
        "register its products with fnl_hf.register_attention or fnl_hf.register_product"
    )
    caplog.clear()
    frobenius_param_groups(StrangeAttention(), 0.0)
    frobenius_param_groups(model_of("roberta"), 0.1)
    assert not caplog.records


def test_a_decay_that_finds_nothing_is_an_error(caplog):
    message = (
        r"frobenius_decay \(0.5\) has nothing to decay: StrangeAttention has no trainable products; its attention is "
        "of an unknown kind: StrangeAttention. For ordinary weight decay, leave it out; otherwise register .*"
    )
    with pytest.raises(ValueError, match=message):
        frobenius_param_groups(StrangeAttention(), 0.01, frobenius_decay=0.5)
    plain = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="Sequential has no trainable products. For"):
        frobenius_param_groups(plain, 0.01, 0.5)
    frobenius_param_groups(plain, 0.01, 0.0)
    frobenius_param_groups(plain, 0.01, 0.5, "none")
    assert not caplog.records
    frobenius_param_groups(plain, 0.01)
    frobenius_param_groups(plain, 0.01, 0.5, "weight")
    assert [r.getMessage() for r in caplog.records] == [
        "Sequential has no trainable products: all decay is ordinary weight decay"
    ]


def test_frozen_products_are_no_error_and_frozen_attention_is_not_named(caplog):
    """A decay that was given for a model of which the head is trained."""
    model = nn.ModuleDict({"base": model_of("roberta"), "head": nn.Linear(3, 2)})
    model.base.requires_grad_(False)
    groups = frobenius_param_groups(model, 0.0375, frobenius_decay=0.5)
    assert [group["name"] for group in groups] == ["decay", "plain"]
    assert [record.getMessage() for record in caplog.records] == [
        "ModuleDict has no trainable products: all decay is ordinary weight decay"
    ]
    assert len(muon_param_groups(model, 0.0375, frobenius_decay=0.5)) == 2
