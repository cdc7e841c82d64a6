#!/usr/bin/env python
"""Measure time and memory of Frobenius decay and of the optimizers that have it, compared with alternatives.

    .venv/bin/python benchmarks/optimizer_step.py                       # BERT-Base and Large, E full and halved
    .venv/bin/python benchmarks/optimizer_step.py --models base --training_step

Both sides of each comparison run alternately in one process. Prints medians, minima, the median ratio of neighboring
runs, and the memory that a step needs. Uses a CUDA device if there is one.

The comparisons are:
- the decay alone, with its batched matmuls (two Gram matrices and two products per pair, into fresh and into
  preallocated tensors) and with the method of the published code: one module at a time, each factor's gradient written
  to a buffer of its own and subtracted from the factor;
- FrobeniusAdamW with torch's fused AdamW; Lamb and FrobeniusLamb with pytorch_optimizer's Lamb (the faster of its two
  modes, all parameters at once or one at a time); FrobeniusMuon with torch's Muon and AdamW together, with
  ``per_head``, and with AdamW alone;
- with ``--training_step``, the decay with a whole training step.
"""

import argparse
import gc
import itertools
import os
import platform
import statistics
import time

import torch

from fnl_hf import (
    FnlBertConfig,
    FnlBertForMaskedLM,
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    Lamb,
    frobenius_param_groups,
    muon_param_groups,
)
from fnl_hf.bert.factorization import RANK_DIMS, head_rows
from fnl_hf.optim.base import decay_products_
from fnl_hf.training.models import preset_config

LR, DECAY = 1e-4, 0.01


def measure(functions, repeats, device):
    """{name: seconds of each run}; the functions run alternately, in a new order each time, after two warm-ups."""
    names, times = list(functions), {name: [] for name in functions}
    for round_ in range(repeats + 2):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            functions[name]()
            synchronize(device)
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def report(title, times, ours, others):
    """A table row for each function, with the ratio of ours to the others named."""
    print(f"\n**{title}**\n\n| | median ms | min ms | {' | '.join(f'ours / {other}' for other in others)} |")
    print("|---|---|---|" + "---|" * len(others))
    for name, values in times.items():
        ratios = [
            f"{statistics.median(a / b for a, b in zip(times[ours], times[other])):.2f}" if name == ours else ""
            for other in others
        ]
        row = [name, f"{1e3 * statistics.median(values):.1f}", f"{1e3 * min(values):.1f}", *ratios]
        print(f"| {' | '.join(row)} |", flush=True)


def rows_of(product):
    return [head_rows(w.detach(), product.num_heads, dim) for w, dim in zip(product.weights, RANK_DIMS[product.kind])]


def bare_matmuls(pairs, preallocated):
    """Only the four batched matmuls of each pair."""
    outs = {}

    def out(like):
        return outs.setdefault((like.shape, like.stride()), torch.empty_like(like)) if preallocated else None

    def run():
        for left, right in pairs:
            left_gram, right_gram = torch.bmm(left, left.mT), torch.bmm(right, right.mT)
            torch.bmm(right_gram, left, out=out(left))
            torch.bmm(left_gram, right, out=out(right))

    return run


def published_way(products):
    """One module at a time, through gradient buffers like the parameters."""

    def run():
        for product in products:
            left, right = rows_of(product)
            gradients = (right @ right.mT) @ left, (left @ left.mT) @ right
            for weight, gradient, dim in zip(product.weights, gradients, RANK_DIMS[product.kind]):
                buffer = torch.empty_like(weight)
                head_rows(buffer, product.num_heads, dim).copy_(gradient)
                weight.sub_(buffer, alpha=LR * DECAY)

    return torch.no_grad()(run)


def build(model_name, halved, device):
    config = FnlBertConfig(**preset_config(model_name), sparse_prediction=True)
    config.attention_embedding_size = config.hidden_size // 2 if halved else config.hidden_size
    torch.manual_seed(0)
    model = FnlBertForMaskedLM(config).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def decay_candidates(model):
    """name -> function, ours first."""
    groups = [g | {"lr": LR} for g in frobenius_param_groups(model, DECAY) if g["product"]]
    products = model.factor_pairs()
    pairs = [rows_of(product) for product in products]
    return {
        "Frobenius decay, ours": lambda: decay_products_(groups),
        "bare matmuls": bare_matmuls(pairs, preallocated=False),
        "bare matmuls, preallocated": bare_matmuls(pairs, preallocated=True),
        "published method": published_way(products),
    }


def compare_decay(model, title, args, device):
    times = measure(decay_candidates(model), args.repeats * 3, device)
    ours, *others = times
    report(f"{title}: the decay alone", times, ours, others)
    return statistics.median(times[ours])


