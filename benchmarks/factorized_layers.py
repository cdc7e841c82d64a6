#!/usr/bin/env python
"""Measure the speed of factorized layers compared with dense ones: whole models at several ratios, and single layers.

    .venv/bin/python benchmarks/factorized_layers.py

Prints two tables. For models: the ratio reached, the largest error of a layer (‖W − U Vᵀ‖_F/‖W‖_F of the random
initialization, which has no small singular values; a trained model loses less), and the time of forward and backward
pass, alternating with the dense model. For layers: the speedup over the dense layer; below 1 it is slower.
"""

import argparse
import copy
import platform
import statistics
import time
import warnings

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from fnl_hf import FactorizationConfig, factorize
from fnl_hf.layers import FactorizedLayer

RATIOS = (0.02, 0.05, 0.1, 0.15, 0.5)
# Layer, and the shape of its input.
LAYERS = {
    "Linear 768 → 3072, 512 rows": (lambda: nn.Linear(768, 3072), (512, 768)),
    "Linear 768 → 768, 512 rows": (lambda: nn.Linear(768, 768), (512, 768)),
    "Linear 768 → 768, 4 rows": (lambda: nn.Linear(768, 768), (4, 768)),
    "Conv 16 → 16, 3x3, 32 of 28x28": (lambda: nn.Conv2d(16, 16, 3, padding=1), (32, 16, 28, 28)),
    "Conv 64 → 64, 3x3, 32 of 8x8": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 8, 8)),
    "Conv 128 → 128, 3x3, 8 of 28x28": (lambda: nn.Conv2d(128, 128, 3, padding=1), (8, 128, 28, 28)),
    "Conv 512 → 512, 3x3, 8 of 7x7": (lambda: nn.Conv2d(512, 512, 3, padding=1), (8, 512, 7, 7)),
    "Conv 96 → 96, 3x3, depthwise, 8 of 28x28": (lambda: nn.Conv2d(96, 96, 3, 1, 1, groups=96), (8, 96, 28, 28)),
    "Conv 256 → 256, 1x1, 8 of 14x14": (lambda: nn.Conv2d(256, 256, 1), (8, 256, 14, 14)),
}


def models(device):
    """Name -> model, its input, and the factorized layers: all except embeddings and the stem."""
    bert = BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False)
    resnet = ResNetModel(ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]))
    return {
        "4 layers of BERT-Base, 4 x 128 tokens": (
            bert,
            torch.randint(1000, 2000, (4, 128)),
            ["Linear", "*attention*"],
            [],
        ),
        "ResNet18, 8 images of 112 x 112": (
            resnet,
            torch.randn(8, 3, 112, 112),
            ["Conv2d"],
            ["embedder*", "*shortcut*"],
        ),
    }


def passes(model, x):
    """Seconds of one forward and backward pass."""
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    out = model(x)
    (out if isinstance(out, torch.Tensor) else out.last_hidden_state).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def medians(candidates, x, repeats):
    """Median seconds of each, measured alternately after two warm-up rounds."""
    seconds = {name: [] for name in candidates}
    for turn in range(repeats + 2):
        for name, model in candidates.items():
            taken = passes(model, x)
            if turn >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def model_table(device, repeats):
    print("| model | target | reached | largest error of a layer | dense, ms | factorized, ms | times faster |")
    print("|---|---|---|---|---|---|---|")
    for name, (dense, x, include, exclude) in models(device).items():
        dense, x = dense.to(device), x.to(device)
        candidates = {None: dense}
        for ratio in RATIOS:
            config = FactorizationConfig(target_ratio=ratio, include=include, exclude=exclude)
            candidates[ratio] = factorize(copy.deepcopy(dense), config)
        seconds = medians(candidates, x, repeats)
        for ratio in RATIOS:
            layers = [m for m in candidates[ratio].modules() if isinstance(m, FactorizedLayer)]
            own = sum(p.numel() for layer in layers for p in layer.parameters())
            reached = own / sum(p.numel() for layer in layers for p in layer.new_dense(device="meta").parameters())
            times = f"{1e3 * seconds[None]:.0f} | {1e3 * seconds[ratio]:.0f} | {seconds[None] / seconds[ratio]:.2f}"
            print(f"| {name} | {ratio} | {reached:.4f} | {max(m.error for m in layers):.3f} | {times} |", flush=True)


def layer_table(device, repeats):
    print(
        f"\n| layer | dense, ms | {' | '.join(f'ratio {ratio}' for ratio in RATIOS)} |\n|---|---|{'---|' * len(RATIOS)}"
    )
    for name, (make, shape) in LAYERS.items():
        x = torch.randn(shape, device=device, requires_grad=True)
        candidates = {None: nn.Sequential(make()).to(device)}
        for ratio in RATIOS:
            candidates[ratio] = factorize(copy.deepcopy(candidates[None]), FactorizationConfig(target_ratio=ratio))
        seconds = medians(candidates, x, 4 * repeats)
        cells = [f"{seconds[None] / seconds[ratio]:.2f}" for ratio in RATIOS]
        print(f"| {name} | {1e3 * seconds[None]:.2f} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="target_ratio .* is below")  # the reached one is printed
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, float32\n")
    model_table(args.device, args.repeats)
    layer_table(args.device, args.repeats)


if __name__ == "__main__":
    main()
