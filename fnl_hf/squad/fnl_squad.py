"""Exact match and F1 of SQuAD v1.1 and v2.0, as a metric module that ``evaluate.load`` finds by path, offline.

Rajpurkar et al. 2016 (v1.1) and 2018 (v2.0). Texts are compared without case, punctuation, articles and extra space;
each question counts its best gold answer. Scores are percentages and equal those of the official scripts.
"""

import collections
import re
import string
from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = "Exact match and F1 of SQuAD v1.1 and v2.0."
_CITATION = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016."
_INPUTS = """
predictions: dicts with "id", "prediction_text" and, for v2.0, "no_answer_probability" (any score that grows with it)
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


def f1_score(prediction: str, gold: str, empty_agrees: bool = False) -> float:
    """Harmonic mean of precision and recall of the words; ``empty_agrees``: 1 for two texts without words (v2.0)."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if empty_agrees and not (predicted and expected):
        return float(predicted == expected)
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def squad_v1_scores(predictions: dict[str, str], golds: Sequence[tuple[str, list[str]]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` as the v1.1 script has them: a question without prediction scores 0, and one whose id
    occurs twice counts twice."""
    answered = [(predictions[i], texts) for i, texts in golds if i in predictions]
    exact = sum(max(exact_match_score(prediction, gold) for gold in texts) for prediction, texts in answered)
    f1 = sum(max(f1_score(prediction, gold) for gold in texts) for prediction, texts in answered)
    return {"exact_match": 100.0 * exact / len(golds), "f1": 100.0 * f1 / len(golds)}


def squad_v2_scores(
    predictions: dict[str, str],
    golds: dict[str, list[str]],
    no_answer: dict[str, float],
    no_answer_threshold: float,
) -> dict[str, float]:
    """Scores as the v2.0 script has them, over all, answerable and unanswerable questions, and the best thresholds.

    Of questions with one id the last counts.

    Args:
        predictions: the best answer to each question, as if all were answerable.
        golds: gold answers, none for an unanswerable question.
        no_answer: a score for having no answer; where it exceeds ``no_answer_threshold`` the prediction is dropped.
    """
    subsets = {"HasAns_": [i for i in golds if golds[i]], "NoAns_": [i for i in golds if not golds[i]]}
    subsets = {prefix: subset for prefix, subset in subsets.items() if subset}
    result: dict[str, float] = {}
    for name, score in (("exact", exact_match_score), ("f1", lambda p, g: f1_score(p, g, empty_agrees=True))):
        raw = {
            i: max(score(predictions[i], gold) for gold in [t for t in texts if normalize_answer(t)] or [""])
            for i, texts in golds.items()
        }
        kept = {i: float(not golds[i]) if no_answer[i] > no_answer_threshold else raw[i] for i in golds}
        result[name] = _percentage(kept, golds)
        for prefix, subset in subsets.items():
            result[f"{prefix}{name}"] = _percentage(kept, subset)
        best, threshold = best_threshold(raw, predictions, golds, no_answer)
        result[f"best_{name}"], result[f"best_{name}_thresh"] = 100.0 * best / len(golds), threshold
    return result | {f"{prefix}total": len(subset) for prefix, subset in (("", golds), *subsets.items())}


def best_threshold(
    raw: dict[str, float], predictions: dict[str, str], golds: dict[str, list[str]], no_answer: dict[str, float]
) -> tuple[float, float]:
    """The best Σ of scores that a threshold on ``no_answer`` gives, and that threshold.

    Of equal scores each may be the threshold, as in the script, in the order of ``no_answer``.
    """
    total = best = float(sum(not texts for texts in golds.values()))
    threshold = 0.0
    for i in sorted((i for i in no_answer if i in golds), key=no_answer.__getitem__):
        if golds[i]:
            total += raw[i]
        elif predictions[i]:
            total -= 1.0
        if total > best:
            best, threshold = total, no_answer[i]
    return best, threshold


def _percentage(scores: dict[str, float], ids) -> float:
    return 100.0 * sum(scores[i] for i in ids) / len(ids)


class FnlSquad(evaluate.Metric):
    """``evaluate.load(path_of_this_file, "v1.1" or "v2.0").compute(predictions=..., references=...)``."""

    def _info(self):
        if self.config_name not in ("v1.1", "v2.0"):
            raise ValueError(f"the metric's configuration must be 'v1.1' or 'v2.0', got {self.config_name!r}")
        prediction = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        if self.config_name == "v2.0":
            prediction["no_answer_probability"] = datasets.Value("float64")
        texts, starts = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int64"))
        reference = {"id": datasets.Value("string"), "answers": {"text": texts, "answer_start": starts}}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": prediction, "references": reference}),
        )

    def _compute(self, predictions, references, no_answer_threshold=1.0):
        texts = {entry["id"]: entry["prediction_text"] for entry in predictions}
        golds = [(entry["id"], entry["answers"]["text"]) for entry in references]
        if self.config_name == "v1.1":
            return squad_v1_scores(texts, golds)
        no_answer = {entry["id"]: entry["no_answer_probability"] for entry in predictions}
        return squad_v2_scores(texts, dict(golds), no_answer, no_answer_threshold)
