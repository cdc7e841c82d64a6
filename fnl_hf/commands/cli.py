"""The command ``fnl-hf``: what is done to a checkpoint once it is trained."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fnl_hf.commands import export
from fnl_hf.commands.calibration import LENGTH, SAMPLES, CalibrationText
from fnl_hf.commands.compress import Compression, factorize_checkpoint, merge_checkpoint
from fnl_hf.commands.convert import SPECTRA_FILE, as_bert, convert_checkpoint, load_model, truncation_table
from fnl_hf.commands.folders import refuse_bad_file
from fnl_hf.commands.report import SUFFIXES, report_runs
from fnl_hf.errors import UserInputError
from fnl_hf.layers.base import INITS, MODES
from fnl_hf.publishing.checkpoints import reading
from fnl_hf.publishing.hub import push_folder
from fnl_hf.runs.command_line import join_negative_numbers
from fnl_hf.squad.features import read_squad_file
from fnl_hf.squad.inference import ask
from fnl_hf.surgery.config import DEFAULT_RANK_SCALES, TYPES, FactorizationConfig
from fnl_hf.surgery.factorize import factorization_table
from fnl_hf.version import __version__

DASHES = re.compile(r"(?<=^--)[a-z]+(-[a-z]+)+")  # --target-ratio for --target_ratio, as the scripts allow
# what is read or written
PLACES = ("source", "folder", "model", "file", "name", "questions_file", "calibration_file", "runs", "output")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """argparse would print the usage as well and exit."""
        command = self.prog.partition(" ")[2]
        raise UserInputError(f"{command}: {message}" if command else message)


def main(argv: Sequence[str] | None = None) -> None:
    """Exit status 2 and one line on stderr for bad input."""
    parser = build_parser()
    try:
        words = join_negative_numbers(sys.argv[1:] if argv is None else argv)
        args = parser.parse_args([DASHES.sub(lambda found: found[0].replace("-", "_"), word) for word in words])
        take_places(args)
        args.run(args)
    except UserInputError as error:
        print(f"fnl-hf: error: {error}", file=sys.stderr)
        sys.exit(2)


def take_places(args: argparse.Namespace) -> None:
    """Replace "~" by the home folder: shells do not expand it in ``--flag=~/x`` or in quotes.

    Raises:
        UserInputError: a name that is empty, or longer than a file system takes.
    """
    for name in PLACES:
        value = getattr(args, name, None)
        places = value if isinstance(value, list) else [] if value is None else [value]
        for place in places:
            if place == "":
                raise UserInputError(f"{name} is empty: give a name")
            try:
                Path(place).exists()
            except OSError as error:
                raise UserInputError(f"{name}: {place}: {error.strerror}") from error
        expanded = [os.path.expanduser(place) for place in places]
        if places:
            setattr(args, name, expanded if isinstance(value, list) else expanded[0])


def warn_of_unused(args: argparse.Namespace, flag: str, remedy: str) -> None:
    """One line for a flag that was given and has no effect."""
    if getattr(args, flag) is not None:
        print(f"fnl-hf: warning: --{flag} has no effect: it needs {remedy}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fnl-hf",
        description="Convert, factorize, export, upload and query models whose layers are products of matrices; "
        "draw their training runs.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_convert(commands)
    add_factorize(commands)
    add_merge(commands)
    add_export(commands)
    add_push(commands)
    add_ask(commands)
    add_report(commands)
    return parser


def add_command(
    commands, name: str, run: Callable[[argparse.Namespace], None], help: str, description: str, example: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=description, epilog=f"example: fnl-hf {name} {example}")
    command.set_defaults(run=run)
    return command


def add_source_and_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="checkpoint to read: folder or Hub name")
    command.add_argument("folder", help="folder for the new checkpoint; must be empty or not exist")


def add_convert(commands) -> None:
    converting = add_command(
        commands, "convert", run_convert, "convert a BERT to an FNL-BERT, or an FNL-BERT to a BERT",
        "Convert a BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT or ELECTRA to an FNL-BERT. It computes the same "
        "function if E is unchanged; a smaller E truncates the attention products by SVD. With --to bert, convert "
        "back to a stock BERT with dense layers, which computes the same function and loads without fnl_hf. Copies "
        "the tokenizer and the files of sentence-transformers, and writes a model card.",
        "google-bert/bert-base-uncased my-bert --attention_embedding_size 384 --calibration_file text.txt",
    )  # fmt: skip
    add_source_and_folder(converting)
    converting.add_argument(
        "--to",
        choices=("fnl_bert", "bert"),
        default="fnl_bert",
        help="kind of the new checkpoint (default: %(default)s)",
    )
    converting.add_argument(
        "--attention_embedding_size",
        type=int,
        help="the attention embedding size E, a multiple of the number of heads (default: unchanged)",
    )
    add_calibration(converting)


def add_calibration(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--calibration_file",
        nargs="+",
        default=[],
        help="text to calibrate the truncation on, so that a trained model loses little: txt (one document per line), "
        "or json, jsonl, csv or parquet",
    )
    command.add_argument(
        "--calibration_samples", type=int, help=f"number of documents to calibrate on (default: {SAMPLES})"
    )
    command.add_argument("--max_seq_length", type=int, help=f"maximum tokens per document (default: {LENGTH})")
    command.add_argument("--text_column_name", help="column with the text (default: text)")


def calibration_of(args: argparse.Namespace) -> CalibrationText:
    given = {"samples": "calibration_samples", "max_seq_length": "max_seq_length", "text_column": "text_column_name"}
    if not args.calibration_file:
        for flag in given.values():
            warn_of_unused(args, flag, "--calibration_file")
    values = {name: getattr(args, flag) for name, flag in given.items() if getattr(args, flag) is not None}
    return CalibrationText(args.calibration_file, **values)


def add_factorize(commands) -> None:
    factorizing = add_command(
        commands, "factorize", run_factorize, "factorize layers of a checkpoint of any architecture",
        "Replace layers of a checkpoint by products of two or three matrices, computed from its weights or drawn "
        "at random. With a calibration file, a trained model keeps most of its quality: the truncation and the "
        "ranks of the layers then minimize the change of the model's outputs. Prints what each layer lost.",
        "google-bert/bert-base-uncased my-small-bert --target_ratio 0.5 --calibration_file text.txt",
    )  # fmt: skip
    add_source_and_folder(factorizing)
    factorizing.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="low_rank makes layers smaller; wide (two factors) and deep (three) make them larger until they are "
        "merged (default: %(default)s)",
    )
    sizes = factorizing.add_mutually_exclusive_group()
    scales = ", ".join(f"{mode} {scale}" for mode, scale in DEFAULT_RANK_SCALES.items())
    sizes.add_argument("--rank_scale", type=float, help=f"rank as a share of the full rank (default: {scales})")
    sizes.add_argument(
        "--target_ratio",
        type=float,
        help="parameters of the factorized layers as a share of those of the dense layers; above 0, with low_rank at "
        "most 1",
    )
    sizes.add_argument("--model_ratio", type=float, help="parameters of the whole model as a share of the original")
    sizes.add_argument("--energy", type=float, help="share of the squared singular values that each layer keeps")
    factorizing.add_argument(
        "--init",
        choices=INITS,
        default=INITS[0],
        help="compute the factors from the dense weights, or draw them at random (default: %(default)s)",
    )
    factorizing.add_argument(
        "--include",
        nargs="+",
        default=list(TYPES),
        help="layers to factorize: types (Linear, Conv1D, Conv2d, Embedding) or shell-style patterns of names or their "
        f"ends after a dot, for example 'encoder.*' (default: {' '.join(TYPES)})",
    )
    factorizing.add_argument("--exclude", nargs="+", default=[], help="layers to leave dense: types or patterns")
    factorizing.add_argument(
        "--seed", type=int, default=0, help="seed for factors drawn at random (default: %(default)s)"
    )
    add_calibration(factorizing)


def add_merge(commands) -> None:
    merging = add_command(
        commands, "merge", run_merge, "turn the factorized layers of a checkpoint back into dense ones",
        "Multiply out the factorized layers of a checkpoint. The result computes the same function and loads "
        "without fnl_hf.",
        "my-small-bert my-dense-bert",
    )  # fmt: skip
    add_source_and_folder(merging)


def add_export(commands) -> None:
    exporting = add_command(
        commands, "export", run_export, "export a model to ONNX and check it against PyTorch with ONNX Runtime",
        "Export the forward pass of an FNL-BERT, or of a model that `fnl-hf convert` reads, to ONNX, in float32 and "
        "for any batch size and length, and compare its outputs with those of PyTorch. Needs "
        f"{export.INSTALL}.",
        "my-bert-squad my-bert-squad.onnx",
    )  # fmt: skip
    exporting.add_argument("model", help="checkpoint to export, with its head: folder or Hub name")
    exporting.add_argument("file", help=".onnx file to write; must not exist")


def add_push(commands) -> None:
    pushing = add_command(
        commands, "push", run_push, "upload a saved model to the Hub with the token of `hf auth login`",
        "Upload a saved model with its tokenizer, code, model card and report. Files that the Hub already has are "
        "not uploaded again.",
        "my-bert-squad me/my-bert-squad --private",
    )  # fmt: skip
    pushing.add_argument("folder", help="folder of the saved model; its checkpoints are not uploaded")
    pushing.add_argument("name", help="repository to upload to: name or owner/name")
    pushing.add_argument("--private", action="store_true", help="make the repository private")


def add_ask(commands) -> None:
    asking = add_command(
        commands, "ask", run_ask, "answer questions with spans of a context",
        "Answer one question, or those of a file, with a fine-tuned question answering model (see run_squad.py). "
        "Prints one line per question: its id if it comes from a file, the answer and the score, separated by tabs.",
        'my-bert-squad "Who wrote it?" "It was written by Ada Lovelace."',
    )  # fmt: skip
    asking.add_argument("model", help="question answering model: folder or Hub name")
    asking.add_argument("question", nargs="?", help="the question")
    asking.add_argument("context", nargs="?", help="text to find the answer in")
    asking.add_argument(
        "--questions_file",
        help="answer the questions of this file instead: JSON in the layout of SQuAD, answers optional",
    )
    asking.add_argument(
        "--max_seq_length", type=int, default=384, help="maximum tokens per window (default: %(default)s)"
    )
    asking.add_argument(
        "--doc_stride",
        type=int,
        default=128,
        help="tokens from the start of one window to the start of the next (default: %(default)s)",
    )
    asking.add_argument("--batch_size", type=int, default=32, help="windows per batch (default: %(default)s)")
    asking.add_argument("--version_2_with_negative", action="store_true", help="allow questions without an answer")
    asking.add_argument(
        "--null_score_diff_threshold", type=float, help="predict no answer above this score difference (default: 0.0)"
    )
    asking.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")


def add_report(commands) -> None:
    reporting = add_command(
        commands, "report", run_report, "draw several training runs in one picture",
        "Draw loss, held-out scores, throughput and the norms of the products against the steps, in one color per run. "
        "The legend names each run by the flags that differ between the runs. Unfinished runs are drawn up to their "
        "newest checkpoint. A single run gets its own report.",
        "output/frobenius output/weight --output compare.png",
    )  # fmt: skip
    reporting.add_argument("runs", nargs="+", metavar="run", help="output folder of a run, or a checkpoint")
    reporting.add_argument("--output", required=True, help=f"picture to write: {', '.join(SUFFIXES)}")
    reporting.add_argument("--overwrite", action="store_true", help="replace an earlier picture")


def run_convert(args: argparse.Namespace) -> None:
    original, model, truncations = convert_checkpoint(
        args.source,
        args.folder,
        args.to,
        args.attention_embedding_size,
        calibration_of(args),
    )
    if truncations:
        print(truncation_table(truncations))
        print(f"singular values: {args.folder}/{SPECTRA_FILE}")
    before, after = original.num_parameters(), model.num_parameters()
    print(f"{type(model).__name__}: {after:,} parameters instead of {before:,}; saved in {args.folder}")


def run_factorize(args: argparse.Namespace) -> None:
    names = ("mode", "rank_scale", "target_ratio", "model_ratio", "energy", "init", "include", "exclude", "seed")
    try:
        config = FactorizationConfig(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        raise UserInputError(f"--{error}") from error
    result = factorize_checkpoint(args.source, args.folder, config, calibration_of(args))
    print(factorization_table(result.model))
    print_sizes(result, args.folder)


def run_merge(args: argparse.Namespace) -> None:
    print_sizes(merge_checkpoint(args.source, args.folder), args.folder)


def print_sizes(result: Compression, folder: str) -> None:
    new, old = result.size, result.original
    lines = [
        f"{new.parameters:,} parameters instead of {old.parameters:,}",
        f"{new.bytes / 1e6:.1f} MB instead of {old.bytes / 1e6:.1f}",
    ]
    if new.flops is not None and old.flops is not None:
        lines.append(f"{new.flops / 1e9:.3g} GFLOP for the first calibration batch instead of {old.flops / 1e9:.3g}")
    print(f"{type(result.model).__name__}: {'; '.join(lines)}; saved in {folder}")


def run_export(args: argparse.Namespace) -> None:
    refuse_bad_file(Path(args.file), export.SUFFIX)  # before the model is loaded
    model = load_model(args.model)
    with reading(args.model):
        model = as_bert(model)
    difference = export.export_onnx(model, args.file)
    print(f"{args.file}: differs from PyTorch by at most {difference:.1e}")


def run_push(args: argparse.Namespace) -> None:
    print(push_folder(args.folder, args.name, private=args.private or None))


def run_ask(args: argparse.Namespace) -> None:
    alone = args.questions_file is None
    if alone != (args.context is not None) or alone != (args.question is not None):
        raise UserInputError("ask: give a question and a context, or --questions_file")
    if alone:
        ids, questions, contexts = [None], [args.question], [args.context]
    else:
        examples = read_squad_file(args.questions_file)
        ids, questions, contexts = (examples[name][:] for name in ("id", "question", "context"))
    if not args.version_2_with_negative:
        warn_of_unused(args, "null_score_diff_threshold", "--version_2_with_negative")
    options = (
        "max_seq_length", "doc_stride", "batch_size", "version_2_with_negative", "null_score_diff_threshold",
        "trust_remote_code",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    answers = ask(args.model, questions, contexts, **given)
    for name, found in zip(ids, answers, strict=True):
        answer = " ".join(found["answer"].split())  # one line, one field
        print(*([] if name is None else [name]), answer, f"{found['score']:.3f}", sep="\t")


def run_report(args: argparse.Namespace) -> None:
    runs = report_runs(args.runs, Path(args.output), args.overwrite)
    for name, run in runs.items():
        losses = {"training loss": run.last("loss"), "held-out loss": run.last("eval_loss")}
        figures = "".join(f", {label} {loss:.4g}" for label, loss in losses.items() if loss is not None)
        print(f"{name}: {run.steps:,} steps{figures}; in {run.folder}")
    print(args.output)
