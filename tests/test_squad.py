"""SQuAD features, answers and scores against brute force, torchmetrics and scores worked out by hand."""

import itertools
import json

import evaluate
import numpy as np
import pytest
import torchmetrics
from datasets import Dataset

from fnl_hf import FnlBertConfig, FnlBertForQuestionAnswering, UserInputError, ask
from fnl_hf.data.squad import EXAMPLE_FEATURES, FeatureMaker, load_sample, read_squad_file
from fnl_hf.data.squad_answers import answers_from_logits, best_spans
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.metrics import fnl_squad

CONTEXT = "Ada Lovelace wrote the first programme for Babbage’s engine. " * 3 + "Grace Hopper built a compiler in 1952."


def example(question="Who built a compiler?", answer="Grace Hopper", context=CONTEXT, **kwargs):
    start = context.index(answer) if answer else 0
    answers = {"text": [answer], "answer_start": [start]} if answer else {"text": [], "answer_start": []}
    return {"id": "q1", "question": question, "context": context, "answers": answers} | kwargs


def dataset(*examples):
    return Dataset.from_list(list(examples), features=EXAMPLE_FEATURES)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": [CONTEXT, "Who built a compiler? When was it?"]}), 90, 64)


# ---- features ----


def test_sample_is_large_enough_and_sound():
    """``read_squad_file`` has checked every offset."""
    train, validation = load_sample("train"), load_sample("validation")
    assert len(train) >= 60 and len(set(train["context"])) >= 12
    assert len(validation) >= 20 and not set(train["context"]) & set(validation["context"])


def test_windows_cover_the_context_and_overlap_by_the_stride(tokenizer):
    maker = FeatureMaker(tokenizer, max_seq_length=40, doc_stride=7)
    features = maker.evaluation(dataset(example()))
    assert len(features) > 1 and set(features["example_id"]) == {"q1"}
    windows = [[tuple(o) for o in offsets if o[0] >= 0] for offsets in features["offset_mapping"]]
    whole = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert windows[0] + [o for w in windows[1:] for o in w[7:]] == [tuple(o) for o in whole]
    assert all(first[-7:] == second[:7] for first, second in itertools.pairwise(windows))
    assert max(len(ids) for ids in features["input_ids"]) == 40


def test_training_positions_mark_the_answer_or_the_cls_token(tokenizer):
    maker = FeatureMaker(tokenizer, max_seq_length=40, doc_stride=7)
    examples = dataset(example(), example(answer="", id="q2"))
    features, offsets = maker.train(examples), maker.evaluation(examples)
    found = 0
    for feature, evaluation in zip(features, offsets):
        start, end = feature["start_positions"], feature["end_positions"]
        if start == 0:
            assert end == 0 and feature["input_ids"][0] == tokenizer.cls_token_id
            continue
        found += 1
        assert evaluation["example_id"] == "q1"
        assert CONTEXT[evaluation["offset_mapping"][start][0] : evaluation["offset_mapping"][end][1]] == "Grace Hopper"
    holding = sum(any(o == [CONTEXT.index("Grace"), CONTEXT.index("Grace") + 5] or o[0] == CONTEXT.index("Grace")
                      for o in e["offset_mapping"]) for e in offsets if e["example_id"] == "q1")  # fmt: skip
    assert 1 <= found <= holding


def test_an_answer_cut_off_by_a_window_is_no_answer_there(tokenizer):
    maker = FeatureMaker(tokenizer, max_seq_length=40, doc_stride=7)
    long_answer = CONTEXT[CONTEXT.index("Babbage") : CONTEXT.index("compiler")]  # longer than a window
    features = maker.train(dataset(example(answer=long_answer)))
    assert set(features["start_positions"]) == {0} == set(features["end_positions"])


def test_a_long_question_is_cut_to_64_tokens(tokenizer):
    features = FeatureMaker(tokenizer, 100, 7).train(dataset(example(question="who built " * 60)))
    separator = features["input_ids"][0].index(tokenizer.sep_token_id)
    assert separator == 1 + 64


