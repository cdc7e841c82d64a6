"""BERT to FNL-BERT and back: exact where it can be, and elsewhere the best that the rank allows."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch.nn.utils import parametrizations, prune
from transformers import BertConfig, BertForPreTraining
from transformers.models.bert import modeling_bert

import fnl_hf
from fnl_hf.bert import modeling_fnl_bert
from tests.bert.conversions import assert_same_outputs, outputs, random_weights
from tests.conftest import DIMENSIONS

HEADS, LAYERS, HEAD_SIZE = 3, 2, 14
CLASSES = list(modeling_fnl_bert.AUTO_CLASSES.values())


@pytest.fixture
def bert(dimensions):
    return random_weights(BertForPreTraining(BertConfig(**dimensions)))


def attention_in_float64(model, layer=0):
    """Q, K, V, O (H, d, r) and b_q, b_k, b_v (H, r), b_o of one layer, as numpy in float64."""
    attention = model.base_model.encoder.layer[layer].attention
    split = [p.weight.detach().double().numpy().reshape(HEADS, -1, 42) for p in
             (attention.self.query, attention.self.key, attention.self.value)]  # fmt: skip
    biases = [p.bias.detach().double().numpy().reshape(HEADS, -1) for p in
              (attention.self.query, attention.self.key, attention.self.value)]  # fmt: skip
    output = attention.output.dense
    o = output.weight.detach().double().numpy().reshape(42, HEADS, -1).transpose(1, 0, 2)
    return [part.transpose(0, 2, 1) for part in split] + [o], biases, output.bias.detach().double().numpy()


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_at_full_size_is_the_stock_model_to_the_last_bit(name, dimensions, batch):
    ours = getattr(modeling_fnl_bert, name)
    stock = random_weights(ours.bert_class()(BertConfig(**dimensions)))
    assert ours.bert_class() is getattr(modeling_bert, name.removeprefix("Fnl"))
    if "MultipleChoice" in name:
        batch = {key: value[:4].view(2, 2, -1) for key, value in batch.items()}
    converted = ours.from_bert(stock)
    back = converted.to_bert()
    assert type(back) is type(stock) and back.config.model_type == "bert"
    assert {n: tuple(v.shape) for n, v in back.state_dict().items()} == {
        n: tuple(v.shape) for n, v in stock.state_dict().items()
    }
    with torch.no_grad():
        for a, b, c in zip(stock(**batch).to_tuple(), converted(**batch).to_tuple(), back(**batch).to_tuple()):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("embedding_size", [3, 15, 39])
@pytest.mark.parametrize("calibrated", [False, True])
def test_back_to_bert_is_exact_after_truncation(bert, batch, embedding_size, calibrated):
    calibration = [batch] if calibrated else None
    small, lost = fnl_hf.FnlBertForPreTraining.from_bert(bert, embedding_size, calibration, output_truncations=True)
    assert small.config.mha_embedding_size == embedding_size and len(lost) == 2 * LAYERS
    assert all(product.singular_values.shape == (HEADS, HEAD_SIZE) for product in lost)
    assert_same_outputs(small, small.to_bert(), batch)
    padded = small.to_bert().bert.encoder.layer[1].attention.self.key.weight.view(HEADS, HEAD_SIZE, 42)
    assert not padded[:, embedding_size // HEADS :].any()


@pytest.mark.parametrize("embedding_size", [6, 33])
def test_the_truncation_is_the_svd_of_the_products(bert, embedding_size):
    """Against numpy's SVD of the d×d products in float64 (method.md: the bias is one more row)."""
    rank = embedding_size // HEADS
    small, lost = fnl_hf.FnlBertForPreTraining.from_bert(bert, embedding_size, output_truncations=True)
    (q, k, v, o), (bq, bk, bv), bo = attention_in_float64(bert, layer=1)
    (q2, k2, v2, o2), (bq2, bk2, bv2), bo2 = attention_in_float64(small, layer=1)
    scores = np.concatenate([q, bq[:, None]], 1) @ np.concatenate([k, bk[:, None]], 1).transpose(0, 2, 1)
    scores2 = np.concatenate([q2, bq2[:, None]], 1) @ np.concatenate([k2, bk2[:, None]], 1).transpose(0, 2, 1)
    values, values2 = v @ o.transpose(0, 2, 1), v2 @ o2.transpose(0, 2, 1)
    by_name = {product.name: product for product in lost}
    for kind, old, new in (("qk", scores / HEAD_SIZE**0.5, scores2 / rank**0.5), ("vo", values, values2)):
        p, sigma, qh = np.linalg.svd(old)
        best = p[..., :rank] * sigma[:, None, :rank] @ qh[:, :rank]
        np.testing.assert_allclose(new, best, atol=1e-5)
        scale = HEAD_SIZE**0.5 if kind == "qk" else 1.0
        product = by_name[f"bert.encoder.layer.1.attention.{kind}"]
        np.testing.assert_allclose(product.singular_values, scale * sigma[:, :HEAD_SIZE], rtol=1e-6)
        np.testing.assert_allclose(product.lost, scale * np.sqrt((sigma[:, rank:HEAD_SIZE] ** 2).sum()), rtol=1e-6)
        np.testing.assert_allclose(product.kept, scale * np.sqrt((sigma[:, :rank] ** 2).sum()), rtol=1e-6)
    constant = np.einsum("hr,hdr->d", bv, o) + bo
    np.testing.assert_allclose(np.einsum("hr,hdr->d", bv2, o2) + bo2, constant, atol=1e-5)


