"""Rotary embeddings that a layer, its configuration or its caller switches off, and those that are not understood."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.afmoe.configuration_afmoe import AfmoeConfig
from transformers.models.afmoe.modeling_afmoe import AfmoeAttention
from transformers.models.lightglue.configuration_lightglue import LightGlueConfig
from transformers.models.lightglue.modeling_lightglue import LightGlueAttention
from transformers.models.zamba2.configuration_zamba2 import Zamba2Config
from transformers.models.zamba2.modeling_zamba2 import Zamba2Attention

from fnl_hf import find_products
from fnl_hf.products.discovery import discover
from tests.products.architectures import GROUPED, hidden, of_transformers
from tests.products.attention_by_hand import filled
from tests.products.test_attention import assert_outputs_know_the_products_alone

WINDOWS = ["sliding_attention", "full_attention"]
WIDE = GROUPED | {"hidden_size": 24}
GRANITE = WIDE | {"layer_types": ["full_attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 7}
GRANITE |= {"mamba_n_heads": 4, "mamba_d_state": 3}
CONFORMER = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 7}
CONFORMER |= {"feature_projection_input_dim": 5, "conv_depthwise_kernel_size": 3, "layerdrop": 0.0}


def heard(model):
    generator = torch.Generator().manual_seed(1)
    return model(input_features=torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)).last_hidden_state


MODELS = {  # build, run or None where queries and keys are normalized or meet more, products, unknown
    "granite hybrid": (
        of_transformers("granitemoehybrid", "GraniteMoeHybrid", **GRANITE, position_embedding_type="rope"),
        hidden,
        {"rotary": 2, "vo": 2},
        [],
    ),
    "granite hybrid without": (
        of_transformers("granitemoehybrid", "GraniteMoeHybrid", **GRANITE),
        hidden,
        {"qk": 2, "vo": 2},
        [],
    ),
    "cohere2": (
        of_transformers("cohere2", "Cohere2", **WIDE, layer_types=WINDOWS, sliding_window=5),
        hidden,
        {"rotary": 1, "qk": 1, "vo": 2},
        [],
    ),
    "exaone4": (
        of_transformers("exaone4", "Exaone4", **WIDE, layer_types=WINDOWS, sliding_window=5),
        None,
        {"rotary": 1, "qk": 1, "vo": 2},
        [],
    ),
    "moonshine": (  # 4 of 6 rows are rotated, of cross-attention none
        of_transformers(
            "moonshine",
            "Moonshine",
            vocab_size=31,
            hidden_size=12,
            intermediate_size=7,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.7},
        ),
        None,
        {"rotary": 2, "qk": 3, "vo": 3},
        [],
    ),
    "conformer": (
        of_transformers("wav2vec2_bert", "Wav2Vec2Bert", **CONFORMER, position_embeddings_type="relative_key"),
        None,  # queries meet positions, too
        {"qk": 1, "vo": 1},
        [],
    ),
    "conformer without positions": (
        of_transformers("wav2vec2_bert", "Wav2Vec2Bert", **CONFORMER, position_embeddings_type=None),
        heard,
        {"qk": 1, "vo": 1},
        [],
    ),
    "conformer with rotated inputs": (
        of_transformers("wav2vec2_bert", "Wav2Vec2Bert", **CONFORMER, position_embeddings_type="rotary"),
        heard,
        {"vo": 1},
        ["Wav2Vec2BertSelfAttention"],
    ),
    "gemma4": (  # proportional angles in the second layer, with zeros at the end; values are normalized
        of_transformers(
            "gemma4",
            "Gemma4Text",
            **WIDE,
            layer_types=WINDOWS,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=31,
            global_head_dim=8,
        ),
        None,
        {"rotary": 1},
        ["Gemma4TextAttention"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_rotated_is_what_the_forward_rotates(name):
    build, run, expected, unknown = MODELS[name]
    torch.manual_seed(0)
    model = filled(build())
    assert Counter(product.kind for product in find_products(model)) == expected
    assert discover(model)[1] == unknown
    if run is not None:
        assert_outputs_know_the_products_alone(model, run, expected)


def kinds_of(**modules):
    model = nn.ModuleDict(modules)
    return {name: {p.kind for p in find_products(model) if p.name.startswith(name)} for name in modules}


def test_a_switch_in_the_module_or_its_configuration_is_read():
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    local = AfmoeConfig(**sizes, head_dim=6, num_hidden_layers=2, layer_types=WINDOWS)
    by_config = [Zamba2Config(**sizes, num_hidden_layers=1, layers_block_type=["hybrid"]) for _ in range(2)]
    by_config[1].use_mem_rope = True
    found = kinds_of(
        local=AfmoeAttention(local, 0),
        everywhere=AfmoeAttention(local, 1),
        without=Zamba2Attention(by_config[0], 0, num_fwd_mem_blocks=1, block_id=0),
        rotated=Zamba2Attention(by_config[1], 0, num_fwd_mem_blocks=1, block_id=0),
    )
    assert found == {
        "local": {"rotary", "vo"},
        "everywhere": {"qk", "vo"},
        "without": {"qk", "vo"},
        "rotated": {"rotary", "vo"},
    }


def test_angles_that_only_the_caller_has_are_unknown_but_in_cross_attention():
    config = LightGlueConfig(descriptor_dim=24, num_attention_heads=4, num_hidden_layers=1)
    attention = LightGlueAttention(config, 0)
    assert kinds_of(self_attention=attention) == {"self_attention": {"vo"}}
    assert discover(nn.ModuleDict({"self_attention": attention}))[1] == ["LightGlueAttention"]
    assert kinds_of(cross_attention=attention) == {"cross_attention": {"qk", "vo"}}


def apply_rotary(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def apply_rot_embed(x, embedding):
    return apply_rotary(x, *embedding)


class Switched(nn.Module):
    """Conditions of all forms around the call."""

    use, kind, other, num_heads = True, "rope", None, 2

    def __init__(self, **switches):
        super().__init__()
        for name, value in switches.items():
            setattr(self, name, value)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x, cos, sin, mask=None):
        q, k = self.q_proj(x), self.k_proj(x)
        if self.use and not self.other is not None:
            q, k = (self._turn(each, cos, sin) for each in (q, k))
        return q @ k.mT @ self.v_proj(x)

    def _turn(self, x, cos, sin):
        return apply_rotary(x, cos, sin) if self.kind in ("rope", "rotary") else x


class Unclear(Switched):
    def forward(self, x, cos, sin, mask=None):
        q, k = self.q_proj(x), self.k_proj(x)
        if mask is None or self.other:
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q @ k.mT @ self.v_proj(x)


class OtherName(Switched):
    def forward(self, x, embedding):
        q, k = apply_rot_embed(self.q_proj(x), embedding), apply_rot_embed(self.k_proj(x), embedding)
        return q @ k.mT @ self.v_proj(x)


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


apply_RoPE = apply_rotary


class Inline(Switched):
    def forward(self, x, cos, sin):
        q, k = self.q_proj(x), self.k_proj(x)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        return q @ k.mT @ self.v_proj(x)


class Capitals(Switched):
    def forward(self, x, cos, sin):
        q, k = apply_RoPE(self.q_proj(x), cos, sin), apply_RoPE(self.k_proj(x), cos, sin)
        return q @ k.mT @ self.v_proj(x)


@pytest.mark.parametrize(
    "module, expected",
    [
        (Switched(), {"rotary", "vo"}),
        (Switched(use=False), {"qk", "vo"}),
        (Switched(kind="learned"), {"qk", "vo"}),
        (Switched(other=0), {"qk", "vo"}),
        (Unclear(), {"vo"}),
        (Unclear(other=True), {"rotary", "vo"}),
        (OtherName(), {"vo"}),
        (Capitals(), {"rotary", "vo"}),
        (Inline(), {"vo"}),
    ],
)
def test_conditions_are_read_as_they_are_written(module, expected):
    assert kinds_of(attention=copy.deepcopy(module)) == {"attention": expected}


class Passed(Switched):
    def forward(self, x, position_embeddings=None):
        q, k = self.q_proj(x), self.k_proj(x)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q @ k.mT @ self.v_proj(x)


ROPE = {"rope_type": "default", "rope_theta": 10.0}
BY_TYPE = {"layer_types": WINDOWS, "rope_parameters": {"sliding_attention": ROPE, "full_attention": None}}


@pytest.mark.parametrize(
    "config, kinds",
    [
        ({}, ("vo", "vo")),
        ({"position_embedding_type": "rope"}, ("rotary", "rotary")),
        ({"position_embedding_type": None, "rope_parameters": ROPE}, ("qk", "qk")),  # Granite's hybrids
        ({"layer_rope_theta": [10.0, 0], "rope_parameters": ROPE}, ("rotary", "qk")),  # Granite with windows
        ({"rope_parameters": ROPE}, ("rotary", "rotary")),
        ({"rope_parameters": ROPE | {"rope_theta": None}}, ("qk", "qk")),  # OLMo hybrid
        ({"rope_parameters": None}, ("qk", "qk")),
        (BY_TYPE, ("rotary", "qk")),  # Cohere's Compass
    ],
)
def test_whether_angles_are_passed_is_the_configurations_to_say(config, kinds):
    config = SimpleNamespace(**config)
    found = kinds_of(first=Passed(config=config, layer_idx=0), second=Passed(config=config, layer_idx=1))
    assert found == {name: {kind, "vo"} for name, kind in zip(("first", "second"), kinds)}
    assert kinds_of(encoder_attn=Passed(config=config, layer_idx=0)) == {"encoder_attn": {"qk", "vo"}}
