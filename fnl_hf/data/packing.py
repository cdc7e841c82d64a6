"""Documents as packed sequences of token ids, without padding."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.encoding import (
    RowKind,
    document_buffers,
    encode_documents,
    fixed_lists,
    make_rows_of,
    plain_backend,
    token_dtype,
)


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
    return make_rows_of(PACKED, documents, tokenizer, max_seq_length, num_proc, cache_dir)


def _packed_tables(chunks, documents, tokenizer, max_seq_length) -> Iterator[pa.Table]:
    backend, dtype, separator = plain_backend(tokenizer), token_dtype(tokenizer), tokenizer.sep_token_id
    content = max_seq_length - 2
    for start, stop in chunks:
        rest = np.empty(0, dtype)
        for tokens in encode_documents(backend, document_buffers(documents, start, stop), separator, dtype):
            tokens = np.concatenate([rest, tokens])
            rows = frame_rows(tokens, tokenizer, max_seq_length)
            rest = tokens[len(rows) * content :]
            if len(rows):
                yield pa.table({"input_ids": fixed_lists(rows)})


def frame_rows(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> np.ndarray:
    """Rows [CLS] tokens [SEP] of the length, as many as the tokens fill."""
    content = max_seq_length - 2
    count = len(tokens) // content
    rows = np.empty((count, max_seq_length), tokens.dtype)
    rows[:, 0], rows[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows[:, 1:-1] = tokens[: count * content].reshape(count, content)
    return rows


PACKED = RowKind("packed", _packed_tables, 3, "[CLS], a token, [SEP]")
