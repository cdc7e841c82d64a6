"""Sources of text: a data set on the Hub, files, or the prose in every Python installation."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError

from fnl_hf.data.readers import find_columns, generate_records, missing_column, split_files, split_for_shards
from fnl_hf.errors import UserInputError


@dataclass(frozen=True)
class Source:
    """The source of training and held-out text; the embedded corpus without a data set and files.

    Attributes:
        dataset_name, dataset_config_name: on the Hub, or a folder that ``datasets.load_dataset`` takes.
        train_file, validation_file: text, JSON, CSV and Parquet files, compressed or not.
        text_column: the column that holds the text.
        shards: parts of a stream that are read apart from each other; None: the text is read once, as a whole.

    Raises:
        UserInputError: a data set and files, validation files alone, or a stream of the embedded corpus.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_file: Sequence[str] | None = None
    validation_file: Sequence[str] | None = None
    text_column: str = "text"
    shards: int | None = None

    def __post_init__(self):
        if self.shards is not None:
            if (self.dataset_name is None) == (self.train_file is None):
                raise UserInputError("--streaming needs one of --dataset_name and --train_file")
            return
        if self.dataset_name is not None and self.train_file is not None:
            raise UserInputError(
                f"give --dataset_name ({self.dataset_name}) or --train_file ({', '.join(self.train_file)}), not both"
            )
        if self.validation_file is not None and self.train_file is None:
            raise UserInputError(f"--validation_file ({', '.join(self.validation_file)}) needs --train_file")


def load_hub(source: Source, cache_dir: str | None = None) -> DatasetDict:
    """All splits and columns of the data set that a source names.

    Raises:
        UserInputError: it cannot be loaded, or has no split "train".
    """
    name = source.dataset_name
    try:
        loaded = datasets.load_dataset(name, source.dataset_config_name, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetGenerationError) as error:  # not found, offline, no such configuration
        raise UserInputError(f"--dataset_name {name}: {_root_cause(error)}") from error
    if "train" not in loaded:
        raise UserInputError(f"--dataset_name {name} has no split 'train', only {sorted(loaded)}")
    return loaded


def stream_hub(source: Source) -> IterableDataset:
    """The records of the split "train" of the data set that a source names, as they are used.

    Raises:
        UserInputError: it cannot be opened, or has no column of that name.
    """
    name = source.dataset_name
    try:
        stream = datasets.load_dataset(name, source.dataset_config_name, split="train", streaming=True)
        columns = stream.column_names or list(next(iter(stream), {}))  # not every builder knows the columns in advance
    except (OSError, ValueError, DatasetGenerationError) as error:  # not found, offline, no such configuration or split
        raise UserInputError(f"--dataset_name {name}: {_root_cause(error)}") from error
    if source.text_column not in columns:
        raise missing_column(f"--dataset_name {name}", source.text_column, columns)
    return stream


def _root_cause(error: BaseException) -> BaseException:
    """The first error of a chain; ``datasets`` hides it behind 'An error occurred while generating the dataset'."""
    seen = error
    while isinstance(seen, DatasetGenerationError) and (seen.__cause__ or seen.__context__):
        seen = seen.__cause__ or seen.__context__
    return seen


def stream_files(files: Sequence[str], text_column: str, shards: int) -> IterableDataset:
    """The records of files as they are used, {"text": ..., "fault": ...}, in a multiple of ``shards`` parts if the
    files can be split so.

    Raises:
        UserInputError: see :func:`fnl_hf.data.readers.split_files`; no text, or JSON objects without the column.
    """
    pieces = split_files(files, text_column)
    if not pieces:
        raise UserInputError(f"{', '.join(files)}: no text")
    for piece in pieces:  # a missing column would be searched to the end of the stream
        columns = find_columns(piece) if piece.format == "json" and piece.start == 0 else []
        if columns and piece.column not in columns:
            raise missing_column(piece.path, piece.column, columns)
    return IterableDataset.from_generator(generate_records, gen_kwargs={"pieces": split_for_shards(pieces, shards)})


def embedded_corpus() -> Dataset:
    """The Python Language Reference and the docstrings of the standard library, about 2 million characters.

    Each topic of the reference, and the docstrings of each module, are one document. Every Python installation has
    them; the text differs a little between versions.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}.isdisjoint(
            path.relative_to(root).parts
        ):
            document = "\n\n".join(_docstrings(path))
            if document:
                documents.append(document)
    return Dataset.from_dict({"text": documents})


def _docstrings(path: Path) -> Iterator[str]:
    """Parsed, not imported: importing every module would even open a browser."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning about old escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # the standard library contains a few broken examples
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
