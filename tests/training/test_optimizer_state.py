"""Runs that start from another's model and optimizer state, as the second phase of a recipe does."""

import json
import re
import shutil

import pytest
import torch

import run_pretrain
from fnl_hf import UserInputError
from tests.conftest import pretraining, weights

FIRST = {"max_seq_length": 8, "max_steps": 7, "learning_rate": 1e-2, "save_steps": 3}
SECOND = {"max_seq_length": 16, "max_steps": 5, "learning_rate": 2e-3, "warmup_steps": 2, "save_steps": 3}
KEY = "bert.encoder.layer.0.intermediate.dense.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **flags)])


def second(corpus, first, folder, carried=True, **flags):
    states = {"optimizer_state_from": first} if carried else {}
    run(corpus, folder, model_name_or_path=first, **states | SECOND | flags)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A first run, and second ones with its optimizer state and without."""
    folder = tmp_path_factory.mktemp("runs")
    run(corpus, folder / "first", **FIRST)
    second(corpus, folder / "first", folder / "carried")
    second(corpus, folder / "first", folder / "reset", carried=False)
    return folder


def test_moments_are_carried_or_reset(runs):
    assert not torch.equal(weights(runs / "carried")[KEY], weights(runs / "reset")[KEY])
    states = [
        torch.load(runs / name / "checkpoint-5" / "optimizer.pt", weights_only=True)["state"]
        for name in ("carried", "reset")
    ]
    assert [next(iter(state.values()))["step"] for state in states] == [12, 5]


def test_the_schedule_is_the_second_runs_own(runs):
    history = json.loads((runs / "carried" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates[0] == pytest.approx(2e-3), "at its third step, after warm-up"
    assert weights(runs / "first")[POSITIONS].shape == weights(runs / "carried")[POSITIONS].shape == (512, 32)


def test_a_resumed_run_keeps_its_own_optimizer_state(runs, corpus, tmp_path):
    """It needs none of the first run, whose checkpoints may be gone."""
    first, out = tmp_path / "first", tmp_path / "out"
    shutil.copytree(runs / "first", first)
    second(corpus, first, out)
    whole = weights(out)
    assert all(torch.equal(whole[name], value) for name, value in weights(runs / "carried").items())
    for checkpoint in (out / "checkpoint-5", *first.glob("checkpoint-*")):
        shutil.rmtree(checkpoint)
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    second(corpus, first, out, resume_from_checkpoint="auto")
    assert all(torch.equal(whole[name], value) for name, value in weights(out).items())


def test_a_run_belongs_to_the_weights_it_started_from(runs, corpus, tmp_path):
    first, out = tmp_path / "first", tmp_path / "out"
    shutil.copytree(runs / "first", first)
    second(corpus, first, out)
    finished = (out / "all_results.json").stat().st_mtime_ns
    trained = (first / "model.safetensors").read_bytes()
    shutil.copy(first / "checkpoint-3" / "model.safetensors", first)
    with pytest.raises(UserInputError, match="out contains a run that started from other weights: the checksum was"):
        second(corpus, first, out, resume_from_checkpoint="auto")
    (first / "model.safetensors").write_bytes(trained)
    second(corpus, first, out, resume_from_checkpoint="auto")
    assert (out / "all_results.json").stat().st_mtime_ns == finished, "nothing left to do"


def test_moments_are_those_of_the_weights_that_a_run_starts_from(runs, corpus, tmp_path):
    """Of the checkpoint that has them: a run may end with its best one's, and a model may be any of its checkpoints."""
    first = tmp_path / "first"
    shutil.copytree(runs / "first", first)

    def steps(folder):
        states = torch.load(folder / "checkpoint-5" / "optimizer.pt", weights_only=True)["state"]
        return next(iter(states.values()))["step"]

    second(corpus, first / "checkpoint-3", tmp_path / "of a checkpoint", optimizer_state_from=first)
    assert steps(tmp_path / "of a checkpoint") == 3 + 5
    shutil.copy(first / "checkpoint-6" / "model.safetensors", first)  # as load_best_model_at_end leaves it
    second(corpus, first, tmp_path / "of the best")
    assert steps(tmp_path / "of the best") == 6 + 5
    shutil.rmtree(first / "checkpoint-6")
    newest = re.escape(str(first / "checkpoint-7"))
    with pytest.raises(UserInputError, match=f"has the weights .* set --model_name_or_path .* the newest, {newest}$"):
        second(corpus, first, tmp_path / "of none")
    with pytest.raises(
        UserInputError, match="first: no complete checkpoint in it has the weights that this run starts"
    ):
        run(corpus, tmp_path / "from scratch", optimizer_state_from=first, **SECOND)
    assert not (tmp_path / "of none").exists() and not (tmp_path / "from scratch").exists()
