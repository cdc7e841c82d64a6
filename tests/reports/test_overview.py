"""What a run says of itself at its start and at its end."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import run_pretrain
import run_squad
import train
from fnl_hf import FnlBertForQuestionAnswering
from fnl_hf.reports.overview import describe_end
from fnl_hf.training.pretraining_arguments import DataArguments
from tests.conftest import IMAGE_CLASSES, IMAGE_HEIGHT, IMAGE_WIDTH, pretraining
from tests.examples.test_image_classification import command as classification
from tests.squad.test_squad_script import squad


def said(capsys):
    """The rows of the block, and the last line."""
    lines = capsys.readouterr().out.splitlines()
    rows = dict(match.groups() for line in lines if (match := re.fullmatch(r"  (\S.*?)  +(\S.*)", line)))
    return rows, lines


def test_a_pretraining_run_says_what_it_is(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    flags = {"max_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    run_pretrain.run(pretraining(corpus, out, **flags))
    rows, lines = said(capsys)
    # 216 lines, 5% of them held out; by hand: embeddings, one layer, prediction head
    parameters = (60 + 512 + 2) * 32 + 64 + 4 * (32 * 32 + 32) + 64 + 2 * 32 * 37 + 37 + 32 + 64
    parameters += 32 * 32 + 32 + 64 + 60
    assert rows["model"] == f"FnlBertForMaskedLM, {parameters:,} parameters"
    assert re.fullmatch(
        r"corpus.txt: 205 documents, (\d+) sequences of 16 tokens \(.* in all\)", rows["training data"]
    ), rows
    assert rows["held-out data"].startswith("11 documents, ")
    assert (rows["steps"], rows["global batch"]) == ("2", "6 = 3 x 2 accumulation step(s) x 1 process(es)")
    assert (rows["precision"], rows["folder"]) == ("float32", str(out))
    assert rows["device"] == f"1 x cpu, {torch.get_num_threads()} thread(s)"
    assert "NO DATA" not in "".join(lines)
    pattern = rf"trained and saved in {out}, in \d+ s: train_loss [\d.]+, eval_loss [\d.]+, eval_accuracy [\d.]+, .*"
    assert re.fullmatch(pattern, lines[-1]) and "unigram_entropy 3." in lines[-1] and "per_second" not in lines[-1]


def test_an_image_classifier_says_what_it_is(idx_dir, tmp_path, capsys):
    train.run(classification(tmp_path / "out", idx_dir=idx_dir, max_steps=None, num_train_epochs=0.3, do_train="true"))
    rows, lines = said(capsys)
    shape = f"{IMAGE_HEIGHT} x {IMAGE_WIDTH} x 1"
    assert rows["train data"] == f"{idx_dir}: 84 images of {shape}"
    assert (rows["test data"], rows["classes"]) == (f"{idx_dir}: 35 images of {shape}", str(IMAGE_CLASSES))
    assert rows["steps"] == "3, 0.3 epoch(s)" and rows["global batch"].startswith("8 = 8 x 1 ")
    assert "train_loss" in lines[-1]


def test_the_embedded_sample_is_not_used_in_silence(pretrained, tmp_path, capsys):
    model = tmp_path / "model"  # whose answers are random
    FnlBertForQuestionAnswering.from_pretrained(pretrained).save_pretrained(model)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(model)
    flags = {"do_eval": "true", "max_eval_samples": 3, "max_seq_length": 256, "doc_stride": 32, "bf16": "true"}
    run_squad.run(squad(model, tmp_path / "sample", max_steps=None, **flags))
    rows, lines = said(capsys)
    assert rows["validation data"].startswith("embedded sample: 3 questions, ") and "steps" not in rows
    assert rows["precision"] == "mixed, bfloat16"
    assert sum("NO DATA NAMED: this is the EMBEDDED SAMPLE" in line for line in lines) == 1
    assert lines[-1].startswith(f"done, results in {tmp_path / 'sample'}, in ") and "eval_f1 " in lines[-1]
    answers = [{"text": "fox", "answer_start": 4}]
    paragraph = {"context": "the fox", "qas": [{"id": "1", "question": "who", "answers": answers}]}
    (tmp_path / "own.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    run_squad.run(squad(model, tmp_path / "own", tmp_path / "own.json", do_eval="true"))
    rows, lines = said(capsys)
    assert rows["validation data"].startswith("own.json: 1 questions, ") and "NO DATA" not in "".join(lines)


def test_the_embedded_corpus_is_not_used_in_silence():
    data = Dataset.from_dict({"text": ["a"] * 7}), Dataset.from_dict({"text": ["a"] * 2})
    documents, rows = (SimpleNamespace(train=train, held_out=held_out) for train, held_out in (data, data[::-1]))
    name, facts, notice = run_pretrain.describe_data(documents, rows, DataArguments(max_seq_length=11))
    assert notice.startswith("NO DATA NAMED: this is the EMBEDDED CORPUS. To use your own, give --train_file or")
    assert facts == {
        "training data": "embedded corpus: 7 documents, 2 sequences of 11 tokens (22 in all)",
        "held-out data": "2 documents, 7 sequences of 11 tokens (77 in all)",
    }
    for named in ({"dataset_name": "a/b"}, {"train_file": ["/x/b"]}):
        assert run_pretrain.describe_data(documents, rows, DataArguments(**named))[2] is None


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min 0 s"), (90061, "25 h 1 min 1 s")]
)
def test_durations(seconds, text):
    args = SimpleNamespace(do_train=True, output_dir="out")
    metrics = {"train": {"train_loss": 1.23456, "train_runtime": 3.0}, "eval": {"eval_f1": 50.0, "epoch": 1.0}}
    assert describe_end(args, seconds, metrics) == (
        f"trained and saved in out, in {text}: train_loss 1.235, eval_f1 50"
    )
