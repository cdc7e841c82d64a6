"""Checks of the optimizers on several processes: each process runs them all and writes its figures as JSON.

test_sharded.py starts it and asserts on the figures: torchrun --nproc_per_node 2 tests/optim/sharded_worker.py FOLDER
"""

import copy
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from fnl_hf import (
    FactorizedConv1D,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    FrobeniusSGD,
    Lamb,
    find_products,
    frobenius_param_groups,
    muon_param_groups,
)
from fnl_hf.optim import sharding
from tests.conftest import DIMENSIONS
from tests.optim.sharded_models import (
    all_kinds,
    assembled,
    attention_kinds,
    bert,
    convolutions,
    difference,
    differences,
    full,
    language_model,
    product,
    seeded,
    shard,
)
from tests.optim.worker_checks import check, check_each, run_checks

STEPS, FEWER_STEPS = 20, 4
WEIGHT_DECAY, FROBENIUS_DECAY = 0.1, 0.5
OPTIMIZERS = {
    "adamw": partial(FrobeniusAdamW, lr=1e-2, foreach=True),  # the default on a GPU
    "adamw_fused": partial(FrobeniusAdamW, lr=1e-2, fused=True),
    "sgd": partial(FrobeniusSGD, lr=3e-3, momentum=0.9, foreach=True),
    "sgd_decoupled": partial(FrobeniusSGD, lr=3e-3, momentum=0.9, nesterov=True, decoupled=True),
    "lamb": partial(FrobeniusLamb, lr=1e-2),  # fused
    "lamb_in_trust_ratio": partial(FrobeniusLamb, lr=1e-2, decay="in_trust_ratio", foreach=True),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = partial(FrobeniusMuon, lr=1e-2, fused=True)
    OPTIMIZERS["muon_per_head"] = partial(FrobeniusMuon, lr=1e-2, adamw_lr=1e-3, per_head=True)
MUON = ("muon",) if hasattr(torch.optim, "Muon") else ()
FEWER = ("sgd", "lamb", "lamb_in_trust_ratio")  # coupled, decoupled and inside the trust ratio
ENTRIES = ("name", "product", "num_heads", "frobenius_decay", "weight_decay", "lr")

# Steps


def like(full, parameter):
    """``full`` cut as ``parameter`` is. Every process has it, so nothing is sent."""
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def set_gradients(model, step, idle=()):
    """Random gradients, the same however ``model`` is sharded, of a norm that differs from step to step."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        full = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * (1 + step % 3)
        parameter.grad = like(full, parameter) if parameter.requires_grad and name not in idle else None


def run(model, optimizer, steps, idle=()):
    for step in steps:
        set_gradients(model, step, idle)
        optimizer.step()
    return model


def optimizer_of(model, name, decay=FROBENIUS_DECAY):
    make_groups = muon_param_groups if name.startswith("muon") else frobenius_param_groups
    return OPTIMIZERS[name](make_groups(model, WEIGHT_DECAY, decay))


def trained(model, name, steps=STEPS, decay=FROBENIUS_DECAY, idle=()):
    return run(model, optimizer_of(model, name, decay), range(steps), idle)


def sharding_errors(model, names=FEWER, idle=(), **kwargs):
    """{optimizer: how far training sharded is from training unsharded}."""
    errors = {}
    for name in names:
        plain, cut = copy.deepcopy(model), shard(copy.deepcopy(model), **kwargs)
        errors[name] = difference(*(trained(m, name, FEWER_STEPS, idle=idle) for m in (plain, cut)))
    return errors


@contextmanager
def counted():
    """Counts the collectives that the package calls, and as "all" whatever torch sends."""
    calls = Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counting("all_reduce", dist.all_reduce)),
        mock.patch.object(sharding, "_all_gather", counting("all_gather", sharding._all_gather)),
        CommDebugMode() as everything,
    ):
        yield calls
    calls["all"] = everything.get_total_counts()


def collectives(model, optimizer):
    """Those of the second step."""
    run(model, optimizer, range(1))
    set_gradients(model, 1)
    with counted() as calls:
        optimizer.step()
    return {name: calls[name] for name in ("all_gather", "all_reduce", "all")}


# Sharded equals unsharded


@check
def cuts(folder):
    """What lies here is what ``sharding_of`` says; parameters of which nothing does; rows after the last whole head."""
    model = all_kinds(bert=bert())
    whole = {name: full(p) for name, p in model.named_parameters()}
    empty, right = [], True
    for name, parameter in shard(model).named_parameters():
        found, part = sharding.sharding_of(parameter), sharding.local(parameter)
        start, stop = found.rows_of(found.process)
        right &= torch.equal(part, whole[name].narrow(found.dim, start, stop - start))
        empty += [name] if part.numel() == 0 else []
    pairs = [p for p in find_products(model) if p.kind in ("qk", "vo")]
    left_over = [sharding.sharding_of(p.weights[0]).rows_of(0)[1] % 3 for p in pairs]
    return {"right": right, "empty": empty, "left_over": left_over}


@check_each(*OPTIMIZERS)
def equal(name, folder):
    """All kinds of product; ``effect``: the decay's smallest on a factor, which the comparison would have noticed."""
    model = all_kinds(bert=bert())
    decayed, plain = trained(copy.deepcopy(model), name), trained(copy.deepcopy(model), name, decay=0.0)
    factors = {weight for p in find_products(model) for weight in p.weight_names}
    effects = [value for weight, value in differences(decayed, plain).items() if weight in factors]
    return {"difference": difference(decayed, trained(shard(model), name)), "effect": min(effects)}


@check_each("adamw_fused", *FEWER)
def attention_views(name, folder):
    """Factors that are parts of parameters: all of them decayed, or those that are not rotated."""
    model, found = attention_kinds(), {}
    for rotary in (True, False):

        def trained_with(decay, model, rotary=rotary):
            groups = frobenius_param_groups(model, WEIGHT_DECAY, decay, decay_rotary=rotary)
            return run(model, OPTIMIZERS[name](groups), range(FEWER_STEPS))

        decayed, plain = (trained_with(decay, copy.deepcopy(model)) for decay in (FROBENIUS_DECAY, 0.0))
        cut = shard(copy.deepcopy(model))
        names = [product.name for product in find_products(cut)]
        assert names == [product.name for product in find_products(model)]
        found[f"rotary {rotary}"] = difference(decayed, trained_with(FROBENIUS_DECAY, cut))
        others = ("fused", "shared")  # whose queries and keys are rotated
        found[f"effect {rotary}"] = min(
            value for weight, value in differences(decayed, plain).items() if rotary or not weight.startswith(others)
        )
    return found


@check
def attention_views_under_ddp(folder):
    """torch's own attention, each process with its own data: replicas are equal to the last bit."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(15, 3, 7, dropout=0.0, batch_first=True)
    model = DistributedDataParallel(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    optimizer = optimizer_of(model.module, "adamw")
    kinds = [product.kind for product in find_products(model)]
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        model(torch.randn(2, 4, 15, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    equal = True
    for parameter in model.parameters():
        copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, parameter.detach())
        equal &= all(torch.equal(copies[0], other) for other in copies)
    return {"equal": equal, "kinds": kinds}


@check
def plain_lamb_clips(folder):
    """Lamb with clipped gradients; ``effect``: that of the clipping."""
    model = all_kinds(bert=bert())

    def after(model, bound):
        return run(model, Lamb(model.parameters(), lr=1e-2, max_grad_norm=bound), range(STEPS))

    clipped, free = after(copy.deepcopy(model), 0.1), after(copy.deepcopy(model), None)
    return {"difference": difference(clipped, after(shard(model), 0.1)), "effect": difference(clipped, free)}


@check
def frozen_and_idle(folder):
    """Frozen factors, factors without a gradient, and a product of which no factor has one."""
    model = all_kinds()
    frozen = ["qk.0.weight", "deep.1.weight"]
    idle = ["linear.1.weight", "wide.0.weight", "wide.1.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    after = trained(shard(copy.deepcopy(model)), "adamw", FEWER_STEPS, idle=idle)
    still = [name for name, value in differences(model, after).items() if value == 0.0]
    return {
        "differences": sharding_errors(model, idle=idle),
        "still": sorted(still),
        "expected": sorted(frozen + idle),
    }


@check
def two_dtypes(folder):
    """Products in float32 and float64: none may be rounded to, or packed as, the other's dtype."""
    pairs = [product("linear", (7, 3), (3, 5)), product("linear", (7, 3), (3, 5)).double()]
    return sharding_errors(assembled(layer=nn.ModuleList(pairs)))


# Other placements

COLUMNS = {f"{name}.weight": 1 for name in ("query", "key", "value")}
OUTPUT = {"attention.output.dense.weight": 1}


@check_each("columns", "columns_of_output")
def attention_cut(name, folder):
    """Cut along dimension 1: query, key and value beside their rank; the output projection along its own, as value is
    along its dimension 0."""
    along = COLUMNS if name == "columns" else OUTPUT
    model = seeded(bert(hidden=30, embedding=30))
    cut = shard(copy.deepcopy(model), along=along)
    calls = collectives(cut, optimizer_of(cut, "lamb"))
    return {"differences": sharding_errors(model, along=along), "calls": calls}


@check_each("uv", "deep")
def rank_cut(kind, folder):
    """Outer factors that hold their rank in dimension 1, cut along it: both, or the left one of three."""
    if kind == "uv":
        model, along = product("uv", (7, 6), (5, 6), num_heads=2), {"weight": 1}
    else:
        model, along = product("deep", (7, 6), (6, 4), (4, 5)), {"0.weight": 1}
    return sharding_errors(seeded(model), along=along)


@check_each("rows", "rank", "kernel")
def convolutions_cut(name, folder):
    """(c_out, r, k, 1) and (r, c_in, 1, k): cut along dimension 0, along the first one's rank, along its kernel."""
    along = {"rows": {}, "rank": {"0.weight": 1}, "kernel": {"0.weight": 2}}[name]
    return sharding_errors(convolutions(), (*FEWER, *MUON), along=along)


@check_each("replicate", "shard")
def hybrid(name, folder):
    """A mesh of two dimensions, one of them of size 1."""
    size = dist.get_world_size()
    shape = (size, 1) if name == "replicate" else (1, size)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return sharding_errors(all_kinds(), ("lamb", "lamb_in_trust_ratio"), mesh=mesh)


@check
def four_processes(folder):
    """Two replicas of two shards: Gram matrices and norms are summed over the shards alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return sharding_errors(all_kinds(), ("adamw", *FEWER), mesh=mesh)


@check_each(
    "linear.0.weight",
    "linear.1.weight",
    "deep.0.weight",
    "deep.1.weight",
    "deep.2.weight",
    "qk.0.weight",
    "vo.1.weight",
)
def one_factor_whole(name, folder):
    """A factor that FSDP2 leaves alone, beside sharded ones."""
    # torch's foreach and fused kernels of Adam and SGD take no DTensors beside others.
    return sharding_errors(all_kinds(), ("sgd_decoupled", "lamb_in_trust_ratio"), ignored=[name])


# Collectives


@check_each("adamw", *FEWER)
def collectives_per_step(name, folder):
    """Of a small and of a larger model."""
    small, large = shard(all_kinds()), shard(all_kinds(bert=bert()))
    return {
        "small": collectives(small, optimizer_of(small, name)),
        "large": collectives(large, optimizer_of(large, name)),
    }


@check_each("qk", "linear")
def collectives_without_straddling(kind, folder):
    """Six heads on 2 or 3 processes; the outer factors of "linear" are cut beside their rank and along it."""
    left = (12, 4) if kind == "qk" else (6, 12)
    model = shard(seeded(product(kind, left, (12, 5), num_heads=6)))
    return collectives(model, optimizer_of(model, "adamw"))


# Data parallel


def fit(model, optimizer, steps=5):
    """Each process has its own data."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        ids = torch.randint(DIMENSIONS["vocab_size"], (3, 9), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@check_each(*OPTIMIZERS, "plain_lamb")
def data_parallel(name, folder):
    """Replicas under DDP: whether they are equal to the last bit, and which parameters did not move."""
    model = seeded(language_model())
    start = copy.deepcopy(model)
    replica = DistributedDataParallel(model)
    fit(replica, Lamb(model.parameters(), lr=1e-2) if name == "plain_lamb" else optimizer_of(model, name))
    equal = True
    for parameter in model.parameters():
        copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, parameter.detach())
        equal &= all(torch.equal(copies[0], other) for other in copies)
    return {"equal": equal, "still": [n for n, value in differences(start, model).items() if value == 0.0]}


