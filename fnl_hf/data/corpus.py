"""Text corpora: from the Hub, from files, or the prose that every Python installation carries."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers.utils import logging

from fnl_hf.data.arrow_cache import cached_dataset
from fnl_hf.data.readers import (
    LINES,
    RECORD_FEATURES,
    Piece,
    cut_files,
    cut_for_shards,
    found_columns,
    hash_files,
    no_column,
    read_documents,
    read_tables,
)
from fnl_hf.errors import UserInputError

logger = logging.get_logger(__name__)

RECORDS_VERSION = 1  # raise it when the same files give other records, so that what an older version cached is not used
# The held-out documents do not depend on the training seed, so that runs with different seeds can be compared.
SPLIT_SEED = 0


def load_corpus(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: Sequence[str] | None = None,
    validation_file: Sequence[str] | None = None,
    validation_split_percentage: float = 5.0,
    text_column_name: str = "text",
    cache_dir: str | None = None,
    strict: bool = False,
    num_proc: int | None = None,
) -> DatasetDict:
    """Documents as a ``DatasetDict`` with splits "train" and "validation" and one string column "text".

    Without a dataset name and files: the embedded corpus. Without a validation split or files,
    ``validation_split_percentage`` of the documents, drawn at random, are held out.

    Args:
        strict: refuse broken records; otherwise they are left out and counted in a warning.
        num_proc: processes that read files; the documents do not depend on it.

    Raises:
        UserInputError: a missing, empty or unreadable file, no text, too few documents to split.
    """
    if dataset_name is not None and train_file is not None:
        raise UserInputError(
            f"give --dataset_name ({dataset_name}) or --train_file ({', '.join(train_file)}), not both"
        )
    if validation_file is not None and train_file is None:
        raise UserInputError(f"--validation_file ({', '.join(validation_file)}) needs --train_file")
    if dataset_name is not None:
        splits = _load_hub(dataset_name, dataset_config_name, text_column_name, cache_dir, strict)
    elif train_file is not None:
        files = {"train": train_file, "validation": validation_file}
        splits = {
            split: load_text_files(names, text_column_name, cache_dir, strict, num_proc)
            for split, names in files.items()
            if names is not None
        }
    else:
        splits = {"train": embedded_corpus()}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(splits["train"], validation_split_percentage)
    return DatasetDict(splits)


def stream_corpus(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    files: Sequence[str] | None = None,
    text_column_name: str = "text",
    shards: int = 1,
) -> tuple[IterableDataset, str]:
    """A corpus that is read as it is used, from the Hub or from files, and the name of its column of text.

    Files are cut so that each of ``shards`` readers has its own parts of them; where that cannot be, each reads all and
    keeps its share, and a warning says so.

    Raises:
        UserInputError: no source, one that cannot be opened, or one without the column.
    """
    if (dataset_name is None) == (files is None):
        raise UserInputError("--streaming needs one of --dataset_name and --train_file")
    if files is not None:
        pieces = cut_files(files, text_column_name)
        if not pieces:
            raise UserInputError(f"{', '.join(files)}: no text")
        for piece in pieces:  # a column that is nowhere would be looked for to the stream's end
            columns = found_columns(piece) if piece.format == "json" and piece.start == 0 else []
            if columns and piece.column not in columns:
                raise no_column(piece.path, piece.column, columns)
        cut = cut_for_shards(pieces, shards)
        _warn_of_whole_reads(len(cut), shards)
        return IterableDataset.from_generator(read_documents, gen_kwargs={"pieces": cut}), "text"
    try:
        stream = datasets.load_dataset(dataset_name, dataset_config_name, split="train", streaming=True)
        columns = stream.column_names or list(next(iter(stream), {}))  # not every builder knows them beforehand
    except (OSError, ValueError, DatasetGenerationError) as error:  # not found, offline, no such configuration or split
        raise UserInputError(f"--dataset_name {dataset_name}: {_root_cause(error)}") from error
    if text_column_name not in columns:
        raise no_column(f"--dataset_name {dataset_name}", text_column_name, columns)
    _warn_of_whole_reads(stream.num_shards, shards)
    return stream, text_column_name


def _warn_of_whole_reads(parts: int, shards: int) -> None:
    if parts % shards:
        logger.warning(
            f"The stream comes in {parts} parts, no multiple of its {shards} shards: each shard reads all of it and "
            "keeps its share. Plain text or JSON lines, which can be cut, or another number of --streaming_shards helps"
        )


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
    chosen = np.zeros(len(documents), dtype=bool)
    chosen[np.random.default_rng(SPLIT_SEED).permutation(len(documents))[:held_out]] = True
    # In the order of the corpus, so that it is read from end to end.
    return documents.select(np.flatnonzero(~chosen)), documents.select(np.flatnonzero(chosen))


def load_text_files(
    files: Sequence[str],
    text_column: str = "text",
    cache_dir: str | None = None,
    strict: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Text, JSON, CSV and Parquet files, compressed or not, as documents with a column "text", in order.

    A line of a text file is a document; blank records are dropped. What has been read once is read from the cache as
    long as the contents of the files are the same.

    Raises:
        UserInputError: see :func:`load_corpus`.
    """
    pieces = cut_files(files, text_column)
    where_cut = [(piece.format, piece.file, piece.start, piece.stop) for piece in pieces]
    fingerprint = Hasher.hash((RECORDS_VERSION, hash_files(files), where_cut, text_column))
    records = cached_dataset(
        "documents", read_tables, pieces, {}, RECORD_FEATURES, fingerprint, cache_dir=cache_dir, num_proc=num_proc
    )
    owners = records.data.column("file").to_numpy()
    for index, file in enumerate(files):
        rows = records.data.slice(*_span(owners, index))
        _report_faults(file, rows.column("text"), rows.column("fault"), _unit(pieces, index), strict)
        if rows.column("text").null_count == len(rows):
            raise _no_text(file, rows.column("fault"), [piece for piece in pieces if piece.file == index])
    return _with_text(records.select_columns("text"))


