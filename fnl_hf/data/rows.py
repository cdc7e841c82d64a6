"""Rows of token ids from documents: packed sequences, one sequence per document, segment pairs or a stream.

Shapes: B chosen rows, S tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.corpus import Documents, DocumentStream
from fnl_hf.data.encoding import table_indices
from fnl_hf.data.packing import pack_documents, separate_documents
from fnl_hf.data.pairs import pair_documents
from fnl_hf.data.source import Source
from fnl_hf.data.streaming import StreamedRows, StreamOrder
from fnl_hf.data.tokenizer import warn_of_unknown_tokens
from fnl_hf.errors import UserInputError

OBJECTIVES = {"mlm": pack_documents, "mlm_nsp": pair_documents, "distill": pack_documents}
LIMITS = {"max_train_samples": "training data", "max_eval_samples": "held-out data"}
HEAD_BYTES = 2**20  # bytes of a streamed file that are read to identify it


@dataclass(frozen=True)
class RowOptions:
    """The rows to make.

    Attributes:
        max_seq_length: tokens per row.
        objective: a key of :data:`OBJECTIVES`.
        line_by_line: see :func:`separate_documents`.
        max_train_samples, max_eval_samples: the maximum number of rows.
    """

    max_seq_length: int
    objective: str = "mlm"
    line_by_line: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows, see :func:`pack_documents`, :func:`separate_documents`, :func:`pair_documents` and
    :class:`StreamedRows`.

    ``unigram_entropy``: of the held-out tokens, in nats. ``fingerprint``: of the training and evaluation data.
    """

    train: Dataset | StreamedRows
    held_out: Dataset
    unigram_entropy: float
    fingerprint: str


def make_rows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    order: StreamOrder | None = None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> Rows:
    """Tokenize documents, or load them from the cache; a stream is tokenized during training, in ``order``.

    Raises:
        UserInputError: documents that do not fill one row, a length that is too small, a state of another stream.
    """

    make_from = separate_documents if options.line_by_line else OBJECTIVES[options.objective]

    def make(documents: Dataset, limit: str) -> Dataset:
        try:
            rows = make_from(documents, tokenizer, options.max_seq_length, num_proc, cache_dir)
        except UserInputError as error:
            raise UserInputError(f"{LIMITS[limit]}: {error}") from error
        rows = first_rows(rows, limit, getattr(options, limit))
        warn_of_unknown_tokens(tokenizer, sample_rows(rows), LIMITS[limit])
        return rows

    train: Dataset | StreamedRows
    if isinstance(documents.train, Dataset):
        train = make(documents.train, "max_train_samples")
        held_out = make(documents.held_out, "max_eval_samples")
        fingerprint = data_fingerprint(train, held_out)
    elif order is None:
        raise ValueError("a stream needs an order")
    else:
        held_out = make(documents.held_out, "max_eval_samples")
        train = StreamedRows(documents.train, tokenizer, options.max_seq_length, order)
        fingerprint = _stream_fingerprint(documents.source, documents.train, held_out)
    return Rows(train, held_out, unigram_entropy(held_out, tokenizer.all_special_ids), fingerprint)


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


class Column:
    """A column of numbers, or of lists of one length, as NumPy arrays directly from the memory-mapped table.

    ``column[indices]`` is (B,) or (B, S) in the column's own dtype, three to eighteen times as fast as with the
    dataset's own formats. If it is sent to another process with its dataset, the file is mapped again there.
    """

    def __init__(self, dataset: Dataset, column: str = "input_ids"):
        self.dataset = dataset
        self.column = column
        self._map_table()

    def _map_table(self) -> None:
        chunks = [chunk for chunk in self.dataset.data.column(self.column).chunks if len(chunk)]
        self._views = [_as_numpy(chunk) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(view) for view in self._views])
        self._indices = table_indices(self.dataset)

    def __getstate__(self):
        return {"dataset": self.dataset, "column": self.column}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._map_table()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        places = np.asarray(indices) if self._indices is None else self._indices[indices]  # (B,) in the table
        chunks = np.searchsorted(self._starts, places, side="right") - 1
        values = np.empty((len(places), *self._views[0].shape[1:]), self._views[0].dtype)
        for i, (chunk, row) in enumerate(zip(chunks.tolist(), (places - self._starts[chunks]).tolist())):
            values[i] = self._views[chunk][row]
        return values

    def blocks(self, count: int = 2**12) -> Iterator[np.ndarray]:
        """All rows in order, at most ``count`` at a time."""
        if self._indices is None:
            for view in self._views:
                for start in range(0, len(view), count):
                    yield view[start : start + count]
        else:
            for start in range(0, len(self), count):
                yield self[np.arange(start, min(start + count, len(self)))]


def _as_numpy(chunk: pa.Array) -> np.ndarray:
    if not pa.types.is_nested(chunk.type):
        return chunk.to_numpy()
    return chunk.flatten().to_numpy().reshape(len(chunk), -1)  # flatten() respects the offset of a sliced table


def sample_rows(rows: Dataset, count: int = 2**12) -> np.ndarray:
    """(B, S) at most ``count`` rows of token ids, evenly spaced."""
    return Column(rows)[np.unique(np.linspace(0, len(rows) - 1, count, dtype=np.int64))]


def unigram_entropy(sequences: Dataset, special_ids: list[int]) -> float:
    """Entropy in nats of the distribution of single tokens, except special ones.

    This is the loss of a masked language model that only knows the frequencies of the held-out tokens.
    """
    counts = np.zeros(0, dtype=np.int64)
    for block in Column(sequences).blocks():
        found = np.bincount(block.ravel(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    counts[[i for i in special_ids if i < len(counts)]] = 0
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def data_fingerprint(*datasets: Dataset) -> str:
    """A checksum of the rows of some tokenized data sets, all columns, for the record of a run."""
    digest = xxhash.xxh3_128()
    for dataset in datasets:
        for column in sorted(dataset.column_names):
            digest.update(f"{column} {len(dataset)} ".encode())
            for block in Column(dataset, column).blocks():
                digest.update(block.data)
    return digest.hexdigest()


def _stream_fingerprint(source: Source, stream: DocumentStream, held_out: Dataset) -> str:
    """From the names, sizes and beginnings of files: streaming avoids reading them completely."""
    # Earlier versions divided such a stream in another way: their runs cannot go on here.
    division = ("whole parts",) if stream.has_whole_parts else ()
    name = (source.dataset_name, source.dataset_config_name, *division)
    digest = xxhash.xxh3_128(repr((name, data_fingerprint(held_out))).encode())
    for file in map(Path, source.train_file or ()):
        digest.update(repr((file.name, file.stat().st_size)).encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEAD_BYTES))
    return digest.hexdigest()
