#!/usr/bin/env python
"""Compare the throughput of run_pretrain.py with stock BertForMaskedLM, Trainer, collator and fused AdamW.

    .venv/bin/python benchmarks/pretraining_throughput.py --repeats 5

Both sides train models of the same dimensions on the same packed sequences with the same batch, dropout and learning
rate, alternately and each in a process of its own. A third side is ours with E halved. Rates are non-padding tokens per
second of the median step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from fnl_hf import FnlBertConfig
from fnl_hf.data.packing import pack_documents
from fnl_hf.data.source import embedded_corpus
from fnl_hf.data.tokenizer import load_tokenizer, train_tokenizer
from fnl_hf.reports.flops import training_flops
from fnl_hf.training.models import preset_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SIDES = ("stock", "ours", "ours, E halved")
BATCHES = {"tiny": 32, "mini": 32, "small": 16, "base": 4, "large": 2}
GPU_BATCHES = {"tiny": 1024, "mini": 1024, "small": 512, "base": 256, "large": 128}
WARM_UP = 3  # times of each turn that do not count
GPU_STEPS = 20


class StepTimer(transformers.TrainerCallback):
    """Writes the seconds of each step when training ends. On a GPU, which runs asynchronously, it takes the mean of
    GPU_STEPS steps. All Trainers of this process get this callback."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        together = GPU_STEPS if torch.cuda.is_available() else 1
        if state.global_step % together:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() / together)

    def on_train_end(self, args, state, control, **kwargs):
        steps = [after - before for before, after in zip(self.ends, self.ends[1:])]
        Path(os.environ["STEP_TIMES"]).write_text(json.dumps(steps[WARM_UP:]))


def prepare(folder, sequence_length):
    """A tokenizer of BERT's vocabulary and the embedded corpus as text, for both sides."""
    documents = embedded_corpus()
    tokenizer = train_tokenizer(documents, 30522, model_max_length=512)
    tokenizer.save_pretrained(folder / "tokenizer")
    documents.to_json(folder / "corpus.jsonl")
    pack_documents(documents, tokenizer, sequence_length).save_to_disk(folder / "packed")


def common(args, model, folder):
    values = {
        "output_dir": folder / "out", "learning_rate": 1e-4, "logging_steps": 10,
        "max_steps": (args.steps + WARM_UP + 1) * (GPU_STEPS if args.cuda else 1),
        "per_device_train_batch_size": args.batch_size or (GPU_BATCHES if args.cuda else BATCHES)[model],
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 1, "bf16": args.cuda,
        "dataloader_num_workers": 4 if args.cuda else 0, "torch_compile": args.compile,
    }  # fmt: skip
    return values | ({"tf32": True} if args.cuda else {})


def run_stock(args, model, folder):
    import datasets

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    entries = preset_config(model) | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    dropout = args.dropout if args.stock_dropout is None else args.stock_dropout
    entries |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    Trainer(
        BertForMaskedLM(BertConfig(**entries)),
        TrainingArguments(**common(args, model, folder), optim="adamw_torch_fused", weight_decay=0.01),
        train_dataset=datasets.load_from_disk(folder / "packed"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    ).train()


def run_ours(args, model, folder, halved):
    import run_pretrain

    values = common(args, model, folder) | {
        "preset": model, "tokenizer_name": folder / "tokenizer", "train_file": folder / "corpus.jsonl",
        "cache_dir": folder / "cache", "max_seq_length": args.sequence_length, "max_eval_samples": 4, "do_train": True,
        "config_overrides": f"hidden_dropout_prob={args.dropout},attention_probs_dropout_prob={args.dropout}",
        "overwrite_output_dir": True,
    }  # fmt: skip
    if halved:
        values["attention_embedding_size"] = preset_config(model)["hidden_size"] // 2
    run_pretrain.run([word for name, value in values.items() for word in (f"--{name}", str(value))])


def turn(args, model, side, folder):
    """Step times of one side, measured in a separate process."""
    times = folder / "times.json"
    flags = ["--turn", side, "--models", model, "--folder", str(folder), "--steps", str(args.steps)]
    flags += ["--sequence_length", str(args.sequence_length), "--dropout", str(args.dropout)]
    flags += ["--batch_size", str(args.batch_size)] if args.batch_size else []
    flags += ["--stock_dropout", str(args.stock_dropout)] if args.stock_dropout is not None else []
    flags += ["--compile"] if args.compile else []
    environment = {**os.environ, "STEP_TIMES": str(times), "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{side} failed:\n{result.stderr[-3000:]}")
    return json.loads(times.read_text())


def matmul_flops(cuda):
    """FLOP/s of a bare square matmul: fp32 on a CPU, bf16 on a GPU."""
    size, device, dtype = (8192, "cuda", torch.bfloat16) if cuda else (2048, "cpu", torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def compare(args, model, folder):
    batch = common(args, model, folder)["per_device_train_batch_size"]
    steps: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks = []
    for _ in range(args.repeats):
        peaks.append(matmul_flops(args.cuda))
        for side in SIDES:
            steps[side] += turn(args, model, side, folder)
    length, peak = args.sequence_length, statistics.median(peaks)
    rates = {side: batch * length / statistics.median(times) for side, times in steps.items()}
    dropout = f"{args.dropout}" + (f" (stock {args.stock_dropout})" if args.stock_dropout is not None else "")
    print(f"\n{model}, batch {batch} x {length}, dropout {dropout}; bare matmul {peak / 1e9:.0f} GFLOP/s\n")
    print("| | tokens/s | spread of steps | times stock | model FLOPs / bare matmul |\n|---|---|---|---|---|")
    for side, rate in rates.items():
        low, _, high = statistics.quantiles(steps[side], n=4)
        config = FnlBertConfig(**preset_config(model), vocab_size=30522)
        if side.endswith("halved"):
            config.attention_embedding_size = config.hidden_size // 2
        masked = round(0.15 * length)
        flops = training_flops(config, length, masked, None if side == "stock" else masked)
        utilization = rate / length * flops / peak
        spread = f"{batch * length / high:,.0f} to {batch * length / low:,.0f}"
        print(f"| {side} | {rate:,.0f} | {spread} | {rate / rates['stock']:.2f} | {utilization:.2f} |", flush=True)
    print(f"\nE halved / E = d: {rates['ours, E halved'] / rates['ours']:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "mini", "base"], choices=list(BATCHES))
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--stock_dropout", type=float, help="dropout of the stock side, if different")
    parser.add_argument(
        "--steps",
        type=int,
        default=12,
        help="steps per turn after the warm-up; 20 times as many on a GPU",
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns per side")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--compile", action="store_true", help="use torch.compile on both sides")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cuda = torch.cuda.is_available()
    if args.turn:
        transformers.trainer.DEFAULT_CALLBACKS.append(StepTimer)
        if args.turn == "stock":
            return run_stock(args, args.models[0], args.folder)
        return run_ours(args, args.models[0], args.folder, args.turn.endswith("halved"))
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.cuda else f"{platform.machine()}, {args.threads} threads"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, {args.repeats} turns")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.sequence_length)
        for model in args.models:
            compare(args, model, Path(folder))


if __name__ == "__main__":
    main()
