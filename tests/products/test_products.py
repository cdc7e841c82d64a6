"""Which products a model holds, and which parameter gets which decay."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from fnl_hf import (
    FnlBertConfig,
    FnlBertForMaskedLM,
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    FrobeniusSGD,
    frobenius_param_groups,
)
from fnl_hf.products.discovery import find_products, register_product
from tests.conftest import needs_muon
from tests.optim.test_frobenius import draw_weights

OPTIMIZERS = pytest.mark.parametrize(
    "optimizer_class", [FrobeniusAdamW, FrobeniusSGD, FrobeniusLamb, pytest.param(FrobeniusMuon, marks=needs_muon)]
)


class Block(nn.Module):
    """A pair of two products and a triple, registered, and what belongs to no product."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(5, 6, bias=False), nn.Linear(6, 7)
        self.v, self.m, self.u = (nn.Linear(*size, bias=False) for size in [(7, 3), (3, 2), (2, 5)])
        self.norm, self.readout = nn.LayerNorm(5), nn.Linear(5, 3)
        register_product(self, "linear", "up.weight", "down.weight", num_heads=2)
        register_product(self, "deep", "u.weight", "m.weight", "v.weight", name="triple")


PAIR, TRIPLE = ("up.weight", "down.weight"), ("u.weight", "m.weight", "v.weight")


def small_model(dimensions, **kwargs):
    return FnlBertForMaskedLM(FnlBertConfig(**dimensions, attention_embedding_size=6, **kwargs))


def names_by_group(model, *args):
    names = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in frobenius_param_groups(model, *args)}


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "change, path",
    [
        (lambda block: block, ""),
        (copy.deepcopy, ""),
        (saved_and_loaded, ""),
        (lambda block: nn.ModuleDict({"outer": nn.Sequential(nn.ReLU(), block)}), "outer.1"),
        (torch.compile, "_orig_mod"),
        (lambda block: copy.deepcopy(block).double(), ""),
    ],
)
def test_a_registration_stays_with_its_module(change, path):
    block = Block()
    model = change(block)
    stem = f"{path}." if path else ""
    found = find_products(model)
    assert [(p.name, p.kind, p.num_heads) for p in found] == [
        (path or "Block", "linear", 2),
        (f"{stem}triple", "deep", 1),
    ]
    assert [p.weight_names for p in found] == [tuple(stem + n for n in names) for names in (PAIR, TRIPLE)]
    parameters = dict(model.named_parameters())
    for product in found:
        assert all(w is parameters[n] for w, n in zip(product.weights, product.weight_names))


def test_a_copy_registers_for_itself():
    block = Block()
    twin = copy.deepcopy(block)
    twin.extra = nn.Linear(3, 4)
    register_product(twin, "linear", "extra.weight", "readout.weight", name="extra")
    register_product(twin, "linear", "extra.weight", "readout.weight", name="extra")  # once more, as notebooks do
    assert (len(find_products(twin)), len(find_products(block))) == (3, 2)
    with pytest.raises(ValueError, match=r"Block already has a product named 'triple': give product \(extra.weight"):
        register_product(twin, "uv", "extra.weight", "m.weight", name="triple")
    model = nn.Sequential(block, nn.Linear(4, 2), nn.Linear(2, 3))
    register_product(model, "linear", "2.weight", "1.weight", name="0.triple")
    with pytest.raises(ValueError, match="^two products are named 0.triple, one of them of 2.weight and 1.weight: "):
        find_products(model)