def test_an_fnl_bert_can_be_truncated_too(bert, batch):
    half = fnl_hf.FnlBertForPreTraining.from_bert(bert, 21)
    torch.testing.assert_close(
        outputs(fnl_hf.FnlBertForPreTraining.from_bert(half, 9), batch)[0],
        outputs(fnl_hf.FnlBertForPreTraining.from_bert(bert, 9), batch)[0], atol=1e-4, rtol=0,
    )  # fmt: skip


def test_a_large_rank_goes_back_only_if_the_products_fit(dimensions, batch):
    config = fnl_hf.FnlBertConfig(**dimensions, attention_embedding_size=60)
    wide = random_weights(fnl_hf.FnlBertModel(config))
    with pytest.raises(ValueError, match=r"attention\.qk has products of rank 20; .* at most 14"):
        wide.to_bert()
    with torch.no_grad():
        for layer in wide.encoder.layer:
            for linear in (layer.attention.self.key, layer.attention.self.value):
                for parameter in (linear.weight, linear.bias):
                    parameter.view(HEADS, 20, -1)[:, 13:] = parameter.view(HEADS, 20, -1)[:, 3:10]
    assert_same_outputs(wide, wide.to_bert(), batch)


def test_another_head_gives_what_it_has(bert, batch, caplog):
    answers = fnl_hf.FnlBertForQuestionAnswering.from_bert(bert, 21)
    assert torch.equal(answers.bert.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)
    assert "newly initialized, because BertForPreTraining does not have them: qa_outputs.bias" in caplog.text
    from_encoder = fnl_hf.FnlBertForQuestionAnswering.from_bert(bert.bert, 21)
    torch.testing.assert_close(
        outputs(from_encoder.bert, batch)[0], outputs(fnl_hf.FnlBertModel.from_bert(bert, 21), batch)[0]
    )


class FnlBertForRanking(fnl_hf.FnlBertPreTrainedModel):
    """A head that transformers does not have."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = fnl_hf.FnlBertModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


def test_a_head_without_a_counterpart_is_refused_by_its_name(bert, dimensions, tmp_path):
    model = FnlBertForRanking.from_bert(bert)  # the encoder's weights need no counterpart
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)
    bert.save_pretrained(tmp_path)
    message = "^FnlBertForRanking cannot be converted: it must inherit from a class of transformers"
    for convert_it in (model.to_bert, FnlBertForRanking.bert_class, lambda: FnlBertForRanking.from_bert(tmp_path)):
        with pytest.raises(ValueError, match=message):
            convert_it()


def test_dtype_and_ties_are_kept(dimensions):
    stock = fnl_hf.FnlBertForMaskedLM.bert_class()(BertConfig(**dimensions)).bfloat16()
    small = fnl_hf.FnlBertForMaskedLM.from_bert(stock, 21)
    assert small.dtype == small.to_bert().dtype == torch.bfloat16
    assert small.cls.predictions.decoder.weight is small.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("embedding_size", [0, -3, 20, 45])
def test_an_embedding_size_that_does_not_fit_is_refused(bert, embedding_size):
    with pytest.raises(ValueError, match=rf"\({embedding_size}\) must be a multiple of .* \(3\) and at most 42"):
        fnl_hf.FnlBertForPreTraining.from_bert(bert, embedding_size)


def test_arguments_that_are_no_use_are_refused(bert):
    for size in (21.0, "21", [21]):
        with pytest.raises(ValueError, match=r"attention_embedding_size \(.*21.*\) must be a multiple"):
            fnl_hf.FnlBertModel.from_bert(bert, size)
    with pytest.raises(
        ValueError, match="^attention_embeding_size: only for a model's name or folder, not for a model"
    ):
        fnl_hf.FnlBertModel.from_bert(bert, attention_embeding_size=21)


def test_weights_of_conversions_and_of_new_models_do_not_know_autocast(bert):
    models = []
    for is_inside in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
            config = fnl_hf.FnlBertConfig(**DIMENSIONS, attention_embedding_size=21)
            made = [fnl_hf.FnlBertModel(config), fnl_hf.FnlBertForPreTraining.from_bert(bert, 21)]
            models.append([*made, made[1].to_bert()])
    for outside, inside in zip(*models):
        for name, value in outside.state_dict().items():
            assert torch.equal(value, inside.state_dict()[name]), name


# ---- models whose layers are not those that their configuration describes ----


class Wrapped(torch.nn.Module):
    """A layer whose weight has another name."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer


