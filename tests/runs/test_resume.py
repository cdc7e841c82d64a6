"""What a resumed run must have in common with the one that was started, and what it may change."""

import json
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import run_pretrain
from fnl_hf import UserInputError
from fnl_hf.runs.checkpoints import newest_complete_checkpoint
from fnl_hf.runs.plan import RunPlan, plan_run, validate_data
from fnl_hf.training.resuming import seed_new_process
from fnl_hf.training.trainer import FnlTrainer
from tests.conftest import SENTENCES, TINY, assert_same_weights, launch, pretraining

# Adam's ε keeps rounding noise of gradients that are zero in theory (key biases) from becoming whole steps.
FLAGS = {
    "config_overrides": TINY + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0", "adam_epsilon": 1e-3,
    "per_device_train_batch_size": 4, "max_train_samples": 61, "do_train": "true", "save_steps": 0.25,
}  # fmt: skip


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **FLAGS | flags)])


def go_on(corpus, folder, **flags):
    run(corpus, folder, resume_from_checkpoint="auto", **flags)


def before_its_end(whole, folder, newest):
    """A copy of a finished run as it was after its checkpoint ``newest``."""
    shutil.copytree(whole, folder)
    (folder / "all_results.json").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > newest:
            shutil.rmtree(checkpoint)
    return folder


@pytest.fixture(scope="module")
def of_two_processes(corpus, tmp_path_factory):
    """Twelve steps of 2 processes x 4 sequences, seven steps an epoch."""
    folder = tmp_path_factory.mktemp("resume") / "two"
    launch("run_pretrain.py", *pretraining(corpus, folder, **FLAGS), processes=2)
    return folder


@pytest.mark.parametrize("newest", [6, 9])  # in the first epoch and in the second
def test_a_run_of_two_processes_goes_on_with_one(of_two_processes, corpus, tmp_path, newest, caplog):
    out = before_its_end(of_two_processes, tmp_path / "out", newest)
    started = r"was started on 2 process\(es\) x 1 accumulation step\(s\) x 4 sequences; now they are 1 x"
    remedy = "same sample position with --allow_other_world_size true --gradient_accumulation_steps 2"
    with pytest.raises(UserInputError, match=f"{started} 2 x 4: resume at the {remedy}"):
        go_on(corpus, out, gradient_accumulation_steps=2)
    with pytest.raises(UserInputError, match=f"{started} 1 x 4: resume at the {remedy}"):
        go_on(corpus, out, allow_other_world_size="true")
    with pytest.raises(UserInputError, match="contains another run: .*per_device_train_batch_size was 4 and is now 8"):
        go_on(corpus, out, allow_other_world_size="true", per_device_train_batch_size=8)
    go_on(corpus, out, allow_other_world_size="true", gradient_accumulation_steps=2)
    assert_same_weights(of_two_processes, out, atol=1e-5, rtol=0)
    assert not [record for record in caplog.records if record.name.startswith("transformers.trainer")]
    now = json.loads((out / "run_arguments.json").read_text())
    assert now["world_size"] == 1 and now["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize("there, here, remedy", [
    ((3, 2), 5, "5 processes cannot share its global batch of 42 sequences. The number of processes must divide 6"),
    ((3, 2), 2, "--gradient_accumulation_steps 3"),
    ((1, 6), 3, "--gradient_accumulation_steps 2"),
])  # fmt: skip
def test_the_accumulation_that_keeps_the_global_batch_is_named(tmp_path, there, here, remedy):
    started = {"world_size": there[0], "gradient_accumulation_steps": there[1], "per_device_train_batch_size": 7}
    (tmp_path / "run_arguments.json").write_text(json.dumps(started))
    for allowed in (False, True):
        args = SimpleNamespace(
            output_dir=tmp_path, resume_from_checkpoint="auto", overwrite_output_dir=False, do_train=True,
            allow_other_world_size=allowed,
        )  # fmt: skip
        with pytest.raises(UserInputError, match=remedy):
            plan_run(args, started | {"world_size": here})


