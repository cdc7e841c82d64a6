"""Models, their conversions and factorized layers on a simulated GPU: as on the CPU, and the host runs ahead."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import fnl_hf
from fnl_hf import FactorizationConfig, FnlBertConfig, FnlBertForMaskedLM, factorize, find_products, merge
from fnl_hf.bert.modeling_fnl_bert import AUTO_CLASSES
from tests.simulated.cases import B, S, inputs_of, loss_and_gradients
from tests.simulated_cuda import DEVICE, SimulatedCuda


def on_device(inputs):
    return {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def assert_equal_to(found, expected):
    assert found.device == DEVICE
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse_last_layer", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", sorted(AUTO_CLASSES.values()))
def test_every_head_trains_as_on_the_cpu_without_a_wait(dimensions, head, attention, sparse_last_layer):
    dimensions |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = FnlBertConfig(**dimensions, attention_embedding_size=21, sparse_last_layer=sparse_last_layer)
    config._attn_implementation = attention
    for inputs in inputs_of(head):
        torch.manual_seed(1)
        model = getattr(fnl_hf, head)(copy.deepcopy(config))
        expected, gradients = loss_and_gradients(copy.deepcopy(model), inputs)
        with SimulatedCuda() as gpu:
            model, inputs = model.to("cuda"), on_device(inputs)
            gpu.reset()
            found, found_gradients = loss_and_gradients(model, inputs)
            assert not gpu.waits
            assert_equal_to(found.detach(), expected.detach())
            assert found_gradients.keys() == gradients.keys()
            for name, gradient in gradients.items():
                assert_equal_to(found_gradients[name], gradient)


def test_dropout_and_checkpointing_wait_for_nothing(dimensions):
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions, sparse_last_layer=True))
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    (_, inputs, *_) = inputs_of("FnlBertForMaskedLM")
    with SimulatedCuda() as gpu:
        model, inputs = model.to("cuda").train(), on_device(inputs)
        gpu.reset()
        loss_and_gradients(model, inputs)
        assert not gpu.waits


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("embedding_size", [42, 21])
def test_conversions_there_and_back(dimensions, embedding_size, calibrated):
    bert = BertForMaskedLM(BertConfig(**dimensions)).eval()
    with torch.no_grad():
        for parameter in bert.parameters():  # biases are zeros otherwise
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(5, 53, (B, S))
    calibration = [{"input_ids": ids}] if calibrated else None
    expected = FnlBertForMaskedLM.from_bert(bert, embedding_size, calibration)
    expected_back = expected.to_bert()
    with SimulatedCuda(), torch.no_grad():
        small = FnlBertForMaskedLM.from_bert(bert.to("cuda"), embedding_size, calibration)
        back = small.to_bert()
        for found, on_cpu in ((small, expected), (back, expected_back)):
            assert {parameter.device for parameter in found.parameters()} == {DEVICE}
            torch.testing.assert_close(found(ids.to("cuda")).logits.cpu(), on_cpu(ids).logits, rtol=1e-4, atol=1e-5)


def test_heads_that_are_larger_than_berts_come_back(dimensions):
    wide = FnlBertForMaskedLM(FnlBertConfig(**dimensions, attention_embedding_size=63)).eval()
    with torch.no_grad():
        for pair in wide.factor_pairs():  # rank 14 of 21: it fits
            for factor in pair.factors():
                factor[..., 14:] = 0
    expected = wide.to_bert()
    with SimulatedCuda():
        found = wide.to("cuda").to_bert()
        assert {parameter.device for parameter in found.parameters()} == {DEVICE}
        for ours, theirs in zip(found.parameters(), expected.parameters()):
            torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["spectral", "normal"])
def test_models_are_made_on_the_device(dimensions, init):
    with SimulatedCuda() as gpu:
        with torch.device("cuda"):
            model = FnlBertForMaskedLM(FnlBertConfig(**dimensions, attention_embedding_size=21, attention_init=init))
        assert {parameter.device for parameter in model.parameters()} == {DEVICE}
        assert gpu.operations["_linalg_svd"] == (4 if init == "spectral" else 0)


@pytest.mark.parametrize("mode", ["low_rank", "wide", "deep"])
def test_layers_are_factorized_and_merged_where_they_lie(mode):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 7))

    config = FactorizationConfig(ranks=dict.fromkeys(["0", "2"], 2 if mode == "low_rank" else 29), mode=mode)
    x = torch.randn(5, 3, 3, 3)
    on_cpu, found = make(), make()
    with warnings.catch_warnings(action="ignore"):
        expected = factorize(on_cpu, config)(x)
        expected_merged = merge(on_cpu)(x)
        with SimulatedCuda() as gpu:
            found, x = factorize(found.to("cuda"), config), x.to("cuda")
            gpu.reset()
            outputs = found(x)
            outputs.square().mean().backward()
            assert not gpu.waits
            assert_equal_to(outputs.detach(), expected.detach())
            assert {weight.device for product in find_products(found) for weight in product.weights} == {DEVICE}
            assert_equal_to(merge(found)(x).detach(), expected_merged.detach())


def test_calibration_runs_where_the_model_lies():
    """A convolution, an embedding and Linear layers; moments, truncation and bias as on the CPU."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.table, self.conv = nn.Embedding(19, 13), nn.Conv2d(3, 13, 3, padding=1)
            self.up, self.down = nn.Linear(13, 29), nn.Linear(29, 7)

        def forward(self, ids, images):
            return self.down(self.up(self.table(ids) + self.conv(images).mean(dim=(2, 3))[:, None]).relu())

    config = FactorizationConfig(ranks={"table": 5, "conv": 4, "up": 3, "down": 2})
    batches = [{"ids": torch.randint(0, 19, (11, 7)), "images": torch.randn(11, 3, 5, 5)} for _ in range(3)]
    expected = factorize(Both(), config, batches)(**batches[0])
    with SimulatedCuda():
        model = factorize(Both().to("cuda"), config, batches)
        found = model(**{name: value.to("cuda") for name, value in batches[0].items()})
        assert_equal_to(found.detach(), expected.detach())


def test_embeddings_of_low_rank():
    table = nn.Sequential(nn.Embedding(19, 13))
    config = FactorizationConfig(ranks={"Embedding": 5})
    ids = torch.randint(0, 19, (3, 7))
    expected = factorize(copy.deepcopy(table), config)(ids)
    with SimulatedCuda() as gpu:
        model, ids = factorize(table.to("cuda"), config), ids.to("cuda")
        gpu.reset()
        found = model(ids)
        found.sum().backward()
        assert not gpu.waits
        assert_equal_to(found.detach(), expected.detach())
