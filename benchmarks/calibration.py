#!/usr/bin/env python
"""Compare plain SVD, calibration, and calibration without some of its parts, on a masked language model and on ResNets.

    python run_pretrain.py configs/quickstart.yaml --seed 1 --output_dir mlm \\
        --config_overrides hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0
    python examples/image_classification/train.py --idx_dir fashion-mnist --seed 1 --max_train_samples 6000 \\
        --num_train_epochs 6 --weight_decay 5e-4 --output_dir resnet-1    # and seeds 2, 3
    python benchmarks/calibration.py --mlm mlm --idx_dir fashion-mnist --classifiers resnet-1 resnet-2 resnet-3

Prints two tables; nothing is trained after truncation. The first has the held-out loss of the language model with a
smaller encoder, on the documents of the embedded corpus that pretraining held out. The second has the accuracy on test
images of classifiers in which all convolutions except the first are smaller. "On inputs only" leaves out the moments of
the outputs; "ranks in proportion" gives each layer the rank of plain SVD. Values are means and standard deviations over
the models and over ``--seeds``, which draw the calibration data.
"""

import argparse
import copy
import platform
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from compression import at_equal_ranks, without_outputs
from transformers import AutoModelForMaskedLM

from fnl_hf import FactorizationConfig, factorize
from fnl_hf.data.corpus import read_documents
from fnl_hf.data.masking import MaskingTransform, UnmaskedTransform, mask_rows
from fnl_hf.data.rows import RowOptions, make_rows
from fnl_hf.data.source import Source
from fnl_hf.data.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parent.parent / "examples" / "image_classification"))
from data import ImageDataset, load_idx
from preparation import Preparation
from resnet import CifarResNetForImageClassification

LENGTH, MASKED = 32, 0.2  # of the quickstart


def batches_of(dataset, indices, size=64):
    return [dataset.__getitems__(list(indices[start : start + size])) for start in range(0, len(indices), size)]


def drawn(dataset, names, count, seed):
    """Batches of ``count`` samples, with only the inputs of the model."""
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return [{name: batch[name] for name in names} for batch in batches_of(dataset, chosen)]


@torch.inference_mode()
def masked_loss(model, batches):
    """Mean over the masked tokens."""
    total, count = 0.0, 0
    for batch in batches:
        masked = int((batch["labels"] != -100).sum())
        total += masked * model(**batch).loss.item()
        count += masked
    return total / count


@torch.inference_mode()
def accuracy(model, batches):
    """In percent."""
    right = [model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"] for batch in batches]
    return 100 * torch.cat(right).float().mean().item()


def variants(model, config, calibrations):
    """Name -> factorized copy of the model; ``calibrations``: name -> batches, the first one for the ablations."""
    plain = factorize(copy.deepcopy(model), config)
    yield "plain SVD", plain
    for name, calibration in calibrations.items():
        yield name, factorize(copy.deepcopy(model), config, calibration)
    calibration = next(iter(calibrations.values()))
    yield "calibrated on inputs only", without_outputs(copy.deepcopy(model), config, calibration)
    yield "calibrated, ranks in proportion", at_equal_ranks(copy.deepcopy(model), plain, calibration)


def measured(model, score, layers, calibrations, ratios):
    """{name: {ratio: score}}; ratio 1 is the model itself."""
    found = {"original": {1: score(model)}}
    for ratio in ratios:
        for name, small in variants(model, FactorizationConfig(target_ratio=ratio, **layers), calibrations):
            found.setdefault(name, {})[ratio] = score(small)
    return found


def language_models(folders, args):
    for folder in folders:
        model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), load_tokenizer(folder)
        rows = make_rows(read_documents(Source(), held_out_percentage=5.0), tokenizer, RowOptions(LENGTH, "mlm"))
        masked = mask_rows(rows, MaskingTransform(tokenizer, MASKED, args.seeds[0]))
        texts = mask_rows(rows, UnmaskedTransform(tokenizer)).train
        held_out = batches_of(masked.held_out, range(len(masked.held_out)))
        for seed in args.seeds:
            calibrations = {
                "calibrated": drawn(texts, ["input_ids"], args.samples, seed),
                "calibrated on masked text": drawn(masked.train, ["input_ids"], args.samples, seed),
            }
            score = lambda model, held_out=held_out: masked_loss(model, held_out)  # noqa: E731
            yield measured(model, score, {"include": ["encoder.*"]}, calibrations, args.ratios)


def classifiers(folders, args):
    for folder in folders:
        model = CifarResNetForImageClassification.from_pretrained(folder).eval()
        prepare = Preparation.of_model(folder, model.config)
        images = load_idx(args.idx_dir, prepare)
        train, test = (ImageDataset(images[split], prepare) for split in ("train", "test"))
        held_out = batches_of(test, range(min(args.test_samples, len(test))), 250)
        for seed in args.seeds:
            calibrations = {"calibrated": drawn(train, ["pixel_values"], args.image_samples, seed)}
            score = lambda model, held_out=held_out: accuracy(model, held_out)  # noqa: E731
            yield measured(model, score, {"include": ["Conv2d"], "exclude": ["stem"]}, calibrations, args.ratios)


def print_table(title, results, ratios, pattern):
    print(f"\n{title}\n\n| | {' | '.join(f'ratio {ratio}' for ratio in ratios)} |\n|---|{'---|' * len(ratios)}")
    for name in results[0]:
        cells = []
        for ratio in ratios if name != "original" else [1]:
            values = [result[name][ratio] for result in results]
            cells.append(f"{pattern.format(statistics.mean(values))} ± {pattern.format(statistics.pstdev(values))}")
        print(f"| {name} | {' | '.join(cells)} |" + " |" * (len(ratios) - len(cells)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--mlm", nargs="*", default=[], help="folders with trained quickstart models")
    parser.add_argument("--classifiers", nargs="*", default=[], help="folders with trained ResNets")
    parser.add_argument("--idx_dir", default=None, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25], help="target ratios")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--samples", type=int, default=1024, help=f"number of sequences of {LENGTH} tokens to calibrate on"
    )
    parser.add_argument("--image_samples", type=int, default=256, help="number of images to calibrate on")
    parser.add_argument("--test_samples", type=int, default=2000, help="number of test images")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".* layers get more parameters than before")
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
    if args.mlm:
        results = list(language_models(args.mlm, args))
        print_table("masked language model: held-out loss", results, args.ratios, "{:.3f}")
    if args.classifiers:
        results = list(classifiers(args.classifiers, args))
        print_table("ResNet: accuracy on test images, %", results, args.ratios, "{:.2f}")


if __name__ == "__main__":
    main()
