"""Dense up to a step, then products, on two processes: as on one, and to the last bit when the run goes on."""

import json

import pytest

import run_pretrain
from tests.conftest import RESUMES_ON_CPUS, STREAM, TINY, assert_same_weights, launch, pretraining, weights
from tests.runs.test_resume import before_its_end

# Adam's ε keeps rounding noise of gradients that are zero in theory (key biases) from becoming whole steps.
FLAGS = {
    "config_overrides": TINY + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0", "adam_epsilon": 1e-3,
    "per_device_train_batch_size": 4, "max_train_samples": 61, "max_steps": 8, "save_steps": 1, "logging_steps": 1,
    "factorize_at_step": 4,
}  # fmt: skip


def words(corpus, folder, **flags):
    return [str(word) for word in pretraining(corpus, folder, **FLAGS | flags)]


def losses(folder):
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def of_two(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm") / "two"
    launch("run_pretrain.py", *words(corpus, folder), processes=2)
    return folder


def test_two_processes_train_as_one_does(of_two, corpus, tmp_path):
    run_pretrain.run(words(corpus, tmp_path / "one", gradient_accumulation_steps=2))
    assert losses(of_two) == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    assert_same_weights(of_two, tmp_path / "one", atol=1e-4, rtol=0)
    dense, factorized = (set(weights(of_two / f"checkpoint-{step}")) for step in (4, 5))
    assert dense != factorized == set(weights(of_two))


@RESUMES_ON_CPUS
@pytest.mark.parametrize("stopped", [3, 5])
def test_they_go_on_from_either_side_of_the_switch_to_the_last_bit(of_two, corpus, tmp_path, stopped):
    out = before_its_end(of_two, tmp_path / "out", stopped)
    launch("run_pretrain.py", *words(corpus, out, resume_from_checkpoint="auto"), processes=2)
    assert_same_weights(of_two, out)
    assert losses(of_two) == losses(out)


def test_of_a_stream_all_processes_see_what_one_would_see(finished_runs, corpus, tmp_path):
    """Each reads a shard of its own."""
    flags = STREAM | {"tokenizer_name": finished_runs.run, "max_train_samples": None, "streaming_shards": 2}
    flags |= {"factorize_at_step": 1, "max_steps": 3}
    launch("run_pretrain.py", *words(corpus, tmp_path / "two", **flags), processes=2)
    run_pretrain.run(words(corpus, tmp_path / "one", **flags, gradient_accumulation_steps=2))
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-4, rtol=0)