@pytest.mark.parametrize(
    "lengths, message",
    [((30, 40), r"--doc_stride \(40\) must be smaller than the window"), ((4, 0), r"--max_seq_length \(4\) leaves no"),
     ((40, -1), r"--doc_stride \(-1\) is negative")],
)  # fmt: skip
def test_impossible_lengths_are_refused(tokenizer, lengths, message):
    with pytest.raises(UserInputError, match=message):
        FeatureMaker(tokenizer, *lengths).train(dataset(example()))


def squad_json(tmp_path, *questions, context=CONTEXT):
    path = tmp_path / "squad.json"
    path.write_text(
        json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]})
    )
    return str(path)


def question(start, text="Grace Hopper", id="a", **kwargs):
    return {"id": id, "question": "Who?", "answers": [{"text": text, "answer_start": start}]} | kwargs


def test_unanswerable_questions_have_no_answers(tmp_path):
    place = CONTEXT.index("Grace")
    impossible = question(0, id="b", is_impossible=True, plausible_answers=[{"text": "x", "answer_start": 0}])
    read = read_squad_file(squad_json(tmp_path, question(place), impossible))
    assert read["answers"][:] == [
        {"text": ["Grace Hopper"], "answer_start": [place]},
        {"text": [], "answer_start": []},
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"{torn", "not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"version": 1}', "not in SQuAD's layout .* KeyError\\('data'\\)"),
        (b"[1, 2]", "not in SQuAD's layout"),
        (b'{"data": []}', "no questions"),
        (b'{"data": [{"paragraphs": [{"context": "x", "qas": ["q"]}]}]}', "not in SQuAD's layout"),
        (b'{"data": [{"paragraphs": [{"context": null, "qas": [{"id": 1, "question": "q"}]}]}]}', ".*must be texts"),
        (
            b'{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 1, "question": "q", "answers": '
            b'[{"text": "x", "answer_start": "0"}]}]}]}]}',
            ".*answer_start must be an integer",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserInputError, match=f"bad.json: {message}"):
        read_squad_file(str(path))


def test_bad_questions_are_refused(tmp_path):
    place = CONTEXT.index("Grace")
    with pytest.raises(UserInputError, match="question a: the answer 'Grace Hopper' is not at offset 3"):
        read_squad_file(squad_json(tmp_path, question(3)))
    with pytest.raises(UserInputError, match="offset -1"):
        read_squad_file(squad_json(tmp_path, question(-1)))
    with pytest.raises(UserInputError, match="question id 'a' occurs twice"):
        read_squad_file(squad_json(tmp_path, question(place), question(place)))


# ---- answers ----


def test_best_spans_equal_brute_force():
    generator = np.random.default_rng(3)
    start, end = generator.normal(size=(2, 13))
    offsets = np.array([[-1, -1]] * 4 + [[3 * i, 3 * i + 2] for i in range(8)] + [[-1, -1]])
    spans = sorted(best_spans(start, end, offsets, n_best_size=13, max_answer_length=3), reverse=True)
    expected = sorted(
        (
            (start[i], end[j], offsets[i, 0], offsets[j, 1])
            for i, j in itertools.product(range(4, 12), repeat=2)
            if 0 <= j - i < 3
        ),
        reverse=True,
    )
    np.testing.assert_allclose(spans, expected)


def logits_for(features, span_score, null_score):
    """Logits that put ``span_score`` on "Grace Hopper" where a window holds it and ``null_score`` on [CLS]."""
    longest = max(len(o) for o in features["offset_mapping"])
    start, end = np.full((2, len(features), longest), -5.0)
    start[:, 0] = end[:, 0] = null_score / 2
    place = CONTEXT.index("Grace Hopper")
    for row, offsets in enumerate(features["offset_mapping"]):
        for column, (first, last) in enumerate(offsets):
            if first == place:
                start[row, column] = span_score / 2
            if last == place + len("Grace Hopper"):
                end[row, column] = span_score / 2
    return start, end


def test_answers_and_the_no_answer_threshold(tokenizer):
    examples = dataset(example())
    features = FeatureMaker(tokenizer, 40, 7).evaluation(examples)
    start, end = logits_for(features, span_score=6.0, null_score=8.0)
    plain = answers_from_logits(examples, features, start, end)
    assert plain.text == {"q1": "Grace Hopper"} and not plain.null_odds
    assert sum(entry["probability"] for entry in plain.nbest["q1"]) == pytest.approx(1.0)
    assert len(plain.nbest["q1"]) == 20 and len(answers_from_logits(examples, features, start, end, 3).nbest["q1"]) == 3
    negative = answers_from_logits(examples, features, start, end, version_2_with_negative=True)
    assert negative.text == {"q1": ""} and negative.best_span == {"q1": "Grace Hopper"}
    assert negative.null_odds["q1"] == pytest.approx(2.0)
    assert negative.nbest["q1"][0]["text"] == ""
    lenient = answers_from_logits(
        examples, features, start, end, version_2_with_negative=True, null_score_diff_threshold=2.5
    )
    assert lenient.text == {"q1": "Grace Hopper"}
    short = answers_from_logits(examples, features, start, end, max_answer_length=1)
    assert len(tokenizer.tokenize(short.text["q1"])) == 1


def test_ask_answers_from_the_context(tokenizer, dimensions):
    dimensions |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model = FnlBertForQuestionAnswering(FnlBertConfig(**dimensions))
    answer = ask(model, "Who built a compiler?", CONTEXT, tokenizer, doc_stride=16)
    assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"] and 0 < answer["score"] <= 1
    assert model.training, "the model is left as it was"
    refused = ask(model, "Who?", CONTEXT, tokenizer, doc_stride=16, version_2_with_negative=True,
                  null_score_diff_threshold=-1e9)  # fmt: skip
    assert (refused["answer"], refused["start"], refused["end"]) == ("", 0, 0)
    with pytest.raises(UserInputError, match="must not be empty"):
        ask(model, " ", CONTEXT, tokenizer)


# ---- scores ----

V1_PAIRS = [
    ("the Cat", ["cat"]),
    ("cat!", ["a  cat", "dog"]),
    ("black cat", ["cat"]),
    ("", ["cat"]),
    ("cat cat dog", ["cat dog dog"]),
    ("Größe", ["größe."]),
    ("an owl", ["the", "owl"]),
    ("1,000", ["1000"]),
    ("state-of-the-art", ["state of the art"]),
]


def test_v1_scores_agree_with_torchmetrics():
    for count in range(1, len(V1_PAIRS) + 1):
        pairs = V1_PAIRS[:count]
        predictions = [{"id": str(i), "prediction_text": p} for i, (p, _) in enumerate(pairs)]
        references = [
            {"id": str(i), "answers": {"text": g, "answer_start": [0] * len(g)}} for i, (_, g) in enumerate(pairs)
        ]
        metric = evaluate.load(fnl_squad.__file__, "v1.1")
        ours = metric.compute(predictions=predictions, references=references)
        theirs = torchmetrics.text.SQuAD()(predictions, references)
        assert ours == pytest.approx({k: v.item() for k, v in theirs.items()}, rel=1e-5)


def test_v1_texts_without_words_score_as_in_the_official_script():
    """Both normalize to nothing: exact match 1, F1 0. torchmetrics gives F1 1 here."""
    assert fnl_squad.squad_v1_scores({"q": "the"}, {"q": ["a"]}) == {"exact_match": 100.0, "f1": 0.0}
    assert fnl_squad.squad_v1_scores({}, {"q": ["cat"]}) == {"exact_match": 0.0, "f1": 0.0}


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


def test_positions_beyond_a_feature_are_ignored(tokenizer):
    """Logits are padded to the longest feature of the evaluation."""
    examples = dataset(example())
    features = FeatureMaker(tokenizer, 40, 7).evaluation(examples)
    start, end = logits_for(features, 6.0, 0.0)
    padded = [np.pad(logits, ((0, 0), (0, 5)), constant_values=100.0) for logits in (start, end)]
    assert answers_from_logits(examples, features, *padded).text == {"q1": "Grace Hopper"}
