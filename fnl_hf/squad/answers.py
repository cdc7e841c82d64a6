"""Compute answers from start and end logits: n-best spans, and no answer if that scores higher (SQuAD v2.0).

Like ``write_predictions`` of ``run_squad.py`` in google-research/bert, with two exceptions: padding of a feature is
excluded instead of ranked among its tokens, and if there is no span, the answer is "" instead of "empty".

Shapes: S tokens of a feature without its padding.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fnl_hf.errors import validate_bounds

Span = tuple[float, float, int, int]  # start logit, end logit, first character, end character
NO_SPAN_ODDS = 1e9  # for a context without tokens; finite, so that it can be written as JSON


@dataclass(frozen=True)
class AnswerOptions:
    """How logits become answers.

    Args:
        n_best_size: answers to keep for each question, and positions to combine in each feature.
        max_answer_length: tokens in an answer, at most.
        version_2_with_negative: allow no answer: the empty text, scored by the [CLS] positions.
        null_score_diff_threshold: answer only if score(no answer) − score(best span) is not above it.
    """

    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0

    def __post_init__(self):
        validate_bounds("n_best_size", self.n_best_size, 1)
        validate_bounds("max_answer_length", self.max_answer_length, 1)


@dataclass
class Answers:
    """Per question id: the answer, the best span's text, the n-best list and, for v2.0, ``null_odds``.

    ``null_odds`` is the score of no answer minus that of the best span.
    """

    text: dict[str, str] = field(default_factory=dict)
    best_span: dict[str, str] = field(default_factory=dict)
    nbest: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    null_odds: dict[str, float] = field(default_factory=dict)


def answers_from_logits(
    examples,
    features,
    start_logits: Sequence[np.ndarray] | np.ndarray,
    end_logits: Sequence[np.ndarray] | np.ndarray,
    options: AnswerOptions,
) -> Answers:
    """The best answers of all questions.

    Args:
        examples: columns ``id`` and ``context``.
        features: the columns ``ANSWER_COLUMNS``, as ``FeatureMaker.eval_dataset`` makes them.
        start_logits: of each feature; what is past its own length is ignored.
        end_logits: likewise.
    """
    rows_of = defaultdict(list)
    for row, example_id in enumerate(features["example_id"]):
        rows_of[example_id].append(row)
    offset_mappings, max_context = features["offset_mapping"], features["token_is_max_context"]
    answers = Answers()
    for example_id, context in zip(examples["id"], examples["context"], strict=True):
        spans: list[Span] = []
        nulls: list[Span] = []
        for row in rows_of[example_id]:
            offsets = np.asarray(offset_mappings[row])  # (S, 2)
            start, end = start_logits[row][: len(offsets)], end_logits[row][: len(offsets)]
            nulls.append((float(start[0]), float(end[0]), 0, 0))
            may_start = np.asarray(max_context[row], dtype=bool)
            spans += best_spans(start, end, offsets, may_start, options.n_best_size, options.max_answer_length)
        null = min(nulls, key=_score)
        nbest = _nbest_list(context, spans, options.n_best_size, null if options.version_2_with_negative else None)
        answers.nbest[example_id] = nbest
        best = next((entry for entry in nbest if entry["text"]), None)
        answers.text[example_id] = answers.best_span[example_id] = best["text"] if best else ""
        if options.version_2_with_negative:
            odds = _score(null) - best["start_logit"] - best["end_logit"] if best else NO_SPAN_ODDS
            answers.null_odds[example_id] = odds
            if odds > options.null_score_diff_threshold:
                answers.text[example_id] = ""
    return answers


def best_spans(
    start: np.ndarray,
    end: np.ndarray,
    offsets: np.ndarray,
    may_start: np.ndarray,
    n_best_size: int,
    max_answer_length: int,
) -> list[Span]:
    """The best spans of the context in a feature, from its tokens' logits ``start`` and ``end`` (S,), their characters
    ``offsets`` (S, 2) and ``may_start`` (S,).

    Combines the ``n_best_size`` best starts of all tokens with as many ends. Keeps spans that are in the context, have
    text (a space that is a token of bytes has none) and start where ``may_start`` is true, so that a window does not
    answer with text that a neighboring window shows with more context.
    """
    starts = np.argsort(-start, kind="stable")[:n_best_size]
    ends = np.argsort(-end, kind="stable")[:n_best_size]
    starts, ends = starts[may_start[starts]], ends[offsets[ends, 0] >= 0]
    length = ends[None, :] - starts[:, None] + 1  # in tokens, (starts, ends)
    has_text = offsets[ends, 1][None, :] > offsets[starts, 0][:, None]
    first, last = np.nonzero((length >= 1) & (length <= max_answer_length) & has_text)
    return [
        (float(start[starts[i]]), float(end[ends[j]]), int(offsets[starts[i], 0]), int(offsets[ends[j], 1]))
        for i, j in zip(first, last, strict=True)
    ]


def _score(span: Span) -> float:
    return span[0] + span[1]


def _nbest_list(context: str, spans: list[Span], n_best_size: int, null: Span | None) -> list[dict[str, Any]]:
    """The best distinct texts with softmax probabilities; with ``null``, no answer is among them, or last."""
    entries: dict[str, dict[str, Any]] = {}
    candidates = spans if null is None else [*spans, null]
    for span in sorted(candidates, key=_score, reverse=True):
        if len(entries) == n_best_size:
            break
        _add_entry(entries, context, span)
    if null is not None:
        _add_entry(entries, context, null)
    if not entries:
        _add_entry(entries, context, (0.0, 0.0, 0, 0))
    nbest = list(entries.values())
    scores = np.array([entry["start_logit"] + entry["end_logit"] for entry in nbest])
    weights = np.exp(scores - scores.max())
    for entry, probability in zip(nbest, weights / weights.sum(), strict=True):
        entry["probability"] = float(probability)
    return nbest


def _add_entry(entries: dict[str, dict[str, Any]], context: str, span: Span) -> None:
    start_logit, end_logit, first, last = span
    text = context[first:last]
    entry = {"text": text, "start_logit": start_logit, "end_logit": end_logit, "offsets": [first, last]}
    entries.setdefault(text, entry)
