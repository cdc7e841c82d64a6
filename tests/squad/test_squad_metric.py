"""Exact match and F1 against a table worked out by hand, torchmetrics, and the rules of the official scripts."""

from fractions import Fraction

import evaluate
import pytest
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st

from fnl_hf.squad import fnl_squad

MARY = ["Saint Bernadette Soubirous", "Bernadette", "the Virgin Mary"]
F = Fraction
# Prediction, gold answers, exact match and F1. F1 = 2PR/(P + R) of the words that are left by the normalization: lower
# case, no ASCII punctuation, then no articles, then single spaces.
PAIRS = [
    ("Denver Broncos", ["Denver Broncos"], 1, F(1)),
    ("denver BRONCOS", ["Denver Broncos"], 1, F(1)),
    ("the Denver Broncos", ["Denver Broncos"], 1, F(1)),
    ("a cat", ["the cat"], 1, F(1)),
    ("an apple a day", ["apple day"], 1, F(1)),
    ("Denver, Broncos!", ["Denver Broncos"], 1, F(1)),
    ("  two   spaces ", ["two spaces"], 1, F(1)),
    ("tab\tand\nline", ["tab and line"], 1, F(1)),
    ("no\u00a0break", ["no break"], 1, F(1)),
    ("1,000", ["1000"], 1, F(1)),
    ("$1.5 million", ["15 million"], 1, F(1)),
    ("50 %", ["50"], 1, F(1)),
    ("US", ["U.S."], 1, F(1)),
    ("it's", ["its"], 1, F(1)),
    ("C++", ["C#"], 1, F(1)),
    ("1895-1943", ["18951943"], 1, F(1)),
    ("_under_score_", ["underscore"], 1, F(1)),
    ("a-an-the", ["aanthe"], 1, F(1)),  # punctuation goes before articles do
    ('"quoted"', ["quoted"], 1, F(1)),
    ("Größe", ["größe."], 1, F(1)),
    ("東京", ["東京"], 1, F(1)),
    ("The Virgin Mary", MARY, 1, F(1)),  # the third of three
    ("cat!", ["dog", "a  cat"], 1, F(1)),
    ("Broncos Denver", ["Denver Broncos"], 0, F(1)),  # the order does not count
    ("Denver", ["Denver Broncos"], 0, F(2, 3)),  # P 1, R 1/2
    ("in 1895", ["1895"], 0, F(2, 3)),  # P 1/2, R 1
    ("Denver Broncos team", ["Denver Broncos"], 0, F(4, 5)),  # P 2/3, R 1
    ("Santa Clara, California", ["Santa Clara"], 0, F(4, 5)),
    ("Denver Panthers", ["Denver Broncos"], 0, F(1, 2)),  # P 1/2, R 1/2
    ("cat cat", ["cat"], 0, F(2, 3)),  # each word as often as it occurs
    ("cat", ["cat cat"], 0, F(2, 3)),
    ("cat cat dog", ["cat dog dog"], 0, F(2, 3)),  # two in common of three and three
    ("one two three four five", ["two four six"], 0, F(1, 2)),  # P 2/5, R 2/3
    ("Saint Bernadette", MARY, 0, F(4, 5)),  # P 1, R 2/3 of the first
    ("the quick brown fox", ["quick brown dog", "fox"], 0, F(2, 3)),  # 2/3 and 1/2
    ("a b c", ["b", "b c d e"], 0, F(2, 3)),  # 2/3 of both: "a" is an article
    ("Levi's Stadium", ["Levi’s Stadium"], 0, F(1, 2)),  # only ASCII punctuation is dropped
    ("“quoted”", ["quoted"], 0, F(0)),
    ("1895–1943", ["1895"], 0, F(0)),
    ("東京。", ["東京"], 0, F(0)),
    ("東京都", ["東京"], 0, F(0)),  # a word without spaces is one
    ("state-of-the-art", ["state of the art"], 0, F(0)),
    ("and/or", ["and or"], 0, F(0)),
    ("U. S.", ["US"], 0, F(0)),
    ("theater", ["the ater"], 0, F(0)),
    ("GRÖSSE", ["größe"], 0, F(0)),  # lower(), not casefold()
    ("İstanbul", ["istanbul"], 0, F(0)),  # lower() leaves a combining dot
    ("Zürich", ["Zurich"], 0, F(0)),
    ("Carolina Panthers", ["Denver Broncos"], 0, F(0)),
    ("", ["cat"], 0, F(0)),
    ("The The", ["the Beatles"], 0, F(0)),
]
# Texts that the normalization leaves no word of, and questions without answer: prediction, golds, then exact match and
# F1 of v1.1, and those of v2.0, which drops such golds and takes two texts without words for equal.
WORDLESS = [
    ("A", ["the"], (1, 0), (1, 1)),
    ("the", ["the the", "an"], (1, 0), (1, 1)),
    ("?!", ["..."], (1, 0), (1, 1)),
    ("", ["the"], (1, 0), (1, 1)),
    ("a", ["the", "cat"], (1, 0), (0, 0)),
    ("cat", ["the", "cat"], (1, 1), (1, 1)),
    ("cat", ["the"], (0, 0), (0, 0)),
    ("", [], None, (1, 1)),
    ("the", [], None, (1, 1)),
    ("cat", [], None, (0, 0)),
]


