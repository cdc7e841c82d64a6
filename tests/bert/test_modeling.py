"""FNL-BERT against stock BERT, its checkpoints, and its code without fnl_hf."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertConfig

import fnl_hf
from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, FnlBertModel, factor_pairs
from fnl_hf.bert.modeling_fnl_bert import AUTO_CLASSES
from tests.conftest import WITHOUT_FNL_HF

HEADS = [name.removeprefix("FnlBert") for name in AUTO_CLASSES.values()]


def fnl(head, dimensions, **kwargs):
    kwargs = {"attention_embedding_size": 6} | kwargs
    return getattr(fnl_hf, f"FnlBert{head}")(FnlBertConfig(**dimensions, **kwargs))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_stock_weights_give_stock_outputs(tmp_path, dimensions, batch, head, implementation):
    config = BertConfig(**dimensions, num_labels=2)
    stock = getattr(transformers, f"Bert{head}")(config).eval()
    for parameter in stock.parameters():  # far from initialization, so that every weight and bias shows
        nn.init.normal_(parameter, std=0.3)
    stock.save_pretrained(tmp_path)
    ours = getattr(fnl_hf, f"FnlBert{head}").from_pretrained(tmp_path, attn_implementation=implementation).eval()
    inputs = {k: torch.stack([v, v.flip(0)], 1) for k, v in batch.items()} if head == "ForMultipleChoice" else batch
    with torch.no_grad():
        expected, outputs = stock(**inputs).to_tuple(), ours(**inputs).to_tuple()
    assert len(expected) == len(outputs)
    for a, b in zip(outputs, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_attention_equals_the_paper(dimensions, batch):
    """softmax(x Q_h K_hᵀ xᵀ/√r) x V_h O_hᵀ summed over heads, with r = E/H = 2."""
    model = fnl("Model", dimensions).eval()
    attention = model.encoder.layer[0].attention
    for name, parameter in attention.named_parameters():
        if "LayerNorm" not in name:
            nn.init.normal_(parameter, std=0.5 if name.endswith("weight") else 0.0)
    x = torch.randn(5, 11, 42)
    qk, vo = factor_pairs(model)[:2]
    (q, k), (v, o) = qk.factors(), vo.factors()
    scores = torch.einsum("bsi,hir,hjr,btj->bhst", x, q, k, x) / 2**0.5
    expected = torch.einsum("bhst,bti,hir,hjr->bsj", scores.softmax(-1), x, v, o)
    context, _ = attention.self(x)
    assert context.shape == (5, 11, 6)
    torch.testing.assert_close(attention.output.dense(context), expected, atol=1e-4, rtol=1e-4)


def test_attention_options(dimensions, batch):
    model = fnl("Model", dimensions).eval()
    sdpa = model(**batch).last_hidden_state
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_attentions=True, output_hidden_states=True)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs.last_hidden_state[valid], sdpa[valid])
    assert [a.shape for a in outputs.attentions] == [(5, 3, 11, 11)] * 2
    assert len(outputs.hidden_states) == 3


def test_gradient_checkpointing_changes_no_gradient(dimensions, batch):
    dimensions |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = fnl("ForMaskedLM", dimensions).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()
    assert any(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("saved", [False, True])
def test_the_configuration_can_ask_for_gradient_checkpointing(tmp_path, dimensions, head, saved):
    """As transformers' own test_gradient_checkpointing_backward_compatibility; also from a saved configuration."""
    config = FnlBertConfig(**dimensions, attention_embedding_size=6, gradient_checkpointing=True)
    model_class = getattr(fnl_hf, f"FnlBert{head}")
    if saved:
        fnl(head, dimensions).save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
        model = model_class.from_pretrained(tmp_path)
    else:
        model = model_class(config)
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.base_model.encoder.layer)
    assert not hasattr(model.config, "gradient_checkpointing"), "it is used up, as in transformers"
    assert not fnl(head, dimensions).is_gradient_checkpointing


