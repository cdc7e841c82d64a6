"""Questions asked one by one and many at once, from Python and the command line."""

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import BertConfig

from fnl_hf import FactorizationConfig, FnlBertConfig, FnlBertForQuestionAnswering, UserInputError, ask, factorize
from fnl_hf.commands import cli
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.squad.answers import best_spans

CONTEXT = "Ada Lovelace wrote the first programme for Babbage’s engine. " * 3 + "Grace Hopper built a compiler in 1952."
SHORT = "Ada wrote the programme,\tGrace\nthe compiler."
QUESTIONS = ["Who built a compiler?", "Who wrote the first programme for the engine?", "When?"]
CONTEXTS = [CONTEXT, SHORT, CONTEXT[61:]]
LENGTHS = {"max_seq_length": 50, "doc_stride": 16}


@pytest.fixture
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": [CONTEXT, *QUESTIONS]}), 90, 64)


@pytest.fixture
def model(tokenizer, dimensions):
    dimensions |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    return FnlBertForQuestionAnswering(FnlBertConfig(**dimensions))


def test_ask_answers_from_the_context(model, tokenizer):
    model.train()
    answer = ask(model, QUESTIONS[0], CONTEXT, tokenizer, doc_stride=16)
    assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"] and 0 < answer["score"] <= 1
    assert model.training, "the model is left as it was"
    refused = ask(model, "Who?", CONTEXT, tokenizer, doc_stride=16, version_2_with_negative=True,
                  null_score_diff_threshold=-1e9)  # fmt: skip
    assert (refused["answer"], refused["start"], refused["end"]) == ("", 0, 0)


def test_many_questions_get_the_answers_that_each_gets_alone(model, tokenizer):
    sizes = []
    model.register_forward_pre_hook(lambda _, args, inputs: sizes.append(inputs["input_ids"].shape), with_kwargs=True)
    alone = [ask(model, *pair, tokenizer, **LENGTHS) for pair in zip(QUESTIONS, CONTEXTS)]
    windows = sum(rows for rows, _ in sizes)
    assert len(sizes) == 3 and windows > 7
    for batch_size in (1, 5, 32):
        sizes.clear()
        together = ask(model, QUESTIONS, CONTEXTS, tokenizer, **LENGTHS, batch_size=batch_size)
        assert [rows for rows, _ in sizes] == [batch_size] * (windows // batch_size) + [windows % batch_size] * (
            windows % batch_size > 0
        )
        for one, other in zip(alone, together, strict=True):
            assert one == other | {"score": pytest.approx(one["score"], rel=1e-4)}
    assert ask(model, [], [], tokenizer) == []


