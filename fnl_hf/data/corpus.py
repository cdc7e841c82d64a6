"""Text corpora: from the Hub, from files, or the prose that every Python installation carries."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError

from fnl_hf.errors import UserInputError

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst", ".lz4")
# The held-out documents do not depend on the training seed, so that runs with different seeds can be compared.
SPLIT_SEED = 0


def load_corpus(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    validation_split_percentage: float = 5.0,
    text_column_name: str = "text",
    cache_dir: str | None = None,
) -> DatasetDict:
    """Documents as a ``DatasetDict`` with splits "train" and "validation" and one string column "text".

    Without a dataset name and a file: the embedded corpus. Without a validation split or file,
    ``validation_split_percentage`` of the documents, drawn at random, are held out.

    Raises:
        UserInputError: a missing, empty or unreadable file, a record without text, too few documents to split.
    """
    if dataset_name is not None and train_file is not None:
        raise UserInputError(f"give --dataset_name ({dataset_name}) or --train_file ({train_file}), not both")
    if validation_file is not None and train_file is None:
        raise UserInputError(f"--validation_file ({validation_file}) needs --train_file")
    if dataset_name is not None:
        splits = _load_hub(dataset_name, dataset_config_name, text_column_name, cache_dir)
    elif train_file is not None:
        files = {"train": train_file, "validation": validation_file}
        splits = {
            split: load_text_file(file, text_column_name, cache_dir)
            for split, file in files.items()
            if file is not None
        }
    else:
        splits = {"train": embedded_corpus()}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(splits["train"], validation_split_percentage)
    return DatasetDict(splits)


def first_rows(dataset: Dataset, flag: str, count: int | None) -> Dataset:
    """The first ``count`` rows; all of them for None.

    Raises:
        UserInputError: ``count`` below 1; names ``flag``.
    """
    if count is None:
        return dataset
    if count < 1:
        raise UserInputError(f"--{flag} ({count}) must be at least 1")
    return dataset.select(range(min(count, len(dataset))))


def _hold_out(documents: Dataset, percentage: float) -> tuple[Dataset, Dataset]:
    if not 0.0 < percentage < 100.0:
        raise UserInputError(f"--validation_split_percentage ({percentage}) must be above 0 and below 100")
    held_out = max(1, round(len(documents) * percentage / 100))
    if held_out >= len(documents):
        raise UserInputError(
            f"the corpus has {len(documents)} documents, too few to hold out {percentage}%: give a --validation_file"
        )
    split = documents.train_test_split(test_size=held_out, seed=SPLIT_SEED)
    return split["train"], split["test"]


def _load_hub(name: str, config: str | None, text_column: str, cache_dir: str | None) -> dict[str, Dataset]:
    try:
        loaded = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetGenerationError) as error:  # not found, offline, no such configuration
        raise UserInputError(f"--dataset_name {name}: {_root_cause(error)}") from error
    if "train" not in loaded:
        raise UserInputError(f"--dataset_name {name} has no split 'train', only {sorted(loaded)}")
    return {
        split: _text_only(loaded[split], text_column, f"--dataset_name {name}, split {split}")
        for split in ("train", "validation")
        if split in loaded
    }


def load_text_file(file: str, text_column: str = "text", cache_dir: str | None = None) -> Dataset:
    """One text, JSON, CSV or Parquet file, compressed or not, as documents with a column "text".

    A line of a text file is a document; empty ones are dropped.
    """
    path = Path(file)
    builder = builder_of(path)
    if not path.is_file():
        raise UserInputError(f"{file}: no such file")
    if path.stat().st_size == 0:
        raise UserInputError(f"{file}: the file is empty")
    try:
        documents = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=cache_dir)
    except (OSError, ValueError, DatasetGenerationError, EOFError) as error:  # Arrow's and the codecs' errors are these
        cause = _root_cause(error)
        if isinstance(cause, UnicodeDecodeError):
            raise UserInputError(f"{file}: not UTF-8 text: {cause}") from error
        raise UserInputError(f"{file}: cannot be read as {builder}: {cause}") from error
    return _text_only(documents, text_column, file, empty_is_none=builder == "csv")


def builder_of(path: Path) -> str:
    """The ``datasets`` builder for a file name, compression suffix aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in BUILDERS:
        raise UserInputError(
            f"{path}: unknown file type, must be one of {', '.join(BUILDERS)}, "
            f"plain or compressed ({', '.join(COMPRESSIONS)})"
        )
    return BUILDERS[suffixes[-1]]


def _root_cause(error: BaseException) -> BaseException:
    """The first error of a chain; ``datasets`` hides it behind 'An error occurred while generating the dataset'."""
    seen = error
    while isinstance(seen, DatasetGenerationError) and (seen.__cause__ or seen.__context__):
        seen = seen.__cause__ or seen.__context__
    return seen


def _text_only(documents: Dataset, text_column: str, where: str, empty_is_none: bool = False) -> Dataset:
    if text_column not in documents.column_names:
        raise UserInputError(
            f"{where}: no column {text_column!r}, only {documents.column_names}: set --text_column_name"
        )
    documents = documents.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    dtype = getattr(documents.features["text"], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise UserInputError(f"{where}: column {text_column!r} holds {dtype or documents.features['text']}, not text")
    missing = np.flatnonzero(documents.data.column("text").is_null().to_numpy())
    if len(missing) and not empty_is_none:
        raise UserInputError(
            f"{where}: {len(missing)} of {len(documents)} records have no {text_column!r}, "
            f"first record {missing[0] + 1}"
        )
    try:
        for chunk in documents.data.column("text").chunks:  # Arrow's JSON reader takes any bytes for text
            chunk.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserInputError(f"{where}: not UTF-8 text: {error}") from error
    documents = documents.filter(_has_text, batched=True)
    if len(documents) == 0:
        raise UserInputError(f"{where}: no text")
    return documents


def _has_text(batch):
    return [text is not None and bool(text.strip()) for text in batch["text"]]


def embedded_corpus() -> Dataset:
    """The Python Language Reference and the docstrings of the standard library, about 2 million characters.

    A topic of the reference or the docstrings of one module are one document. Every Python installation has them;
    their text differs a little between versions.
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
    """Parsed, not imported: importing every module would open a browser, and worse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning about old escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # the standard library ships a few broken examples
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