def v1(prediction, golds):
    scores = fnl_squad.squad_v1_scores({"q": prediction}, [("q", golds)])
    return scores["exact_match"] / 100, scores["f1"] / 100


def v2(prediction, golds):
    scores = fnl_squad.squad_v2_scores({"q": prediction}, {"q": golds}, {"q": 0.0}, 0.0)
    return scores["exact"] / 100, scores["f1"] / 100


def references(pairs):
    return [{"id": str(i), "answers": {"text": g, "answer_start": [0] * len(g)}} for i, (_, g) in enumerate(pairs)]


def predictions(pairs, **more):
    return [{"id": str(i), "prediction_text": p} | more for i, (p, _) in enumerate(pairs)]


@pytest.mark.parametrize("prediction, golds, exact, f1", PAIRS)
def test_pairs_score_as_worked_out_by_hand(prediction, golds, exact, f1):
    assert v1(prediction, golds) == v2(prediction, golds) == pytest.approx((exact, float(f1)), abs=1e-12)


@pytest.mark.parametrize("prediction, golds, of_v1, of_v2", WORDLESS)
def test_texts_without_words_score_as_in_the_official_scripts(prediction, golds, of_v1, of_v2):
    assert v2(prediction, golds) == of_v2
    if of_v1 is not None:
        assert v1(prediction, golds) == of_v1


def test_the_table_as_a_whole_is_its_mean_and_that_of_torchmetrics():
    pairs = [(prediction, golds) for prediction, golds, _, _ in PAIRS]
    means = [float(100 * sum(row[column] for row in PAIRS) / len(PAIRS)) for column in (2, 3)]
    ours = evaluate.load(fnl_squad.__file__, "v1.1").compute(
        predictions=predictions(pairs), references=references(pairs)
    )
    assert [ours["exact_match"], ours["f1"]] == pytest.approx(means)
    theirs = torchmetrics.text.SQuAD()(predictions(pairs), references(pairs))
    assert ours == pytest.approx({k: v.item() for k, v in theirs.items()}, rel=1e-5)
    negative = evaluate.load(fnl_squad.__file__, "v2.0").compute(
        predictions=predictions(pairs, no_answer_probability=0.0), references=references(pairs)
    )
    assert [negative["exact"], negative["f1"]] == pytest.approx(means)
    assert "NoAns_total" not in negative and negative["HasAns_total"] == negative["total"] == len(PAIRS)


