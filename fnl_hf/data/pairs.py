"""Pairs of segments for next sentence prediction, as in the original BERT (Devlin et al. 2019).

A pair is [CLS] A [SEP] B [SEP]. A is one or more sentences of a document. In half of the pairs B is what follows; in
the other half it is a segment from elsewhere, and the document continues with what B would have been. Three things
differ from the published script. The length is drawn for each pair, not for each document, so one pair in ten is short.
A sentence that fills a pair by itself is cut into A and B instead of always getting a random B, so half of the pairs
are random. A random B is as long as the text that it replaces, and starts and ends within a sentence or with one in the
same way. In the published script it is filled to the target length, while a true B ends with its document, so for short
documents the length alone reveals most labels.

Shapes: N pairs of S tokens.
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
    plain_backend,
    read_chunk,
    split_into_batches,
    to_fixed_size_lists,
    token_dtype,
    tokenize_documents,
)

SHORT_PROBABILITY, RANDOM_PROBABILITY = 0.1, 0.5
DRAWS = 16  # number of random segments to draw, for one as long as the replaced text
SEED = 0  # pairs are made once, whatever the training seed
SENTENCE_MARKS = (".", "!", "?")
NEXT, RANDOM = 0, 1  # labels of Transformers' BertForNextSentencePrediction

Line = tuple[str, bool, bool]  # text, whether a line ends there, whether the document does


@dataclass(frozen=True)
class Document:
    """Tokens, and the position after each sentence: increasing, the last is the number of tokens."""

    tokens: np.ndarray
    sentence_stops: list[int]


@dataclass(frozen=True)
class Pair:
    first: np.ndarray
    second: np.ndarray
    label: int


@dataclass(frozen=True)
class Shape:
    """Properties that a random B shares with the true B, so that only its meaning reveals it.

    Attributes:
        length: tokens.
        room: how many of them fit beside A.
        begins_within: it begins within a sentence.
        ends_document: it ends with its document.
    """

    length: int
    room: int
    begins_within: bool
    ends_document: bool

    def distance(self, document: Document, start: int, stop: int) -> tuple[int, ...]:
        """How far tokens of a document are from this shape, most important property first; zeros are equal."""
        stops, size = document.sentence_stops, stop - start
        begins_within = start > 0 and stops[bisect_left(stops, start)] != start
        return (
            begins_within != self.begins_within,
            (stop == len(document.tokens)) != self.ends_document,
            abs(min(size, self.room) - min(self.length, self.room)),
            abs(size - self.length),
        )


def pair_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Segment pairs [CLS] A [SEP] B [SEP] of at most ``max_seq_length`` tokens, made once like packed sequences.

    A sentence ends with ".", "!" or "?", or with a line. The random B is from another document among those that are
    read together (about four million bytes of text), or from another place of the document if there is no other. A
    single document that consists of one pair only yields that pair with its own continuation.

    Returns:
        "input_ids" padded to ``max_seq_length``, "first_length" (tokens of [CLS] A [SEP]), "length" (tokens that are no
        padding), "next_sentence_label" (0: B follows A, 1: random).

    Raises:
        UserInputError: a length below 5, a tokenizer without padding, no pair at all.
    """
    return tokenize_documents(PAIRS, documents, tokenizer, max_seq_length, num_proc, cache_dir)


def _make_pair_tables(chunks, documents, tokenizer, max_seq_length) -> Iterator[pa.Table]:
    backend, dtype = plain_backend(tokenizer), token_dtype(tokenizer)
    vocabulary = tokenizer.backend_tokenizer.get_vocab()
    mark_ids = np.array([vocabulary[mark] for mark in SENTENCE_MARKS if mark in vocabulary])
    for start, stop in chunks:
        for number, group in enumerate(split_sentences(backend, read_chunk(documents, start, stop), mark_ids, dtype)):
            # the pairs of a chunk do not depend on the process that makes them
            rng = random.Random(f"{SEED} {start} {number}")
            pairs = [pair for i in range(len(group)) for pair in make_pairs(group, i, max_seq_length - 3, rng)]
            if pairs:
                yield _make_table(pairs, tokenizer, max_seq_length)


