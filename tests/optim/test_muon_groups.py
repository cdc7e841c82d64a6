"""Which parameters follow Muon, and what FrobeniusMuon refuses before anything moves."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    CLIPConfig,
    CLIPForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)
from transformers.pytorch_utils import Conv1D

from fnl_hf import (
    FactorizationConfig,
    FnlBertConfig,
    FnlBertForMaskedLM,
    FrobeniusAdamW,
    FrobeniusMuon,
    UserInputError,
    factorize,
    muon_param_groups,
)
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.optimizers import build_optimizer
from tests.conftest import needs_muon
from tests.optim.test_muon import LR, READOUT, Tagger, loss_of, make, torchs, train
from tests.optim.test_optim import same

pytestmark = needs_muon


def names_by_group(model, **kwargs):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = muon_param_groups(model, 0.1, **kwargs)
    found = {group["name"]: (group["use_muon"], [names[id(p)] for p in group["params"]]) for group in groups}
    assert len(found) == len(groups)
    return found


def test_a_language_model_trains_embeddings_and_heads_by_adamw():
    sizes = {"vocab_size": 11, "hidden_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = BertForPreTraining(BertConfig(**sizes, intermediate_size=5, max_position_embeddings=7))
    groups = names_by_group(model)
    layer = "bert.encoder.layer.0"
    query, output = f"{layer}.attention.self", f"{layer}.attention.output.dense.weight"
    assert groups["qk"] == (True, [f"{query}.query.weight", f"{query}.key.weight"])
    assert groups["vo"] == (True, [f"{query}.value.weight", output])
    dense = [f"{layer}.intermediate.dense.weight", f"{layer}.output.dense.weight", "bert.pooler.dense.weight"]
    assert groups["decay"] == (True, dense)
    embeddings = [f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    heads = ["cls.predictions.transform.dense.weight", "cls.seq_relationship.weight"]  # the decoder's is the table
    assert groups["decay_adamw"] == (False, [*embeddings, *heads])
    assert groups["plain"][0] is False and len(groups) == 5
    assert sum(len(names) for _, names in groups.values()) == len(list(model.parameters()))


def test_heads_and_tables_of_other_models():
    vit = ViTForImageClassification(ViTConfig(hidden_size=6, num_hidden_layers=1, num_attention_heads=2,
                                              intermediate_size=5, image_size=8, patch_size=4))  # fmt: skip
    of_adamw = names_by_group(vit)["decay_adamw"][1]
    assert of_adamw == ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "classifier.weight"]
    assert "vit.embeddings.patch_embeddings.projection.weight" in names_by_group(vit)["decay"][1]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=6, d_kv=3, d_ff=5, num_layers=1, num_heads=2,
                                             decoder_start_token_id=0))  # fmt: skip
    found = names_by_group(t5)["decay_adamw"][1]
    assert {name.split(".")[-2] for name in found} == {"shared", "relative_attention_bias"} and len(found) == 3
    for tied, heads in ((True, []), (False, ["lm_head.weight"])):
        gpt = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=6, n_layer=1, n_head=2, n_positions=7,
                                         tie_word_embeddings=tied))  # fmt: skip
        expected = ["transformer.wte.weight", "transformer.wpe.weight", *heads]
        assert names_by_group(gpt)["decay_adamw"] == (False, expected)


def test_heads_of_task_models_without_a_base_model():
    """The model around them may be wrapped; a convolution that a model inside begins with is no head."""
    sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 5}
    clip = CLIPConfig(vision_config=sizes | {"image_size": 8, "patch_size": 4}, text_config=sizes, num_labels=3)
    of_adamw = names_by_group(nn.ModuleDict({"inner": CLIPForImageClassification(clip)}))["decay_adamw"][1]
    assert [name for name in of_adamw if "embedding" not in name] == ["inner.classifier.weight"]
    whisper = WhisperConfig(vocab_size=11, d_model=6, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=5,
                            num_mel_bins=5, max_source_positions=7, pad_token_id=0)  # fmt: skip
    groups = names_by_group(WhisperForAudioClassification(whisper))
    assert groups["decay_adamw"][1][-2:] == ["projector.weight", "classifier.weight"]
    assert {"encoder.conv1.weight", "encoder.conv2.weight"} <= set(groups["decay"][1])


class Bare(nn.Module):
    """Matrices that are no layer's, beside those that are."""

    def __init__(self):
        super().__init__()
        self.hidden, self.conv, self.fused = nn.Linear(3, 5), nn.Conv1d(5, 2, 3), Conv1D(7, 2)
        self.relative_position_bias_table = nn.Parameter(torch.ones(7, 2))
        self.A_log, self.token = nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(1, 5))
        self.recurrent = nn.GRU(3, 2)


