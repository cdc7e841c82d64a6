"""Documents as packed sequences of token ids, without padding.

Shapes: N rows of S tokens, of which S - 2 are text and separators.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.encoding import (
    RowKind,
    encode_documents,
    plain_backend,
    read_chunk,
    to_fixed_size_lists,
    token_dtype,
    tokenize_documents,
)


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


PACKED = RowKind("packed", _make_packed_tables, min_length=3, content="[CLS], a token, [SEP]")