@check
def meta_layers(folder):
    """torch's way to make a model that no process can hold: on the meta device, sharded, then initialized."""
    makers = (
        lambda: FactorizedLinear(7, 5, 3),
        lambda: FactorizedLinear(7, 5, 7, deep=True),
        lambda: FactorizedConv1D(5, 7, 3),
        lambda: FactorizedEmbedding(11, 5, 3, padding_idx=2),
        lambda: FactorizedConv2d(4, 6, 3, rank=2, groups=2),
    )
    with torch.device("meta"):
        model = nn.Sequential(*(make() for make in makers))
    shard(model).to_empty(device="cpu")
    found = {}
    for index, (layer, make) in enumerate(zip(model, makers)):
        torch.manual_seed(3 + dist.get_rank())
        layer.reset_parameters()
        torch.manual_seed(3)  # the first process draws for all
        expected = make()
        found |= {
            f"{index}.{name}": (full(layer.get_parameter(name)) - getattr(expected, name)).abs().max().item()
            for name in ("left", "middle", "right")
            if getattr(expected, name) is not None
        }
    return found


@check
def backward_through_fsdp2(folder):
    """Gradients as FSDP2 leaves them: it and DDP train alike. SGD, as Adam magnifies rounding in gradients near 0."""
    model = seeded(language_model())
    replica = DistributedDataParallel(copy.deepcopy(model))
    cut = shard(model)
    fit(replica, optimizer_of(replica.module, "sgd"))
    fit(cut, optimizer_of(cut, "sgd"))
    return {"difference": difference(replica.module, cut)}


