"""Pairs of segments for next sentence prediction, as the original BERT's (Devlin et al. 2019).

A pair is [CLS] A [SEP] B [SEP]. A is one or more sentences of a document; B is what follows in half of the pairs, and
in the other half a segment from elsewhere, after which the document goes on with what B would have been. Two things
differ from the published script: the length is drawn for each pair, not for each document, so that one pair in ten is
short; and a sentence that fills a pair by itself is cut into A and B instead of always getting a random B, so that half
of the pairs are random.
"""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.encoding import (
    RowKind,
    batch_parts,
    document_buffers,
    fixed_lists,
    make_rows_of,
    plain_backend,
    token_dtype,
)
from fnl_hf.errors import UserInputError

SHORT_PROBABILITY, RANDOM_PROBABILITY = 0.1, 0.5
SEED = 0  # pairs are made once, whatever the training seed
SENTENCE_ENDS = (".", "!", "?")
NEXT, RANDOM = 0, 1  # labels of Transformers' BertForNextSentencePrediction


@dataclass(frozen=True)
class Document:
    """Tokens, and where its sentences end: increasing positions, the last is the number of tokens."""

    tokens: np.ndarray
    ends: list[int]


@dataclass(frozen=True)
class Pair:
    first: np.ndarray
    second: np.ndarray
    label: int


