"""Documents as tokens, and rows of tokens that are built once and cached as memory-mapped Arrow files.

Processes share the work in *chunks*, ranges of documents. Text goes to the tokenizer in *batches* of *parts*; a long
document has several parts. Tokens do not depend on these bounds. Of packed rows, the last tokens of each
chunk, less than one row, are left out.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.arrow_cache import cached_dataset
from fnl_hf.data.tokenizer import name_of, vocabulary_size
from fnl_hf.errors import UserInputError

PACKING_VERSION = 3  # raise it when the same input gives other rows, so that older caches are not used
CHUNK_BYTES = 2**22  # at length 512, about 0.03% of the tokens are left out
BATCH_BYTES = 2**21
PART_BYTES = 2**16
# Where to split text, best place first. Byte-level vocabularies have tokens of several spaces, and some add a space to
# text that does not start with one (``add_prefix_space``).
CUTS = [re.compile(pattern) for pattern in (rb"(?<=[^ \n\t\r]) ", rb"(?<=[^ \n\t\r])[\n\t\r]", rb"[ \n\t\r]")]

Part = tuple[str, bool]  # text, whether its document ends there


# ---- rows, made once ----


@dataclass(frozen=True)
class RowKind:
    """A way to build rows of token ids from documents.

    Attributes:
        name: of its folder in the cache.
        make_tables: (chunks, documents, tokenizer, max_seq_length) -> tables of rows.
        min_length, content: the smallest ``max_seq_length``, and what a row of it holds.
        columns: beside "input_ids".
    """

    name: str
    make_tables: Callable[..., Iterator[pa.Table]]
    min_length: int
    content: str
    columns: dict[str, Value] = field(default_factory=dict)

    def validate_length(self, max_seq_length: int) -> None:
        if max_seq_length < self.min_length:
            bound = f"at least {self.min_length}: {self.content}"
            raise UserInputError(f"--max_seq_length ({max_seq_length}) must be {bound}")


def tokenize_documents(
    kind: RowKind,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """The rows of some documents, from the cache if it has them.

    Args:
        documents: a dataset with a column "text".
        num_proc: processes, one thread each; with one, the tokenizer uses all cores. The rows do not depend on it.

    Returns:
        a dataset with the columns "input_ids", lists of ``max_seq_length`` ids, and ``kind.columns``.

    Raises:
        UserInputError: a length that is too small, a tokenizer that cannot pad rows of several lengths, or there is not
            one row.
    """
    kind.validate_length(max_seq_length)
    if "length" in kind.columns and tokenizer.pad_token_id is None:
        raise UserInputError(f"the tokenizer of {name_of(tokenizer)} has no pad_token")
    ids = SequenceFeature(Value(token_dtype(tokenizer)), length=max_seq_length)
    digest = xxhash.xxh3_128()
    backend, specials = tokenizer.backend_tokenizer.to_str(), tokenizer.all_special_ids
    for value in (kind.name, PACKING_VERSION, documents._fingerprint, backend, specials, max_seq_length):
        digest.update(repr(value).encode())
    with threads_for(num_proc):
        rows = cached_dataset(
            kind.name,
            kind.make_tables,
            split_into_chunks(documents),
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
    """Within the context, the tokenizer has one thread in each of several processes, or all cores in a single
    process."""
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


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """The smallest integer type that fits every token id."""
    return "uint16" if vocabulary_size(tokenizer) <= 2**16 else "int32"


def to_fixed_size_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


# ---- text in chunks, batches and parts ----


def table_indices(dataset: Dataset) -> np.ndarray | None:
    """Positions of the rows of a dataset in its Arrow table; None if they are in order."""
    return None if dataset._indices is None else dataset._indices.column(0).to_numpy().view(np.int64)


def split_into_chunks(documents: Dataset) -> list[tuple[int, int]]:
    """Consecutive ranges of documents of about ``CHUNK_BYTES`` of text each."""
    sizes = pc.binary_length(documents.data.column("text")).to_numpy()
    indices = table_indices(documents)
    bytes_so_far = np.cumsum(sizes if indices is None else sizes[indices], dtype=np.int64)
    if len(bytes_so_far) == 0:
        return []
    stops = np.searchsorted(bytes_so_far, np.arange(CHUNK_BYTES, bytes_so_far[-1], CHUNK_BYTES)) + 1
    stops = np.unique(np.append(stops, len(bytes_so_far))).tolist()
    return list(zip([0, *stops[:-1]], stops))


def read_chunk(documents: Dataset, start: int, stop: int) -> Iterator[memoryview]:
    """The UTF-8 text of some documents, not copied from the Arrow table."""
    texts, indices = documents.data.column("text"), table_indices(documents)
    for index in range(start, stop) if indices is None else indices[start:stop].tolist():
        yield memoryview(texts[index].as_buffer())


def split_text(text: memoryview, limit: int = PART_BYTES) -> Iterator[Part]:
    """UTF-8 text in parts of at most ``limit`` bytes.

    Splits before white space, so that the tokens of the parts are those of the whole; only a word longer than the limit
    is split inside.
    """
    start = 0
    while len(text) - start > limit:
        window = bytes(text[start : start + limit])
        size = max(next(filter(None, ([found.start() for found in cut.finditer(window)] for cut in CUTS)), [0]))
        if size <= 0:
            size = limit
            while text[start + size] & 0xC0 == 0x80:  # within a character
                size -= 1
        yield str(text[start : start + size], "utf-8"), False
        start += size
    yield str(text[start:], "utf-8"), True


def split_into_batches(documents: Iterable[memoryview]) -> Iterator[list[Part]]:
    """The parts of UTF-8 documents, about ``BATCH_BYTES`` of text at a time, regardless of the documents' lengths."""
    batch: list[Part] = []
    size = 0
    for document in documents:
        for part in split_text(document):
            batch.append(part)
            size += len(part[0])
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


# ---- tokens ----


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer that treats everything as text, even "[SEP]", and neither truncates nor pads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode_documents(
    backend: Tokenizer, documents: Iterable[memoryview], separator: int, dtype: str
) -> Iterator[np.ndarray]:
    """The tokens of consecutive UTF-8 documents, each followed by ``separator``, in arrays of any length."""
    for parts in _encode_batches(backend, documents):
        tokens: list[int] = []
        for ids, is_last in parts:
            tokens += ids
            if is_last:
                tokens.append(separator)
        yield np.array(tokens, dtype=dtype)


def encode_separately(backend: Tokenizer, documents: Iterable[memoryview], limit: int) -> Iterator[list[int]]:
    """The first tokens of each UTF-8 document, at most ``limit``."""
    tokens: list[int] = []
    for ids, is_last in chain.from_iterable(_encode_batches(backend, documents)):
        tokens += ids[: limit - len(tokens)]
        if is_last:
            yield tokens
            tokens = []


def _encode_batches(backend: Tokenizer, documents: Iterable[memoryview]) -> Iterator[Iterator[tuple[list[int], bool]]]:
    """For each batch its parts: tokens, whether their document ends there."""
    for batch in split_into_batches(documents):
        encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        yield ((encoding.ids, is_last) for encoding, (_, is_last) in zip(encodings, batch))
