"""Next sentence prediction and streaming, through the script."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import run_pretrain
from fnl_hf import FnlBertForPreTraining, UserInputError
from fnl_hf.data.masking import pair_inputs
from tests.conftest import TINY, assert_same_weights, launch, pretraining, weights

NO_DROPOUT = TINY + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **flags)])


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Documents of several sentences, so that there are pairs."""
    path = tmp_path_factory.mktemp("stories") / "stories.txt"
    words = ("the", "quick", "brown", "fox", "dog", "cat", "bird", "jumps", "runs", "flies", "over", "lazy", "house")
    generator = np.random.default_rng(0)
    lines = [". ".join(" ".join(generator.choice(words, 5)) for _ in range(9)) + "." for _ in range(97)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ---- next sentence prediction ----


def test_pair_inputs_by_hand():
    inputs = pair_inputs(np.zeros((2, 7), dtype=np.uint16), np.array([3, 4]), np.array([5, 7]), np.array([1, 0]))
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert inputs["next_sentence_label"].tolist() == [1, 0]


def test_next_sentence_prediction_is_trained(stories, tmp_path):
    """Its head moves, padding is masked out, and the metrics are there; resumed, the end is the same."""
    flags = {"objective": "mlm_nsp", "max_seq_length": 19, "vocab_size": 60}
    run(stories, tmp_path / "whole", **flags)
    results = json.loads((tmp_path / "whole" / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(results["eval_mlm_loss"] + results["eval_nsp_loss"])
    assert 0 <= results["eval_nsp_accuracy"] <= 1 and results["eval_perplexity"] > 1
    model = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "whole")
    assert type(model) is FnlBertForPreTraining
    assert model.cls.seq_relationship.bias.abs().min() > 1e-3, "the sentence head was trained"
    assert "AutoModelForPreTraining" in (tmp_path / "whole" / "README.md").read_text()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    resume = tmp_path / "resumed" / "checkpoint-5"
    run(stories, tmp_path / "resumed", **flags, resume_from_checkpoint=resume)
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


# ---- streaming ----


@pytest.fixture(scope="module")
def tokenizer(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "out"
    run(stories, folder, max_steps=1, vocab_size=60)
    return folder


def streamed(tokenizer, **flags):
    return {
        "streaming": "true", "tokenizer_name": tokenizer, "shuffle_buffer_size": 21, "vocab_size": None,
        "streaming_validation_documents": 5, "per_device_train_batch_size": 7,
    } | flags  # fmt: skip


def before_its_end(whole, folder, step):
    """The run as it was after a checkpoint."""
    shutil.copytree(whole, folder)
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (folder / name).unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)
    return folder


@pytest.mark.parametrize("workers, accumulation", [(0, 1), (0, 2), (1, 1), (2, 2)])
def test_a_streaming_run_resumes_to_the_same_weights(stories, tokenizer, tmp_path, workers, accumulation):
    """In the middle of a buffer, with dropout, workers and accumulation."""
    flags = streamed(tokenizer, dataloader_num_workers=workers, gradient_accumulation_steps=accumulation)
    run(stories, tmp_path / "whole", **flags)
    out = before_its_end(tmp_path / "whole", tmp_path / "out", 5)
    state = json.loads((out / "checkpoint-5" / "stream_state_0.json").read_text())
    assert state["consumed"] == 5 * accumulation and state["shards"] == max(1, workers)
    run(stories, out, **flags, resume_from_checkpoint="auto")
    assert_same_weights(tmp_path / "whole", out)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [round(row["epoch"], 4) for row in history if "loss" in row] == [0.25, 0.5, 0.75, 1.0]


def test_processes_share_a_stream_and_can_change_their_number(stories, tokenizer, tmp_path):
    """Two processes and one with two accumulation steps train the same model; a run of two goes on as one."""
    flags = streamed(tokenizer, streaming_shards=2, config_overrides=NO_DROPOUT, max_steps=20, save_steps=10)
    one = flags | {"gradient_accumulation_steps": 2}
    run(stories, tmp_path / "one", **one)
    launch("run_pretrain.py", *pretraining(stories, tmp_path / "two", **flags), processes=2)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=0)
    out = before_its_end(tmp_path / "two", tmp_path / "out", 10)
    with pytest.raises(UserInputError, match="--allow_other_world_size"):
        run(stories, out, **flags, resume_from_checkpoint="auto")
    run(stories, out, **one, resume_from_checkpoint="auto", allow_other_world_size="true")
    assert_same_weights(tmp_path / "two", out, atol=1e-5, rtol=0)


def test_attention_within_documents_and_whole_words_change_the_run(stories, tokenizer, tmp_path):
    flags = {"config_overrides": NO_DROPOUT, "max_steps": 3, "tokenizer_name": tokenizer, "vocab_size": None}
    run(stories, tmp_path / "plain", **flags)
    options = {"attend_within_documents": "true", "whole_word_mask": "true", "sparse_prediction": "false"}
    for name, value in options.items():
        run(stories, tmp_path / name, **flags, **{name: value})
    run(stories, tmp_path / "same", **flags, sparse_last_layer="false")
    key = "bert.encoder.layer.0.intermediate.dense.weight"
    found = {name: weights(tmp_path / name)[key] for name in ("plain", "same", *options)}
    assert not torch.allclose(found["plain"], found["attend_within_documents"], atol=1e-4)
    assert not torch.allclose(found["plain"], found["whole_word_mask"], atol=1e-4)
    for name in ("sparse_prediction", "same"):
        torch.testing.assert_close(found["plain"], found[name], atol=1e-5, rtol=0)
    for kernel in ("sdpa", "eager"):
        run(stories, tmp_path / kernel, **flags, attn_implementation=kernel, attend_within_documents="true")
    assert_same_weights(tmp_path / "sdpa", tmp_path / "eager", atol=1e-5, rtol=0)