# Checkpoints


@check_each(
    *(f"{name}-{direction}" for name in ("adamw", "sgd", "lamb", *MUON) for direction in ("gathering", "scattering"))
)
def checkpoint(case, folder):
    """Written sharded and read unsharded ("gathering") or the other way round, then trained on, beside the first."""
    name, direction = case.split("-")
    models = (all_kinds(model=language_model(), attention=attention_kinds()) for _ in (0, 1))  # it has tied parameters
    first, second = (seeded(model, seed) for seed, model in enumerate(models))
    shard(first if direction == "gathering" else second)
    optimizer, other = optimizer_of(first, name), optimizer_of(second, name, decay=0.9)
    run(first, optimizer, range(3))
    dcp.save(state_of(first, optimizer), checkpoint_id=folder / case)
    run(first, optimizer, range(3, 6))
    state = state_of(second, other)
    dcp.load(state, checkpoint_id=folder / case)
    set_state_dict(second, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    entries = [[{name: group[name] for name in ENTRIES} for group in o.param_groups] for o in (optimizer, other)]
    run(second, other, range(3, 6))
    return {"difference": difference(first, second), "saved": entries[0], "loaded": entries[1]}


def state_of(model, optimizer):
    parameters, state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": state}


# What is refused


def refusal(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return "not refused"


@check
def refused_placements(folder):
    """Two sharded mesh dimensions, a pending reduction, and the middle one of three factors cut beside its rank."""
    size = dist.get_world_size()
    line, plane = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (1, size))
    tensors = {
        "two": DTensor.from_local(torch.ones(2, 3), plane, [Shard(0), Shard(1)]),
        "partial": DTensor.from_local(torch.ones(2, 3), line, [Partial()]),
    }
    messages = {name: refusal(sharding.sharding_of, tensor) for name, tensor in tensors.items()}
    cut = shard(seeded(product("deep", (7, 2), (2, 6), (6, 5))), along={"1.weight": 1})
    whole = DTensor.from_local(torch.ones(2, 3), plane, [Replicate(), Replicate()])
    return messages | {"middle": refusal(trained, cut, "adamw"), "whole": sharding.sharding_of(whole)}


@check_each("original_parameters", "flat_parameters")
def refused_fsdp1(name, folder):
    """The whole model or a part of it under FSDP1."""

    def wrapped():
        inner = product("linear", (7, 3), (3, 5))
        original = name == "original_parameters"
        return FullyShardedDataParallel(inner, use_orig_params=original, device_id=torch.device("cpu"))

    model = wrapped()
    return {
        "model": refusal(frobenius_param_groups, model),
        "part": refusal(frobenius_param_groups, nn.Sequential(nn.Linear(2, 5), wrapped())),
        "lamb": refusal(Lamb, model.parameters()),
        "frobenius_lamb": refusal(FrobeniusLamb, model.parameters()),
    }


if __name__ == "__main__":
    import tests.optim.sharded_training  # noqa: F401  its checks are run here, too

    run_checks(Path(sys.argv[1]))