def test_windows_are_as_long_as_the_positions_of_a_roberta_allow(tokenizer, dimensions):
    """Of its 40 positions two are spent on padding: what is asked with more tokens is asked with 38."""
    dimensions |= {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": 1}
    model = transformers.RobertaForQuestionAnswering(transformers.RobertaConfig(**dimensions))
    shapes = []
    model.register_forward_pre_hook(lambda _, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    for is_factorized in (False, True):
        if is_factorized:
            factorize(model, FactorizationConfig(rank_scale=0.5, include=["Embedding"]))
            shapes.clear()
        asked = [ask(model, QUESTIONS[0], CONTEXT, tokenizer, max_seq_length=size, doc_stride=16) for size in (38, 384)]
        assert asked[0] == asked[1] and [length for _, length in shapes] == [38, 38]


def test_what_cannot_be_asked_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(UserInputError, match="must not be empty, but number 1 is"):
        ask(model, " ", CONTEXT, tokenizer)
    with pytest.raises(UserInputError, match="must not be empty, but number 2 is"):
        ask(model, ["Who?", "Who?"], [CONTEXT, ""], tokenizer)
    with pytest.raises(UserInputError, match="one question and one context, or a list of each"):
        ask(model, QUESTIONS, CONTEXT, tokenizer)
    with pytest.raises(UserInputError, match="3 questions and 2 contexts"):
        ask(model, QUESTIONS, CONTEXTS[:2], tokenizer)
    with pytest.raises(UserInputError, match=r"batch_size \(0\)"):
        ask(model, "Who?", CONTEXT, tokenizer, batch_size=0)
    with pytest.raises(UserInputError, match="no question answering model in .*nothing"):
        ask(tmp_path / "nothing", "Who?", CONTEXT)


def test_models_that_cannot_answer_are_refused(tokenizer, dimensions, tmp_path):
    """Loaded, or the caller's own: a random head answers at random."""
    dimensions |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "num_labels": 3}
    lacking = "^no question answering model in .*: it lacks qa_outputs.bias, which would be random"
    for name, there, held in (
        ("BertForMaskedLM", lacking, "this BertForMaskedLM is not .*: it returns logits"),
        ("BertForSequenceClassification", lacking, "SequenceClassification is not .*: it returns logits"),
        (
            "BertForQuestionAnswering", r"qa_outputs.bias has shape \(3,\) in .* and \(2,\) in this model$",
            r"BertForQuestionAnswering returns 3 logits per token \(num_labels\)",
        ),
    ):  # fmt: skip
        model = getattr(transformers, name)(BertConfig(**dimensions))
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
        with pytest.raises(UserInputError, match=there):
            ask(tmp_path / name, "Who?", CONTEXT)
        with pytest.raises(UserInputError, match=held):
            ask(model, "Who?", CONTEXT, tokenizer, doc_stride=16)
    (tmp_path / name / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserInputError, match="^no question answering model in .*: .*deserializing"):
        ask(tmp_path / name, "Who?", CONTEXT)


def test_every_module_keeps_its_mode(model, tokenizer):
    model.train().bert.eval()
    ask(model, QUESTIONS[0], SHORT, tokenizer, **LENGTHS)
    assert model.training and model.qa_outputs.training and not model.bert.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_models_device_is_used(model, tokenizer):
    expected = ask(model, QUESTIONS, CONTEXTS, tokenizer, **LENGTHS)
    found = ask(model.cuda(), QUESTIONS, CONTEXTS, tokenizer, **LENGTHS)
    assert [one["answer"] for one in found] == [one["answer"] for one in expected]


def test_the_command_answers_one_question_or_a_file_of_them(model, tokenizer, tmp_path, capsys):
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    folder, file = str(tmp_path / "model"), tmp_path / "questions.json"
    qas = [{"id": f"q{i}", "question": question} for i, question in enumerate(QUESTIONS)]  # without answers
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    transformers.logging.disable_progress_bar()
    flags = ["--max_seq_length", "50", "--doc_stride", "16", "--batch_size", "3"]
    cli.main(["ask", folder, QUESTIONS[0], CONTEXT, *flags])
    expected = ask(folder, QUESTIONS, [CONTEXT] * 3, **LENGTHS)
    lines = [f"{' '.join(found['answer'].split())}\t{found['score']:.3f}" for found in expected]
    assert capsys.readouterr().out.splitlines() == lines[:1]
    cli.main(["ask", folder, "--questions_file", str(file), *flags])
    assert capsys.readouterr().out.splitlines() == [f"q{i}\t{line}" for i, line in enumerate(lines)]
    for threshold in (["--null_score_diff_threshold", "-1e9"], ["--null_score_diff_threshold=-1000"]):
        nothing = ["--version_2_with_negative", *threshold]
        cli.main(["ask", folder, "--questions_file", str(file), *flags, *nothing])
        found = [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()]
        assert found == [[f"q{i}", ""] for i in range(3)]
    for words in ([], ["Who?"], ["Who?", CONTEXT, "--questions_file", str(file)]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["ask", folder, *words])
        assert stop.value.code == 2 and "give a question and a context, or --questions_file" in capsys.readouterr().err


def test_a_space_that_is_a_token_of_bytes_is_no_answer():
    """[CLS] "red", a space whose offsets are trimmed to nothing, "fox"; the space scores best."""
    offsets = np.array([(-1, -1), (0, 3), (4, 4), (5, 8)])
    start, end = np.array([0.0, 1.0, 9.0, 2.0]), np.array([0.0, 1.0, 9.0, 3.0])
    spans = best_spans(start, end, offsets, offsets[:, 0] >= 0, n_best_size=4, max_answer_length=2)
    assert sorted(spans) == [(1.0, 1.0, 0, 3), (1.0, 9.0, 0, 4), (2.0, 3.0, 5, 8), (9.0, 3.0, 4, 8)]
