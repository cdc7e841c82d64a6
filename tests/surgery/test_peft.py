"""Adapters of PEFT beside factorized layers and decayed products: what a user of both relies on."""

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import fnl_hf

SIZES = {"hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 42, "vocab_size": 50}
FACTORS = ["intermediate.dense.left", "output.dense.right"]


@pytest.fixture
def factorized(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES))
    fnl_hf.factorize(model, fnl_hf.FactorizationConfig(target_ratio=0.5)).save_pretrained(tmp_path / "base")
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")


def randomize(model):
    """Adapters start from zero: a product of zeros shows nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[3, 5, 7], [11, 13, 2]])).logits


def test_adapters_of_factors_are_trained_saved_and_merged(factorized, tmp_path):
    before = logits(factorized.eval())
    config = peft.LoraConfig(r=2, target_parameters=FACTORS, task_type="SEQ_CLS")
    model = randomize(peft.get_peft_model(factorized, config))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # A and B in two layers: of two factors, and of query and value, which PEFT adds for a BERT.
    assert sum("lora" in name for name in trained) == 2 * 2 * (2 + 2)
    assert all("lora" in name or "classifier" in name for name in trained)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert_close(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), adapted, rtol=0, atol=0)
    merged = model.merge_and_unload()
    assert sum(isinstance(layer, fnl_hf.FactorizedLinear) for layer in merged.modules()) == 2 * 2 + 1
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")), adapted)
    assert_close(logits(fnl_hf.merge(merged)), adapted)


def test_transformers_own_adapters(factorized, tmp_path):
    factorized.add_adapter(peft.LoraConfig(r=2, target_modules=[], target_parameters=FACTORS))
    adapted = logits(randomize(factorized))
    factorized.save_pretrained(tmp_path / "adapter")
    assert_close(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")), adapted)


def test_the_products_of_adapters_are_decayed_once_registered():
    base = BertForSequenceClassification(BertConfig(**SIZES))
    model = randomize(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "dense"])))
    adapted = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    for layer in adapted:
        fnl_hf.register_product(layer, "linear", "lora_B.default.weight", "lora_A.default.weight")
    groups = fnl_hf.frobenius_param_groups(model, weight_decay=0.5)
    assert sum(group.get("num_products", 0) for group in groups) == len(adapted) == 2 * 4 + 1
    layer = model.base_model.model.bert.encoder.layer[1].intermediate.dense
    left, right = (getattr(layer, name).default.weight for name in ("lora_B", "lora_A"))
    product = (left @ right).detach()
    expected = left - 0.1 * 0.5 * product @ right.T, right - 0.1 * 0.5 * left.T @ product
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    fnl_hf.FrobeniusSGD(groups, lr=0.1).step()
    assert_close((left, right), expected)
