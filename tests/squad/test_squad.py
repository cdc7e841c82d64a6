"""SQuAD features and answers against a transcription of ``run_squad.py`` in google-research/bert."""

import copy
import json

import numpy as np
import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from hypothesis import given, settings
from hypothesis import strategies as st

from fnl_hf import UserInputError
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.squad import features as squad
from fnl_hf.squad.answers import AnswerOptions, answers_from_logits
from fnl_hf.squad.features import EXAMPLE_FEATURES, FeatureMaker, load_sample, questions_fingerprint, read_squad_file
from fnl_hf.squad.trainer import SquadTrainer
from fnl_hf.training.arguments import FnlTrainingArguments

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


def original_spans(length, window, doc_stride):
    """(start, length) of the windows of a context of ``length`` tokens, as in the original."""
    spans, start = [], 0
    while True:
        size = min(length - start, window)
        spans.append((start, size))
        if start + size == length:
            return spans
        start += min(size, doc_stride)


def original_is_max_context(spans, index, position):
    best_score = best_index = None
    for span_index, (start, length) in enumerate(spans):
        end = start + length - 1
        if position < start or position > end:
            continue
        score = min(position - start, end - position) + 0.01 * length
        if best_score is None or score > best_score:
            best_score, best_index = score, span_index
    return index == best_index


def context_tokens(tokenizer, context):
    return tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


@pytest.mark.parametrize("doc_stride", [1, 7, 16, 1000])
def test_windows_and_their_claims_on_a_token_are_the_originals(tokenizer, doc_stride):
    features = FeatureMaker(tokenizer, 40, doc_stride).eval_dataset(dataset(example()))
    whole = context_tokens(tokenizer, CONTEXT)
    question = len(tokenizer.tokenize(example()["question"]))
    spans = original_spans(len(whole), 40 - question - 3, doc_stride)
    assert len(spans) > 2 and len(features) == len(spans) and set(features["example_id"]) == {"q1"}
    for index, (feature, (start, length)) in enumerate(zip(features, spans)):
        inside = [position for position, offset in enumerate(feature["offset_mapping"]) if offset != [-1, -1]]
        assert inside == list(range(question + 2, question + 2 + length))
        assert [tuple(feature["offset_mapping"][position]) for position in inside] == whole[start : start + length]
        claims = [original_is_max_context(spans, index, start + i) for i in range(length)]
        assert feature["token_is_max_context"] == [False] * (question + 2) + claims + [False]


def test_padding_on_the_left_is_refused(tokenizer):
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    with pytest.raises(UserInputError, match=r"padding_side \('left'\) must be 'right' for question answering"):
        FeatureMaker(left, 40, 4)


@pytest.mark.parametrize("doc_stride", [5, 16])
def test_training_positions_mark_the_answer_where_a_window_holds_all_of_it(tokenizer, doc_stride):
    """For answers of 1, 2, 3, ... tokens anywhere, also those that no window can hold."""
    whole = context_tokens(tokenizer, CONTEXT)
    marked = [(first, last) for first in range(0, len(whole), 3) for last in (first, first + 4, first + 31)]
    marked = [(first, last) for first, last in marked if last < len(whole)]
    rows = []
    for first, last in marked:
        start, end = whole[first][0], whole[last][1]
        answers = {"text": [CONTEXT[start:end]], "answer_start": [start]}
        rows.append(example() | {"id": str(len(rows)), "answers": answers})
    rows.append(example(answer="") | {"id": str(len(rows))})
    features = FeatureMaker(tokenizer, 40, doc_stride).train_dataset(dataset(*rows))
    question = len(tokenizer.tokenize(example()["question"]))
    spans = original_spans(len(whole), 40 - question - 3, doc_stride)
    expected = []
    for first, last in [*marked, (-1, -1)]:
        for start, length in spans:
            holds = start <= first and last < start + length
            expected.append((first - start + question + 2, last - start + question + 2) if holds else (0, 0))
    assert list(zip(features["start_positions"], features["end_positions"])) == expected
    assert {ids[0] for ids in features["input_ids"]} == {tokenizer.cls_token_id}