def test_save_and_load_keep_every_weight(tmp_path, dimensions, batch):
    model = fnl("ForMaskedLM", dimensions, attention_init="spectral").eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is FnlBertForMaskedLM and loaded.config.attention_embedding_size == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is FnlBertModel
    torch.testing.assert_close(bare(**batch).last_hidden_state, model.bert(**batch).last_hidden_state)


def test_resize_token_embeddings(dimensions, batch):
    model = fnl("ForMaskedLM", dimensions)
    model.resize_token_embeddings(59)
    outputs = model(**batch, labels=batch["input_ids"] + 5)
    assert outputs.logits.shape == (5, 11, 59) and torch.isfinite(outputs.loss)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


# ---- initialization ----


def imbalance(pair):
    """0 where UᵀU = VᵀV, as after spectral initialization."""
    u, v = pair.factors()
    return ((u.mT @ u - v.mT @ v).norm() / (u.mT @ u).norm()).item()


@pytest.mark.parametrize("make", ["class", "auto", "head"])
def test_spectral_initialization_reaches_the_pairs_from_scratch(dimensions, make):
    config = FnlBertConfig(**dimensions, attention_embedding_size=6, attention_init="spectral")
    model = {"class": FnlBertModel, "head": FnlBertForMaskedLM, "auto": AutoModel.from_config}[make](config)
    assert len(model.factor_pairs()) == 4
    assert max(imbalance(pair) for pair in model.factor_pairs()) < 1e-5
    assert min(imbalance(pair) for pair in fnl("ForMaskedLM", dimensions).factor_pairs()) > 1e-2, "normal is not"


def test_initial_scale_is_bert_s_own(dimensions):
    dimensions |= {"hidden_size": 420, "num_attention_heads": 3}
    model = fnl("Model", dimensions, attention_embedding_size=210)
    for pair in model.factor_pairs():
        assert pair.weights[0].std().item() == pytest.approx(0.02, rel=0.03)
        assert pair.weights[1].std().item() == pytest.approx(0.02, rel=0.03)
    # Truncating a 420×420 product of rank 140 to rank 70 keeps its largest singular values.
    spectral = fnl("Model", dimensions, attention_embedding_size=210, attention_init="spectral")
    u, v = spectral.factor_pairs()[0].factors()
    full = torch.randn(420, 140) * 0.02 @ (torch.randn(420, 140) * 0.02).T
    expected = torch.linalg.svdvals(full)[:70].square().sum().sqrt()
    assert torch.linalg.matrix_norm(u[0] @ v[0].T).item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("init", ["folded", "rescaled"])
def test_the_scale_of_a_smaller_head(dimensions, init):
    """H 3, d/H 14, r 2: against an SVD of the d x d products that the same numbers make."""
    model = fnl("Model", dimensions, attention_init=init, initializer_range=0.5)
    assert max(imbalance(pair) for pair in model.factor_pairs()) < 1e-5, "it reaches the pairs from scratch"
    for pair in model.factor_pairs()[:2]:
        torch.manual_seed(2)
        left, right = (torch.empty(3, 42, 14).normal_(std=0.5).double() for _ in range(2))
        p, sigma, qh = torch.linalg.svd(left @ right.mT)
        scale = torch.full((3,), (2 / 14) ** 0.5 if pair.kind == "qk" else 1.0)  # 1/√14 in the place of 1/√2
        if init == "rescaled":
            scale = scale * sigma.norm(dim=1) / sigma[:, :2].norm(dim=1)
        expected = scale[:, None, None] * (p[..., :2] * sigma[:, None, :2] @ qh[:, :2])
        torch.manual_seed(2)
        model._initialize_spectrally(pair)
        u, v = pair.factors()
        torch.testing.assert_close((u @ v.mT).double(), expected, atol=1e-4, rtol=1e-4)


