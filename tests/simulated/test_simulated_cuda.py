"""The simulated device itself: what it refuses, counts and takes for waiting, each as on a real one."""

import copy

import pytest
import torch
from torch import nn

from tests.simulated_cuda import DEVICE, SimulatedCuda, Wait

# What waits on a GPU (torch.cuda.set_sync_debug_mode("error") says so), and what of the same kind does not.
WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: (x > 0).nonzero(),
    "indexing by a mask": lambda x: x[x > 0],
    "assigning a tensor by a mask": lambda x: x.index_put_((x > 0,), x.sum()),
    "equal": lambda x: torch.equal(x, x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "svdvals": lambda x: torch.linalg.svdvals(x),
    "eigh": lambda x: torch.linalg.eigh(x @ x.T),
    "to the CPU": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "from the CPU": lambda x: torch.ones(3).to(x.device),
    "a number": lambda x: torch.tensor(3.0, device=x.device),
    "copy_ from the CPU": lambda x: x.copy_(torch.ones(3, 5)),
    "indices on the CPU": lambda x: x[torch.tensor([0, 2])],
}
RUNNING_AHEAD = {
    "matmul": lambda x: x @ x.T,
    "from the CPU, not blocking": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "indices on the device": lambda x: x[torch.arange(2, device=x.device)],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "a CPU tensor without dimensions": lambda x: x * torch.tensor(2.0),
    "qr": lambda x: torch.linalg.qr(x),
    "slices": lambda x: x[1:, :3].transpose(0, 1),
}
REFUSED = {
    "add": lambda x: x + torch.ones(5),
    "matmul": lambda x: x @ torch.ones(5, 2),
    "where": lambda x: torch.where(torch.ones(3, 5, dtype=torch.bool), x, 0.0),
    "cat": lambda x: torch.cat([x, torch.ones(2, 5)]),
    "stack without dimensions": lambda x: torch.stack([x.sum(), torch.tensor(0.0)]),
    "in place on the CPU": lambda x: torch.zeros(()).add_(x.sum()),
    "a list, times a number on the CPU": lambda x: torch._foreach_mul([x, x], torch.tensor(2.0)),
    "values on the CPU": lambda x: x.index_put_((torch.arange(2, device=x.device),), torch.ones(5)),
    "a generator of the CPU": lambda x: x.normal_(generator=torch.Generator()),
    "another generator of the CPU": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
}


@pytest.fixture
def gpu():
    with SimulatedCuda() as gpu:
        yield gpu


@pytest.mark.parametrize("name", WAITING)
def test_what_the_host_waits_for_is_noted(gpu, name):
    x = torch.randn(3, 5).to("cuda")
    gpu.reset()
    WAITING[name](x)
    assert gpu.waits


@pytest.mark.parametrize("name", RUNNING_AHEAD)
def test_what_the_host_runs_ahead_of_is_not(gpu, name):
    x = torch.randn(3, 5).to("cuda")
    gpu.reset()
    RUNNING_AHEAD[name](x)
    assert not gpu.waits


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_of_two_devices_are_refused(gpu, name):
    x = torch.randn(3, 5).to("cuda")
    with pytest.raises(RuntimeError, match="CPU|cpu"):
        REFUSED[name](x)


def test_a_wait_names_the_line_of_ours_that_asked(gpu, monkeypatch):
    x = torch.ones((), device="cuda")
    monkeypatch.setattr("tests.simulated_cuda.ROOT", "/somewhere")
    source = "\n" * 6 + "def ask(x):\n    return float(x)\n"
    names: dict = {}
    exec(compile(source, "/somewhere/fnl_hf/new.py", "exec"), names)
    names["ask"](x)
    assert gpu.waits == [Wait("_local_scalar_dense", "fnl_hf/new.py:8")]


def test_operations_are_counted_and_views_are_none(gpu):
    x = torch.empty(3, 5, device="cuda")
    assert not gpu.operations
    ((x.T.reshape(15) + 1).view(3, 5)[0] * 2).neg_()
    assert gpu.operations == {"clone": 1, "add": 1, "mul": 1, "neg_": 1}


def test_modules_train_there_as_on_the_cpu(gpu):
    first, second = nn.Linear(5, 7), nn.Linear(7, 5)
    second.weight = nn.Parameter(first.weight.detach().T.clone())
    tied = nn.ModuleList([nn.Linear(5, 7), nn.Linear(5, 7)])
    tied[1].weight = tied[0].weight
    x = torch.randn(3, 5)
    expected = nn.Sequential(first, nn.ReLU(), second)
    there = copy.deepcopy(expected).to("cuda")
    for model, inputs in ((expected, x), (there, x.to("cuda"))):
        model(inputs).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    for ours, theirs in zip(there.parameters(), expected.parameters()):
        assert isinstance(ours, nn.Parameter) and ours.is_leaf and ours.device == ours.grad.device == DEVICE
        assert torch.equal(ours.cpu(), theirs) and torch.equal(ours.grad.cpu(), theirs.grad)
    tied.to("cuda")
    assert tied[0].weight is tied[1].weight and tied[0].weight.is_cuda


def test_a_gradient_goes_from_one_device_to_the_other(gpu):
    x = torch.randn(3, requires_grad=True)
    (x.to("cuda") * torch.full((3,), 7.0, device="cuda")).cpu().sum().backward()
    assert not x.grad.is_cuda and x.grad.tolist() == [7.0] * 3
