"""Documents: the records of a source without the broken and blank ones, to train on and to hold out.

What is read whole becomes a data set with one column "text", kept by ``datasets``. A stream is read in shards, each
from its beginning or from where an earlier reading stood.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from datasets.fingerprint import Hasher
from torch.utils.data import get_worker_info
from transformers.utils import logging

from fnl_hf.data.arrow_cache import cached_dataset
from fnl_hf.data.readers import (
    LINES,
    RECORD_FEATURES,
    Piece,
    check_text,
    cut_files,
    found_columns,
    hash_files,
    no_column,
    read_tables,
)
from fnl_hf.data.source import Source, embedded_corpus, load_hub, stream_files, stream_hub
from fnl_hf.errors import UserInputError

logger = logging.get_logger(__name__)

RECORDS_VERSION = 1  # raise it when the same files give other records, so that what an older version cached is not used
# The held-out documents do not depend on the training seed, so that runs with different seeds can be compared.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Documents:
    """Texts to train on and to hold out: data sets with one column "text", or a stream to train on."""

    source: Source
    train: "Dataset | DocumentStream"
    held_out: Dataset


def read_documents(
    source: Source,
    held_out_percentage: float = 5.0,
    held_out_documents: int = 1000,
    strict: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> Documents:
    """The documents of a source. Held out are those of its validation split or files; without, some of the others.

    Args:
        held_out_percentage: of the documents, drawn at random, where they are read whole.
        held_out_documents: the first ones of a stream, as many of each shard.
        strict: refuse broken records; otherwise they are left out and counted in a warning.
        num_proc: processes that read files; the documents do not depend on it.

    Raises:
        UserInputError: a missing, empty or unreadable file, no text, too few documents to split.
    """
    if source.shards is not None:
        return _open_stream(source, source.shards, held_out_documents, strict, cache_dir, num_proc)
    if source.dataset_name is not None:
        loaded = load_hub(source, cache_dir)
        where = f"--dataset_name {source.dataset_name}, split"
        splits = {
            split: _text_only(loaded[split], source.text_column, f"{where} {split}", strict)
            for split in ("train", "validation")
            if split in loaded
        }
    elif source.train_file is not None:
        files = {"train": source.train_file, "validation": source.validation_file}
        splits = {
            split: load_text_files(names, source.text_column, cache_dir, strict, num_proc)
            for split, names in files.items()
            if names is not None
        }
    else:
        splits = {"train": embedded_corpus()}
    if "validation" in splits:
        return Documents(source, splits["train"], splits["validation"])
    return Documents(source, *_hold_out(splits["train"], held_out_percentage))


def _hold_out(documents: Dataset, percentage: float) -> tuple[Dataset, Dataset]:
    """The others, and the held-out documents."""
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


# ---- read whole ----


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
        UserInputError: see :func:`read_documents`.
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


# ---- streams ----


@dataclass(frozen=True)
class DocumentStream:
    """Documents that are read as they are used.

    Attributes:
        records: with the text in ``text_column`` and, where readers have found one, a "fault".
        shards: how many readers have records of their own.
        hold_out: documents at the beginning of each shard that are left out, see :meth:`held_out_documents`.
        strict: refuse broken records; otherwise they are left out and counted in warnings, shard by shard.
    """

    records: IterableDataset
    shards: int
    text_column: str = "text"
    hold_out: int = 0
    strict: bool = False

    def read_shard(
        self, shard: int, place: dict | None = None, epoch: int = 0
    ) -> Iterator[tuple[str, dict | None, int]]:
        """A shard's documents over and over, each with the place before it and the epoch.

        Args:
            place: where to begin, as an earlier reading gave it: ``datasets``' own state; None: at the beginning.
            epoch: how often the shard's documents have ended before.

        Raises:
            UserInputError: a shard without documents, or a broken record if ``strict``.
        """
        where = _named(shard, self.shards)
        while True:
            stream = self._shard(shard)
            left_out, count, broken = self.hold_out if place is None else 0, 0, 0
            if place is not None:
                stream.load_state_dict(place)
            before = place
            for record in _all_records(stream):
                text, fault = _text_of(record, self.text_column)
                if fault is not None:
                    broken += 1
                    self._report(f"{where}: {broken} broken records, the last: {fault}", broken, epoch)
                if text is not None:
                    count += 1
                    if count > left_out:
                        yield text, before, epoch
                before = stream.state_dict()
            if place is None and count <= left_out:
                raise _too_few(where, count, broken, left_out)
            place, epoch = None, epoch + 1
            if shard == 0:
                logger.warning(f"The stream begins again: epoch {epoch}")

    def _shard(self, shard: int) -> IterableDataset:
        return split_dataset_by_node(self.records, rank=shard, world_size=self.shards)

    def _report(self, message: str, broken: int, epoch: int) -> None:
        if self.strict:
            raise UserInputError(f"{message}; --strict refuses them")
        if epoch == 0 and broken & (broken - 1) == 0:  # at 1, 2, 4, 8: a shard may be too long to wait for its end
            logger.warning(f"{message}; they are left out, --strict refuses them")

    def held_out_documents(self) -> list[str]:
        """The documents that are left out.

        Raises:
            UserInputError: a shard has no others.
        """
        held: list[str] = []
        for shard in range(self.shards):
            found, broken = [], 0
            for record in _all_records(self._shard(shard)):
                text, fault = _text_of(record, self.text_column)
                broken += fault is not None
                if text is not None:
                    found.append(text)
                if len(found) > self.hold_out:
                    break
            else:
                raise _too_few(_named(shard, self.shards), len(found), broken, self.hold_out)
            held += found[: self.hold_out]
        return held


def _open_stream(
    source: Source, shards: int, held_out: int, strict: bool, cache_dir: str | None, num_proc: int | None
) -> Documents:
    if source.train_file is not None:
        # Readers have found the faults, and named the column "text".
        column, records = "text", stream_files(source.train_file, source.text_column, shards)
    else:
        column, records = source.text_column, stream_hub(source)
    _warn_of_whole_reads(records.num_shards, shards)
    hold_out = 0 if source.validation_file else -(-held_out // shards)
    stream = DocumentStream(records, shards, column, hold_out, strict)
    if source.validation_file:
        documents = load_text_files(source.validation_file, source.text_column, cache_dir, strict, num_proc)
    else:
        documents = Dataset.from_dict({"text": stream.held_out_documents()})
    return Documents(source, stream, documents)


def _warn_of_whole_reads(parts: int, shards: int) -> None:
    if parts % shards:
        logger.warning(
            f"The stream comes in {parts} parts, no multiple of its {shards} shards: each shard reads all of it and "
            "keeps its share. Plain text or JSON lines, which can be cut, or another number of --streaming_shards helps"
        )


def _named(shard: int, shards: int) -> str:
    return f"shard {shard} of {shards} of the stream"


def _too_few(where: str, documents: int, broken: int, held_out: int) -> UserInputError:
    return UserInputError(
        f"{where} has {documents} documents and {broken} broken records, and {held_out} documents are to be held out: "
        "lower --streaming_validation_documents or --streaming_shards"
    )


def _all_records(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """All records of a stream, also in a worker of a DataLoader, where ``datasets`` would give a part of them."""
    if get_worker_info() is not None:
        fsspec.asyn.reset_lock()  # held by threads of the parent process, which are not here to release it
    iterator = iter(stream)
    with _no_worker():  # ``datasets`` asks when the first record is fetched
        first = next(iterator, None)
    if first is not None:
        yield first
        yield from iterator


@contextlib.contextmanager
def _no_worker() -> Iterator[None]:
    module = torch.utils.data._utils.worker
    info, module._worker_info = module._worker_info, None
    try:
        yield
    finally:
        module._worker_info = info


def _text_of(record: dict[str, Any], column: str) -> tuple[str | None, str | None]:
    fault = record.get("fault")
    return (None, fault) if fault is not None else check_text(record.get(column), column)
