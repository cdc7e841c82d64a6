"""Documents as packed sequences of token ids, tokenized once and kept as memory-mapped Arrow."""

import contextlib
import os
from collections.abc import Iterable, Iterator

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
MIN_LENGTH = 3


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """The smallest of the types that hold every token id."""
    return "uint16" if len(tokenizer) <= 2**16 else "int32"


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Sequences of exactly ``max_seq_length`` tokens, without padding: [CLS] text [SEP] text ... [SEP].

    Documents follow each other, a [SEP] between them, and are cut wherever a sequence is full. Special tokens that are
    spelled out in the text stay text.

    Args:
        documents: a dataset with a column "text".
        num_proc: processes, one thread each; with one, the tokenizer uses all cores. The rows do not depend on it.

    Returns:
        a dataset with one column "input_ids" of fixed length.

    Raises:
        UserInputError: the documents do not fill one sequence.
    """
    validate_length(max_seq_length, MIN_LENGTH, "[CLS], a token, [SEP]")
    dtype = token_dtype(tokenizer)
    features = Features({"input_ids": SequenceFeature(Value(dtype), length=max_seq_length)})
    return tokenized_dataset(
        "packed", _packed_tables, documents, tokenizer, max_seq_length, features, num_proc, cache_dir
    )


def validate_length(max_seq_length: int, smallest: int, what: str) -> None:
    if max_seq_length < smallest:
        raise UserInputError(f"--max_seq_length ({max_seq_length}) must be at least {smallest}: {what}")


def tokenized_dataset(
    name, make_tables, documents, tokenizer, max_seq_length, features, num_proc=None, cache_dir=None
) -> Dataset:
    """``make_tables(chunks, documents=, tokenizer=, max_seq_length=)`` over chunks of documents, made once.

    Raises:
        UserInputError: there is not one row.
    """
    digest = xxhash.xxh3_128()
    backend = tokenizer.backend_tokenizer.to_str()
    for part in (name, PACKING_VERSION, documents._fingerprint, backend, tokenizer.all_special_ids, max_seq_length):
        digest.update(repr(part).encode())
    with threads_for(num_proc):
        rows = cached_dataset(
            name,
            make_tables,
            chunk_documents(documents),
            {"documents": documents, "tokenizer": tokenizer, "max_seq_length": max_seq_length},
            features,
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


def encode_documents(
    backend: Tokenizer, documents: Iterable[memoryview], separator: int, dtype: str
) -> Iterator[np.ndarray]:
    """The tokens of UTF-8 documents one after the other, each followed by ``separator``, in arrays of any length.

    However long the documents are, only about ``BATCH_BYTES`` of text are held at once.
    """
    parts: list[tuple[str, bool]] = []
    held = 0
    for document in documents:
        for part in cut_text(document):
            parts.append(part)
            held += len(part[0])
            if held >= BATCH_BYTES:
                yield _encode(backend, parts, separator, dtype)
                parts, held = [], 0
    if parts:
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


def _packed_tables(chunks, documents, tokenizer, max_seq_length) -> Iterator[pa.Table]:
    backend, dtype, separator = plain_backend(tokenizer), token_dtype(tokenizer), tokenizer.sep_token_id
    content = max_seq_length - 2
    for start, stop in chunks:
        rest = np.empty(0, dtype)
        for tokens in encode_documents(backend, document_buffers(documents, start, stop), separator, dtype):
            tokens = np.concatenate([rest, tokens])
            count = len(tokens) // content
            rows = np.empty((count, max_seq_length), dtype)
            rows[:, 0] = tokenizer.cls_token_id
            rows[:, 1:-1] = tokens[: count * content].reshape(count, content)
            rows[:, -1] = separator
            rest = tokens[count * content :]
            if count:
                yield pa.table({"input_ids": fixed_lists(rows)})


def fixed_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


class Rows:
    """A column of numbers, or of lists of one length, as NumPy arrays straight from the memory-mapped table.

    ``rows[indices]`` is (B,) or (B, S) in the column's own dtype. Indexing the dataset itself costs about a millisecond
    a batch. Travels to other processes with the dataset, which is mapped anew there.
    """

    def __init__(self, dataset: Dataset, column: str = "input_ids"):
        self.dataset = dataset
        self.column = column
        self._map()

    def _map(self) -> None:
        chunks = [chunk for chunk in self.dataset.data.column(self.column).chunks if len(chunk)]
        self._views = [_view(chunk) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(view) for view in self._views])
        self._stored = stored_rows(self.dataset)

    def __getstate__(self):
        return {"dataset": self.dataset, "column": self.column}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        stored = np.asarray(indices) if self._stored is None else self._stored[indices]
        chunks = np.searchsorted(self._starts, stored, side="right") - 1
        out = np.empty((len(stored), *self._views[0].shape[1:]), self._views[0].dtype)
        for i, (chunk, row) in enumerate(zip(chunks.tolist(), (stored - self._starts[chunks]).tolist())):
            out[i] = self._views[chunk][row]
        return out

    def blocks(self, count: int = 2**12) -> Iterator[np.ndarray]:
        """All rows in order, at most ``count`` at a time."""
        if self._stored is None:
            for view in self._views:
                for start in range(0, len(view), count):
                    yield view[start : start + count]
        else:
            for start in range(0, len(self), count):
                yield self[np.arange(start, min(start + count, len(self)))]


def _view(chunk: pa.Array) -> np.ndarray:
    if not pa.types.is_nested(chunk.type):
        return chunk.to_numpy()
    return chunk.flatten().to_numpy().reshape(len(chunk), -1)  # flatten() minds the offset of a sliced table


def unigram_entropy(sequences: Dataset, special_ids: list[int]) -> float:
    """Entropy in nats of the distribution of single tokens, special ones aside, in packed sequences.

    The loss of a masked language model that knows the frequencies of the held-out tokens and nothing else.
    """
    counts = np.zeros(0, dtype=np.int64)
    for block in Rows(sequences).blocks():
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
            for block in Rows(dataset, column).blocks():
                digest.update(block.data)
    return digest.hexdigest()
