"""Checks of training under FSDP2, without Accelerate: what one process does with the same global batches.

sharded_worker.py runs them with its own; test_sharded.py asserts on the figures.
"""

import copy
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fnl_hf import (
    FactorizationConfig,
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    FrobeniusSGD,
    factorize,
    frobenius_param_groups,
    muon_param_groups,
)
from fnl_hf.data.masking import MaskedLMDataset, MaskingTransform
from fnl_hf.training.fsdp import (
    load_whole_optimizer_state,
    load_whole_weights,
    whole_optimizer_state,
    whole_weights,
)
from fnl_hf.training.sampling import EpochSampler
from tests.conftest import DIMENSIONS
from tests.optim.sharded_models import full, language_model, shard
from tests.optim.worker_checks import check, check_each

STEPS, GLOBAL_BATCH, ACCUMULATION, BOUND = 20, 12, 2, 0.5
# Adam's ε keeps rounding noise of gradients that are zero in theory (key biases) from becoming whole steps.
OPTIMIZERS = {
    "adamw": partial(FrobeniusAdamW, lr=1e-2, eps=1e-3, fused=True),
    "lamb": partial(FrobeniusLamb, lr=2e-2, eps=1e-3, max_grad_norm=None),
    "sgd": partial(FrobeniusSGD, lr=1e-1, momentum=0.9, foreach=True),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = partial(FrobeniusMuon, lr=1e-2, eps=1e-3, fused=True)


def optimizer_of(model, name):
    make_groups = muon_param_groups if name == "muon" else frobenius_param_groups
    return OPTIMIZERS[name](make_groups(model, 0.1, frobenius_decay=0.5))


class Tokenizer:
    mask_token_id, sep_token_id, all_special_ids = 4, 3, [0, 1, 2, 3, 4]

    def get_vocab(self):
        return {str(index): index for index in range(DIMENSIONS["vocab_size"])}


def dataset():
    """Five global batches and a rest: twenty steps are four epochs, each with an order and masks of its own."""
    rows = np.random.default_rng(0).integers(5, DIMENSIONS["vocab_size"], (5 * GLOBAL_BATCH + 7, 17))
    return MaskedLMDataset(Dataset.from_dict({"input_ids": rows.tolist()}), MaskingTransform(Tokenizer(), 0.2, seed=1))


def global_batches(data, steps):
    """The indices of each step, in the order of ``run_pretrain.py``; sets the epoch."""
    sampler = EpochSampler(len(data), GLOBAL_BATCH, seed=2)
    for step in range(steps):
        epoch, position = divmod(step, len(sampler) // GLOBAL_BATCH)
        for part in (sampler, data):
            part.set_epoch(epoch)
        yield list(sampler)[position * GLOBAL_BATCH :][:GLOBAL_BATCH]


def micro_batches(indices):
    """This process's, as Accelerate shares them out: one to each process in turn."""
    size = GLOBAL_BATCH // ACCUMULATION // dist.get_world_size()
    batches = [indices[start : start + size] for start in range(0, GLOBAL_BATCH, size)]
    return batches[dist.get_rank() :: dist.get_world_size()]


def fit(model, optimizer, steps=range(STEPS)):
    """Train as FnlTrainer does: means over the labels of the global batch, which FSDP2's mean over the processes
    would divide once more. Returns the norms of the gradients."""
    data, norms = dataset(), []
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    for step, indices in enumerate(global_batches(data, steps.stop)):
        if step not in steps:
            continue
        items = {"labels": data.__getitems__(indices)["labels"].ne(-100).sum()}
        batches = micro_batches(indices) if sharded else [indices]
        for number, batch in enumerate(batches, start=1):
            if sharded:
                model.set_requires_gradient_sync(number == len(batches))
            loss = model(**data.__getitems__(batch), num_items_in_batch=items).loss
            (loss * (dist.get_world_size() if sharded else 1)).backward()
        norms.append(full(torch.nn.utils.clip_grad_norm_(model.parameters(), BOUND)).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def largest_difference(model, other):
    """Of any two weights."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return torch.stack([(full(first) - full(second)).abs().max() for first, second in pairs]).max().item()


@check_each("adamw-whole_last_layer", "lamb-sparse_last_layer")
def training(case, folder):
    name, layer = case.split("-")
    start = language_model(sparse_last_layer=layer == "sparse_last_layer")
    alone, cut = copy.deepcopy(start), shard(copy.deepcopy(start))
    norms = [fit(model, optimizer_of(model, name)) for model in (alone, cut)]
    return {
        "difference": largest_difference(alone, cut),
        "effect": largest_difference(start, alone),
        "clipped": sum(norm > BOUND for norm in norms[0]),
        "norms": max(abs(one - other) for one, other in zip(*norms, strict=True)),
        "tied": cut.cls.predictions.decoder.weight is cut.bert.embeddings.word_embeddings.weight
        and cut.cls.predictions.decoder.bias is cut.cls.predictions.bias,
    }


def factorized(mode):
    """Grouped convolution, convolution and Linear layers as products, as ``factorize`` makes them."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 5, (2, 3)), nn.Flatten(), nn.Linear(5 * 4, 7)
    sizes = {"low_rank": (4, 5, 3), "wide": (7, 13, 9), "deep": (7, 13, 9)}[mode]
    model = nn.Sequential(*layers)
    return factorize(model, FactorizationConfig(mode=mode, ranks=dict(zip(("0", "2", "4"), sizes))))


@check_each(*(f"{mode}-{way}" for mode in ("low_rank", "wide", "deep") for way in ("fsdp2", "ddp")))
def factorized_layers(case, folder):
    """Forward, backward and Frobenius decay, each process with its part of the batch."""
    mode, way = case.split("-")
    start = factorized(mode)
    alone, others = copy.deepcopy(start), copy.deepcopy(start)
    wrapped = shard(others) if way == "fsdp2" else DistributedDataParallel(others)
    world, rank = dist.get_world_size(), dist.get_rank()
    for model in (alone, wrapped):
        optimizer = optimizer_of(model, "sgd")
        for step in range(5):
            x = torch.randn(6 * world, 4, 5, 6, generator=torch.Generator().manual_seed(step))
            part = x if model is alone else x[6 * rank : 6 * rank + 6]
            model(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"difference": largest_difference(alone, others), "effect": largest_difference(start, alone)}


@check_each(*(f"{name}-{direction}" for name in OPTIMIZERS for direction in ("gathering", "scattering")))
def trainer_checkpoint(case, folder):
    """Trainer's files, written sharded and read by one process ("gathering") or the other way round; both go on."""
    name, direction = case.split("-")
    first, second = language_model(), language_model(initializer_range=0.5)
    shard(first if direction == "gathering" else second)
    optimizer, other = optimizer_of(first, name), optimizer_of(second, name)
    fit(first, optimizer, range(3))
    files = folder / f"{case}.safetensors", folder / f"{case}.pt"
    main = dist.get_rank() == 0
    weights, state = whole_weights(first, keep=main), whole_optimizer_state(optimizer, keep=main)
    if main:
        save_file({name: weights[name].contiguous() for name, _ in first.named_parameters()}, files[0])
        torch.save(state, files[1])
    dist.barrier()
    saved = torch.load(files[1], weights_only=True)
    if direction == "gathering":
        second.load_state_dict(load_file(files[0]), strict=False)
        other.load_state_dict(saved)
    else:
        load_whole_weights(second, load_file(files[0]))
        load_whole_optimizer_state(other, saved)
    before = largest_difference(first, second)
    for model, its in ((first, optimizer), (second, other)):
        fit(model, its, range(3, 8))
    return {"before": before, "after": largest_difference(first, second)}


@check_each("adamw", "lamb")
def skipped_step(name, folder):
    """``found_inf``, by which the loss guard leaves out a step on an accelerator."""
    model = shard(language_model())
    optimizer = optimizer_of(model, name)
    fit(model, optimizer, range(2))
    before = whole_weights(model, keep=True), whole_optimizer_state(optimizer, keep=True)
    optimizer.found_inf = torch.ones(())
    fit(model, optimizer, range(2, 4))
    after = whole_weights(model, keep=True), whole_optimizer_state(optimizer, keep=True)
    del optimizer.found_inf
    fit(model, optimizer, range(4, 5))
    moved = whole_weights(model, keep=True)
    states = zip(before[1]["state"].values(), after[1]["state"].values(), strict=True)
    return {
        "weights": all(torch.equal(value, after[0][name]) for name, value in before[0].items()),
        "state": all(torch.equal(value, two[name]) for one, two in states for name, value in one.items()),
        "moved": any(not torch.equal(value, moved[name]) for name, value in after[0].items()),
    }


@check
def saved_model(folder):
    """What ``save_pretrained`` writes of a sharded model beside its weights."""
    written = {}
    for kind, model in (("whole", language_model()), ("sharded", shard(language_model()))):
        weights = whole_weights(model, keep=True)
        model.save_pretrained(folder / f"{kind}_{dist.get_rank()}", state_dict=weights)
        files = sorted((folder / f"{kind}_{dist.get_rank()}").iterdir())
        written[kind] = {path.name: path.read_bytes().hex() for path in files}
    return {"files": sorted(written["whole"]), "equal": written["whole"] == written["sharded"]}
