"""Documents: the records of a source, without broken and blank ones, for training and held out.

Sources that are read completely become a data set with one column "text", cached by ``datasets``. Streams are read in
shards, from the beginning or from the position of an earlier reading.
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
    LINE_FORMATS,
    RECORD_FEATURES,
    Piece,
    check_text,
    find_columns,
    hash_files,
    missing_column,
    read_record_tables,
    split_files,
)
from fnl_hf.data.source import Source, embedded_corpus, load_hub, stream_files, stream_hub
from fnl_hf.errors import UserInputError

logger = logging.get_logger(__name__)

RECORDS_VERSION = 2  # raise it when the same files give other records, so that older caches are not used
# The held-out documents do not depend on the training seed, so that runs with different seeds can be compared.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Documents:
    """Texts for training and held-out texts: data sets with one column "text", or a stream for training."""

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
    """The documents of a source. The held-out ones are its validation split or files, otherwise a part of the
    documents.

    Args:
        held_out_percentage: of the documents, drawn at random, where they are read whole.
        held_out_documents: of a stream: the first ones of each shard, in equal number, rounded up.
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
            split: _check_hub_split(loaded[split], source.text_column, f"{where} {split}", strict)
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
    """Documents for training, and held-out documents."""
    if not 0.0 < percentage < 100.0:
        raise UserInputError(f"--validation_split_percentage ({percentage}) must be above 0 and below 100")
    held_out = max(1, round(len(documents) * percentage / 100))
    if held_out >= len(documents):
        raise UserInputError(
            f"the corpus has {len(documents)} documents, too few to hold out {percentage}%: give a --validation_file"
        )
    chosen = np.zeros(len(documents), dtype=bool)
    chosen[np.random.default_rng(SPLIT_SEED).permutation(len(documents))[:held_out]] = True
    # In the order of the corpus, so that it is read sequentially.
    return documents.select(np.flatnonzero(~chosen)), documents.select(np.flatnonzero(chosen))


# ---- documents that are read whole ----


def load_text_files(
    files: Sequence[str],
    text_column: str = "text",
    cache_dir: str | None = None,
    strict: bool | None = False,
    num_proc: int | None = None,
) -> Dataset:
    """Text, JSON, CSV and Parquet files, compressed or not, as documents with a column "text", in order.

    A line of a text file is a document; blank records are left out. The result is cached until the contents of the
    files change.

    Args:
        strict: as in :func:`read_documents`; None leaves broken records out and does not tell of the flag.

    Raises:
        UserInputError: see :func:`read_documents`.
    """
    pieces = split_files(files, text_column)
    bounds = [(piece.format, piece.file, piece.start, piece.stop) for piece in pieces]
    fingerprint = Hasher.hash((RECORDS_VERSION, hash_files(files), bounds, text_column))
    records = cached_dataset(
        "documents", read_record_tables, pieces, {}, RECORD_FEATURES, fingerprint, cache_dir, num_proc
    )
    first_pieces = {piece.file: piece for piece in reversed(pieces)}
    starts = np.searchsorted(records.data.column("file").to_numpy(), np.arange(len(files) + 1)).tolist()
    for index, (file, start, stop) in enumerate(zip(files, starts, starts[1:])):
        rows, piece = records.data.slice(start, stop - start), first_pieces.get(index)
        unit = "line" if piece is not None and piece.format in LINE_FORMATS else "record"
        _report_faults(file, rows.column("text"), rows.column("fault"), unit, strict)
        if rows.column("text").null_count == len(rows):
            raise _no_text(file, rows.column("fault"), piece)
    valid = records.data.column("text").is_valid().to_numpy()
    documents = records.select_columns("text")
    return documents if valid.all() else documents.select(np.flatnonzero(valid))


def _report_faults(where: str, texts: pa.ChunkedArray, faults: pa.ChunkedArray, unit: str, strict: bool | None) -> None:
    """Count the broken records in one warning, or raise an error."""
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
        raise UserInputError(f"{message}: {listed}. Correct them, or leave out --strict to skip them")
    hint = "" if strict is None else ". Set --strict true to stop at broken records"
    logger.warning(f"{message} and were left out: {listed}{hint}")


def _no_text(file: str, faults: pa.ChunkedArray, piece: Piece | None) -> UserInputError:
    kinds = pc.unique(faults.drop_null()).to_pylist()
    if piece is not None and kinds == [f"no {piece.column!r}"] and piece.format in ("json", "array"):
        columns = find_columns(piece)
        if piece.column not in columns:
            return missing_column(file, piece.column, columns)
    return UserInputError(f"{file}: no text" + (f", all records are broken: {', '.join(kinds)}" if kinds else ""))