def pair_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Segment pairs [CLS] A [SEP] B [SEP] of at most ``max_seq_length`` tokens, made once like packed sequences.

    A sentence ends with ".", "!" or "?", or with a line. The random B is from another document among those that are
    read together (about four million bytes of text), or from elsewhere in the document if that is the only one. A
    document that is nothing but one pair and has no others beside it yields that pair with its own continuation.

    Returns:
        "input_ids" padded to ``max_seq_length``, "first_length" (tokens of [CLS] A [SEP]), "length" (tokens that are no
        padding), "next_sentence_label" (0: B follows A, 1: random).

    Raises:
        UserInputError: a length below 5, a tokenizer without padding, no pair at all.
    """
    if tokenizer.pad_token_id is None:
        raise UserInputError(f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no pad_token")
    return make_rows_of(PAIRS, documents, tokenizer, max_seq_length, num_proc, cache_dir)


def _pair_tables(chunks, documents, tokenizer, max_seq_length) -> Iterator[pa.Table]:
    backend = plain_backend(tokenizer)
    known = tokenizer.backend_tokenizer.get_vocab()
    ends = np.array([known[mark] for mark in SENTENCE_ENDS if mark in known])
    for start, stop in chunks:
        groups = split_sentences(backend, document_buffers(documents, start, stop), ends, token_dtype(tokenizer))
        for index, group in enumerate(groups):
            draw = random.Random(f"{SEED} {start} {index}")
            pairs = [pair for i in range(len(group)) for pair in make_pairs(group, i, max_seq_length - 3, draw)]
            if pairs:
                yield _table(pairs, tokenizer, max_seq_length)


def split_sentences(
    backend: Tokenizer, documents: Iterator[memoryview], ends: np.ndarray, dtype: str
) -> Iterator[list[Document]]:
    """Documents as sentences, in groups of about ``BATCH_BYTES`` of text; a longer one becomes several.

    Args:
        ends: the tokens that end a sentence.
    """
    for parts in batch_parts(documents):
        lines: list[tuple[str, bool, bool]] = []  # text, whether a line ends there, whether the document does
        for text, last in parts:
            *whole, rest = text.split("\n")
            lines += [(line, True, False) for line in whole]
            lines.append((rest, last, last))
        yield _group(backend, lines, ends, dtype)


def _group(backend: Tokenizer, parts: list[tuple[str, bool, bool]], ends: np.ndarray, dtype: str) -> list[Document]:
    documents = []
    tokens: list[int] = []
    lines: list[int] = []
    encodings = backend.encode_batch_fast([text for text, _, _ in parts], add_special_tokens=False)
    for index, (encoding, (_, line_ends, document_ends)) in enumerate(zip(encodings, parts)):
        tokens += encoding.ids
        if line_ends:
            lines.append(len(tokens))
        if tokens and (document_ends or index == len(parts) - 1):
            documents.append(_document(np.array(tokens, dtype), lines, ends))
        if document_ends:
            tokens, lines = [], []
    return documents


def _document(tokens: np.ndarray, lines: list[int], ends: np.ndarray) -> Document:
    marks = np.isin(tokens, ends)
    stops = np.flatnonzero(marks & ~np.append(marks[1:], False)) + 1  # "..." ends one sentence
    positions = np.unique(np.concatenate([stops, np.array([*lines, len(tokens)], dtype=np.int64)]))
    return Document(tokens, positions[positions > 0].tolist())


def make_pairs(group: list[Document], index: int, limit: int, draw: random.Random) -> Iterator[Pair]:
    """The pairs whose A is from ``group[index]``, of at most ``limit`` tokens together."""
    tokens, ends = group[index].tokens, group[index].ends
    start = 0
    while start < len(tokens):
        target = 2 + int(draw.random() * (limit - 1)) if draw.random() < SHORT_PROBABILITY else limit
        low = bisect_right(ends, start)
        high = min(bisect_left(ends, start + target, lo=low), len(ends) - 1)
        stop = ends[high]
        middle = _cut(ends, low, high, start, draw)
        second = None
        if middle == stop or draw.random() < RANDOM_PROBABILITY:
            second = _elsewhere(group, index, range(low, high + 1), target - (middle - start), draw)
        if second is not None:
            yield Pair(*_truncated(tokens[start:middle], second, limit, draw), RANDOM)
            start = middle
            continue
        if middle < stop:
            yield Pair(*_truncated(tokens[start:middle], tokens[middle:stop], limit, draw), NEXT)
        start = stop


def _cut(ends: list[int], low: int, high: int, start: int, draw: random.Random) -> int:
    """Where A ends: after any but the last of some sentences, or within the one there is."""
    if high > low:
        return ends[low + int(draw.random() * (high - low))]
    return min(start + 1 + int(draw.random() * (ends[high] - start - 1)), ends[high])


def _elsewhere(group: list[Document], index: int, taken: range, length: int, draw: random.Random) -> np.ndarray | None:
    """Sentences of about ``length`` tokens from another document, or outside the sentences ``taken`` of this one."""
    if len(group) > 1:
        other = int(draw.random() * (len(group) - 1))
        document = group[other + (other >= index)]
        first = int(draw.random() * len(document.ends))
    else:
        document = group[index]
        free = len(document.ends) - len(taken)
        if free == 0:
            return None
        first = int(draw.random() * free)
        first += len(taken) * (first >= taken.start)
    start = document.ends[first - 1] if first else 0
    last = min(bisect_left(document.ends, start + length, lo=first), len(document.ends) - 1)
    return document.tokens[start : document.ends[last]]


def _truncated(first: np.ndarray, second: np.ndarray, limit: int, draw: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Cut the longer one, then both alike, each lost token from the front or the back at random."""
    if len(first) + len(second) <= limit:
        return first, second
    short = min(len(first), len(second), limit // 2)
    lengths = (limit - short, short) if len(first) >= len(second) else (short, limit - short)
    return _shortened(first, lengths[0], draw), _shortened(second, lengths[1], draw)


def _shortened(tokens: np.ndarray, length: int, draw: random.Random) -> np.ndarray:
    front = draw.getrandbits(max(len(tokens) - length, 1)).bit_count() if len(tokens) > length else 0
    return tokens[front : front + length]


def _table(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> pa.Table:
    rows = np.full((len(pairs), max_seq_length), tokenizer.pad_token_id, token_dtype(tokenizer))
    rows[:, 0] = tokenizer.cls_token_id
    first = np.array([len(pair.first) + 2 for pair in pairs], dtype=np.int32)
    length = first + np.array([len(pair.second) + 1 for pair in pairs], dtype=np.int32)
    for row, pair, middle, stop in zip(rows, pairs, first.tolist(), length.tolist()):
        row[1 : middle - 1] = pair.first
        row[middle : stop - 1] = pair.second
    rows[np.arange(len(pairs)), first - 1] = tokenizer.sep_token_id
    rows[np.arange(len(pairs)), length - 1] = tokenizer.sep_token_id
    labels = np.array([pair.label for pair in pairs], dtype=np.int8)
    return pa.table({
        "input_ids": fixed_lists(rows), "first_length": first, "length": length, "next_sentence_label": labels,
    })  # fmt: skip


COLUMNS = {"first_length": Value("int32"), "length": Value("int32"), "next_sentence_label": Value("int8")}
PAIRS = RowKind("pairs", _pair_tables, 5, "[CLS], a token, [SEP], a token, [SEP]", COLUMNS)