def test_going_on_from_the_last_checkpoint_trains_no_step_more(of_one_process, corpus, tmp_path):
    """Killed in what comes after training. Ten steps of seven an epoch; a linear schedule's last rate of 0 hides it."""
    flags = {"max_steps": 10, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    stream = {"streaming": "true", "tokenizer_name": of_one_process, "vocab_size": None, "max_train_samples": None,
              "shuffle_buffer_size": 21, "streaming_validation_documents": 9}  # fmt: skip
    for name, more in (("mapped", {}), ("streamed", stream)):
        run(corpus, tmp_path / name, **flags | more)
        out = before_its_end(tmp_path / name, tmp_path / f"{name} again", 10)
        (out / "model.safetensors").unlink()
        go_on(corpus, out, **flags | more)
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 10
        assert_same_weights(tmp_path / name, out)


def test_what_lies_beyond_the_checkpoint_that_is_named_never_passes_for_newer(
    of_one_process, corpus, tmp_path, monkeypatch
):
    out = before_its_end(of_one_process, tmp_path / "out", 9)

    def killed(self, *args):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return original(self, *args)

    original = FnlTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FnlTrainer, "training_step", killed)
        run(corpus, out, resume_from_checkpoint=out / "checkpoint-3", save_total_limit=2)
    assert newest_complete_checkpoint(out) == out / "checkpoint-6"
    assert {path.name for path in out.glob("*checkpoint*")} == {
        "checkpoint-3", "checkpoint-6", "_abandoned-checkpoint-6", "_abandoned-checkpoint-9",
    }  # fmt: skip
    go_on(corpus, out, save_total_limit=2)
    assert_same_weights(of_one_process, out)


@pytest.fixture(scope="module")
def of_one_process(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "one"
    run(corpus, folder)
    return folder


def test_other_data_are_refused(of_one_process, corpus, tmp_path):
    """The file of the same name has one word changed; the tokenizer is the checkpoint's."""
    out = before_its_end(of_one_process, tmp_path / "out", 9)
    changed = corpus.parent / "changed.txt"
    changed.write_text("\n".join(["the quick brown fox jumps over the big cat", *(SENTENCES * 4)[1:]]))
    original = corpus.read_bytes()
    before = json.loads((out / "run_arguments.json").read_text())
    try:
        os.replace(changed, corpus)
        with pytest.raises(UserInputError, match=f"other data: the fingerprint was {before['data_fingerprint']} and"):
            go_on(corpus, out)
        with pytest.raises(UserInputError, match="Restore the old files"):
            run(corpus, out, resume_from_checkpoint=out / "checkpoint-6")
    finally:
        corpus.write_bytes(original)
    assert json.loads((out / "run_arguments.json").read_text()) == before
    go_on(corpus, out)
    assert_same_weights(of_one_process, out)


def test_a_run_of_an_earlier_version_has_no_fingerprint_and_goes_on(tmp_path):
    (tmp_path / "run_arguments.json").write_text("{}")
    validate_data(RunPlan(continued=tmp_path), {"data_fingerprint": "3f", "validation_fingerprint": "5a"})
    validate_data(RunPlan(), {"data_fingerprint": "3f"})


def test_a_process_that_the_checkpoint_does_not_know_has_a_random_state_of_its_own(of_one_process, corpus, tmp_path):
    def draws(seed, step, process):
        args = SimpleNamespace(seed=seed, world_size=3, process_index=process)
        seed_new_process(args, str(of_one_process / "checkpoint-6"), step)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws(7, 6, 1) == draws(7, 6, 1)
    different = [draws(7, 6, 1), draws(8, 6, 1), draws(7, 9, 1), draws(7, 6, 2)]
    assert all(len(set(column)) == len(different) for column in zip(*different))
    args, before = SimpleNamespace(seed=7, world_size=1, process_index=0), torch.get_rng_state()
    seed_new_process(args, str(of_one_process / "checkpoint-6"), 6)
    assert torch.equal(torch.get_rng_state(), before), "Trainer restores what the checkpoint knows"


def test_a_run_can_be_made_longer_and_is_told_what_that_means(of_one_process, corpus, tmp_path, caplog):
    out = before_its_end(of_one_process, tmp_path / "out", 9)
    go_on(corpus, out, max_steps=13)
    assert (
        "the run was started for 12 steps and now ends after 13 steps in total. From this step on, the learning rate"
        in caplog.text
    )
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 13
    caplog.clear()
    go_on(corpus, out, max_steps=13)
    assert "was started for" not in caplog.text


def test_logging_and_saving_follow_the_command_line(of_one_process, corpus, tmp_path, caplog):
    out = before_its_end(of_one_process, tmp_path / "out", 6)
    go_on(corpus, out, save_steps=4, logging_steps=2)
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (3, 6, 8, 12)}
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [3, 6, 8, 10, 12]
    assert not [record for record in caplog.records if "do not match" in record.message]
    assert_same_weights(of_one_process, out)


def test_workers_that_outlive_an_epoch_change_nothing_and_end_with_the_run(corpus, tmp_path):
    """Seven steps an epoch, dropout; launched, because such workers end with the interpreter."""
    flags = {"max_train_samples": 61, "save_steps": 3, "per_device_eval_batch_size": 4, "eval_strategy": "epoch"}
    flags |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": "true"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    launch("run_pretrain.py", *pretraining(corpus, whole, **flags), timeout=120)
    before_its_end(whole, out, 3)
    launch("run_pretrain.py", *pretraining(corpus, out, resume_from_checkpoint="auto", **flags), timeout=120)
    assert_same_weights(whole, out)