def lamb_groups(model):
    """Settings of pytorch_optimizer for our default: no trust ratio and no decay for vectors."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices}, {"params": vectors, "adam": True, "weight_decay": 0.0}]


def other_lamb(*args, **kwargs):
    from pytorch_optimizer import Lamb

    return Lamb(*args, **kwargs)


class MuonAndAdamW:
    """torch's two optimizers, as used without FrobeniusMuon."""

    def __init__(self, groups):
        by_rule = {True: [], False: []}
        for group in groups:
            by_rule[group["use_muon"]].append({"params": group["params"], "weight_decay": group["weight_decay"]})
        self.muon = torch.optim.Muon(by_rule[True], lr=LR, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(by_rule[False], lr=LR, fused=True)

    def step(self):
        self.muon.step()
        self.adamw.step()


def optimizer_candidates(model):
    """kind -> name -> function that makes the optimizer, ours first."""

    def groups():
        return frobenius_param_groups(model, DECAY)

    def muon(**options):
        return FrobeniusMuon(muon_param_groups(model, DECAY), lr=LR, fused=True, **options)

    plain = {"lr": LR, "weight_decay": DECAY}
    return {
        "AdamW": {
            "FrobeniusAdamW": lambda: FrobeniusAdamW(groups(), lr=LR, fused=True),
            "torch's AdamW, fused": lambda: torch.optim.AdamW(model.parameters(), **plain, fused=True),
        },
        "LAMB": {
            "Lamb": lambda: Lamb(model.parameters(), **plain, max_grad_norm=None),
            "pytorch_optimizer's Lamb, all at once": lambda: other_lamb(
                lamb_groups(model), **plain, weight_decouple=False, foreach=True
            ),
            "pytorch_optimizer's Lamb, one at a time": lambda: other_lamb(
                lamb_groups(model), **plain, weight_decouple=False, foreach=False
            ),
        },
        "Muon": {
            "FrobeniusMuon": muon,
            "FrobeniusMuon, per head": lambda: muon(per_head=True),
            "torch's Muon, and its AdamW for the rest": lambda: MuonAndAdamW(muon_param_groups(model, DECAY)),
            "torch's AdamW, fused": lambda: torch.optim.AdamW(model.parameters(), **plain, fused=True),
        },
        "LAMB with decay": {
            "FrobeniusLamb": lambda: FrobeniusLamb(groups(), lr=LR, max_grad_norm=None),
            "pytorch_optimizer's Lamb, one at a time": lambda: other_lamb(
                lamb_groups(model), **plain, weight_decouple=True, foreach=False
            ),
        },
    }


def compare_optimizers(model, title, args, device):
    for kind, makers in optimizer_candidates(model).items():
        optimizers = {name: make() for name, make in makers.items()}
        times = measure({name: o.step for name, o in optimizers.items()}, args.repeats, device)
        ours, *others = times
        report(f"{title}: a step of {kind}", times, ours, others)
        parameters = sum(p.nbytes for p in model.parameters())
        peaks = {name: 100 * peak_memory(o.step, device) / parameters for name, o in optimizers.items()}
        print("\npeak memory of a step, minus the memory before it, in % of the parameters' bytes: ", end="")
        print(", ".join(f"{name} {peak:.1f}" for name, peak in peaks.items()))
        del optimizers
        gc.collect()


def peak_memory(step, device):
    """Peak memory of a step in bytes, minus the memory before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    return max([0, *held])


def compare_training_step(model, title, decay_seconds, args, device):
    """Share of a step: forward, backward and FrobeniusAdamW on a batch of random tokens, 15% of them masked."""
    batch = args.batch_size or (64 if device == "cuda" else 32)
    ids = torch.randint(1000, model.config.vocab_size, (batch, 128), device=device)
    labels = torch.where(torch.rand(ids.shape, device=device) < 0.15, ids, -100)
    optimizer = FrobeniusAdamW(frobenius_param_groups(model, DECAY), lr=LR, fused=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()

    times = measure({"step": step}, args.training_repeats, device)["step"]
    share = decay_seconds / statistics.median(times)
    precision = "bf16" if device == "cuda" else "fp32"
    print(f"\n{title}: a training step, {batch} x 128, {precision}: {statistics.median(times):.3f} s;", end=" ")
    print(f"the decay is {100 * share:.2f}% of it", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=["base", "large"], choices=["tiny", "base", "large"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--training_step", action="store_true", help="also time a whole training step")
    parser.add_argument("--training_repeats", type=int, default=2)
    parser.add_argument("--batch_size", type=int)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}, {args.repeats} repeats")
    for model_name in args.models:
        for halved in (False, True):
            model = build(model_name, halved, device)
            title = f"{model_name}, E = {model.config.mha_embedding_size}"
            seconds = compare_decay(model, title, args, device)
            compare_optimizers(model, title, args, device)
            if args.training_step:
                compare_training_step(model, title, seconds, args, device)
            del model
            gc.collect()


if __name__ == "__main__":
    main()
