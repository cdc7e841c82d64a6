"""The optimizer that the command line describes."""

import subprocess
import sys

import pytest
import torch
from transformers import FNetConfig, FNetForMaskedLM, FNetForQuestionAnswering

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, UserInputError
from fnl_hf.optim.base import ProductGroups
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.optimizers import OPTIMIZERS, build_optimizer
from tests.conftest import ROOT, needs_muon

FLAGS = {"learning_rate": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.125, "use_cpu": True}


class FrobeniusRMSprop(ProductGroups, torch.optim.RMSprop):
    """Takes an eps and no betas, and has no fused kernel."""


class FrobeniusAdafactor(ProductGroups, torch.optim.Adafactor):
    """Means two numbers by eps, and has no fused kernel."""


def built(tmp_path, dimensions, **flags):
    args = FnlTrainingArguments(str(tmp_path), report_to="none", **FLAGS | flags)
    return build_optimizer(args, FnlBertForMaskedLM(FnlBertConfig(**dimensions)))


@pytest.mark.parametrize("name, expected", [
    ("adamw", {"lr": 0.25, "betas": (0.5, 0.75), "eps": 0.125, "fused": True}),
    ("lamb", {"lr": 0.25, "betas": (0.5, 0.75), "eps": 0.125, "fused": True}),
    ("sgd", {"lr": 0.25, "momentum": 0.9, "fused": True}),
    pytest.param("muon", {"lr": 0.25, "betas": (0.5, 0.75), "eps": 0.125, "fused": True}, marks=needs_muon),
])  # fmt: skip
def test_an_optimizer_gets_the_flags_that_it_takes(tmp_path, dimensions, name, expected):
    groups = built(tmp_path, dimensions, optimizer=name).param_groups
    assert all({key: group[key] for key in expected} == expected for group in groups)
    assert "eps" in expected or all("eps" not in group for group in groups)


@needs_muon
def test_muon_takes_its_own_arguments(tmp_path, dimensions):
    text = "adamw_lr=0.5,adjust_lr_fn=original,per_head=true,momentum=0.75,ns_steps=3,ns_coefficients=(2,-1.5,0.5)"
    groups = built(tmp_path, dimensions, optimizer="muon", optim_args=text, weight_decay=0.125).param_groups
    expected = {"adjust_lr_fn": "original", "per_head": True, "momentum": 0.75, "ns_steps": 3}
    assert all({key: group[key] for key in expected} == expected for group in groups)
    found = [(group["name"], group["use_muon"], group["lr"], group["weight_decay"]) for group in groups]
    assert found == [("qk", True, 0.25, 0.0), ("vo", True, 0.25, 0.0), ("decay", True, 0.25, 0.125),
                     ("decay_adamw", False, 0.5, 0.125), ("plain", False, 0.5, 0.0)]  # fmt: skip
    for bad, message in {
        "adjust_lr_fn=moonshot": r"adjust_lr_fn \(moonshot\) must be a number",
        "adamw_lr=-1": r"lr \(-1\) must be finite and at least 0",
        "ns_steps=2.5": r"ns_steps \(2.5\) must be a whole number",
        "foreach=true": "'foreach' is not an argument of muon",
    }.items():
        with pytest.raises(UserInputError, match=message):
            built(tmp_path, dimensions, optimizer="muon", optim_args=bad)


def test_one_line_adds_an_optimizer(tmp_path, dimensions, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "rmsprop", FrobeniusRMSprop)
    optimizer = built(tmp_path, dimensions, optimizer="rmsprop", optim_args="alpha=0.5,momentum=0.75,centered=true")
    expected = {"lr": 0.25, "eps": 0.125, "alpha": 0.5, "momentum": 0.75, "centered": True}
    assert all({key: group[key] for key in expected} == expected for group in optimizer.param_groups)
    with pytest.raises(
        UserInputError,
        match=r"'betas' is not an argument of rmsprop. Write name=value, with a name from \['alpha', 'cap",
    ):
        built(tmp_path, dimensions, optimizer="rmsprop", optim_args="betas=(0,1)")


def test_a_flag_is_not_for_an_argument_that_means_something_else(tmp_path, dimensions, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adafactor", FrobeniusAdafactor)
    for text, eps in ((None, (None, 1e-3)), ("eps=(0.25,0.5),d=2", (0.25, 0.5))):
        groups = built(tmp_path, dimensions, optimizer="adafactor", optim_args=text).param_groups
        assert all(group["eps"] == eps and group["lr"] == 0.25 for group in groups)
    for text, message in {
        "eps=0.5": r"eps \(0.5\) must have the form of its default, \(None, 0.001\)",
        "eps=(1,2,3)": r"eps \(\(1,2,3\)\) must have the form of its default",
        "d=(1,2)": r"d \(\(1,2\)\) must have the form of its default, 1.0",
        "maximize=1": r"maximize \(1\) must have the form of its default, False",
        "weight_decay=0.1": r"'weight_decay' is not an argument of adafactor",
    }.items():
        with pytest.raises(UserInputError, match=message):
            built(tmp_path, dimensions, optimizer="adafactor", optim_args=text)


def test_a_frobenius_decay_that_finds_no_product_is_bad_input_and_a_dense_model_by_default_is_none(tmp_path, caplog):
    def built_for_dense(**flags):
        args = FnlTrainingArguments(str(tmp_path), report_to="none", weight_decay=0.1, **FLAGS | flags)
        return build_optimizer(args, torch.nn.Linear(3, 2))

    with pytest.raises(UserInputError, match=r"^frobenius_decay \(0.3\) has nothing to decay: Linear has no trainable"):
        built_for_dense(frobenius_decay=0.3)
    groups = built_for_dense().param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.1), ("plain", 0.0)]
    assert not caplog.records


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_squad.py"])
def test_the_scripts_say_so_in_one_line_and_end_with_status_2(script, corpus, tokenizer, tmp_path):
    """An FNet has no attention."""
    sizes = {"hidden_size": 42, "num_hidden_layers": 1, "intermediate_size": 35, "max_position_embeddings": 64}
    model_class = FNetForQuestionAnswering if script == "run_squad.py" else FNetForMaskedLM
    for part in (model_class(FNetConfig(vocab_size=len(tokenizer), **sizes)), tokenizer):
        part.save_pretrained(tmp_path / "fnet")
    flags = {"model_name_or_path": tmp_path / "fnet", "output_dir": tmp_path / "out", "frobenius_decay": 0.5}
    flags |= {"max_seq_length": 50, "max_steps": 2, "report_to": "none", "use_cpu": "true", "max_train_samples": 3}
    if script == "run_squad.py":
        flags |= {"doc_stride": 16, "max_eval_samples": 3}
    else:
        flags |= {"objective": "distill", "teacher_name_or_path": tmp_path / "fnet", "train_file": corpus}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True, cwd=ROOT)
    (said,) = [line for line in ended.stderr.splitlines() if line.startswith(f"{script}: error: ")]
    expected = f"frobenius_decay (0.5) has nothing to decay: {model_class.__name__} has no trainable products"
    assert ended.returncode == 2 and expected in said and "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
