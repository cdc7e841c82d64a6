"""run_pretrain.py, launched as a user launches it, and in-process, on a tiny corpus."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from transformers import pipeline

import run_pretrain
from fnl_hf import FnlBertForMaskedLM, UserInputError
from fnl_hf.training.trainer import FnlTrainer
from tests.conftest import ROOT, assert_same_weights, launch, needs_muon, pretraining, weights

# ---- pretraining ----


def test_pretraining_leaves_a_complete_folder(pretrained):
    results = json.loads((pretrained / "all_results.json").read_text())
    assert {"eval_loss", "eval_accuracy", "eval_perplexity", "unigram_entropy", "train_loss"} <= set(results)
    assert results["eval_loss"] < 4.0 and results["eval_perplexity"] == pytest.approx(
        2.718281828 ** results["eval_loss"]
    )
    model = transformers.AutoModelForMaskedLM.from_pretrained(pretrained)
    assert type(model) is FnlBertForMaskedLM
    assert model.config.attention_embedding_size == 16 and model.config.attention_init == "spectral"
    assert len(transformers.AutoTokenizer.from_pretrained(pretrained)) == model.config.vocab_size <= 60
    with open(pretrained / "training_report.png", "rb") as plot:
        assert plot.read(8) == b"\x89PNG\r\n\x1a\n"
    card = (pretrained / "README.md").read_text()
    assert "library_name: transformers" in card and "16 (50% of d)" in card and "| Held-out loss |" in card
    assert "| data | corpus.txt |" in card and "runtime" not in card
    assert (
        "| sequence length | 16 |" in card and "| masked | 15.0% of the tokens |" in card and "| steps | 12 |" in card
    )
    history = json.loads((pretrained / "trainer_state.json").read_text())["log_history"]
    norms = [entry for entry in history if "norms/qk/bert.encoder.layer.0.attention.qk/nuclear" in entry]
    assert [entry["step"] for entry in norms] == [0, 3, 6, 9, 12]
    assert all(
        e[f"norms/{k}/bert.encoder.layer.0.attention.{k}/nuclear"]
        <= e[f"norms/{k}/bert.encoder.layer.0.attention.{k}/bound"] * 1.0001
        for e in norms
        for k in ("qk", "vo")
    )
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9, 12]
    speed = {"tokens_per_second", "mfu", "data_wait", "peak_memory_gb"}
    assert all(speed <= entry.keys() for entry in logged) and {f"train_{name}" for name in speed} <= results.keys()


def test_pipelines_work(pretrained, tmp_path):
    found = pipeline("fill-mask", str(pretrained))("the quick [MASK] fox")
    assert len(found) == 5 and all(0 <= entry["score"] <= 1 for entry in found)
    config = transformers.AutoConfig.from_pretrained(pretrained, num_labels=3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path)
    assert pipeline("text-classification", str(tmp_path))("the lazy dog")[0]["label"].startswith("LABEL_")


def test_a_killed_run_resumes_to_the_same_weights(pretrained, corpus, tmp_path):
    """SIGKILL after the first checkpoint, then the same command with ``auto``: equal to the last bit."""
    folder = tmp_path / "out"
    arguments = pretraining(corpus, folder, attention_embedding_size=16, attention_init="spectral")
    arguments += ["--resume_from_checkpoint", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "run_pretrain.py"), *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint-5" / "trainer_state.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "all_results.json").exists(), "killed before its end"
    torn = folder / "checkpoint-11"  # as left by a kill while a checkpoint is written
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    resumed = launch("run_pretrain.py", *arguments)
    assert "checkpoint-11: trainer_state.json is missing" in resumed.stderr
    assert_same_weights(folder, pretrained)
    before = (folder / "all_results.json").stat().st_mtime_ns
    for changed in (["--resume_from_checkpoint", folder / "checkpoint-10"], []):
        with pytest.raises(UserInputError, match="contains another run: adam_beta2 was 0.999 and is now 0.5"):
            run_in_process([*arguments, *changed, "--adam_beta2", 0.5])
    with pytest.raises(UserInputError, match="contains another run: decay_mode was frobenius and is now none"):
        run_in_process([*arguments, "--decay_mode", "none"])
    again = launch("run_pretrain.py", *arguments)
    assert "is finished: nothing to do" in again.stderr
    assert (folder / "all_results.json").stat().st_mtime_ns == before


def run_in_process(arguments, monkeypatch=None):
    run_pretrain.run([str(a) for a in arguments])


def test_decay_mode_changes_the_norms(corpus, tmp_path):
    """In 12 steps at λ = 30: weight decay and Frobenius decay shrink the products, none does not."""
    norm = {}
    for mode in ("frobenius", "weight", "none"):
        flags = {"decay_mode": mode, "frobenius_decay": 30, "weight_decay": 0, "save_strategy": "no"}
        run_in_process(pretraining(corpus, tmp_path / mode, **flags))
        history = json.loads((tmp_path / mode / "trainer_state.json").read_text())["log_history"]
        key = "norms/qk/bert.encoder.layer.0.attention.qk/frobenius"
        norm[mode] = [entry[key] for entry in history if key in entry][-1]
    assert norm["weight"] < 0.5 * norm["none"] and norm["frobenius"] < 0.9 * norm["none"]


@pytest.mark.parametrize(
    "flags, state, entries",
    [
        ({"optimizer": "adamw", "adam_epsilon": 1e-7}, {"exp_avg"}, {"eps": 1e-7, "fused": True, "amsgrad": False}),
        ({"optimizer": "adamw", "optim_args": "amsgrad=True"}, {"max_exp_avg_sq"}, {"amsgrad": True}),
        ({"optimizer": "sgd"}, {"momentum_buffer"}, {"momentum": 0.9, "decoupled": False, "nesterov": False}),
        ({"optimizer": "sgd", "optim_args": "momentum=0.5, nesterov=true,decoupled=True"}, {"momentum_buffer"},
         {"momentum": 0.5, "decoupled": True, "nesterov": True}),
        ({"optimizer": "sgd", "optim_args": "decoupled=false"}, {"momentum_buffer"}, {"decoupled": False}),
        ({"optimizer": "lamb"}, {"exp_avg"}, {"decay": "decoupled", "betas": (0.9, 0.999), "trust_clamp": None}),
        ({"optimizer": "lamb", "optim_args": "decay=in_trust_ratio,trust_clamp=(0,1),foreach=True"}, {"exp_avg"},
         {"decay": "in_trust_ratio", "trust_clamp": (0, 1), "fused": False}),
    ],
)  # fmt: skip
def test_optimizer_flags_make_the_optimizer(corpus, tmp_path, flags, state, entries):
    run_in_process(pretraining(corpus, tmp_path / "out", max_steps=2, save_steps=2, **flags))
    saved = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    products = saved["param_groups"][0]
    assert products["product"] == "qk" and products["frobenius_decay"] == 0.01
    assert {name: products[name] for name in entries} == entries
    assert all(state <= values.keys() for values in saved["state"].values()) and len(saved["state"]) > 10
    assert f"| optimizer | {flags['optimizer']}" in (tmp_path / "out" / "README.md").read_text()


@needs_muon
def test_muon_launched_and_killed_goes_on_to_the_last_bit(corpus, tmp_path, monkeypatch):
    flags = {"optimizer": "muon", "optim_args": "per_head=true,adamw_lr=0.005", "max_steps": 6, "save_steps": 2,
             "logging_steps": 1, "product_norms_steps": 3}  # fmt: skip
    launch("run_pretrain.py", *pretraining(corpus, tmp_path / "whole", **flags))
    step = FnlTrainer.training_step

    def killed(self, *args):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FnlTrainer, "training_step", killed)
        run_in_process(pretraining(corpus, tmp_path / "out", **flags))
    run_in_process(pretraining(corpus, tmp_path / "out", resume_from_checkpoint="auto", **flags))
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    groups = {group["name"]: (group["use_muon"], group["initial_lr"]) for group in saved["param_groups"]}
    assert groups == {"qk": (True, 0.01), "vo": (True, 0.01), "decay": (True, 0.01), "decay_adamw": (False, 0.005),
                      "plain": (False, 0.005)}  # fmt: skip
    kinds = [set(entries) for entries in saved["state"].values()]
    assert {"momentum_buffer"} in kinds and {"step", "exp_avg", "exp_avg_sq"} in kinds
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "norms/vo/bert.encoder.layer.0.attention.vo/bound" in e] == [0, 3, 6]
    assert [e["learning_rate"] for e in history if "loss" in e] == pytest.approx(
        [0.01 * n / 6 for n in range(6, 0, -1)]
    )


def test_diagnostics_are_logged_every_n_steps(corpus, tmp_path):
    run_in_process(pretraining(corpus, tmp_path / "out", max_steps=5, product_norms_steps=2, save_strategy="no"))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "norms/vo/bert.encoder.layer.0.attention.vo/bound" in e] == [0, 2, 4]
    assert [e["step"] for e in history if "loss" in e] == [3]


def test_config_file_and_flags(corpus, tmp_path):
    flags = dict(zip(*[iter(pretraining(corpus, tmp_path / "out", max_steps=2, save_strategy="no"))] * 2))
    config = {key.removeprefix("--"): value for key, value in flags.items()} | {
        "seed": 1,
        "do_train": True,
        "run_name": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_in_process([tmp_path / "config.json", "--seed", 2, "--attention_embedding_size", 8])
    assert weights(tmp_path / "out")["bert.encoder.layer.0.attention.self.query.weight"].shape == (8, 32)


def test_norms_follow_the_logging_strategy(corpus, tmp_path):
    flags = {"logging_strategy": "epoch", "max_steps": 6, "max_train_samples": 24, "save_strategy": "no"}
    run_in_process(pretraining(corpus, tmp_path / "out", **flags))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "norms/vo/bert.encoder.layer.0.attention.vo/bound" in e] == [0, 3, 6]
    assert [e["step"] for e in history if "loss" in e] == [3, 6]


def test_half_precision_checkpoints_go_on_in_float32(pretrained, corpus, tmp_path):
    half = transformers.AutoModelForMaskedLM.from_pretrained(pretrained, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path / "half")
    flags = {
        "model_name_or_path": tmp_path / "half",
        "config_overrides": None,
        "bf16_full_eval": "true",
        "max_steps": 1,
    }
    run_in_process(pretraining(corpus, tmp_path / "out", save_strategy="no", **flags))
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.float32}


def test_several_files_and_broken_records(corpus, tmp_path):
    """The files' names are in the card; a broken record is left out, or refused when asked."""
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "the red fox"}\ntorn\n')
    flags = {"max_steps": 1, "save_strategy": "no", "preprocessing_num_workers": 2}
    arguments = pretraining(corpus, tmp_path / "out", **flags)
    at = arguments.index(str(corpus)) + 1
    arguments[at:at] = [str(more)]
    with pytest.raises(UserInputError, match="more.jsonl: 1 of 2 lines are broken: 1 not JSON .first: line 2."):
        run_in_process([*arguments, "--strict"])
    run_in_process(arguments)
    assert "| data | corpus.txt, more.jsonl |" in (tmp_path / "out" / "README.md").read_text()


def test_the_quickstart_is_the_recipe_of_the_embedded_corpus_alone():
    assert run_pretrain.with_quickstart([])[0].endswith("quickstart.yaml")
    assert run_pretrain.with_quickstart(["--preset", "mini"])[0].endswith("quickstart.yaml")
    for own in (["c.yaml"], ["--train-file", "x"], ["--train_file=x"], ["--config_name", "x"]):
        assert run_pretrain.with_quickstart(own) == own


# ---- what is there ----


def test_an_output_folder_is_overwritten_when_asked(pretrained, corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pretrained, copy)
    (copy / "thesis.tex").write_text("years of work")
    run_in_process(pretraining(corpus, copy, overwrite_output_dir="true", max_steps=1, save_strategy="no"))
    assert not list(copy.glob("checkpoint-*"))
    assert weights(copy)["bert.encoder.layer.0.attention.self.query.weight"].shape == (32, 32)
    assert (copy / "thesis.tex").read_text() == "years of work"