@pytest.mark.parametrize(
    "kind, names, heads, message",
    [
        ("linear", ("up.weight", "dwon.weight"), 1, r"product of Block: Block has no parameter 'dwon.weight'"),
        ("lin", PAIR, 1, r"product \(up.weight, down.weight\): kind must be one of \['conv', .*\], not 'lin'"),
        ("qk", PAIR, 1, r"\(up.weight, down.weight\): shapes \(7, 6\) and \(6, 5\) must share one size, .* \(0, 0\)"),
        ("linear", PAIR, 4, r"shapes \(7, 6\) and \(6, 5\) must share one size, a multiple of num_heads \(4\)"),
        ("linear", PAIR, 0, r"a multiple of num_heads \(0\)"),
        ("uv", ("none", "nothing"), 1, r"shapes \(7, 0\) and \(5, 0\) .* num_heads \(1\) above 0"),
        (
            "linear",
            TRIPLE,
            1,
            r"\(u.weight, m.weight, v.weight\): products of kind 'linear' have 2 factors, but 3 are given",
        ),
        ("deep", TRIPLE[::-1], 1, r"\(3, 7\) and \(2, 3\) and \(5, 2\) must match as U \(m, r\), M \(r, s\)"),
        ("deep", TRIPLE, 2, r"must match as .* of each of num_heads \(2\)"),
        ("linear", ("m.weight", "m.weight"), 1, r"\(m.weight, m.weight\): two factors are the same parameter"),
        (
            "linear",
            ("up.weight", "up.bias"),
            1,
            r"\(up.weight, up.bias\): .*matrices, but have the shapes \[\(7, 6\), \(7,\)\]",
        ),
    ],
)
def test_a_wrong_registration_is_refused_and_leaves_nothing_behind(kind, names, heads, message):
    block = Block()
    block.none, block.nothing = nn.Parameter(torch.ones(7, 0)), nn.Parameter(torch.ones(5, 0))
    with pytest.raises(ValueError, match=message):
        register_product(block, kind, *names, num_heads=heads)
    assert len(find_products(block)) == 2


def test_a_parameter_in_two_products_is_refused(dimensions):
    block = Block()
    register_product(block, "linear", "readout.weight", "u.weight", name="again")
    message = (
        "^blocks.0.u.weight is a factor of product blocks.0.again and, as blocks.0.u.weight, of product blocks.0.t"
    )
    with pytest.raises(ValueError, match=message):
        find_products(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    tied = nn.ModuleList([Block(), Block()])
    tied[1].up.weight = tied[0].up.weight
    with pytest.raises(ValueError, match="^1.up.weight is a factor of product 1 and, as 0.up.weight, of product 0: "):
        frobenius_param_groups(tied)
    model = small_model(dimensions)
    layer = model.bert.encoder.layer[0]
    register_product(layer, "linear", "intermediate.dense.weight", "attention.output.dense.weight", name="mixed")
    layer_0 = "bert.encoder.layer.0."
    with pytest.raises(ValueError, match=f"{layer_0}attention.output.dense.weight .* product {layer_0}mixed and,"):
        find_products(model)


def test_a_module_at_two_paths_holds_its_products_once_and_a_lost_parameter_is_named():
    block = Block()
    model = nn.Sequential(block, block)
    assert [p.name for p in find_products(model)] == ["0", "0.triple"]
    twin = Block()  # another module with the same factors
    for name in (*PAIR, *TRIPLE):
        twin.get_submodule(name[:-7]).weight = block.get_parameter(name)
    tied = nn.Sequential(block, twin)
    assert [p.name for p in find_products(tied)] == ["0", "0.triple"]
    assert [len(params) for params in names_by_group(tied).values()][:2] == [2, 3]
    block.down = nn.Identity()
    with pytest.raises(ValueError, match="product 0: Block has no parameter 'down.weight'"):
        find_products(model)


def test_groups_hold_every_parameter_once_and_by_kind(dimensions):
    model = small_model(dimensions)
    groups = names_by_group(model, 0.1, 0.3)
    layer = "bert.encoder.layer.{}.attention."
    assert groups["qk"] == [layer.format(i) + f"self.{n}.weight" for i in (0, 1) for n in ("query", "key")]
    assert groups["vo"] == [layer.format(i) + n for i in (0, 1) for n in ("self.value.weight", "output.dense.weight")]
    assert groups["decay"] == [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "bert.encoder.layer.1.intermediate.dense.weight",
        "bert.encoder.layer.1.output.dense.weight",
        "cls.predictions.transform.dense.weight",
    ]
    assert all(name.endswith("bias") or "LayerNorm" in name for name in groups["plain"])
    assert sorted(sum(groups.values(), [])) == sorted(n for n, _ in model.named_parameters())


def test_registered_products_and_other_numbers_of_heads_get_groups_of_their_own(dimensions):
    """Beside attention: its kinds come first, then kinds and heads in order of registration."""
    blocks = nn.ModuleList([Block(), Block()])
    register_product(blocks, "qk", "0.readout.weight", "1.readout.weight", num_heads=3)
    blocks.extra = nn.Linear(5, 2, bias=False)
    other = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False))
    register_product(other, "linear", "1.weight", "0.weight")
    model = nn.ModuleDict({"bert": small_model(dimensions), "blocks": blocks, "other": other})
    groups = names_by_group(model)
    attention = names_by_group(model["bert"])
    assert list(groups) == ["qk", "vo", "linear", "deep", "linear_1", "decay", "plain"]
    assert groups["qk"] == [f"bert.{n}" for n in attention["qk"]] + [f"blocks.{i}.readout.weight" for i in (0, 1)]
    assert groups["linear"] == [f"blocks.{i}.{n}" for i in (0, 1) for n in PAIR]
    assert groups["deep"] == [f"blocks.{i}.{n}" for i in (0, 1) for n in TRIPLE]
    assert groups["linear_1"] == ["other.1.weight", "other.0.weight"]
    assert groups["decay"] == [f"bert.{n}" for n in attention["decay"]] + ["blocks.extra.weight"]
    assert sorted(sum(groups.values(), [])) == sorted(n for n, _ in model.named_parameters())
    optimizer = FrobeniusAdamW(frobenius_param_groups(model))
    heads = [(g["product"], g["num_heads"]) for g in optimizer.param_groups]
    assert heads == [("qk", 3), ("vo", 3), ("linear", 2), ("deep", 1), ("linear", 1), (None, 1), (None, 1)]