def test_bare_matrices_are_adamws():
    """Tables of biases, states and tokens are not orthogonalized."""
    groups = names_by_group(Bare())
    assert groups["decay"] == (True, ["hidden.weight", "conv.weight", "fused.weight"])
    bare = ["relative_position_bias_table", "A_log", "token"]
    assert groups["decay_adamw"] == (False, [*bare, "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"])


def test_a_product_goes_where_its_layer_does():
    """A factorized table and a factorized head by AdamW, a hidden layer's product by Muon."""
    model = Tagger()
    factorize(model, FactorizationConfig(ranks={"embed": 2, "hidden": 1, "readout": 1}))
    groups = muon_param_groups(model, 0.1, adamw=["readout.*"])
    found = {group["name"]: (group["use_muon"], len(group["params"]), group.get("num_products")) for group in groups}
    assert found["linear"] == found["linear_1"] == (True, 2, 1) and found["linear_1_adamw"] == (False, 4, 2)
    model(torch.arange(11)).sum().backward()
    FrobeniusMuon(groups).step()
    with pytest.raises(ValueError, match=r"adamw \('head.\*'\) matches no parameter of Tagger, which has for example "):
        muon_param_groups(model, adamw=["head.*"])


def test_a_fused_weight_is_one_matrix():
    """GPT-2's: a step is torch's Muon's on it, after the decay of its products; it has no heads to take apart."""
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=6, n_layer=1, n_head=2, n_positions=7))
    fused, output = gpt.transformer.h[0].attn.c_attn.weight, gpt.transformer.h[0].attn.c_proj.weight
    gpt(input_ids=torch.arange(7)[None], labels=torch.arange(7)[None]).loss.backward()
    q, k, v = fused.detach().double().T.unflatten(0, (3, 2, 3)).clone().requires_grad_()
    o = output.detach().double().unflatten(0, (2, 3)).clone().requires_grad_()
    penalty = (q.mT @ k).square().sum() / 2 + (v.mT @ o).square().sum() / 2
    by_q, by_k, by_v, by_o = torch.autograd.grad(penalty, (q, k, v, o))
    decayed = nn.Parameter((torch.stack((q, k, v)) - 0.1 * torch.stack((by_q, by_k, by_v))).flatten(0, 2).T.float())
    second = nn.Parameter((o - 0.1 * by_o).flatten(0, 1).float())
    decayed.grad, second.grad = fused.grad.clone(), output.grad.clone()
    torch.optim.Muon([decayed, second], lr=0.2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    groups = muon_param_groups(gpt, 0.0, frobenius_decay=0.5)
    with pytest.raises(ValueError, match=r"'attention'.*: per_head \(True\) needs factors that are whole parameters"):
        FrobeniusMuon(copy.deepcopy(groups), per_head=True)
    FrobeniusMuon(groups, lr=0.2).step()
    torch.testing.assert_close(fused, decayed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output, second, rtol=1e-5, atol=1e-6)


# ---- what is refused, before anything moves ----


def test_matrices_that_say_nothing_are_refused_and_vectors_are_adamws():
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"group 0 has matrices, but does not say .*use_muon.*muon_param_groups"):
        FrobeniusMuon([matrix, vector])
    assert FrobeniusMuon([vector]).param_groups[0]["use_muon"] is False


