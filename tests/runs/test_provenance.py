"""What is recorded beside a model, and what its trackers are given."""

import json
import os
import subprocess

import pytest
import torch
import transformers

import fnl_hf
import run_pretrain
from fnl_hf.publishing.cards import run_facts
from fnl_hf.runs.provenance import PROVENANCE_FILE, collect_provenance, git_revision, read_starts, record_start
from fnl_hf.training import arguments
from fnl_hf.training.arguments import FnlTrainingArguments
from tests.conftest import pretraining


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *identity, *command], check=True, capture_output=True, text=True).stdout


def test_git_revision_of_a_checkout_and_of_no_checkout(tmp_path, monkeypatch):
    package, installed, plain = tmp_path / "repo" / "package", tmp_path / "repo" / "site", tmp_path / "plain"
    for folder in (package, installed, plain):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("a = 1\n")
    git(tmp_path / "repo", "init")
    git(tmp_path / "repo", "add", "package")
    git(tmp_path / "repo", "commit", "-m", "first")
    git(tmp_path / "repo", "tag", "-a", "v1", "-m", "a tag hides no revision")
    revision = git(tmp_path / "repo", "rev-parse", "HEAD").strip()
    assert len(revision) == 40 and git_revision(package) == revision
    (package / "__init__.py").write_text("a = 2\n")
    assert git_revision(package) == f"{revision}+changes"
    assert git_revision(installed) is None, "a package that lies in another project's checkout is not part of it"
    assert git_revision(plain) is None
    monkeypatch.setenv("PATH", str(plain))
    assert git_revision(package) is None, "without git"


def test_provenance_names_the_software_and_not_the_host():
    found = collect_provenance()
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["fnl_hf"] == fnl_hf.__version__
    assert found["versions"]["transformers"] == transformers.__version__ and len(found["devices"]) >= 1
    assert os.uname().nodename not in json.dumps(found)


def test_every_start_is_saved_with_the_model_and_its_checkpoints(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(corpus.parent))
    folder = tmp_path / "out"
    flags = {"max_steps": 4, "save_steps": 2, "do_train": "true"}
    run_pretrain.run(pretraining(corpus, folder, hub_token="hf_secret", **flags))
    secret = ["--hub-token=hf_secret", "--resume_from_checkpoint", str(folder / "checkpoint-2")]
    run_pretrain.run(pretraining(corpus, folder, **flags) + secret)
    assert [len(read_starts(folder / name)) for name in (".", "checkpoint-2", "checkpoint-4")] == [2, 1, 2]
    first, second = read_starts(folder)
    assert (first["resumed_from"], second["resumed_from"]) == (None, "checkpoint-2")
    for start in (first, second):
        assert start["world_size"] == 1 and start["versions"] == collect_provenance()["versions"]
        assert start["arguments"]["max_seq_length"] == 16 and start["arguments"]["train_file"] == ["~/corpus.txt"]
        assert start["training_arguments"]["learning_rate"] == 0.01
        assert start["command"][:4] == ["--train_file", "~/corpus.txt", "--output_dir", str(folder)]
    hidden = first["command"].index("--hub_token") + 1
    assert first["command"][hidden] == "<hidden>" and "--hub-token=<hidden>" in second["command"]
    for path in (folder / PROVENANCE_FILE, folder / "README.md"):
        assert "hf_secret" not in path.read_text() and str(corpus.parent) not in path.read_text()
    card = (folder / "README.md").read_text()
    assert f"torch {torch.__version__}" in card and (first["git_revision"] or "") in card
    assert "non-padding tokens/s" in card and "TFLOP/s per device: measured on CPU, float32" in card


def test_the_card_names_the_data_and_leaves_out_what_is_not_known(tmp_path):
    args = FnlTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    record_start(args, None, [], {"data_fingerprint": "abc123"})
    (start,) = read_starts(tmp_path)
    facts = run_facts([{}, start | {"git_revision": None}], {"train_loss": 3.0, "train_runtime": 75.0})
    assert facts["training time"] == "1 min 15 s, since the last of 2 starts"
    assert facts["data fingerprint"] == "abc123" and facts["trained on"] == "1 process, CPU"
    assert not {"git revision", "throughput", "model FLOPs utilization", "peak memory"} & facts.keys()


def test_starts_of_a_torn_record_are_none(tmp_path):
    assert read_starts(tmp_path) == []
    for text in ("", "[]", '{"starts"'):
        (tmp_path / PROVENANCE_FILE).write_text(text)
        assert read_starts(tmp_path) == []


def test_tensorboard_is_the_default_when_it_is_installed(tmp_path, monkeypatch):
    def report_to(installed, **given):
        monkeypatch.setattr(arguments, "is_tensorboard_available", lambda: installed)
        return FnlTrainingArguments(str(tmp_path), use_cpu=True, **given).report_to

    assert report_to(True) == ["tensorboard"] and report_to(False) == []
    assert report_to(True, report_to="none") == [] and report_to(False, report_to=["wandb"]) == ["wandb"]


def test_tensorboard_gets_everything(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"report_to": None, "max_steps": 4, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2}
    run_pretrain.run(pretraining(corpus, tmp_path / "out", logging_steps=2, **flags))
    (events,) = (tmp_path / "out" / "runs").iterdir()
    accumulator = EventAccumulator(str(events)).Reload()
    tags = set(accumulator.Tags()["scalars"])
    expected = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "data_wait", "peak_memory_gb"}
    expected |= {f"norms/{kind}/bert.encoder.layer.0.attention.{kind}/nuclear" for kind in ("qk", "vo")}
    expected |= {"train_tokens_per_second", "train_mfu"}
    assert {f"train/{name}" for name in expected} | {"eval/loss", "eval/accuracy"} <= tags
    assert [event.step for event in accumulator.Scalars("train/tokens_per_second")] == [2, 4]
