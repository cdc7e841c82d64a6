#!/usr/bin/env python
"""Measure speed and memory of the data pipeline: reading, tokenizing and packing, masking.

    .venv/bin/python benchmarks/data_pipeline.py                          # about five minutes on two cores
    .venv/bin/python benchmarks/data_pipeline.py --megabytes 10 100 1000  # memory up to 1 GB of input
    .venv/bin/python benchmarks/data_pipeline.py --files a.jsonl.xz --tokenizer_name bert --megabytes  # your own text

Prints medians of alternating runs:
- tokenizing and packing, including writing the Arrow file, compared with the bare tokenizer on the same texts, on one
  core each;
- masking: tokens per second of ``MaskedLMDataset.__getitems__`` in batches drawn at random from the Arrow file;
- peak memory of reading, packing and masking by input size, each in a process of its own. Pages of mapped files, which
  the system can reclaim, are counted separately.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from datasets.utils import disable_progress_bars
from transformers.utils import logging

from fnl_hf.data.corpus import load_text_files
from fnl_hf.data.masking import MaskedLMDataset, MaskingTransform
from fnl_hf.data.packing import pack_documents
from fnl_hf.data.source import embedded_corpus
from fnl_hf.data.tokenizer import load_tokenizer, train_tokenizer

MLM_PROBABILITY = 0.15


def median_seconds(functions, repeats):
    """{name: median seconds}; the functions run alternately, after one warm-up round."""
    times = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare_packing(documents, tokenizer, args, folder):
    texts = documents["text"][:]
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    made = iter(range(args.repeats + 1))
    seconds = median_seconds(
        {
            "bare tokenizer": lambda: tokenizer(texts, add_special_tokens=False, verbose=False),
            "tokenize and pack": lambda: pack_documents(
                documents, tokenizer, args.max_seq_length, cache_dir=str(folder / f"cache{next(made)}")
            ),
        },
        args.repeats,
    )
    rows = len(pack_documents(documents, tokenizer, args.max_seq_length, cache_dir=str(folder / "cache0")))
    print(f"{tokens:,} tokens, {rows:,} rows of {args.max_seq_length}")
    print("\n| one core | tokens/s | rate / bare tokenizer |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {tokens / value:,.0f} | {seconds['bare tokenizer'] / value:.2f} |", flush=True)


def time_masking(documents, tokenizer, args, folder):
    packed = pack_documents(documents, tokenizer, args.max_seq_length, cache_dir=str(folder / "masking"))
    dataset = MaskedLMDataset(packed, MaskingTransform(tokenizer, MLM_PROBABILITY, seed=0))
    order = np.random.default_rng(0).permutation(len(dataset))[: len(dataset) // args.batch_size * args.batch_size]
    batches = [batch.tolist() for batch in order.reshape(-1, args.batch_size)]
    seconds = median_seconds(
        {"masking": lambda: [dataset.__getitems__(batch) for batch in batches]}, args.repeats
    )["masking"]  # fmt: skip
    rate = order.size * args.max_seq_length / seconds
    print(f"\nmasking, batches of {args.batch_size} x {args.max_seq_length}: {rate:,.0f} tokens/s", flush=True)


def resident():
    """Bytes of this process in memory: its own, and pages of mapped files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile"))


def run_pipeline(file, tokenizer_folder, args, folder):
    """Read, pack and mask one file; print the memory before and the peak during it, in bytes."""
    disable_progress_bars()
    tokenizer = load_tokenizer(tokenizer_folder)
    before, peak, done = resident(), resident(), threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.01):
            peak = tuple(map(max, peak, resident()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    documents = load_text_files([file], cache_dir=folder)
    packed = pack_documents(documents, tokenizer, args.max_seq_length, cache_dir=folder)
    dataset = MaskedLMDataset(packed, MaskingTransform(tokenizer, MLM_PROBABILITY, seed=0))
    for start in range(0, len(dataset) - args.batch_size, args.batch_size):
        dataset.__getitems__(list(range(start, start + args.batch_size)))
    done.set()
    watcher.join()
    print(json.dumps({"before": before, "peak": peak}))


def measure_memory(documents, tokenizer, args, folder):
    tokenizer.save_pretrained(folder / "tokenizer")
    lines = "".join(" ".join(text.split()) + "\n" for text in documents["text"][:]).encode()
    print("\n| input | own memory, MB | increase since before reading, MB | mapped files, MB |\n|---|---|---|---|")
    for megabytes in args.megabytes:
        path = folder / f"{megabytes}.txt"
        with path.open("wb") as file:
            for i in range(-(-megabytes * 10**6 // len(lines))):
                file.write(lines[: megabytes * 10**6 - i * len(lines)])
        command = [sys.executable, __file__, "--pipeline", str(path), str(folder / "tokenizer"), str(folder / "memory")]
        command += ["--max_seq_length", str(args.max_seq_length), "--batch_size", str(args.batch_size)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        memory = json.loads(result.stdout.splitlines()[-1])
        own, mapped = (value / 1e6 for value in memory["peak"])
        print(f"| {megabytes} MB | {own:.0f} | {own - memory['before'][0] / 1e6:.0f} | {mapped:.0f} |", flush=True)
        path.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--megabytes", nargs="*", type=int, default=[10, 100], help="input sizes for the memory measurement"
    )
    parser.add_argument("--files", nargs="+", help="text to tokenize; default: the embedded corpus")
    parser.add_argument("--tokenizer_name", help="folder or Hub name; default: trained on the text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--pipeline", nargs=3, metavar=("FILE", "TOKENIZER", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pipeline:
        run_pipeline(args.pipeline[0], args.pipeline[1], args, args.pipeline[2])
        return
    disable_progress_bars()
    logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        documents = load_text_files(args.files, cache_dir=folder) if args.files else embedded_corpus()
        tokenizer = (
            load_tokenizer(args.tokenizer_name)
            if args.tokenizer_name
            else train_tokenizer(documents, args.vocab_size, model_max_length=512)
        )
        characters = sum(map(len, documents["text"][:]))
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"{args.repeats} repeats, {len(documents):,} documents, {characters:,} characters, "
            f"vocabulary {len(tokenizer)}",
            flush=True,
        )
        compare_packing(documents, tokenizer, args, Path(folder))
        time_masking(documents, tokenizer, args, Path(folder))
        if args.megabytes:
            measure_memory(documents, tokenizer, args, Path(folder))


if __name__ == "__main__":
    main()