WORDS = st.lists(st.sampled_from(["a", "The", "cat", "Cat.", "dog", "é", "1,5", "x-y"]), min_size=1, max_size=4)
TEXTS = WORDS.map(" ".join).filter(fnl_squad.normalize_answer)  # torchmetrics gives wordless pairs an F1 of 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_v1_scores_agree_with_torchmetrics(pairs):
    golds = [(str(index), texts) for index, (_, texts) in enumerate(pairs)]
    ours = fnl_squad.squad_v1_scores({str(index): text for index, (text, _) in enumerate(pairs)}, golds)
    theirs = torchmetrics.functional.text.squad(predictions(pairs), references(pairs))
    assert ours == pytest.approx({k: v.item() for k, v in theirs.items()}, rel=1e-5)


def test_questions_without_prediction_and_ids_that_occur_twice():
    """v1.1 counts each occurrence, v2.0 the last of an id, as in the official scripts."""
    assert fnl_squad.squad_v1_scores({}, [("q", ["cat"])]) == {"exact_match": 0.0, "f1": 0.0}
    golds = [("a", ["cat"]), ("a", ["dog"]), ("b", ["owl"])]
    scores = fnl_squad.squad_v1_scores({"a": "dog"}, golds)
    assert scores == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx(100 / 3)}
    pairs = [("dog", ["cat"]), ("dog", ["dog"]), ("owl", ["owl"])]
    twice = [entry | {"id": name} for name, entry in zip("aab", references(pairs))]
    answers = [entry | {"id": name} for name, entry in zip("aab", predictions(pairs, no_answer_probability=0.0))]
    found = evaluate.load(fnl_squad.__file__, "v2.0").compute(predictions=answers, references=twice)
    assert (found["exact"], found["total"]) == (100.0, 2)


def test_v2_scores_by_hand():
    """Two answerable questions (one right, one half right) and two without answer (one left alone, one answered)."""
    golds = {"a": ["red fox"], "b": ["blue whale"], "c": [], "d": []}
    best = {"a": "the red fox", "b": "whale", "c": "x", "d": "y"}
    no_answer = {"a": -3.0, "b": -1.0, "c": 2.0, "d": -2.0}
    predictions = [{"id": i, "prediction_text": best[i], "no_answer_probability": no_answer[i]} for i in golds]
    references = [{"id": i, "answers": {"text": t, "answer_start": [0] * len(t)}} for i, t in golds.items()]
    metric = evaluate.load(fnl_squad.__file__, "v2.0")
    scores = metric.compute(predictions=predictions, references=references, no_answer_threshold=0.0)
    f1_b = 2 * 1.0 * 0.5 / 1.5
    assert scores == pytest.approx(
        {
            "exact": 50.0, "f1": 100 * (1 + f1_b + 1 + 0) / 4, "total": 4,
            "HasAns_exact": 50.0, "HasAns_f1": 100 * (1 + f1_b) / 2, "HasAns_total": 2,
            "NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2,
            # Sorted by no_answer: a (+1) d (-1) b (+0 or +2/3) c (-1), from 2 unanswered ones.
            "best_exact": 75.0, "best_exact_thresh": -3.0, "best_f1": 75.0, "best_f1_thresh": -3.0,
        }
    )  # fmt: skip


def test_the_threshold_search_takes_equal_scores_one_by_one():
    """From one unanswered question: first a (+1), then b (-1), at the same score; the other way round 0, then +1."""
    golds, best = {"a": ["cat"], "b": []}, {"a": "cat", "b": "dog"}
    raw = {"a": 1.0, "b": 0.0}
    assert fnl_squad.best_threshold(raw, best, golds, {"a": -2.0, "b": -2.0}) == (2.0, -2.0)
    assert fnl_squad.best_threshold(raw, best, golds, {"b": -2.0, "a": -2.0}) == (1.0, 0.0)
    assert fnl_squad.best_threshold(raw, best | {"b": ""}, golds, {"b": -2.0, "a": 5.0}) == (2.0, 5.0)