def adapt(model, name):
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[name]), model)


def wrap(model, name, kind):
    model.set_submodule(name, kind(model.get_submodule(name)))


QUERY, UP = "bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.intermediate.dense"
CHANGES = {
    "adapters": (lambda model: adapt(model, QUERY), "has adapters of PEFT, which a conversion would lose"),
    "adapters of a feed-forward layer": (lambda model: adapt(model, UP), "has adapters of PEFT"),
    "another wrapper": (
        lambda model: wrap(model, QUERY, Wrapped), rf"it lacks {QUERY}.bias, {QUERY}.weight and has {QUERY}.base_layer."
    ),
    "a wrapped head": (
        lambda model: wrap(model, "classifier", Wrapped), "lacks classifier.bias, classifier.weight and has classifier"
    ),
    "a parametrization": (
        lambda model: parametrizations.weight_norm(model.get_submodule(QUERY)), f"lacks {QUERY}.weight "
    ),
    "pruning": (
        lambda model: prune.random_unstructured(model.get_submodule(UP), "weight", 0.5),
        f"lacks {UP}.weight and has {UP}.weight_mask, {UP}.weight_orig",
    ),
    "a layer less": (
        lambda model: model.bert.encoder.layer.__delitem__(1), "lacks bert.encoder.layer.1.* and 13 more"
    ),
    "a layer more": (
        lambda model: model.bert.encoder.layer.append(torch.nn.Linear(2, 3)), "it has bert.encoder.layer.2.bias, "
    ),
    "a head of another size": (
        lambda model: model.set_submodule("classifier", torch.nn.Linear(42, 5)), "lacks classifier.bias, "
    ),
    "heads of another size": (
        lambda model: wrap(model, QUERY, lambda layer: torch.nn.Linear(42, 9)), f"lacks {QUERY}.bias, {QUERY}.weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stock", [False, True])
def test_weights_that_a_conversion_would_lose_are_named(dimensions, change, stock):
    ours = fnl_hf.FnlBertForSequenceClassification
    config = BertConfig(**dimensions) if stock else fnl_hf.FnlBertConfig(**dimensions, attention_embedding_size=21)
    model = (ours.bert_class() if stock else ours)(config)
    make, message = CHANGES[change]
    make(model)
    conversions = [lambda: ours.from_bert(model), lambda: ours.from_bert(model, 6), lambda: model.to_bert()]
    for convert_it in conversions[: 2 if stock else 3]:
        with pytest.raises(ValueError, match=message):
            convert_it()


def test_what_is_no_model_of_transformers_is_refused(bert):
    adapted = peft.get_peft_model(copy.deepcopy(bert), peft.LoraConfig(r=2))
    with pytest.raises(ValueError, match="^PeftModel has adapters of PEFT"):
        fnl_hf.FnlBertModel.from_bert(adapted)
    for other in (torch.nn.Sequential(bert), {"bert": bert}, None):
        with pytest.raises(ValueError, match=f"^a {type(other).__name__} is neither a model of Transformers nor"):
            fnl_hf.FnlBertModel.from_bert(other)


def test_factorized_layers_are_multiplied_out(bert, batch):
    """Those of attention, too; a BERT of the same weights is the oracle."""
    model = fnl_hf.FnlBertForPreTraining.from_bert(bert, 21)
    names = ["query", "attention.output.dense", "intermediate.dense", "word_embeddings", "pooler.dense"]
    sizes = {"mode": "deep", "rank_scale": 1.0}
    fnl_hf.factorize(model, fnl_hf.FactorizationConfig(**sizes, include=names))
    back = model.to_bert()
    assert not hasattr(back.config, "quantization_config") and hasattr(model.config, "quantization_config")
    assert not [m for m in back.modules() if isinstance(m, fnl_hf.layers.FactorizedLayer)]
    assert_same_outputs(back, fnl_hf.FnlBertForPreTraining.from_bert(bert, 21), batch, atol=1e-4)
