"""Exact match and F1 of SQuAD v1.1 and v2.0, as a metric module that ``evaluate.load`` finds by path, offline.

Rajpurkar et al. 2016 (v1.1) and 2018 (v2.0). Texts are compared without case, punctuation, articles and extra space;
each question counts its best gold answer. Scores are percentages.
"""

import collections
import re
import string
from collections.abc import Callable

import datasets
import evaluate

_DESCRIPTION = "Exact match and F1 of SQuAD v1.1 and v2.0."
_CITATION = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016."
_INPUTS = """
predictions: dicts with "id", "prediction_text" and, optionally, "no_answer_probability"
references: dicts with "id" and "answers": {"text": [...], "answer_start": [...]}; no texts means unanswerable
"""
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match_score(prediction: str, gold: str) -> float:
    """1 if the normalized texts are the same, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1_score(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words; two empty texts agree."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def best_over_golds(score: Callable[[str, str], float], prediction: str, golds: list[str]) -> float:
    """The best score against any gold answer; golds that normalize to nothing do not count, none means unanswerable."""
    golds = [gold for gold in golds if normalize_answer(gold)] or [""]
    return max(score(prediction, gold) for gold in golds)


def squad_scores(predictions: dict[str, str], golds: dict[str, list[str]]) -> dict[str, float]:
    """Mean scores over all questions, and over the answerable and unanswerable ones if there are both.

    A question without prediction counts as answered with nothing.
    """
    ids = list(golds)
    exact = {i: best_over_golds(exact_match_score, predictions.get(i, ""), golds[i]) for i in ids}
    f1 = {i: best_over_golds(f1_score, predictions.get(i, ""), golds[i]) for i in ids}
    result = {"exact_match": _percentage(exact, ids), "f1": _percentage(f1, ids), "total": len(ids)}
    answerable = [i for i in ids if any(normalize_answer(gold) for gold in golds[i])]
    unanswerable = [i for i in ids if i not in set(answerable)]
    if answerable and unanswerable:
        for name, subset in (("HasAns", answerable), ("NoAns", unanswerable)):
            result[f"{name}_exact"] = _percentage(exact, subset)
            result[f"{name}_f1"] = _percentage(f1, subset)
            result[f"{name}_total"] = len(subset)
    return result


def _percentage(scores: dict[str, float], ids: list[str]) -> float:
    return 100.0 * sum(scores[i] for i in ids) / len(ids)


def best_thresholds(
    predictions: dict[str, str], golds: dict[str, list[str]], no_answer: dict[str, float]
) -> dict[str, float]:
    """The threshold on ``no_answer`` above which a question is left unanswered that scores best, for both scores."""
    result = {}
    for name, score in (("exact", exact_match_score), ("f1", f1_score)):
        unanswered = {i: best_over_golds(score, "", texts) for i, texts in golds.items()}
        answered = {i: best_over_golds(score, predictions.get(i, ""), texts) for i, texts in golds.items()}
        total = best = sum(unanswered.values())
        threshold = 0.0
        for i in sorted(golds, key=lambda i: no_answer[i]):
            total += answered[i] - unanswered[i]
            if total > best:
                best, threshold = total, no_answer[i]
        result[f"best_{name}"] = 100.0 * best / len(golds)
        result[f"best_{name}_thresh"] = threshold
    return result


class FnlSquad(evaluate.Metric):
    """The metric: ``evaluate.load("path/to/fnl_squad.py").compute(predictions=..., references=...)``."""

    def _info(self):
        answers = datasets.Sequence({"text": datasets.Value("string"), "answer_start": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {
                        "id": datasets.Value("string"),
                        "prediction_text": datasets.Value("string"),
                        "no_answer_probability": datasets.Value("float32"),
                    },
                    "references": {"id": datasets.Value("string"), "answers": answers},
                }
            ),
        )

    def _compute(self, predictions, references):
        texts = {entry["id"]: entry["prediction_text"] for entry in predictions}
        golds = {entry["id"]: entry["answers"]["text"] for entry in references}
        result = squad_scores(texts, golds)
        if "NoAns_total" in result:
            no_answer = {entry["id"]: entry["no_answer_probability"] for entry in predictions}
            result |= best_thresholds(texts, golds, no_answer)
        return result