def test_spectral_initialization_leaves_loaded_weights_alone(tmp_path, dimensions):
    model = fnl("ForMaskedLM", dimensions, attention_init="spectral")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    lacking = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "layer.1.attention" not in k}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    old, new = model.factor_pairs(), loaded.factor_pairs()
    for index in (0, 1):
        assert all(map(torch.equal, old[index].weights, new[index].weights))
    for index in (2, 3):
        assert imbalance(new[index]) < 1e-5 and new[index].weights[0].std() < 0.1


def test_spectral_initialization_in_half_precision(dimensions):
    config = FnlBertConfig(**dimensions, attention_embedding_size=6, attention_init="spectral")
    model = AutoModel.from_config(config, dtype=torch.bfloat16)
    u, v = model.factor_pairs()[0].factors()
    assert u.dtype == torch.bfloat16 and imbalance(model.float().factor_pairs()[0]) < 0.02


def test_meta_device_builds_the_large_model():
    with torch.device("meta"):
        model = FnlBertModel(
            FnlBertConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                attention_embedding_size=512, attention_init="spectral",
            )
        )  # fmt: skip
    assert model.num_parameters() == 335_141_888 - 24 * (4 * 512 * 1024 + 3 * 512), "BERT-Large less 50.37 million"


# ---- refusals ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_embedding_size": 7}, r"attention_embedding_size \(7\) must be a positive multiple .*\(3\)"),
        ({"attention_embedding_size": 0}, r"attention_embedding_size \(0\) must be a positive multiple"),
        ({"attention_init": "svd"}, r"must be one of \('normal', 'spectral'\), not 'svd'"),
        ({"attention_init": "spectral", "attention_embedding_size": 45}, r"\(45\) must be at most hidden_size \(42\)"),
        ({"is_decoder": True}, "is an encoder: is_decoder"),
        ({"add_cross_attention": True}, "is an encoder: .*add_cross_attention"),
    ],
)
def test_bad_configurations_are_refused(dimensions, change, message):
    with pytest.raises(StrictDataclassError, match=message):
        FnlBertConfig(**dimensions, **change)


def test_decoder_use_is_refused_late_too(tmp_path, dimensions, batch):
    model = fnl("Model", dimensions)
    model.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="is an encoder"):
        FnlBertModel.from_pretrained(tmp_path, is_decoder=True)
    with pytest.raises(ValueError, match="encoder_hidden_states and past_key_values must be None"):
        model(**batch, encoder_hidden_states=torch.zeros(5, 3, 42))


# ---- checkpoints without fnl_hf ----

REMOTE = (
    WITHOUT_FNL_HF
    + """
import transformers
folder, resaved = sys.argv[1:]
for name in NAMES:
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert model.config.attention_embedding_size == 6, name
    print(name, type(model).__name__)
transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # as in the card: asks nothing
model.save_pretrained(resaved)  # from another head, still loadable into any
transformers.AutoModelForQuestionAnswering.from_pretrained(resaved, trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(resaved, trust_remote_code=True)
u, v = transformers.AutoModel.from_config(config, trust_remote_code=True).factor_pairs()[0].factors()
assert (u.mT @ u - v.mT @ v).norm() < 1e-5 * (u.mT @ u).norm(), "spectral initialization in remote code"
"""
)


@pytest.mark.parametrize("head", ["ForPreTraining", "ForQuestionAnswering"])
def test_checkpoint_loads_into_every_auto_class_without_fnl_hf(tmp_path, dimensions, head, tokenizer):
    fnl(head, dimensions, attention_init="spectral").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = REMOTE.replace("NAMES", repr(list(AUTO_CLASSES)))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "model"), str(tmp_path / "resaved")],
        capture_output=True, text=True, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [word for pair in AUTO_CLASSES.items() for word in pair]


def test_registered_with_the_auto_classes(dimensions):
    config = AutoConfig.for_model("fnl_bert", **dimensions)
    assert type(config) is FnlBertConfig
    for auto, name in AUTO_CLASSES.items():
        assert type(getattr(transformers, auto).from_config(config)).__name__ == name
