"""Documents as tokens: encoded by the tokenizer's Rust backend, in batches, and kept as rows in memory-mapped Arrow."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.arrow_cache import cached_dataset
from fnl_hf.errors import UserInputError

PACKING_VERSION = 1  # raise it when the same input gives other rows, so that what an older version cached is not used
# Documents are packed chunk by chunk, so that chunks can be shared among processes; of each less than one sequence is
# left over and dropped, about 0.03% of the tokens at length 512.
CHUNK_BYTES = 2**22
BATCH_BYTES = 2**21  # text that is tokenized at once
TEXT_BYTES = 2**16  # of a longer document, parts are tokenized


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """The smallest of the types that hold every token id."""
    return "uint16" if len(tokenizer) <= 2**16 else "int32"


@dataclass(frozen=True)
class RowKind:
    """A way to make rows of token ids from documents.

    Attributes:
        name: of its folder in the cache.
        make_tables: (chunks of documents, documents, tokenizer, max_seq_length) -> tables of rows.
        min_length, holds: the smallest ``max_seq_length``, and what such a row holds.
        columns: beside "input_ids".
    """

    name: str
    make_tables: Callable[..., Iterator[pa.Table]]
    min_length: int
    holds: str
    columns: dict[str, Value] = field(default_factory=dict)

    def validate_length(self, max_seq_length: int) -> None:
        if max_seq_length < self.min_length:
            bound = f"at least {self.min_length}: {self.holds}"
            raise UserInputError(f"--max_seq_length ({max_seq_length}) must be {bound}")


def make_rows_of(
    kind: RowKind,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """The documents' rows, made once. They do not depend on ``num_proc``.

    Raises:
        UserInputError: a length that is too small, or there is not one row.
    """
    kind.validate_length(max_seq_length)
    ids = SequenceFeature(Value(token_dtype(tokenizer)), length=max_seq_length)
    digest = xxhash.xxh3_128()
    backend, specials = tokenizer.backend_tokenizer.to_str(), tokenizer.all_special_ids
    for part in (kind.name, PACKING_VERSION, documents._fingerprint, backend, specials, max_seq_length):
        digest.update(repr(part).encode())
    with threads_for(num_proc):
        rows = cached_dataset(
            kind.name,
            kind.make_tables,
            chunk_documents(documents),
            {"documents": documents, "tokenizer": tokenizer, "max_seq_length": max_seq_length},
            Features({"input_ids": ids, **kind.columns}),
            digest.hexdigest(),
            cache_dir=cache_dir,
            num_proc=num_proc,
            rows_per_batch=2**16,
        )
    if len(rows) == 0:
        raise UserInputError(
            f"the corpus ({len(documents)} documents) is shorter than one sequence of --max_seq_length {max_seq_length}"
        )
    return rows


@contextlib.contextmanager
def threads_for(num_proc: int | None) -> Iterator[None]:
    """Within the context the tokenizer of each of several processes has one thread; that of one has all cores."""
    if (num_proc or 1) == 1:
        yield
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def stored_rows(dataset: Dataset) -> np.ndarray | None:
    """Where the rows of a dataset stand in its Arrow table; None where they stand in their own order."""
    return None if dataset._indices is None else dataset._indices.column(0).to_numpy().view(np.int64)


def chunk_documents(documents: Dataset) -> list[tuple[int, int]]:
    """Consecutive ranges of documents of about ``CHUNK_BYTES`` of text each."""
    sizes = pc.binary_length(documents.data.column("text")).to_numpy()
    rows = stored_rows(documents)
    ends = np.cumsum(sizes if rows is None else sizes[rows], dtype=np.int64)
    if len(ends) == 0:
        return []
    stops = np.searchsorted(ends, np.arange(CHUNK_BYTES, ends[-1], CHUNK_BYTES)) + 1
    stops = np.unique(np.append(stops, len(ends))).tolist()
    return list(zip([0, *stops[:-1]], stops))


def cut_text(text: memoryview, limit: int = TEXT_BYTES) -> Iterator[tuple[str, bool]]:
    """UTF-8 text in parts of at most ``limit`` bytes, each with whether it is the last.

    Cut before white space, so that the parts' tokens are those of the whole; only a word that is longer than the limit
    is cut within.
    """
    start = 0
    while len(text) - start > limit:
        window = bytes(text[start : start + limit])
        cut = max(map(window.rfind, (b" ", b"\n", b"\t", b"\r")))
        if cut <= 0:
            cut = limit
            while text[start + cut] & 0xC0 == 0x80:  # within a character
                cut -= 1
        yield str(text[start : start + cut], "utf-8"), False
        start += cut
    yield str(text[start:], "utf-8"), True


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer that takes all text for text, "[SEP]" too, and neither cuts nor pads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def batch_parts(documents: Iterable[memoryview]) -> Iterator[list[tuple[str, bool]]]:
    """The parts of UTF-8 documents, see :func:`cut_text`, about ``BATCH_BYTES`` of text at a time."""
    parts: list[tuple[str, bool]] = []
    held = 0
    for document in documents:
        for part in cut_text(document):
            parts.append(part)
            held += len(part[0])
            if held >= BATCH_BYTES:
                yield parts
                parts, held = [], 0
    if parts:
        yield parts


def encode_documents(
    backend: Tokenizer, documents: Iterable[memoryview], separator: int, dtype: str
) -> Iterator[np.ndarray]:
    """The tokens of UTF-8 documents one after the other, each followed by ``separator``, in arrays of any length.

    However long the documents are, only about ``BATCH_BYTES`` of text are held at once.
    """
    for parts in batch_parts(documents):
        yield _encode(backend, parts, separator, dtype)


def _encode(backend: Tokenizer, parts: list[tuple[str, bool]], separator: int, dtype: str) -> np.ndarray:
    tokens: list[int] = []
    for encoding, (_, last) in zip(
        backend.encode_batch_fast([text for text, _ in parts], add_special_tokens=False), parts
    ):
        tokens += encoding.ids
        if last:
            tokens.append(separator)
    return np.array(tokens, dtype=dtype)


def document_buffers(documents: Dataset, start: int, stop: int) -> Iterator[memoryview]:
    """The UTF-8 text of some documents, not copied from the Arrow table."""
    texts, rows = documents.data.column("text"), stored_rows(documents)
    for row in range(start, stop) if rows is None else rows[start:stop].tolist():
        yield memoryview(texts[row].as_buffer())


def fixed_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
