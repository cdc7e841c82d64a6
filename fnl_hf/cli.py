"""The command ``fnl-hf``: what is done to a checkpoint once it is trained."""

import argparse
import sys
from collections.abc import Sequence

from fnl_hf import export
from fnl_hf.convert import SPECTRA_FILE, convert, load_model, truncation_table
from fnl_hf.errors import UserInputError
from fnl_hf.inference import ask
from fnl_hf.training.hub import push_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Exit status 2 and one line on stderr for bad input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserInputError as error:
        print(f"fnl-hf: error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fnl-hf", description="Convert and use BERTs with factorized attention.")
    commands = parser.add_subparsers(required=True, metavar="command")

    converting = commands.add_parser("convert", help="BERT to FNL-BERT of a smaller attention, or FNL-BERT to BERT")
    converting.add_argument("source", help="a checkpoint: folder or Hub name")
    converting.add_argument("folder", help="where the converted one goes; empty or new")
    converting.add_argument("--to", choices=("fnl_bert", "bert"), default="fnl_bert")
    converting.add_argument(
        "--attention_embedding_size", type=int, help="E, a multiple of the number of heads; default: unchanged"
    )
    converting.add_argument(
        "--calibration_file", nargs="+", default=[], help="text whose activations weigh the truncation: whitened SVD"
    )
    converting.add_argument("--calibration_samples", type=int, default=256, help="documents of it (%(default)s)")
    converting.add_argument("--max_seq_length", type=int, default=128, help="tokens of each (%(default)s)")
    converting.set_defaults(run=run_convert)

    exporting = commands.add_parser("export", help="write a model as ONNX, checked against PyTorch in onnxruntime")
    exporting.add_argument("model", help="a checkpoint with its head: folder or Hub name")
    exporting.add_argument("file", help="the .onnx file to write")
    exporting.set_defaults(run=run_export)

    pushing = commands.add_parser("push", help="upload a saved model to the Hub, with the token of `hf auth login`")
    pushing.add_argument("folder", help="of the model; its checkpoints stay where they are")
    pushing.add_argument("name", help="of the repository: name or owner/name")
    pushing.add_argument("--private", action="store_true", help="make it a private one")
    pushing.set_defaults(run=run_push)

    asking = commands.add_parser("ask", help="answer a question with a span of a context")
    asking.add_argument("model", help="a question answering model: folder or Hub name")
    asking.add_argument("question")
    asking.add_argument("context")
    asking.set_defaults(run=run_ask)
    return parser


def run_convert(args: argparse.Namespace) -> None:
    before, model, truncations = convert(
        args.source,
        args.folder,
        args.to,
        args.attention_embedding_size,
        args.calibration_file,
        args.calibration_samples,
        args.max_seq_length,
    )
    if truncations:
        print(truncation_table(truncations))
        print(f"spectra: {args.folder}/{SPECTRA_FILE}")
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, before {before:,}; in {args.folder}")


def run_export(args: argparse.Namespace) -> None:
    difference = export.export_onnx(load_model(args.model), args.file)
    print(f"{args.file}: differs from PyTorch by {difference:.1e} at most")


def run_push(args: argparse.Namespace) -> None:
    print(push_folder(args.folder, args.name, private=args.private or None))


def run_ask(args: argparse.Namespace) -> None:
    found = ask(args.model, args.question, args.context)
    print(f"{found['answer']}\t{found['score']:.3f}")