# ---- sentences ----


def split_sentences(
    backend: Tokenizer, documents: Iterator[memoryview], mark_ids: np.ndarray, dtype: str
) -> Iterator[list[Document]]:
    """Documents as sentences, in groups of about ``BATCH_BYTES`` of text; a longer document becomes several.

    Args:
        mark_ids: the tokens that end a sentence.
    """
    for batch in split_into_batches(documents):
        lines: list[Line] = []
        for text, is_last in batch:
            *whole, rest = text.split("\n")
            lines += [(line, True, False) for line in whole]
            lines.append((rest, is_last, is_last))
        yield _encode_lines(backend, lines, mark_ids, dtype)


def _encode_lines(backend: Tokenizer, lines: list[Line], mark_ids: np.ndarray, dtype: str) -> list[Document]:
    documents = []
    tokens: list[int] = []
    line_stops: list[int] = []
    encodings = backend.encode_batch_fast([text for text, _, _ in lines], add_special_tokens=False)
    for index, (encoding, (_, ends_line, ends_document)) in enumerate(zip(encodings, lines)):
        tokens += encoding.ids
        if ends_line:
            line_stops.append(len(tokens))
        if tokens and (ends_document or index == len(lines) - 1):
            documents.append(_find_sentences(np.array(tokens, dtype), line_stops, mark_ids))
        if ends_document:
            tokens, line_stops = [], []
    return documents


def _find_sentences(tokens: np.ndarray, line_stops: list[int], mark_ids: np.ndarray) -> Document:
    is_mark = np.isin(tokens, mark_ids)
    mark_stops = np.flatnonzero(is_mark & ~np.append(is_mark[1:], False)) + 1  # "..." ends one sentence
    stops = np.unique(np.concatenate([mark_stops, np.array([*line_stops, len(tokens)], dtype=np.int64)]))
    return Document(tokens, stops[stops > 0].tolist())


# ---- pairs ----


def make_pairs(group: list[Document], index: int, limit: int, rng: random.Random) -> Iterator[Pair]:
    """The pairs whose A is from ``group[index]``, with at most ``limit`` tokens together.

    A and the B that follows are the sentences from ``start`` on up to the pair's length; if B is random, the text that
    would have followed stays for the next pair.
    """
    tokens, stops = group[index].tokens, group[index].sentence_stops
    start = 0
    while start < len(tokens):
        target = 2 + int(rng.random() * (limit - 1)) if rng.random() < SHORT_PROBABILITY else limit
        first_sentence = bisect_right(stops, start)
        last_sentence = min(bisect_left(stops, start + target, lo=first_sentence), len(stops) - 1)
        stop = stops[last_sentence]
        middle = _draw_middle(stops, first_sentence, last_sentence, start, rng)
        if middle == stop:
            return  # a single last token, which is not a pair
        second = None
        if rng.random() < RANDOM_PROBABILITY:
            sentences = range(first_sentence, last_sentence + 1)
            like = Shape(stop - middle, limit - (middle - start), len(sentences) == 1, stop == len(tokens))
            second = _draw_segment(group, index, sentences, like, tokens[middle:stop], rng)
        if second is not None:
            yield Pair(*_truncate_pair(tokens[start:middle], second, limit, rng), RANDOM)
            start = middle
            continue
        yield Pair(*_truncate_pair(tokens[start:middle], tokens[middle:stop], limit, rng), NEXT)
        start = stop


def _draw_middle(stops: list[int], first: int, last: int, start: int, rng: random.Random) -> int:
    """Where A ends: after any sentence except the last, or within the only sentence."""
    if last > first:
        return stops[first + int(rng.random() * (last - first))]
    return min(start + 1 + int(rng.random() * (stops[last] - start - 1)), stops[last])


