"""From start and end logits to answers: n-best spans, and no answer where that scores higher (SQuAD v2.0)."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NO_SPAN_ODDS = 1e9  # where a context has no token at all; finite, so that it can be written as JSON


@dataclass
class Answers:
    """Per question id: the answer, the best span's text, the n-best list and, for v2.0, ``null_odds``.

    ``null_odds`` is the score of no answer less the best span's.
    """

    text: dict[str, str] = field(default_factory=dict)
    best_span: dict[str, str] = field(default_factory=dict)
    nbest: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    null_odds: dict[str, float] = field(default_factory=dict)


def answers_from_logits(
    examples,
    features,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    version_2_with_negative: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> Answers:
    """The best answers of all questions.

    Args:
        examples: rows with ``id`` and ``context``.
        features: rows with ``example_id`` and ``offset_mapping``, as ``FeatureMaker.evaluation`` makes them.
        start_logits: (features, longest sequence), columns past a feature's own length are ignored.
        end_logits: likewise.
        n_best_size: spans to keep for each question, and positions to combine in each feature.
        max_answer_length: tokens in an answer, at most.
        version_2_with_negative: allow no answer: the empty text, scored by the [CLS] positions.
        null_score_diff_threshold: answer only if score(no answer) − score(best span) is not above it.
    """
    rows_of = defaultdict(list)
    for row, example_id in enumerate(features["example_id"]):
        rows_of[example_id].append(row)
    offset_mappings = features["offset_mapping"]
    answers = Answers()
    for example_id, context in zip(examples["id"], examples["context"], strict=True):
        spans, null_score = [], np.inf
        for row in rows_of[example_id]:
            offsets = np.asarray(offset_mappings[row])
            start, end = start_logits[row][: len(offsets)], end_logits[row][: len(offsets)]
            null_score = min(null_score, float(start[0] + end[0]))
            spans += best_spans(start, end, offsets, n_best_size, max_answer_length)
        nbest = _nbest_list(context, spans, n_best_size, null_score if version_2_with_negative else None)
        answers.nbest[example_id] = nbest
        best = next((entry for entry in nbest if entry["text"]), None)
        answers.text[example_id] = answers.best_span[example_id] = best["text"] if best else ""
        if version_2_with_negative:
            odds = null_score - best["start_logit"] - best["end_logit"] if best else NO_SPAN_ODDS
            answers.null_odds[example_id] = float(odds)
            if answers.null_odds[example_id] > null_score_diff_threshold:
                answers.text[example_id] = ""
    return answers


def best_spans(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, n_best_size: int, max_answer_length: int
) -> list[tuple[float, float, int, int]]:
    """(start logit, end logit, first character, end character) of a feature's best spans in the context.

    Combines the ``n_best_size`` best starts with as many ends.
    """
    in_context = np.flatnonzero(offsets[:, 0] >= 0)
    starts = in_context[np.argsort(-start[in_context], kind="stable")[:n_best_size]]
    ends = in_context[np.argsort(-end[in_context], kind="stable")[:n_best_size]]
    length = ends[None, :] - starts[:, None] + 1
    first, last = np.nonzero((length >= 1) & (length <= max_answer_length))
    return [
        (float(start[starts[i]]), float(end[ends[j]]), int(offsets[starts[i], 0]), int(offsets[ends[j], 1]))
        for i, j in zip(first, last, strict=True)
    ]


def _nbest_list(context, spans, n_best_size, null_score) -> list[dict[str, Any]]:
    """The best spans with distinct texts, and no answer if ``null_score`` is given, with softmax probabilities."""
    entries: dict[str, dict[str, Any]] = {}
    for start_logit, end_logit, first, last in sorted(spans, key=lambda span: -(span[0] + span[1])):
        text = context[first:last]
        if text not in entries:
            entries[text] = {"text": text, "start_logit": start_logit, "end_logit": end_logit, "offsets": [first, last]}
        if len(entries) == n_best_size:
            break
    if null_score is not None or not entries:
        # One score for no answer, in the layout of a span.
        half = 0.0 if null_score is None else null_score / 2
        entries[""] = {"text": "", "start_logit": half, "end_logit": half, "offsets": [0, 0]}
    nbest = sorted(entries.values(), key=lambda entry: -(entry["start_logit"] + entry["end_logit"]))
    scores = np.array([entry["start_logit"] + entry["end_logit"] for entry in nbest])
    weights = np.exp(scores - scores.max())
    for entry, probability in zip(nbest, weights / weights.sum(), strict=True):
        entry["probability"] = float(probability)
    return nbest
