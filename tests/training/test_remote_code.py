"""Models and tokenizers that come with code: it runs only where the user says so, and nobody is asked."""

import json
import os
import subprocess
import sys

import pytest
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering

import run_pretrain
import run_squad
from fnl_hf import UserInputError
from fnl_hf.commands import cli
from tests.conftest import DIMENSIONS, launch, pretraining

CODE = """
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, BertTokenizer

class OwnConfig(BertConfig):
    model_type = "own"

class OwnForMaskedLM(BertForMaskedLM):
    config_class = OwnConfig

class OwnForQuestionAnswering(BertForQuestionAnswering):
    config_class = OwnConfig

class OwnTokenizer(BertTokenizer):
    pass
"""
QUESTION = ["Who wrote it?", "It was written by Ada Lovelace."]


def change_json(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def add_code(folder, head):
    """Make a BERT's checkpoint one of a class that comes with it."""
    (folder / "own.py").write_text(CODE)
    autos = {"AutoConfig": "own.OwnConfig", f"AutoModelFor{head}": f"own.OwnFor{head}"}
    change_json(folder / "config.json", model_type="own", architectures=[f"OwnFor{head}"], auto_map=autos)


@pytest.fixture
def checkpoints(tokenizer, tmp_path):
    """Models of both heads, each as it is ("masked", "answers") and with code, and a tokenizer with code."""
    config = BertConfig(**DIMENSIONS | {"vocab_size": len(tokenizer), "max_position_embeddings": 64})
    for model, head, name in (
        (BertForMaskedLM(config), "MaskedLM", "masked"),
        (BertForQuestionAnswering(config), "QuestionAnswering", "answers"),
    ):
        for folder in (tmp_path / name, tmp_path / f"{name}-own"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        add_code(tmp_path / f"{name}-own", head)
    tokenizer.save_pretrained(tmp_path / "words-own")
    (tmp_path / "words-own" / "own.py").write_text(CODE)
    change_json(
        tmp_path / "words-own" / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )  # fmt: skip
    return tmp_path


def distillation(corpus, here, **flags):
    names = {"model_name_or_path": here / "masked-own", "teacher_name_or_path": here / "masked"}
    return pretraining(
        corpus, here / "out", objective="distill", config_overrides=None, vocab_size=None, max_steps=2, **names | flags
    )


def squad(here, **flags):
    values = {
        "model_name_or_path": here / "answers-own", "output_dir": here / "out", "max_seq_length": 50,
        "doc_stride": 16, "max_steps": 2, "report_to": "none", "use_cpu": "true", "max_train_samples": 5,
        "max_eval_samples": 3,
    } | flags  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


COMMANDS = {
    "a model": lambda corpus, here: run_squad.run(squad(here)),
    "a model to train anew": lambda corpus, here: run_squad.run(
        squad(here, config_name=here / "answers-own", tokenizer_name=here / "answers")[2:]
    ),
    "a teacher": lambda corpus, here: run_squad.run(
        squad(here, model_name_or_path=here / "answers", teacher_name_or_path=here / "answers-own")
    ),
    "a tokenizer": lambda corpus, here: run_squad.run(
        squad(here, model_name_or_path=here / "answers", tokenizer_name=here / "words-own")
    ),
    "a student": lambda corpus, here: run_pretrain.run(distillation(corpus, here)),
    "a tokenizer for pretraining": lambda corpus, here: run_pretrain.run(
        pretraining(corpus, here / "out", tokenizer_name=here / "words-own")
    ),
    "a question": lambda corpus, here: cli.main(["ask", str(here / "answers-own"), *QUESTION]),
    "a conversion": lambda corpus, here: cli.main(["convert", str(here / "answers-own"), str(here / "out")]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_code_is_refused_in_one_line_and_nobody_is_asked(corpus, checkpoints, monkeypatch, capsys, name):
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(prompt, pytrace=False))
    with pytest.raises((UserInputError, SystemExit)) as refusal:
        COMMANDS[name](corpus, checkpoints)
    said = capsys.readouterr().err if refusal.type is SystemExit else str(refusal.value)
    assert "-own: it needs the code that comes with it, which only the training scripts" in said
    assert "with --trust_remote_code: read it first" in said and len(said.splitlines()) == 1
    assert not (checkpoints / "out").exists()


def test_pretraining_takes_no_other_architecture_whatever_its_code(corpus, checkpoints):
    command = pretraining(
        corpus, checkpoints / "out", model_name_or_path=checkpoints / "masked-own", config_overrides=None,
        tokenizer_name=checkpoints / "masked", trust_remote_code="true",
    )  # fmt: skip
    with pytest.raises(UserInputError, match="masked-own is neither a BERT nor an FNL-BERT: it comes with code$"):
        run_pretrain.run(command)


def test_code_that_is_trusted_runs_and_goes_with_what_is_trained(checkpoints):
    here = checkpoints
    trusted = {"trust_remote_code": "true", "tokenizer_name": here / "words-own"}
    cached = {"HF_MODULES_CACHE": str(here / "modules")}
    launch("run_squad.py", *squad(here, teacher_name_or_path=here / "answers-own", **trusted), **cached)
    entries = json.loads((here / "out" / "config.json").read_text())
    assert (entries["model_type"], entries["architectures"]) == ("own", ["OwnForQuestionAnswering"])
    assert (here / "out" / "own.py").read_text() == CODE
    program = [sys.executable, "-c", "from fnl_hf.commands.cli import main; main()"]
    command = [*program, "ask", str(here / "out"), *QUESTION, "--trust_remote_code"]
    answered = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | cached)
    assert len(answered.stdout.split("\t")) == 2


def test_a_student_that_comes_with_code_is_distilled(corpus, checkpoints):
    cached = {"HF_MODULES_CACHE": str(checkpoints / "modules")}
    launch("run_pretrain.py", *distillation(corpus, checkpoints, trust_remote_code="true"), **cached)
    entries = json.loads((checkpoints / "out" / "config.json").read_text())
    assert (entries["model_type"], entries["architectures"]) == ("own", ["OwnForMaskedLM"])
    assert "AutoModelForMaskedLM.from_pretrained" in (checkpoints / "out" / "README.md").read_text()