def _draw_segment(
    group: list[Document], index: int, taken: range, like: Shape, following: np.ndarray, rng: random.Random
) -> np.ndarray | None:
    """Of several random segments, the one that is most similar to the true B, ``following``, but if possible not the
    same: from another document, or from this one outside of the sentences ``taken``; None if there is no other."""
    best: tuple[int, ...] | None = None
    found = None
    for _ in range(DRAWS):
        document, sentences = _draw_place(group, index, taken, rng)
        if not sentences:
            return None
        for start, stop in _cut_segments(document.sentence_stops, sentences, like, rng):
            segment = document.tokens[start:stop]
            # If a document occurs twice in the corpus, the true B would be most similar to itself.
            distance = (np.array_equal(segment, following), *like.distance(document, start, stop))
            if best is None or distance < best:
                best, found = distance, segment
        if best is not None and not any(best):
            break
    return found


def _draw_place(group: list[Document], index: int, taken: range, rng: random.Random) -> tuple[Document, range]:
    """A document and the range of its sentences to draw from: all of another document, or those before or after the
    sentences ``taken`` of this one."""
    if len(group) > 1:
        other = int(rng.random() * (len(group) - 1))
        document = group[other + (other >= index)]
        return document, range(len(document.sentence_stops))
    count = len(group[index].sentence_stops)
    is_before = rng.random() * (count - len(taken)) < taken.start
    return group[index], range(taken.start) if is_before else range(taken.stop, count)


def _cut_segments(stops: list[int], sentences: range, like: Shape, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Starts and ends of segments of about ``like.length`` tokens: those that end with the sentences, or some that
    start with a random one of them."""
    begin, end = stops[sentences[0] - 1] if sentences[0] else 0, stops[sentences[-1]]
    if like.ends_document:
        if like.begins_within:
            yield max(begin, end - like.length), end
            return
        after = bisect_left(stops, end - like.length, lo=sentences[0], hi=sentences[-1])
        for start in (stops[after - 1] if after > sentences[0] else begin, stops[after]):
            if start < end:
                yield start, end
        return
    first = sentences[int(rng.random() * len(sentences))]
    start = stops[first - 1] if first else 0
    if like.begins_within:
        stop = stops[min(bisect_right(stops, start + like.length, lo=first), sentences[-1])]
        yield max(start, stop - like.length), stop
        return
    last = min(bisect_left(stops, start + like.length, lo=first), sentences[-1])
    for stop in (stops[last], stops[max(last - 1, first)]):
        yield start, stop


def _truncate_pair(
    first: np.ndarray, second: np.ndarray, limit: int, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Truncate the longer segment, then both equally; each token is removed from the front or the back at random."""
    if len(first) + len(second) <= limit:
        return first, second
    shorter = min(len(first), len(second), limit // 2)
    lengths = (limit - shorter, shorter) if len(first) >= len(second) else (shorter, limit - shorter)
    return _truncate(first, lengths[0], rng), _truncate(second, lengths[1], rng)


def _truncate(tokens: np.ndarray, length: int, rng: random.Random) -> np.ndarray:
    # One random bit for each removed token: 1 removes it from the front.
    front = rng.getrandbits(max(len(tokens) - length, 1)).bit_count() if len(tokens) > length else 0
    return tokens[front : front + length]


def _make_table(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> pa.Table:
    rows = np.full((len(pairs), max_seq_length), tokenizer.pad_token_id, token_dtype(tokenizer))  # (N, S)
    rows[:, 0] = tokenizer.cls_token_id
    first_length = np.array([len(pair.first) + 2 for pair in pairs], dtype=np.int32)  # (N,)
    length = first_length + np.array([len(pair.second) + 1 for pair in pairs], dtype=np.int32)  # (N,)
    for row, pair, middle, stop in zip(rows, pairs, first_length.tolist(), length.tolist()):
        row[1 : middle - 1] = pair.first
        row[middle : stop - 1] = pair.second
    for last in (first_length - 1, length - 1):
        rows[np.arange(len(pairs)), last] = tokenizer.sep_token_id
    labels = np.array([pair.label for pair in pairs], dtype=np.int8)
    return pa.table({
        "input_ids": to_fixed_size_lists(rows), "first_length": first_length, "length": length,
        "next_sentence_label": labels,
    })  # fmt: skip


COLUMNS = {"first_length": Value("int32"), "length": Value("int32"), "next_sentence_label": Value("int8")}
PAIRS = RowKind("pairs", _make_pair_tables, 5, "[CLS], a token, [SEP], a token, [SEP]", COLUMNS)
