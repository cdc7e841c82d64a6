"""Optimizers on a simulated GPU: every option steps as on the CPU, and no step waits for the device."""

import copy

import pytest
import torch

from fnl_hf import (
    FnlBertConfig,
    FnlBertForMaskedLM,
    frobenius_param_groups,
)
from fnl_hf.optim.base import decay_products_
from fnl_hf.training.models import preset_config
from tests.simulated.cases import CASES, FUSED, make_model, make_optimizer, set_gradients
from tests.simulated_cuda import DEVICE, SimulatedCuda

# torch's AdamW and SGD take no tensor there but for fused or capturable kernels, or wait for it.
TENSOR_RATES = [*FUSED, *(name for name in CASES if "lamb" in name and name not in FUSED), "adamw, capturable"]
SKIPPING = [name for name in CASES if "lamb" in name or "fused" in name]
WAITING_FOR_FOUND_INF = [
    pytest.param(name, marks=pytest.mark.xfail(reason="unfused LAMB asks whether the step is to happen"))
    if name not in FUSED and "clamped" not in name and name != "lamb, not corrected" else name for name in SKIPPING
]  # fmt: skip


def assert_same_parameters(found, expected):
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert ours.device == DEVICE
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-5, atol=1e-6)


def steps(model, case, lr=1e-2, found_inf=(), gpu=None, count=3):
    """So many steps; with ``gpu`` none but the first, which makes the state, may wait."""
    optimizer = make_optimizer(model, case, lr)
    for step in range(count):
        set_gradients(model, step)
        if found_inf:
            optimizer.found_inf = found_inf[step]
        if gpu is not None:
            gpu.reset()
        optimizer.step()
        assert gpu is None or step == 0 or not gpu.waits
    return optimizer


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_cpu_and_wait_for_nothing(case):
    expected = make_model()
    if "capturable" not in case:
        steps(expected, case)
    else:  # not on a CPU
        steps(expected, "adamw, foreach")
    with SimulatedCuda() as gpu:
        model = make_model().to("cuda")
        steps(model, case, gpu=gpu)
        assert_same_parameters(model, expected)


@pytest.mark.parametrize(
    "case, where",
    # torch wants the rate of a capturable optimizer on the device
    [
        (case, where)
        for case in TENSOR_RATES
        for where in ("cuda", "cpu")
        if (case, where) != ("adamw, capturable", "cpu")
    ],
)
def test_a_learning_rate_may_be_a_tensor_on_either_device(case, where):
    expected = make_model()
    steps(expected, "adamw, foreach" if "capturable" in case else case)
    with SimulatedCuda() as gpu:
        model = make_model().to("cuda")
        steps(model, case, lr=torch.tensor(1e-2, device=where), gpu=gpu)
        assert_same_parameters(model, expected)


@pytest.mark.parametrize("case", WAITING_FOR_FOUND_INF)
def test_a_step_that_is_not_to_happen_is_skipped_without_a_wait(case):
    expected = make_model()
    optimizer = make_optimizer(expected, case)
    for step in (0, 2):
        set_gradients(expected, step)
        optimizer.step()
    with SimulatedCuda() as gpu:
        model = make_model().to("cuda")
        steps(model, case, found_inf=[torch.tensor(value, device="cuda") for value in (0.0, 1.0, 0.0)], gpu=gpu)
        assert_same_parameters(model, expected)


@pytest.mark.parametrize("case", ["adamw, fused", "sgd, foreach", "lamb, default"])
def test_groups_may_be_added_later_and_states_go_to_another_model(case):
    def run(model, device):
        products, *rest = frobenius_param_groups(model, 0.1)
        optimizer_class, options = CASES[case]
        optimizer = optimizer_class([products], lr=1e-2, **options)
        set_gradients(model, 0)
        optimizer.step()
        for group in rest:
            optimizer.add_param_group(group)
        other = make_optimizer(copy.deepcopy(model), case)
        other.load_state_dict(optimizer.state_dict())
        other_model_parameters = [p for group in other.param_groups for p in group["params"]]
        for index, parameter in enumerate(other_model_parameters):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.grad = gradient.to(device)
        other.step()
        return [parameter.detach().cpu() for parameter in other_model_parameters]

    expected = run(make_model(), "cpu")
    with SimulatedCuda():
        found = run(make_model().to("cuda"), "cuda")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# Operations of one decay, about a kernel's launch each. BERT-Base: one update for each of 48 factors, and in each of 8
# stacks of 16 MB a copy and a matmul for the Gram matrices of its factors of one shape.
@pytest.mark.parametrize("preset, bound", [("base", 64), ("tiny", 10)])
def test_the_decay_launches_few_kernels(preset, bound):
    with SimulatedCuda() as gpu:
        with torch.device("cuda"):
            sizes = preset_config(preset) | {"vocab_size": 7, "intermediate_size": 5}
            model = FnlBertForMaskedLM(FnlBertConfig(**sizes))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        groups = [group | {"lr": 1e-4} for group in frobenius_param_groups(model, 0.01) if group["product"]]
        gpu.reset()
        decay_products_(groups)
        assert not gpu.waits and gpu.operations.total() <= bound