BAD = {
    "momentum": (1.0, r"momentum \(1.0\) must be a number, at least 0 and below 1"),
    "ns_steps": (100, r"ns_steps \(100\) must be a whole number, at least 1 and below 100"),
    "ns_coefficients": ((1.0, 2.0), r"ns_coefficients \(\(1.0, 2.0\)\) must be three numbers"),
    "adjust_lr_fn": ("moonshot", "adjust_lr_fn must be one of .*'match_rms_adamw'.*, not 'moonshot'"),
    "betas": ((0.9, 1.0), r"betas \(\(0.9, 1.0\)\) must be two numbers"),
    "eps": (-1.0, r"eps \(-1.0\) must be finite and at least 0"),
    "lr": (math.inf, r"lr \(inf\) must be finite"),
    "params": ([nn.Parameter(torch.ones(3))], r"group 'new', parameter 0, of shape \(3,\): Muon is for matrices"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_group_is_refused_and_leaves_nothing_behind(name):
    value, message = BAD[name]
    optimizer = make(Tagger())
    before = copy.deepcopy((optimizer.state_dict(), optimizer.defaults))
    group = {"params": [nn.Parameter(torch.ones(2, 3))], "use_muon": True, "name": "new"}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group | {name: value})
    with pytest.raises(TypeError):  # and so with what is not even a layout
        optimizer.add_param_group(group | {"product": "attention", "layout": 3})
    assert (optimizer.state_dict(), optimizer.defaults) == before


@pytest.mark.parametrize("use_muon", [True, False])
def test_complex_parameters_and_sparse_gradients_are_refused(use_muon):
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameter 0, of shape \(2, 3\), has dtype torch.complex64: .*real"):
        FrobeniusMuon([{"params": [weight], "use_muon": use_muon}])
    model = Tagger()
    optimizer, start = make(model), copy.deepcopy(model)
    loss_of(model, 0).backward()
    parameter = model.hidden.weight if use_muon else model.embed.weight
    parameter.grad = parameter.grad.to_sparse()
    with pytest.raises(RuntimeError, match="FrobeniusMuon does not support sparse gradients: parameter group 'decay"):
        optimizer.step()
    assert same(model, start) and not optimizer.state


def test_half_precision_is_for_weights_that_are_not_decayed_as_products():
    model = Tagger().bfloat16()
    with pytest.raises(ValueError, match="torch.bfloat16: .*float32"):
        make(model)
    twin = copy.deepcopy(model)
    train(model, [make(model, decay=0.0)], range(2))
    train(twin, torchs(twin), range(2))
    assert same(model, twin)


@pytest.mark.parametrize("other", ["adamw", "muon", "swapped", "order"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(other):
    model = Tagger()
    groups = muon_param_groups(model, **READOUT)
    if other == "adamw":
        saved: torch.optim.Optimizer = FrobeniusAdamW(copy.deepcopy(groups))
        message = "group 'linear', parameter 0, .* no momentum_buffer: it belongs to another kind"
    elif other == "muon":
        saved = torch.optim.Muon([nn.Parameter(torch.ones(2, 3))])
        message = r"has 1 parameter group\(s\), this optimizer 4 \(linear, decay, decay_adamw, plain\)"
    else:
        changed = copy.deepcopy(groups)
        if other == "swapped":
            changed[2]["use_muon"] = True
        else:
            changed[2]["params"].reverse()
        saved = FrobeniusMuon(changed)
        message = {"swapped": "'decay_adamw', parameter 0, .* no step, exp_avg",
                   "order": "'decay_adamw', parameter 0, .* exp_avg of shape .* another order"}[other]  # fmt: skip
    for group in saved.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    saved.step()
    optimizer = FrobeniusMuon(groups, lr=LR)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state_dict() == before


def test_a_state_without_moments_is_told_by_its_groups():
    groups = muon_param_groups(Tagger(), **READOUT)
    changed, of_adamw = copy.deepcopy(groups), copy.deepcopy(groups)
    changed[2]["use_muon"] = True
    optimizer = FrobeniusMuon(groups)
    with pytest.raises(ValueError, match="'decay_adamw' has use_muon False, but the state to load has True"):
        optimizer.load_state_dict(FrobeniusMuon(changed).state_dict())
    with pytest.raises(ValueError, match="'linear': the state to load has no .*momentum, nesterov"):
        optimizer.load_state_dict(FrobeniusAdamW(of_adamw).state_dict())


def test_an_older_torch_is_told_what_it_lacks(monkeypatch, dimensions, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon")
    version = re.escape(torch.__version__)
    with pytest.raises(RuntimeError, match=f"Muon needs .* torch 2.9 or later: this is torch {version}"):
        make(Tagger())
    args = FnlTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, optimizer="muon")
    with pytest.raises(UserInputError, match="--optimizer muon .*: Muon needs .* torch 2.9 or later"):
        build_optimizer(args, FnlBertForMaskedLM(FnlBertConfig(**dimensions)))
