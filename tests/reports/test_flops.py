"""FLOPs of a training step against PyTorch's own counter, and the peak rates they are compared with."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, FnlBertForPreTraining
from fnl_hf.reports import flops
from fnl_hf.reports.flops import data_sheet_peak, device_peak_flops, training_flops


def counted(model, **inputs):
    """What PyTorch's counter sees in a forward and a backward pass with eager attention."""
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return counter.get_total_flops()


def tokens_and_labels(sequences, length, predicted):
    ids = torch.randint(5, 53, (sequences, length))
    labels = torch.full_like(ids, -100)
    labels[:, :predicted] = ids[:, :predicted]
    return ids, labels


@pytest.mark.parametrize("embedding_size", [None, 42, 15, 54])
def test_flops_are_those_that_pytorch_counts(dimensions, embedding_size):
    ids, labels = tokens_and_labels(5, 11, 3)
    if embedding_size is None:
        model = BertForMaskedLM(BertConfig(**dimensions))
    else:
        config = FnlBertConfig(**dimensions, attention_embedding_size=embedding_size, sparse_prediction=True)
        model = FnlBertForMaskedLM(config)
    positions = 11 if embedding_size is None else 3  # the stock head predicts everywhere
    assert counted(model, input_ids=ids, labels=labels) == 5 * training_flops(model.config, 11, positions)


def test_flops_of_a_sparse_last_layer(dimensions):
    """FnlBertForPreTraining runs it for the first token too, and its pooler (d·d) and NSP head (2·d) there."""
    ids, labels = tokens_and_labels(5, 11, 3)
    inputs = {"input_ids": ids, "labels": labels[:, :3], "masked_positions": torch.arange(3).expand(5, -1)}
    config = FnlBertConfig(**dimensions, attention_embedding_size=15, sparse_prediction=True, sparse_last_layer=True)
    assert counted(FnlBertForMaskedLM(config), **inputs) == 5 * training_flops(config, 11, 3, 3)
    inputs["next_sentence_label"] = torch.ones(5, dtype=torch.long)
    both = counted(FnlBertForPreTraining(config), **inputs)
    assert both == 5 * (training_flops(config, 11, 3, 4) + 6 * 42 * (42 + 2))


def test_flops_of_bert_base_by_hand():
    """85 million weights in the encoder, 6 FLOPs each per token, and 12 layers of attention of width 768."""
    encoder = 6 * 12 * (4 * 768 * 768 + 2 * 768 * 3072) * 128 + 3 * 12 * 4 * 128 * 128 * 768
    assert training_flops(BertConfig(), 128, 0) == encoder
    assert training_flops(BertConfig(), 128, 19) - encoder == 6 * 19 * 768 * (768 + 30522)


@pytest.mark.parametrize(
    "name, precision, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 80GB HBM3", "tf32", 494),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "float32", 67),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A10", "float16", 125),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA L4", "tf32", 60),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
    ],
)
def test_data_sheets(name, precision, teraflops):
    assert data_sheet_peak(name, precision) == (None if teraflops is None else teraflops * 1e12)


def test_an_unknown_device_is_measured(monkeypatch):
    """A clock that moves one second a reading: each product of 1024 × 1024 matrices takes one."""
    seconds = iter(range(10))
    monkeypatch.setattr(flops, "MEASURING_SECONDS", 2.5)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    flops._measured_peak.cache_clear()
    random_state = torch.random.get_rng_state()
    peak, origin = device_peak_flops(torch.device("cpu"), torch.float32)
    flops._measured_peak.cache_clear()
    assert peak == 2 * 1024**3 and origin == "measured on CPU, float32"
    assert torch.equal(torch.random.get_rng_state(), random_state), "the run's own draws stay as they were"