def _check_hub_split(documents: Dataset, text_column: str, where: str, strict: bool) -> Dataset:
    if text_column not in documents.column_names:
        raise missing_column(where, text_column, documents.column_names)
    documents = documents.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    dtype = getattr(documents.features["text"], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise UserInputError(
            f"{where}: column {text_column!r} contains {dtype or documents.features['text']}, not text"
        )
    texts = documents.data.column("text")
    try:
        for chunk in texts.chunks:  # Arrow's JSON reader accepts any bytes as text
            chunk.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserInputError(f"{where}: not UTF-8 text: {error}") from error
    faults = pc.if_else(texts.is_null(), f"no {text_column!r}", pa.scalar(None, pa.string()))
    _report_faults(where, texts, faults, "record", strict)
    documents = documents.filter(_has_text, batched=True)
    if len(documents) == 0:
        raise UserInputError(f"{where}: no text")
    return documents


def _has_text(batch):  # ``datasets`` finds the filtered documents in its cache by the name of this function and file
    return [text is not None and bool(text.strip()) for text in batch["text"]]


# ---- documents that are streamed ----


@dataclass(frozen=True)
class DocumentStream:
    """Documents that are read during training, in V shards.

    Attributes:
        records: with the text in ``text_column``, and in ``fault_column``, if there is one, what readers found wrong.
        shards: V, how many readers have records of their own.
        hold_out: documents at the beginning of each shard that are left out, see :meth:`read_held_out`.
        strict: refuse broken records; otherwise they are left out and counted in warnings, shard by shard.
    """

    records: IterableDataset
    shards: int
    text_column: str = "text"
    hold_out: int = 0
    strict: bool = False
    fault_column: str | None = "fault"

    @property
    def has_whole_parts(self) -> bool:
        """Whether each shard gets parts of its own although their number is not a multiple; some get one more."""
        return self.records.num_shards > self.shards and self.records.num_shards % self.shards != 0

    def read_shard(
        self, shard: int, place: dict | None = None, epoch: int = 0
    ) -> Iterator[tuple[str, dict | None, int]]:
        """A shard's documents in an endless loop, each with the position before it and the epoch.

        Args:
            place: where to begin, as an earlier reading gave it: ``datasets``' own state; None: at the beginning.
            epoch: how often the shard's documents have ended before.

        Raises:
            UserInputError: a shard without documents, or a broken record if ``strict``.
        """
        while True:
            hold_out, count, broken = self.hold_out if place is None else 0, 0, 0
            for text, fault, place_before in self._read_once(shard, place):
                if fault is not None:
                    broken += 1
                    self._report_broken(shard, broken, fault, epoch)
                if text is not None:
                    count += 1
                    if count > hold_out:
                        yield text, place_before, epoch
            if place is None and count <= hold_out:
                raise self._too_few(shard, count, broken)
            place, epoch = None, epoch + 1
            if shard == 0:
                logger.warning(f"The stream starts again: epoch {epoch}")

    def read_held_out(self) -> list[str]:
        """The first ``hold_out`` documents of each shard.

        Raises:
            UserInputError: a shard has no others.
        """
        held_out: list[str] = []
        for shard in range(self.shards):
            found, broken = [], 0
            for text, fault, _ in self._read_once(shard):
                broken += fault is not None
                if text is not None:
                    found.append(text)
                if len(found) > self.hold_out:
                    break
            else:
                raise self._too_few(shard, len(found), broken)
            held_out += found[: self.hold_out]
        return held_out

    def _read_once(self, shard: int, place: dict | None = None) -> Iterator[tuple[str | None, str | None, dict | None]]:
        """A shard's records from a position to its end: text, fault, and the position before the record."""
        if self.has_whole_parts:
            stream = self.records.shard(self.shards, shard)
        else:
            stream = split_dataset_by_node(self.records, rank=shard, world_size=self.shards)
        if place is not None:
            stream.load_state_dict(place)
        for record in _iterate_in_any_process(stream):
            fault = None if self.fault_column is None else record.get(self.fault_column)
            text = None
            if fault is None:
                text, fault = check_text(record.get(self.text_column), self.text_column)
            yield text, fault, place
            place = stream.state_dict()

    def _name(self, shard: int) -> str:
        return f"shard {shard} of {self.shards} of the stream"

    def _report_broken(self, shard: int, count: int, fault: str, epoch: int) -> None:
        message = f"{self._name(shard)}: {count} broken records, the last: {fault}"
        if self.strict:
            raise UserInputError(f"{message}. Correct them, or leave out --strict to skip them")
        if epoch == 0 and count & (count - 1) == 0:  # at 1, 2, 4, 8, ...: the end of a shard may be far away
            logger.warning(f"{message}; they are left out. Set --strict true to stop at broken records")

    def _too_few(self, shard: int, documents: int, broken: int) -> UserInputError:
        return UserInputError(
            f"{self._name(shard)} has {documents} documents and {broken} broken records, but {self.hold_out} "
            "documents are to be held out: lower --streaming_validation_documents or --streaming_shards"
        )


def _open_stream(
    source: Source, shards: int, held_out_documents: int, strict: bool, cache_dir: str | None, num_proc: int | None
) -> Documents:
    columns: tuple[str, str | None]  # names of the text column and the fault column
    if source.train_file is not None:
        records, columns = stream_files(source.train_file, source.text_column, shards), ("text", "fault")
    else:
        records, columns = stream_hub(source), (source.text_column, None)
    if records.num_shards < shards:
        logger.warning(
            f"The stream comes in {records.num_shards} part(s), fewer than its {shards} shards: each shard reads the "
            "whole stream and keeps its share. To avoid this, use plain text or JSON lines, which can be split, or "
            "lower --streaming_shards"
        )
    hold_out = 0 if source.validation_file else -(-held_out_documents // shards)
    stream = DocumentStream(records, shards, columns[0], hold_out, strict, columns[1])
    if source.validation_file:
        held_out = load_text_files(source.validation_file, source.text_column, cache_dir, strict, num_proc)
    else:
        held_out = Dataset.from_dict({"text": stream.read_held_out()})
    return Documents(source, stream, held_out)


def _iterate_in_any_process(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """All records of a stream, even in a DataLoader worker, to which ``datasets`` would give only a part."""
    if get_worker_info() is not None:
        fsspec.asyn.reset_lock()  # held by threads of the parent process, which do not exist here to release it
    iterator = iter(stream)
    with _hidden_worker():  # ``datasets`` looks for a worker when the first record is read
        first = next(iterator, None)
    if first is not None:
        yield first
        yield from iterator


@contextlib.contextmanager
def _hidden_worker() -> Iterator[None]:
    module = torch.utils.data._utils.worker
    info, module._worker_info = module._worker_info, None
    try:
        yield
    finally:
        module._worker_info = info