@pytest.mark.parametrize("context", [
    "Zürich—naïve 東京 tower 🙂 emoji 👩‍🔬 end",  # of one, two and more code points, outside the basic plane too
    "e\u0301te\u0301 I\u0307zmir İzmir ß ﬁne \u200bzero width soft\u00adhyphen",
    "مرحبا بالعالم  שלום\u00a0עולם\tнаука\nline [SEP] [MASK] token",
])  # fmt: skip
def test_offsets_count_characters_of_the_context(tokenizer, context):
    """The tokens of each word, and of two words, are those characters again."""
    words, start = [], 0
    for word in context.split():
        start = context.index(word, start)
        words.append((start, start + len(word)))
        start += len(word)
    answers = words + [(first[0], second[1]) for first, second in zip(words, words[1:])]
    rows = [
        {"id": str(i), "question": "Who?", "context": context,
         "answers": {"text": [context[start:end]], "answer_start": [start]}} for i, (start, end) in enumerate(answers)
    ]  # fmt: skip
    maker = FeatureMaker(tokenizer, 200, 7)
    trained, read = maker.train_dataset(dataset(*rows)), maker.eval_dataset(dataset(*rows))
    assert len(trained) == len(rows), "one window each"
    for row, feature, evaluation in zip(rows, trained, read):
        offsets, text = evaluation["offset_mapping"], row["answers"]["text"][0]
        found = context[offsets[feature["start_positions"]][0] : offsets[feature["end_positions"]][1]]
        assert found == text.strip("\u200b"), "of a character that the tokenizer drops nothing is left"
    ids = {token for name in ("[SEP]", "[MASK]") for token in [tokenizer.convert_tokens_to_ids(name)]}
    assert all(sum(token in ids for token in feature) == 2 for feature in trained["input_ids"])


def test_white_space_around_an_answer_has_no_token(tokenizer):
    text = " Grace Hopper "
    answers = {"text": [text], "answer_start": [CONTEXT.index(text)]}
    maker = FeatureMaker(tokenizer, 40, 7)
    spaced, plain = (maker.train_dataset(dataset(row)) for row in (example() | {"answers": answers}, example()))
    assert spaced["start_positions"][:] == plain["start_positions"][:] and set(plain["start_positions"]) != {0}
    assert spaced["end_positions"][:] == plain["end_positions"][:]


def test_features_are_made_once_and_the_same_on_several_processes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(squad, "BATCH_SIZE", 2)
    examples = dataset(*(example() | {"id": str(i)} for i in range(5)))
    made = FeatureMaker(tokenizer, 40, 7, str(tmp_path / "one")).train_dataset(examples)
    parallel = FeatureMaker(tokenizer, 40, 7, str(tmp_path / "two"), num_proc=2).train_dataset(examples)
    assert made.to_dict() == parallel.to_dict() and str(tmp_path / "one") in made.cache_files[0]["filename"]
    tokenizer("x", truncation=True, max_length=5, padding="max_length")  # leaves its mark on a fast tokenizer

    def not_again(batch, maker):
        raise AssertionError("made again")

    monkeypatch.setattr(squad, "train_features", not_again)
    again = FeatureMaker(tokenizer, 40, 7, str(tmp_path / "one")).train_dataset(examples)
    assert again.to_dict() == made.to_dict()
    for other, length, stride in ((examples, 41, 7), (examples, 40, 8), (dataset(example(question="Who?")), 40, 7)):
        with pytest.raises(DatasetGenerationError):
            FeatureMaker(tokenizer, length, stride, str(tmp_path / "one")).train_dataset(other)


def test_the_fingerprint_covers_every_part_of_a_question():
    base = example()
    others = [base | {"id": "q2"}, base | {"question": "Who?"}, example(context=CONTEXT + "!"), example(answer="")]
    found = {questions_fingerprint(dataset(row)) for row in (base, *others)}
    assert len(found) == 5 and questions_fingerprint(dataset(base)) in found


def test_a_long_question_is_cut_to_64_tokens(tokenizer):
    features = FeatureMaker(tokenizer, 100, 7).train_dataset(dataset(example(question="who built " * 60)))
    separator = features["input_ids"][0].index(tokenizer.sep_token_id)
    assert separator == 1 + 64


@pytest.mark.parametrize(
    "lengths, message",
    [((40, 0), r"--doc_stride \(0\) must be at least 1"), ((0, 7), r"--max_seq_length \(0\) must be at least 1"),
     ((9, 7), r"--max_seq_length \(9\) leaves no room for the context after a question of \d+ tokens")],
)  # fmt: skip
def test_impossible_lengths_are_refused(tokenizer, lengths, message):
    with pytest.raises(UserInputError, match=message):
        FeatureMaker(tokenizer, *lengths).train_dataset(dataset(example()))


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
        (b"[" * 100_000, "not JSON"),
        (b'{"data": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"version": 1}', "not in SQuAD's layout .* KeyError\\('data'\\)"),
        (b"[1, 2]", "not in SQuAD's layout"),
        (b'{"data": []}', "contains no questions"),
        (b'{"data": [{"paragraphs": [{"context": "x", "qas": ["q"]}]}]}', "not in SQuAD's layout"),
        (b'{"data": [{"paragraphs": [{"context": null, "qas": [{"id": 1, "question": "q"}]}]}]}', ".*must be strings"),
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


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = squad_json(tmp_path, question(CONTEXT.index("Grace")))
    path = tmp_path / "marked.json"
    path.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "squad.json").read_bytes())
    assert read_squad_file(str(path))[:] == read_squad_file(file)[:]