@pytest.mark.parametrize("mode, frobenius, weight", [("frobenius", 0.3, 0.0), ("weight", 0.0, 0.3), ("none", 0.0, 0.0)])
def test_decay_mode_changes_the_products_alone(dimensions, mode, frobenius, weight):
    model = nn.ModuleList([small_model(dimensions), Block()])
    groups = {g["name"]: g for g in frobenius_param_groups(model, 0.1, 0.3, mode)}
    for kind, heads in {"qk": 3, "vo": 3, "linear": 2, "deep": 1}.items():
        assert (groups[kind]["frobenius_decay"], groups[kind]["weight_decay"]) == (frobenius, weight)
        assert (groups[kind]["product"], groups[kind]["num_heads"]) == (kind, heads)
    for name, decay in {"decay": 0.1, "plain": 0.0}.items():
        assert (groups[name]["frobenius_decay"], groups[name]["weight_decay"]) == (0.0, decay)
        assert groups[name]["product"] is None


def test_the_decay_of_products_defaults_to_the_weight_decay_and_stock_bert_has_products_too(dimensions):
    groups = {g["name"]: g for g in frobenius_param_groups(BertForMaskedLM(BertConfig(**dimensions)), 0.07)}
    assert groups["qk"]["frobenius_decay"] == groups["decay"]["weight_decay"] == 0.07
    assert len(groups["qk"]["params"]) == len(groups["vo"]["params"]) == 4


def test_a_frozen_factor_stays_beside_its_partner_and_a_frozen_product_goes():
    model = nn.ModuleList([Block(), Block()])
    for name in ("0.up.weight", "1.m.weight", "0.readout.weight", "0.norm.bias"):
        model.get_parameter(name).requires_grad_(False)
    for name in (f"1.{n}" for n in PAIR):
        model.get_parameter(name).requires_grad_(False)
    groups = names_by_group(model)
    assert groups["linear"] == [f"0.{n}" for n in PAIR]
    assert groups["deep"] == [f"{i}.{n}" for i in (0, 1) for n in TRIPLE]
    assert groups["decay"] == ["1.readout.weight"]
    assert sorted(groups["plain"]) == sorted(
        f"{i}.{n}"
        for i in (0, 1)
        for n in ("norm.weight", "norm.bias", "readout.bias", "up.bias")
        if (i, n) != (0, "norm.bias")
    )


def test_a_tied_factor_is_in_the_group_of_its_product_alone():
    """An embedding tied to the readout, whose product with the layer before is registered."""
    model = nn.ModuleDict({"words": nn.Embedding(11, 3), "hidden": nn.Linear(5, 3), "readout": nn.Linear(3, 11)})
    model["readout"].weight = model["words"].weight
    register_product(model, "linear", "readout.weight", "hidden.weight")
    assert names_by_group(model) == {
        "linear": ["words.weight", "hidden.weight"],
        "plain": ["hidden.bias", "readout.bias"],
    }
    assert find_products(model)[0].weight_names == ("readout.weight", "hidden.weight"), "the names of the registration"


