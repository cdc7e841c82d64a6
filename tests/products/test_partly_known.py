"""Attention of which a part is tied, factorized, wrapped, adapted or frozen: what is found of it, and who is named."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.aria.modeling_aria import AriaCrossAttention

from fnl_hf import (
    FactorizationConfig,
    FrobeniusAdamW,
    factorize,
    find_products,
    frobenius_param_groups,
    register_attention,
)
from fnl_hf.products.discovery import discover
from tests.products.architectures import BERT, GROUPED, model_of, of_transformers


class PlainAttention(nn.Module):
    num_heads = 2

    def __init__(self, layer=nn.Linear, output="o_proj"):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", output):
            setattr(self, name, layer(12, 12, bias=False))

    def forward(self, x):
        return self.q_proj(x) @ self.k_proj(x).mT @ self.v_proj(x)


def found_in(model):
    return sorted(product.kind for product in find_products(model)), discover(model)[1]


# Weights that are tied


def tie(model, first, second, whole):
    if whole:
        setattr(model, second, getattr(model, first))
    else:
        getattr(model, second).weight = getattr(model, first).weight


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "first, second, kinds",
    [("q_proj", "k_proj", ["vo"]), ("k_proj", "v_proj", ["qk"]), ("q_proj", "v_proj", ["qk"])],
)
def test_of_tied_weights_one_product_is_left_and_the_class_is_named(first, second, kinds, whole):
    model = PlainAttention()
    tie(model, first, second, whole)
    assert found_in(model) == (kinds, ["PlainAttention"])
    FrobeniusAdamW(frobenius_param_groups(model, 0.1), lr=0.1)
    assert found_in(model.requires_grad_(False)) == (kinds, [])


@pytest.mark.parametrize("first, second, kinds", [("query", "key", ["vo"]), ("key", "value", ["qk"])])
def test_tied_weights_of_bert(first, second, kinds):
    sizes = {"vocab_size": 11, "hidden_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = BertModel(BertConfig(**sizes, intermediate_size=5, max_position_embeddings=7))
    tie(model.encoder.layer[0].attention.self, first, second, whole=False)
    assert found_in(model) == (kinds, ["BertSelfAttention"])
    FrobeniusAdamW(frobenius_param_groups(model, 0.1), lr=0.1)


def test_tied_weights_that_are_registered_are_not_named():
    model = PlainAttention()
    tie(model, "k_proj", "v_proj", whole=False)
    model.own = nn.Linear(12, 12, bias=False)
    register_attention(model, *(f"{name}.weight" for name in ("q_proj", "k_proj", "own", "o_proj")), num_heads=2)
    assert found_in(model) == (["qk", "vo"], [])


# Layers in the place of weights


class Wrapped(nn.Module):
    def __init__(self, *sizes, bias):
        super().__init__()
        self.linear = nn.Linear(*sizes, bias=bias)


class Quantized(nn.Module):
    def __init__(self, rows, columns, bias):
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, columns, dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(rows), requires_grad=False)


def test_wrapped_layers_are_named_and_quantized_ones_are_nothing_to_decay():
    assert found_in(PlainAttention(Wrapped)) == ([], ["PlainAttention"])
    assert found_in(PlainAttention(Wrapped).requires_grad_(False)) == ([], [])
    assert found_in(PlainAttention(Quantized)) == ([], [])


def compiled(*sizes, bias):
    """Unlike a layer, what torch makes of it has a length, and asks the layer for it."""
    return torch.compile(nn.Linear(*sizes, bias=bias), backend="eager")


def test_layers_that_are_compiled_one_by_one_are_named():
    attention = PlainAttention(compiled)
    assert found_in(attention) == ([], ["PlainAttention"])
    attention.q_proj, attention.k_proj, attention.v_proj = (nn.Linear(12, 12) for _ in range(3))
    assert found_in(attention) == (["qk"], ["PlainAttention"])


@pytest.mark.parametrize(
    "include, kinds",
    [
        (["q_proj"], ["linear", "vo"]),
        (["q_proj", "k_proj"], ["linear", "linear", "vo"]),
        (["v_proj", "o_proj"], ["linear", "linear", "qk"]),
        (["o_proj"], ["linear", "qk"]),
        (["q_proj", "o_proj"], ["linear", "linear"]),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ["linear"] * 4),
    ],
)
def test_of_a_factorized_part_the_other_product_is_left(include, kinds):
    model = nn.ModuleDict({"attention": PlainAttention()})
    factorize(model, FactorizationConfig(include=include, target_ratio=0.5))
    assert found_in(model) == (kinds, [])


@pytest.mark.parametrize("include, kinds", [(["c_attn"], ["linear"]), (["attn.c_proj"], ["linear", "qk"])])
def test_of_a_fused_weight_too(include, kinds):
    model = model_of("gpt2").h[0]
    factorize(model, FactorizationConfig(include=include, target_ratio=0.5))
    assert found_in(model) == (kinds, [])


def adapt(model, *names):
    """Wrap layers with LoRA; the others stay trainable."""
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=list(names)), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer" not in name)


def test_layers_with_adapters_are_no_factors_and_nothing_to_warn_of():
    model = PlainAttention()
    adapt(model, "q_proj", "k_proj")
    assert found_in(model) == (["vo"], [])
    model = PlainAttention()
    adapt(model, "q_proj", "k_proj", "v_proj")
    assert found_in(model) == ([], [])


def test_without_an_output_the_values_are_not_understood():
    model = PlainAttention(output="mix")
    assert found_in(model) == (["qk"], ["PlainAttention"])
    model.v_proj.requires_grad_(False)
    model.mix.requires_grad_(False)
    assert found_in(model) == (["qk"], [])


# Fused rows and others of another order


class FusedAttention(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.num_heads = 2
        for name, value in attributes.items():
            setattr(self, name, value)
        self.qkv, self.proj = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x):
        return self.proj(self.qkv(x)[..., :12])


class XCA(FusedAttention):
    pass


def test_fused_rows_by_head_and_of_unequal_parts():
    found = find_products(FusedAttention(head_first=True))
    first, second = (next(p for p in found if p.kind == kind).pair.left.indices() for kind in ("qk", "vo"))
    assert first == {*range(6), *range(18, 24)} and second == {*range(12, 18), *range(30, 36)}
    (qk, _) = find_products(FusedAttention(head_first=False))
    assert qk.pair.left.indices() == {*range(12)}
    for model in (FusedAttention(key_dim=4), FusedAttention(val_dim=8), XCA()):
        assert find_products(model) == []
    assert discover(FusedAttention(key_dim=4))[1] == ["FusedAttention"]


def test_projections_before_torchs_attention_are_no_products():
    vision = SimpleNamespace(hidden_size=12, num_attention_heads=2)
    model = AriaCrossAttention(SimpleNamespace(vision_config=vision))
    assert [product.name for product in find_products(model)] == ["multihead_attn.qk", "multihead_attn.vo"]
    assert discover(model)[1] == ["AriaCrossAttention"]


# Other mathematics


@pytest.mark.parametrize("name, layer, is_between", [("attn_sub_norm", nn.LayerNorm(12), True),
                                                     ("inner_attn_ln", nn.LayerNorm(12), True),
                                                     ("norm", nn.RMSNorm(12), True), ("v_norm", nn.RMSNorm(6), True),
                                                     ("norm", nn.Identity(), False),
                                                     ("q_norm", nn.LayerNorm(12), False),
                                                     ("k_norm", nn.LayerNorm(12), False)])  # fmt: skip
def test_values_that_are_normalized_before_the_output_are_named(name, layer, is_between):
    """As in BitNet: their size is lost, so their product is not what the outputs depend on."""
    model = PlainAttention()
    setattr(model, name, layer)
    assert found_in(model) == ((["qk"], ["PlainAttention"]) if is_between else (["qk", "vo"], []))


def test_bitnet_and_yoso():
    model = of_transformers("bitnet", "BitNet", **GROUPED | {"hidden_size": 24})()
    assert found_in(model) == (["rotary"] * 2, ["BitNetAttention"])
    model = of_transformers("yoso", "Yoso", **BERT)()
    assert found_in(model) == ([], ["YosoSelfAttention"])


# What is frozen


def test_frozen_attention_is_not_named():
    model = of_transformers("roformer", "RoFormer", **BERT | {"hidden_size": 18, "embedding_size": 5})()
    assert discover(model)[1] == ["RoFormerSelfAttention"]
    for layer in model.encoder.layer:
        layer.attention.self.query.requires_grad_(False)
        layer.attention.self.key.requires_grad_(False)
    assert discover(model)[1] == []