GRACE = {"text": "Grace Hopper", "answer_start": CONTEXT.index("Grace")}
# fields of a question (None: of its context) -> what is said of it
BAD_QUESTIONS = {
    "half a pair in the id": (
        {"id": "a\ud800"},
        r"question 'a\\ud800': the character at position 1 is not Unicode: 'a\\ud800'$",
    ),
    "half a pair in the question": (
        {"question": "Who\udfff?"},
        "question 'a': the character at position 3 is not Unicode: ",
    ),
    "half a pair in the context": (
        {None: CONTEXT + "\ud83d"},
        f"'a': the character at position {len(CONTEXT)} is not Unicode: ",
    ),
    "half a pair in an answer": (
        {"answers": [GRACE | {"text": "\udc00"}]},
        "'a': the character at position 0 is not Unicode: ",
    ),
    "a list for an id": ({"id": ["a"]}, r"the id of a question must be a string, not \['a'\]"),
    "no id": ({"id": None}, "the id of a question must be a string, not None"),
    "a word for a truth": ({"is_impossible": "false"}, "'a': is_impossible must be true or false, not 'false'"),
    "a number for a truth": ({"is_impossible": 0}, "'a': is_impossible must be true or false, not 0"),
    "null for a truth": ({"is_impossible": None}, "'a': is_impossible must be true or false, not None"),
    "an object for answers": ({"answers": {}}, "'a': answers must be a list, not {}"),
    "an answer far away": ({"answers": [GRACE | {"answer_start": 10**30}]}, "'Grace Hopper' is not at offset 10{30} "),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_a_bad_question_is_refused_in_one_line(tmp_path, name):
    fields, message = BAD_QUESTIONS[name]
    fields = dict(fields)
    file = squad_json(tmp_path, question(GRACE["answer_start"]) | fields, context=fields.pop(None, CONTEXT))
    with pytest.raises(UserInputError, match=f"^{file}: .*{message}") as refusal:
        read_squad_file(file)
    str(refusal.value).encode()  # and can be printed


def test_texts_that_are_not_unicode_are_refused_where_features_are_made(tokenizer):
    for texts in (("Who\ud800?", CONTEXT), ("Who?", CONTEXT + "\udfff")):
        with pytest.raises(UserInputError, match="^question and context: the character at position "):
            next(FeatureMaker(tokenizer, 40, 16).encode(*([text] for text in texts)))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserInputError, match=f"^{tmp_path}: not a file$"):
        read_squad_file(str(tmp_path))


def test_bad_columns_of_a_data_set_are_refused(tmp_path):
    row = example() | {"answers": {"text": ["Grace Hopper"], "answer_start": ["here"]}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        UserInputError, match=f"^--dataset_name {tmp_path}/data does not have the layout of rajpurkar/squad: "
    ):
        squad.load_squad_hub(str(tmp_path / "data"), None, "train", cache_dir=str(tmp_path / "cache"))


def test_bad_questions_are_refused(tmp_path):
    place = CONTEXT.index("Grace")
    with pytest.raises(UserInputError, match="question a: the answer 'Grace Hopper' is not at offset 3"):
        read_squad_file(squad_json(tmp_path, question(3)))
    with pytest.raises(UserInputError, match="offset -1"):
        read_squad_file(squad_json(tmp_path, question(-1)))
    twice = read_squad_file(squad_json(tmp_path, question(place), question(place)))
    with pytest.raises(UserInputError, match="question id 'a' occurs 2 times among the validation questions"):
        squad.validate_ids(twice, "validation")


def test_scores_need_predictions(tmp_path):
    args = FnlTrainingArguments(output_dir=str(tmp_path / "out"), prediction_loss_only=True, report_to="none")
    with pytest.raises(UserInputError, match=r"--prediction_loss_only \(True\) keeps no predictions"):
        SquadTrainer(None, args, answer_options=AnswerOptions())
    assert not (tmp_path / "out").exists()


# ---- answers ----


