"""Factorized layers and conversions: the models of benchmarks/factorized_layers.py, and BERT-Large."""

import copy
import statistics
import warnings

import factorized_layers
import torch
from transformers import BertConfig, BertModel

from fnl_hf import FactorizationConfig, FnlBertModel, factorize
from fnl_hf.layers.initialization import truncated_svd
from fnl_hf.training.models import preset_config
from gpu.records import Recorder


def compare_models(run: Recorder) -> None:
    ratios = (0.5,) if run.tiny else factorized_layers.RATIOS
    if run.tiny:
        bert = BertModel(BertConfig(**preset_config("tiny")), add_pooling_layer=False)
        models = {"tiny": (bert, torch.randint(1000, 2000, (1, 16)), ["Linear", "*attention*"], [])}
    else:
        models = factorized_layers.models(run.device)
    for name, (dense, x, include, exclude) in models.items():
        dense, x = dense.to(run.device), x.to(run.device)
        candidates = {None: dense}
        for ratio in ratios:
            config = FactorizationConfig(target_ratio=ratio, include=include, exclude=exclude)
            with warnings.catch_warnings(action="ignore"):
                candidates[ratio] = factorize(copy.deepcopy(dense), config)
        seconds = factorized_layers.medians(candidates, x, 1 if run.tiny else 20)
        for ratio in ratios:
            run.record(f"{name}: ratio {ratio}, times as fast as dense", seconds[None] / seconds[ratio])


def time_conversions(run: Recorder) -> None:
    generator = torch.Generator().manual_seed(0)
    for size, rank in ((130, 8),) if run.tiny else ((1024, 64), (4096, 64), (4096, 512)):
        weight = torch.randn(1, size, size, device=run.device)
        times = run.measure(
            {"randomized": lambda weight=weight, rank=rank: truncated_svd(weight, rank, generator),
             "whole": lambda weight=weight: torch.linalg.svd(weight, full_matrices=False)}, 1 if run.tiny else 3,
        )  # fmt: skip
        run.record_times(f"SVD of {size} x {size}, rank {rank}: ", times)
    preset = "tiny" if run.tiny else "large"
    config = BertConfig(**preset_config(preset))
    bert = BertModel(config).to(run.device)
    times = run.measure({preset: lambda: FnlBertModel.from_bert(bert, config.hidden_size // 2)}, 1 if run.tiny else 3)
    run.record(f"from_bert of {preset}, E halved", statistics.median(times[preset]), unit="s")
    small = FnlBertModel.from_bert(bert, config.hidden_size // 2)
    run.record(f"to_bert of {preset}", statistics.median(run.measure({"back": small.to_bert}, 1)["back"]), unit="s")