def test_bad_arguments_of_the_groups_are_refused(dimensions):
    model = small_model(dimensions)
    with pytest.raises(ValueError, match=r"weight_decay \(-1\) must be finite"):
        frobenius_param_groups(model, -1)
    with pytest.raises(ValueError, match=r"frobenius_decay \(nan\) must be finite"):
        frobenius_param_groups(model, 0.1, float("nan"))
    with pytest.raises(ValueError, match="decay_mode must be one of .* not 'nuclear'"):
        frobenius_param_groups(model, decay_mode="nuclear")
    with pytest.raises(ValueError, match="FnlBertForMaskedLM has no trainable parameters"):
        frobenius_param_groups(model.requires_grad_(False))


def pair_group(count=1):
    return {"params": draw_weights([(6, 5), (6, 7)] * count), "product": "qk", "num_heads": 3}


def triple_group():
    return {"params": draw_weights([(7, 3), (3, 2), (2, 5)]), "product": "deep"}


def set_gradients(parameters):
    for parameter in parameters:
        parameter.grad = 0.1 * parameter.detach().cos()


def refusals():
    pair, other = (draw_weights([(6, 5), (6, 7)], seed=seed) for seed in (1, 2))
    shapes = r"\(6, 5\) and \(6, 7\) must share one size"
    single = draw_weights([(6, 7)], torch.float32)[0]
    half = [draw_weights([(6, 5), (6, 7)], dtype) for dtype in (torch.bfloat16, torch.float16)]
    return [
        ({"frobenius_decay": -0.1}, r"group 1: frobenius_decay \(-0.1\) must be finite and at least 0"),
        ({"frobenius_decay": float("nan")}, r"group 1: frobenius_decay \(nan\)"),
        ({"frobenius_decay": float("inf"), "name": "attention"}, r"group 'attention': frobenius_decay \(inf\)"),
        ({"weight_decay": float("inf")}, r"weight_decay \(inf\) must be finite and at least 0"),
        ({"product": "qq"}, r"group 1: product must be one of \['conv', .*'vo'\] or None, not 'qq'"),
        ({"product": None, "use_muon": True, "frobenius_decay": 0.1}, r"group 1: .* \(0.1\) applies to products"),
        ({"num_heads": 4}, rf"group 1, product 0 \(qk\): shapes {shapes}, a multiple of num_heads \(4\)"),
        ({"num_heads": 0}, rf"{shapes}, a multiple of num_heads \(0\)"),
        ({"product": "vo"}, rf"group 1, product 0 \(vo\): shapes {shapes}"),
        ({"params": [*pair, other[0]]}, "group 1: .*multiple of 2 parameters, but has 3: a factor is missing"),
        ({"params": pair[0]}, "multiple of 2 parameters, but has 1: a factor is missing"),
        (
            {"params": [*pair, *other], "product": "deep"},
            "'deep' have 3 factors each, .* but has 4: a factor is missing",
        ),
        (
            {"params": [pair[0], single]},
            r"product 0 \(qk\): its factors must .* are torch.float64 on cpu and torch.float32",
        ),
        ({"params": half[0], "frobenius_decay": 0.1}, r"product 0 \(qk\) has dtype torch.bfloat16: .*float32"),
        ({"params": half[1], "frobenius_decay": 0.1}, r"product 0 \(qk\) has dtype torch.float16: .*float32"),
        ({"params": [*pair, pair[0], other[1]]}, r"parameter 2, of shape \(6, 5\), is already in parameter group 1"),
        ({"params": [other[0], other[0]]}, r"parameter 1, of shape \(6, 5\), is already in parameter group 1"),
        ({"params": [w.detach().view(-1) for w in pair]}, r"matrices, but have the shapes \[\(30,\), \(42,\)\]. FSDP1"),
    ]


@OPTIMIZERS
@pytest.mark.parametrize("change, message", refusals())
def test_a_bad_group_is_refused_and_leaves_the_optimizer_as_it_was(optimizer_class, change, message):
    optimizer, twin = (optimizer_class([triple_group()], lr=0.1, frobenius_decay=0.3) for _ in range(2))
    before = copy.deepcopy((optimizer.state_dict(), optimizer.defaults))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(pair_group() | change)
    assert (optimizer.state_dict(), optimizer.defaults) == before
    for o in (optimizer, twin):  # the next group finds everything in order
        o.add_param_group(pair_group(count=2))
        for group in o.param_groups:
            set_gradients(group["params"])
        o.step()
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group["params"], other["params"], strict=True))


