"""Measure tokens per second of a training step: ours, ours with E halved, and stock BERT, alternately."""

import gc
import statistics

import torch
from transformers import BertConfig, BertForMaskedLM

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, FrobeniusAdamW, frobenius_param_groups
from fnl_hf.reports.flops import device_peak_flops, training_flops
from fnl_hf.training.models import preset_config
from gpu.records import Recorder, quartiles

MASKED = 0.15
TOKENS = {"tiny": 2**17, "mini": 2**17, "small": 2**16, "base": 2**15, "large": 2**14}  # of a batch
GOALS = {("base", 128, "ours"): ">= 600000", ("base", 512, "ours"): ">= 510000"}  # on an H100
STEPS = 10  # timed together: the host runs ahead of the device


def make_side(side: str, preset: str, attention: str):
    sizes = preset_config(preset) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if side == "stock":
        return BertForMaskedLM._from_config(BertConfig(**sizes), attn_implementation=attention)
    halved = sizes["hidden_size"] // 2 if side.endswith("halved") else None
    config = FnlBertConfig(**sizes, attention_embedding_size=halved, sparse_last_layer=True)
    return FnlBertForMaskedLM._from_config(config, attn_implementation=attention)


def make_step(side: str, model, run: Recorder, batch: int, length: int):
    """A function that trains on one batch of random tokens, 15% of them masked."""
    ids = torch.randint(1000, model.config.vocab_size, (batch, length), device=run.device)
    positions = torch.rand(ids.shape, device=run.device).argsort(1)[:, : max(1, round(MASKED * length))]
    if side.startswith("stock"):
        labels = torch.full_like(ids, -100).scatter(1, positions, ids.gather(1, positions))
        inputs = {"input_ids": ids, "labels": labels}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        inputs = {"input_ids": ids, "labels": ids.gather(1, positions), "masked_positions": positions}
        optimizer = FrobeniusAdamW(frobenius_param_groups(model, 0.01), lr=1e-4, fused=True)

    def step():
        for _ in range(1 if run.tiny else STEPS):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.is_gpu):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure_throughput(run: Recorder, preset: str, length: int) -> None:
    """Measure the sides alternately; if memory is short, each is freed before the next is created."""
    torch.backends.cuda.matmul.allow_tf32 = run.is_gpu
    preset_here, length_here = ("tiny", 16) if run.tiny else (preset, length)
    batch = 2 if run.tiny else TOKENS[preset] // length
    variants = [("sdpa", False)] + ([("sdpa", True)] if run.is_gpu else [])
    if run.is_gpu:
        if has_flash():
            variants.append(("flash_attention_2", False))
        else:
            run.skip("FlashAttention", "not installed")
    for attention, is_compiled in variants:
        kind = f"{attention}{', compiled' if is_compiled else ''}"
        models = {
            side: make_side(side, preset_here, attention).to(run.device) for side in ("ours", "ours, E halved", "stock")
        }
        steps = {
            side: make_step(side, torch.compile(model) if is_compiled else model, run, batch, length_here)
            for side, model in models.items()
        }
        times = run.measure(steps, 1 if run.tiny else 5)
        tokens = batch * length_here * (1 if run.tiny else STEPS)
        peak, _ = device_peak_flops(run.device, torch.bfloat16 if run.is_gpu else torch.float32)
        for side, seconds in times.items():
            rates = [tokens / taken for taken in seconds]
            goal = GOALS.get((preset, length, side), "") if kind == "sdpa" else ""
            run.record(f"{side}, {kind}", statistics.median(rates), quartiles(rates), "tokens/s", goal)
            masked = max(1, round(MASKED * length_here))
            flops = training_flops(models[side].config, length_here, masked, None if side == "stock" else masked)
            utilization = statistics.median(rates) / length_here * flops / peak
            run.record(f"{side}, {kind}, model FLOPs utilization", utilization)
        for side in ("ours", "ours, E halved"):
            ratios = [stock / own for stock, own in zip(times["stock"], times[side])]
            goal = ">= 2" if (preset, side, kind) == ("base", "ours", "sdpa") and length == 128 else ""
            run.record(f"{side} / stock, {kind}", statistics.median(ratios), quartiles(ratios), "times as fast", goal)
        if run.is_gpu:
            for side, step in steps.items():
                torch.cuda.reset_peak_memory_stats()
                step()
                run.record(f"{side}, {kind}, peak memory", torch.cuda.max_memory_allocated() / 1e9, unit="GB")
        del models, steps
        gc.collect()
        if run.is_gpu:
            torch.cuda.empty_cache()
            torch._dynamo.reset()


def find_largest_batch(run: Recorder) -> None:
    """By doubling, sequences of 128 and 512 tokens."""
    for length in (16,) if run.tiny else (128, 512):
        model = make_side("ours", "tiny" if run.tiny else "base", "sdpa").to(run.device)
        batch = 1
        while batch < (4 if run.tiny else 2**15):
            try:
                make_step("ours", model, run, 2 * batch, length)()
                run.synchronize()
            except torch.OutOfMemoryError:
                break
            finally:
                gc.collect()
            batch *= 2
        run.record(f"largest power of 2, sequence {length}", batch, unit="sequences")


def has_flash() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()
