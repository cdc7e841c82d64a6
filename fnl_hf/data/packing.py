"""Documents as sequences of token ids: packed without padding, or each as a sequence of its own.

Shapes: N rows of S tokens, of which S - 2 are text and separators.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.encoding import (
    BATCH_BYTES,
    RowKind,
    encode_documents,
    encode_separately,
    plain_backend,
    read_chunk,
    to_fixed_size_lists,
    token_dtype,
    tokenize_documents,
)
from fnl_hf.data.tokenizer import name_of
from fnl_hf.errors import UserInputError

# ---- packed ----


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Sequences of exactly ``max_seq_length`` tokens, without padding: [CLS] text [SEP] text ... [SEP].

    Documents follow each other, separated by [SEP], and are cut where a sequence is full. Special tokens spelled out in
    the text stay text. For arguments, result and errors see :func:`tokenize_documents`.
    """
    return tokenize_documents(PACKED, documents, tokenizer, max_seq_length, num_proc, cache_dir)


def frame_rows(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> np.ndarray:
    """Rows [CLS] tokens [SEP] (N, S), as many as the tokens fill; the remaining tokens are left out."""
    content = max_seq_length - 2
    count = len(tokens) // content
    rows = np.empty((count, max_seq_length), tokens.dtype)
    rows[:, 0], rows[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows[:, 1:-1] = tokens[: count * content].reshape(count, content)
    return rows


def _make_packed_tables(chunks, documents, tokenizer, max_seq_length) -> Iterator[pa.Table]:
    backend, dtype, separator = plain_backend(tokenizer), token_dtype(tokenizer), tokenizer.sep_token_id
    for start, stop in chunks:
        left_over = np.empty(0, dtype)
        for tokens in encode_documents(backend, read_chunk(documents, start, stop), separator, dtype):
            tokens = np.concatenate([left_over, tokens])
            rows = frame_rows(tokens, tokenizer, max_seq_length)  # (N, S)
            left_over = tokens[len(rows) * (max_seq_length - 2) :]
            if len(rows):
                yield pa.table({"input_ids": to_fixed_size_lists(rows)})


# ---- one sequence per document ----


def separate_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Sequences [CLS] text [SEP] of at most ``max_seq_length`` tokens, one for each document that has a token; the rest
    of a longer document is left out.

    For arguments see :func:`tokenize_documents`.

    Returns:
        "input_ids" padded to ``max_seq_length``, "length" (tokens that are no padding).

    Raises:
        UserInputError: see there; or a tokenizer that pads on the left, for models that read the last position.
    """
    if tokenizer.padding_side != "right":
        raise UserInputError(
            f"the tokenizer of {name_of(tokenizer)} pads on the {tokenizer.padding_side}, but single documents are "
            "padded on the right: set --line_by_line false"
        )
    return tokenize_documents(LINES, documents, tokenizer, max_seq_length, num_proc, cache_dir)


def _make_line_tables(chunks, documents, tokenizer, max_seq_length) -> Iterator[pa.Table]:
    backend, count = plain_backend(tokenizer), max(1, BATCH_BYTES // max_seq_length)
    for start, stop in chunks:
        texts = encode_separately(backend, read_chunk(documents, start, stop), max_seq_length - 2)
        nonempty = filter(None, texts)
        while part := list(islice(nonempty, count)):
            yield _make_table(part, tokenizer, max_seq_length)


def _make_table(texts: list[list[int]], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> pa.Table:
    rows = np.full((len(texts), max_seq_length), tokenizer.pad_token_id, token_dtype(tokenizer))  # (N, S)
    length = np.array([len(text) + 2 for text in texts], dtype=np.int32)  # (N,)
    rows[:, 0] = tokenizer.cls_token_id
    for row, text in zip(rows, texts):
        row[1 : len(text) + 1] = text
    rows[np.arange(len(texts)), length - 1] = tokenizer.sep_token_id
    return pa.table({"input_ids": to_fixed_size_lists(rows), "length": length})


CONTENT = "[CLS], a token, [SEP]"
PACKED = RowKind("packed", _make_packed_tables, 3, CONTENT)
LINES = RowKind("lines", _make_line_tables, 3, CONTENT, {"length": Value("int32")})