def original_predictions(context, features, start_logits, end_logits, n_best, longest, negative):
    """n-best list of (text, start logit, end logit, probability) and, of v2.0, the score difference: ``features`` has a
    list of (offsets, is max context) a window."""
    prelim, null = [], (1e6, 0.0, 0.0)
    for (offsets, claims), start, end in zip(features, start_logits, end_logits):
        if start[0] + end[0] < null[0]:
            null = (start[0] + end[0], start[0], end[0])
        best = [sorted(enumerate(x), key=lambda pair: pair[1], reverse=True)[:n_best] for x in (start, end)]
        for i, _ in best[0]:
            for j, _ in best[1]:
                if offsets[i] == [-1, -1] or offsets[j] == [-1, -1] or not claims[i]:
                    continue
                if j < i or j - i + 1 > longest:
                    continue
                prelim.append((context[offsets[i][0] : offsets[j][1]], start[i], end[j]))
    if negative:
        prelim.append(("", null[1], null[2]))
    nbest, seen = [], set()
    for text, start, end in sorted(prelim, key=lambda entry: entry[1] + entry[2], reverse=True):
        if len(nbest) >= n_best:
            break
        if text in seen:
            continue
        seen.add(text)
        nbest.append((text, start, end))
    if negative and "" not in seen:
        nbest.append(("", null[1], null[2]))
    if not nbest:
        nbest.append(("", 0.0, 0.0))
    scores = [np.exp(start + end) for _, start, end in nbest]
    entries = [(*entry, score / sum(scores)) for entry, score in zip(nbest, scores)]
    best = next(((start, end) for text, start, end in nbest if text), None)
    return entries, null[0] - best[0] - best[1] if best else None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 20]), st.sampled_from([1, 4, 30]), st.booleans(), st.booleans()
)
def test_answers_are_the_originals(seed, n_best, longest, negative, ties):
    generator = np.random.default_rng(seed)
    features, windows = {"example_id": [], "offset_mapping": [], "token_is_max_context": []}, []
    for start, length in original_spans(23, 11, 4):
        spans = original_spans(23, 11, 4)
        offsets = [[-1, -1]] * 4 + [[3 * i, 3 * i + 2] for i in range(start, start + length)] + [[-1, -1]]
        claims = [original_is_max_context(spans, len(windows), start + i) for i in range(length)]
        windows.append((offsets, [False] * 4 + claims + [False]))
        for name, values in zip(features, ("q", *windows[-1])):
            features[name].append(values)
    context = "".join(chr(generator.integers(97, 100)) for _ in range(70))  # texts that occur more than once
    logits = [[generator.normal(size=len(offsets)) for offsets, _ in windows] for _ in range(2)]
    if ties:
        logits = [[np.round(values) for values in column] for column in logits]
    options = AnswerOptions(n_best, longest, negative)
    found = answers_from_logits({"id": ["q"], "context": [context]}, features, *logits, options)
    lists = [[values.tolist() for values in column] for column in logits]
    entries, odds = original_predictions(context, windows, *lists, n_best, longest, negative)
    ours = [(e["text"], e["start_logit"], e["end_logit"], e["probability"]) for e in found.nbest["q"]]
    assert [entry[:3] for entry in ours] == [entry[:3] for entry in entries]
    assert [entry[3] for entry in ours] == pytest.approx([entry[3] for entry in entries])
    if negative and odds is not None:
        assert found.null_odds["q"] == odds and found.text["q"] == ("" if odds > 0 else found.best_span["q"])
        assert found.best_span["q"] == next(text for text, *_ in entries if text)
    if not negative:
        assert found.text["q"] == entries[0][0] and not found.null_odds


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
    features = FeatureMaker(tokenizer, 40, 7).eval_dataset(examples)
    start, end = logits_for(features, span_score=6.0, null_score=8.0)
    plain = answers_from_logits(examples, features, start, end, AnswerOptions())
    assert plain.text == {"q1": "Grace Hopper"} and not plain.null_odds
    assert sum(entry["probability"] for entry in plain.nbest["q1"]) == pytest.approx(1.0)
    negative = answers_from_logits(examples, features, start, end, AnswerOptions(version_2_with_negative=True))
    assert negative.text == {"q1": ""} and negative.best_span == {"q1": "Grace Hopper"}
    assert negative.null_odds["q1"] == pytest.approx(2.0)
    assert negative.nbest["q1"][0]["text"] == ""
    options = AnswerOptions(version_2_with_negative=True, null_score_diff_threshold=2.5)
    lenient = answers_from_logits(examples, features, start, end, options)
    assert lenient.text == {"q1": "Grace Hopper"}
    short = answers_from_logits(examples, features, start, end, AnswerOptions(max_answer_length=1))
    assert len(tokenizer.tokenize(short.text["q1"])) == 1


def test_positions_beyond_a_feature_are_ignored(tokenizer):
    """Logits are padded to the longest feature of the evaluation."""
    examples = dataset(example())
    features = FeatureMaker(tokenizer, 40, 7).eval_dataset(examples)
    start, end = logits_for(features, 6.0, 0.0)
    padded = [np.pad(logits, ((0, 0), (0, 5)), constant_values=100.0) for logits in (start, end)]
    assert answers_from_logits(examples, features, *padded, AnswerOptions()).text == {"q1": "Grace Hopper"}