def _span(owners: np.ndarray, index: int) -> tuple[int, int]:
    start, stop = np.searchsorted(owners, [index, index + 1])
    return int(start), int(stop - start)


def _unit(pieces: list[Piece], index: int) -> str:
    return "line" if next((p.format in LINES for p in pieces if p.file == index), False) else "record"


def _with_text(documents: Dataset) -> Dataset:
    valid = documents.data.column("text").is_valid().to_numpy()
    return documents if valid.all() else documents.select(np.flatnonzero(valid))


def _report_faults(where: str, texts: pa.ChunkedArray, faults: pa.ChunkedArray, unit: str, strict: bool) -> None:
    """Count the broken records in one warning, or refuse them."""
    broken = len(faults) - faults.null_count
    if broken == 0:
        return
    counts = {found["values"]: found["counts"] for found in pc.value_counts(faults.drop_null()).to_pylist()}
    listed = ", ".join(
        f"{counts[kind]} {kind} (first: {unit} {pc.index(faults, kind).as_py() + 1})"
        for kind in sorted(counts, key=lambda kind: -counts[kind])
    )
    message = f"{where}: {broken} of {broken + len(texts) - texts.null_count} {unit}s are broken"
    if strict:
        raise UserInputError(f"{message}: {listed}; --strict refuses them")
    logger.warning(f"{message} and left out: {listed}; --strict refuses them")


def _no_text(file: str, faults: pa.ChunkedArray, pieces: list[Piece]) -> UserInputError:
    kinds = pc.unique(faults.drop_null()).to_pylist()
    if pieces and kinds == [f"no {pieces[0].column!r}"] and pieces[0].format in ("json", "array"):
        columns = found_columns(pieces[0])
        if pieces[0].column not in columns:
            return no_column(file, pieces[0].column, columns)
    return UserInputError(f"{file}: no text" + (f", all records are broken: {', '.join(kinds)}" if kinds else ""))


def _load_hub(name: str, config: str | None, column: str, cache_dir: str | None, strict: bool) -> dict[str, Dataset]:
    try:
        loaded = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetGenerationError) as error:  # not found, offline, no such configuration
        raise UserInputError(f"--dataset_name {name}: {_root_cause(error)}") from error
    if "train" not in loaded:
        raise UserInputError(f"--dataset_name {name} has no split 'train', only {sorted(loaded)}")
    return {
        split: _text_only(loaded[split], column, f"--dataset_name {name}, split {split}", strict)
        for split in ("train", "validation")
        if split in loaded
    }


def _root_cause(error: BaseException) -> BaseException:
    """The first error of a chain; ``datasets`` hides it behind 'An error occurred while generating the dataset'."""
    seen = error
    while isinstance(seen, DatasetGenerationError) and (seen.__cause__ or seen.__context__):
        seen = seen.__cause__ or seen.__context__
    return seen


def _text_only(documents: Dataset, text_column: str, where: str, strict: bool) -> Dataset:
    if text_column not in documents.column_names:
        raise no_column(where, text_column, documents.column_names)
    documents = documents.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    dtype = getattr(documents.features["text"], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise UserInputError(f"{where}: column {text_column!r} holds {dtype or documents.features['text']}, not text")
    texts = documents.data.column("text")
    try:
        for chunk in texts.chunks:  # Arrow's JSON reader takes any bytes for text
            chunk.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserInputError(f"{where}: not UTF-8 text: {error}") from error
    fault = pa.array([f"no {text_column!r}"])
    faults = fault.take(pa.array(np.zeros(len(texts), dtype=np.int8), mask=texts.is_valid().to_numpy()))
    _report_faults(where, texts, pa.chunked_array([faults]), "record", strict)
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