@OPTIMIZERS
def test_a_decay_without_products_is_refused(optimizer_class):
    (weight,) = draw_weights([(5, 7)])
    optimizer = optimizer_class([{"params": [weight], "use_muon": True}], lr=0.1, frobenius_decay=0.3)
    set_gradients([weight])
    with pytest.raises(ValueError, match=r"frobenius_decay \(0.3\) has nothing to decay.*frobenius_param_groups"):
        optimizer.step()
    optimizer.add_param_group(pair_group())
    optimizer.step()
    before = weight.clone()
    optimizer.param_groups[0]["frobenius_decay"] = 0.2
    with pytest.raises(ValueError, match=r"group 0: frobenius_decay \(0.2\) applies to products only"):
        optimizer.step()
    assert torch.equal(weight, before)


@OPTIMIZERS
def test_groups_that_name_no_products_are_told(optimizer_class, caplog):
    """Such as those that transformers.Trainer makes of an optimizer's class: nothing would be decayed, silently."""
    model = nn.Linear(5, 7, bias=False)
    known = [group | {"use_muon": True} for group in frobenius_param_groups(model, 0.0)]
    for groups, expected in ((known, []), ([{"params": [model.weight], "use_muon": True}], [optimizer_class.__name__])):
        optimizer = optimizer_class(groups, lr=0.1)
        set_gradients([model.weight])
        caplog.clear()
        for each in (optimizer, copy.deepcopy(optimizer)):
            each.step()
        assert [r.message.split(" decays no")[0] for r in caplog.records if "decays no" in r.message] == expected


@OPTIMIZERS
def test_factors_are_decayed_once(optimizer_class):
    """A group made by hand has no decay of its own from the constructor's default beside the Frobenius decay."""
    optimizer = optimizer_class([pair_group(), triple_group() | {"weight_decay": 0.2}], lr=0.1, frobenius_decay=0.3,
                                weight_decay=0.1)  # fmt: skip
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
    control = optimizer_class([pair_group()], lr=0.1, weight_decay=0.1)
    assert control.param_groups[0]["weight_decay"] == 0.1, "without Frobenius decay it is a group like any other"


@OPTIMIZERS
def test_products_dealt_out_to_processes_are_refused(optimizer_class):
    """As torch's ZeroRedundancyOptimizer does, parameter by parameter: shapes may fit and the products be wrong."""
    model = BertForMaskedLM(BertConfig(vocab_size=11, hidden_size=6, num_attention_heads=2, num_hidden_layers=2,
                                       intermediate_size=5, max_position_embeddings=7))  # fmt: skip
    groups = frobenius_param_groups(model, 0.1)
    groups[0]["params"] = groups[0]["params"][::2]
    with pytest.raises(
        ValueError, match="'qk': .* \\(4, because its num_products is 2\\), but has 2: .*ZeroRedundancyOptimizer"
    ):
        optimizer_class(groups, lr=0.1)


def test_half_precision_is_fine_without_frobenius_decay():
    half = draw_weights([(6, 5), (6, 7)], torch.bfloat16)
    optimizer = FrobeniusAdamW([pair_group() | {"params": half}])
    set_gradients(half)
    optimizer.step()
    optimizer.param_groups[0]["frobenius_decay"] = 0.1
    with pytest.raises(ValueError, match="torch.bfloat16: .*float32"):
        optimizer.step()


@OPTIMIZERS
def test_factors_in_a_set_are_refused(optimizer_class):
    """Its order, and so what is paired, would differ from run to run."""
    with pytest.raises(TypeError, match="sets will change between runs"):
        optimizer_class([pair_group(2) | {"params": set(pair_group(2)["params"])}])


@OPTIMIZERS
def test_a_factor_in_two_groups_is_refused(optimizer_class):
    optimizer = optimizer_class([pair_group() | {"name": "attention"}])
    left, right = optimizer.param_groups[0]["params"]
    with pytest.raises(ValueError, match=r"group 1: parameter 1, of shape \(6, 7\), .* parameter group 'attention'"):
        optimizer.add_param_group({"params": [*draw_weights([(6, 2)]), right], "product": "qk"})
    with pytest.raises(ValueError, match="more than one parameter group"):  # torch's own
        optimizer.add_param_group({"params": [left], "use_muon": True})
    named = {"params": [("up", left), ("down", left)], "product": "qk"}
    with pytest.raises(ValueError, match=r"group 0: down, of shape \(6, 5\), is already in parameter group 0"):
        optimizer_class([named])
    assert len(optimizer.param_groups) == 1
