"""The command ``fnl-hf``: what is done to a checkpoint once it is trained."""

import argparse
import sys
from collections.abc import Sequence

from fnl_hf.commands import export
from fnl_hf.commands.compress import Compression, factorize_checkpoint, merge_checkpoint
from fnl_hf.commands.convert import SPECTRA_FILE, convert_checkpoint, load_model, truncation_table
from fnl_hf.errors import UserInputError
from fnl_hf.layers.base import INITS, MODES
from fnl_hf.publishing.hub import push_folder
from fnl_hf.runs.command_line import join_negative_numbers
from fnl_hf.squad.features import read_squad_file
from fnl_hf.squad.inference import ask
from fnl_hf.surgery.config import DEFAULT_RANK_SCALES, TYPES, FactorizationConfig
from fnl_hf.surgery.factorize import factorization_table


def main(argv: Sequence[str] | None = None) -> None:
    """Exit status 2 and one line on stderr for bad input."""
    parser = build_parser()
    args = parser.parse_args(join_negative_numbers(sys.argv[1:] if argv is None else argv))
    try:
        args.run(args)
    except UserInputError as error:
        print(f"fnl-hf: error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fnl-hf", description="Convert, factorize, export, upload and ask models whose layers are products."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    converting = commands.add_parser("convert", help="BERT to FNL-BERT of a smaller attention, or FNL-BERT to BERT")
    converting.add_argument("source", help="a checkpoint: folder or Hub name")
    converting.add_argument("folder", help="where the converted one goes; empty or new")
    converting.add_argument("--to", choices=("fnl_bert", "bert"), default="fnl_bert", help="(%(default)s)")
    converting.add_argument(
        "--attention_embedding_size", type=int, help="E, a multiple of the number of heads; default: unchanged"
    )
    converting.add_argument(
        "--calibration_file", nargs="+", default=[], help="text whose activations weigh the truncation: whitened SVD"
    )
    converting.add_argument("--calibration_samples", type=int, default=256, help="documents of it (%(default)s)")
    converting.add_argument("--max_seq_length", type=int, default=128, help="tokens of each (%(default)s)")
    converting.set_defaults(run=run_convert)

    add_compression(commands)

    exporting = commands.add_parser("export", help="write a model as ONNX, checked against PyTorch in onnxruntime")
    exporting.add_argument("model", help="a checkpoint with its head: folder or Hub name")
    exporting.add_argument("file", help="the .onnx file to write")
    exporting.set_defaults(run=run_export)

    pushing = commands.add_parser("push", help="upload a saved model to the Hub, with the token of `hf auth login`")
    pushing.add_argument("folder", help="of the model; its checkpoints stay where they are")
    pushing.add_argument("name", help="of the repository: name or owner/name")
    pushing.add_argument("--private", action="store_true", help="make it a private one")
    pushing.set_defaults(run=run_push)

    add_ask(commands)
    return parser


def add_compression(commands) -> None:
    factorizing = commands.add_parser(
        "factorize", help="layers of a checkpoint of any architecture as products of matrices"
    )
    merging = commands.add_parser("merge", help="a checkpoint's factorized layers back to dense ones")
    for parser in (factorizing, merging):
        parser.add_argument("source", help="a checkpoint: folder or Hub name")
        parser.add_argument("folder", help="where the new one goes; empty or new")
    factorizing.add_argument(
        "--mode", choices=MODES, default=MODES[0], help="smaller, or larger until merged (%(default)s)"
    )
    sizes = factorizing.add_mutually_exclusive_group()
    scales = ", ".join(f"{mode} {scale}" for mode, scale in DEFAULT_RANK_SCALES.items())
    sizes.add_argument("--rank_scale", type=float, help=f"rank over the full rank; the default: {scales}")
    sizes.add_argument("--target_ratio", type=float, help="parameters of these layers over those of the dense ones")
    sizes.add_argument("--energy", type=float, help="share of the squared singular values that each layer keeps")
    factorizing.add_argument(
        "--init", choices=INITS, default=INITS[0], help="from the weights, or drawn anew (%(default)s)"
    )
    factorizing.add_argument(
        "--include", nargs="+", default=list(TYPES), help=f"types or patterns of names ({' '.join(TYPES)})"
    )
    factorizing.add_argument("--exclude", nargs="+", default=[], help="types or patterns of names")
    factorizing.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    factorizing.set_defaults(run=run_factorize)
    merging.set_defaults(run=run_merge)


def add_ask(commands) -> None:
    asking = commands.add_parser("ask", help="answer questions with spans of their contexts")
    asking.add_argument("model", help="a question answering model: folder or Hub name")
    asking.add_argument("question", nargs="?", help="one question")
    asking.add_argument("context", nargs="?", help="the text to answer it from")
    asking.add_argument(
        "--questions_file",
        help="instead of one: questions in SQuAD's JSON layout, answers may be missing; a line each with its id",
    )
    asking.add_argument("--max_seq_length", type=int, default=384, help="tokens in a window (%(default)s)")
    asking.add_argument("--doc_stride", type=int, default=128, help="tokens from window to window (%(default)s)")
    asking.add_argument("--batch_size", type=int, default=32, help="windows at once (%(default)s)")
    asking.add_argument("--version_2_with_negative", action="store_true", help="a question may have no answer")
    asking.add_argument(
        "--null_score_diff_threshold", type=float, default=0.0, help="none above this score difference (%(default)s)"
    )
    asking.set_defaults(run=run_ask)


def run_convert(args: argparse.Namespace) -> None:
    original, model, truncations = convert_checkpoint(
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
    before, after = original.num_parameters(), model.num_parameters()
    print(f"{type(model).__name__}: {after:,} parameters, before {before:,}; in {args.folder}")


def run_factorize(args: argparse.Namespace) -> None:
    names = ("mode", "rank_scale", "target_ratio", "energy", "init", "include", "exclude", "seed")
    try:
        config = FactorizationConfig(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        raise UserInputError(f"--{error}") from error
    result = factorize_checkpoint(args.source, args.folder, config)
    print(factorization_table(result.model))
    print_sizes(result, args.folder)


def run_merge(args: argparse.Namespace) -> None:
    print_sizes(merge_checkpoint(args.source, args.folder), args.folder)


def print_sizes(result: Compression, folder: str) -> None:
    name, parameters = type(result.model).__name__, result.model.num_parameters()
    print(f"{name}: {parameters:,} parameters, before {result.original_parameters:,}; in {folder}")


def run_export(args: argparse.Namespace) -> None:
    difference = export.export_onnx(load_model(args.model), args.file)
    print(f"{args.file}: differs from PyTorch by {difference:.1e} at most")


def run_push(args: argparse.Namespace) -> None:
    print(push_folder(args.folder, args.name, private=args.private or None))


def run_ask(args: argparse.Namespace) -> None:
    alone = args.questions_file is None
    if alone != (args.context is not None) or alone != (args.question is not None):
        raise UserInputError("ask: give a question and its context, or --questions_file")
    if alone:
        ids, questions, contexts = [None], [args.question], [args.context]
    else:
        examples = read_squad_file(args.questions_file)
        ids, questions, contexts = (examples[name][:] for name in ("id", "question", "context"))
    options = ("max_seq_length", "doc_stride", "batch_size", "version_2_with_negative", "null_score_diff_threshold")
    answers = ask(args.model, questions, contexts, **{name: getattr(args, name) for name in options})
    for name, found in zip(ids, answers, strict=True):
        answer = " ".join(found["answer"].split())  # one line, one field
        print(*([] if name is None else [name]), answer, f"{found['score']:.3f}", sep="\t")
