"""Decay and optimizers compared with alternatives, as in benchmarks/optimizer_step.py."""

import gc
import statistics

import optimizer_step
import torch

from fnl_hf import FrobeniusAdamW, frobenius_param_groups
from gpu.records import Recorder


def sizes(run: Recorder):
    """(preset, E halved) of the models to measure."""
    return [("tiny", True)] if run.tiny else [(name, halved) for name in ("base", "large") for halved in (False, True)]


def compare_decay(run: Recorder) -> None:
    for name, halved in sizes(run):
        model = optimizer_step.build(name, halved, run.device.type)
        title = f"{name}, E = {model.config.mha_embedding_size}: "
        candidates = optimizer_step.decay_candidates(model)
        times = run.measure(candidates, 2 if run.tiny else 50)
        run.record_times(title, times, {"published method": "<= 0.2"})
        run.record(f"{title}kernels of one decay", run.kernels(candidates["Frobenius decay, ours"]))
        step = _training_step(model, run)
        seconds = statistics.median(run.measure({"step": step}, 1 if run.tiny else 10)["step"])
        share = statistics.median(times["Frobenius decay, ours"]) / seconds
        run.record(f"{title}share of a training step", 100 * share, unit="%", goal="<= 1")
        del model, candidates, step
        gc.collect()


def _training_step(model, run: Recorder):
    """Forward, backward and step on random tokens, 15% of them masked."""
    batch, length = (2, 16) if run.tiny else (64, 128)
    ids = torch.randint(1000, model.config.vocab_size, (batch, length), device=run.device)
    positions = torch.arange(length, device=run.device)[::7].expand(batch, -1).contiguous()
    labels = ids.gather(1, positions)
    optimizer = FrobeniusAdamW(frobenius_param_groups(model, optimizer_step.DECAY), lr=optimizer_step.LR, fused=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.is_gpu):
            loss = model(ids, labels=labels, masked_positions=positions).loss
        loss.backward()
        optimizer.step()

    return step


def compare_steps(run: Recorder, kind: str) -> None:
    if kind == "LAMB" and not run.needs("pytorch_optimizer"):
        return
    goals = {"pytorch_optimizer's Lamb, all at once": "<= 0.33", "pytorch_optimizer's Lamb, one at a time": "<= 0.33"}
    for name, halved in sizes(run):
        model = optimizer_step.build(name, halved, run.device.type)
        title = f"{name}, E = {model.config.mha_embedding_size}: "
        optimizers = {label: make() for label, make in optimizer_step.optimizer_candidates(model)[kind].items()}
        run.record_times(title, run.measure({n: o.step for n, o in optimizers.items()}, 2 if run.tiny else 30), goals)
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        for index, (label, optimizer) in enumerate(optimizers.items()):
            held = 100 * optimizer_step.peak_memory(optimizer.step, run.device.type) / parameters
            run.record(f"{title}{label}, memory of a step", held, unit="% of parameters", goal="" if index else "<= 5")
            run.record(f"{title}{label}, kernels of a step", run.kernels(optimizer.step))
        del model, optimizers
        gc.collect()
