"""Flags that have no effect are named once, each with the reason: a row for each, and its opposite."""

import dataclasses
import logging

import pytest
import torch

import run_pretrain
import run_squad
import train
from fnl_hf import FnlBertConfig, FnlBertForMaskedLM
from fnl_hf.runs.command_line import parse_arguments
from fnl_hf.training import unused_flags
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.unused_flags import RULES, given_flags, warn_of_unused_decay
from tests.conftest import ROOT, pretraining
from tests.runs.test_recipes import RECIPES

SCRIPTS = {
    "pretrain": (run_pretrain.ModelArguments, run_pretrain.DataArguments, FnlTrainingArguments),
    "squad": run_squad.ARGUMENTS,
    "image": train.ARGUMENTS,
}
BASE = {"pretrain": "", "squad": "--model_name_or_path m", "image": "--idx_dir d"}
NEW_TEXT = "--train_file a.jsonl"
# script, flag, a line on which it has no effect, one on which it has (None: there is none)
CASES = [
    ("pretrain", "mlm_probability", "--mlm_probability 0.3 --objective distill", "--mlm_probability 0.3"),
    ("pretrain", "whole_word_mask", "--whole_word_mask true --objective distill", "--whole_word_mask true"),
    ("pretrain", "sparse_prediction", "--sparse_prediction true --objective distill", "--sparse_prediction true"),
    ("pretrain", "sparse_last_layer", "--sparse_last_layer true --objective distill", "--sparse_last_layer true"),
    ("pretrain", "adam_beta1", "--adam_beta1 0.8 --optimizer sgd", "--adam_beta1 0.8"),
    ("pretrain", "adam_beta2", "--adam_beta2 0.5 --optimizer sgd", "--adam_beta2 0.5 --optimizer lamb"),
    ("image", "adam_beta2", "--adam_beta2 0.5", "--adam_beta2 0.5 --optimizer adamw"),
    ("squad", "adam_epsilon", "--adam_epsilon 1e-6 --optimizer sgd", "--adam_epsilon 1e-6"),
    ("pretrain", "frobenius_decay", "--frobenius_decay 0.1 --decay_mode none", "--frobenius_decay 0.1"),
    ("pretrain", "optim_target_modules", "--optim_target_modules all", None),
    ("pretrain", "warmup_steps", "--warmup_steps 5 --lr_scheduler_type constant", "--warmup_steps 5"),
    ("image", "warmup_steps", "--warmup_steps 5 --lr_scheduler_type constant", "--warmup_steps 5"),
    ("pretrain", "lr_scheduler_kwargs", '--lr_scheduler_kwargs {"power":2} --lr_scheduler_type constant',
     '--lr_scheduler_kwargs {"power":2} --lr_scheduler_type polynomial'),
    ("pretrain", "num_train_epochs", "--num_train_epochs 2 --max_steps 5", "--num_train_epochs 2"),
    ("pretrain", "gradient_checkpointing_kwargs", '--gradient_checkpointing_kwargs {"use_reentrant":false}',
     '--gradient_checkpointing_kwargs {"use_reentrant":false} --gradient_checkpointing true'),
    ("pretrain", "activation_checkpointing_kwargs", '--activation_checkpointing_kwargs {"use_reentrant":false}', None),
    ("pretrain", "torch_empty_cache_steps", "--torch_empty_cache_steps 3", None),
    ("pretrain", "prediction_loss_only", "--prediction_loss_only true --do_train true", "--prediction_loss_only true"),
    ("squad", "n_best_size", "--n_best_size 3 --do_train true", "--n_best_size 3"),
    ("squad", "max_answer_length", "--max_answer_length 3 --do_train true", "--max_answer_length 3 --do_predict true"),
    ("pretrain", "fsdp_config", '--fsdp_config {"min_num_params":2}', None),
    ("pretrain", "eval_steps", "--eval_steps 5 --eval_strategy epoch", "--eval_steps 5 --eval_strategy steps"),
    ("pretrain", "eval_delay", "--eval_delay 5", "--eval_delay 5 --eval_strategy steps"),
    ("squad", "metric_for_best_model", "--metric_for_best_model exact",
     "--metric_for_best_model f1 --eval_strategy epoch"),
    ("squad", "greater_is_better", "--greater_is_better true", "--greater_is_better true --eval_strategy epoch"),
    ("squad", "per_device_eval_batch_size", "--per_device_eval_batch_size 3 --do_train true",
     "--per_device_eval_batch_size 3 --do_predict true"),
    ("pretrain", "eval_accumulation_steps", "--eval_accumulation_steps 3 --do_train true",
     "--eval_accumulation_steps 3"),
    ("pretrain", "bf16_full_eval", "--bf16_full_eval true --do_train true", "--bf16_full_eval true"),
    ("pretrain", "fp16_full_eval", "--fp16_full_eval true --do_train true", "--fp16_full_eval true"),
    ("pretrain", "include_for_metrics", "--include_for_metrics inputs", None),
    ("pretrain", "save_steps", "--save_steps 5 --save_strategy no", "--save_steps 5"),
    ("image", "save_steps", "--save_steps 5", "--save_steps 5 --save_strategy steps"),
    ("pretrain", "save_total_limit", "--save_total_limit 5 --save_strategy no", "--save_total_limit 5"),
    ("pretrain", "logging_steps", "--logging_steps 5 --logging_strategy no",
     "--logging_steps 5 --logging_strategy no --eval_strategy steps"),
    ("pretrain", "run_name", "--run_name a --report_to none", "--run_name a --report_to tensorboard"),
    ("pretrain", "project", "--project a", None),
    ("pretrain", "trackio_space_id", "--trackio_space_id a", None),
    ("pretrain", "trackio_bucket_id", "--trackio_bucket_id a", None),
    ("pretrain", "trackio_static_space_id", "--trackio_static_space_id a", None),
    ("pretrain", "hub_model_id", "--hub_model_id a/b", "--hub_model_id a/b --push_to_hub true"),
    ("squad", "hub_token", "--hub_token hf_secret", "--hub_token hf_secret --push_to_hub true"),
    ("pretrain", "hub_private_repo", "--hub_private_repo true", "--hub_private_repo true --push_to_hub true"),
    ("pretrain", "hub_strategy", "--hub_strategy end", "--hub_strategy end --push_to_hub true"),
    ("pretrain", "hub_always_push", "--hub_always_push true", "--hub_always_push true --push_to_hub true"),
    ("pretrain", "hub_always_push", "--hub_always_push true --push_to_hub true --hub_strategy end",
     "--hub_always_push true --push_to_hub true --hub_strategy checkpoint"),
    ("pretrain", "hub_revision", "--hub_revision a", "--hub_revision a --push_to_hub true"),
    ("squad", "seed", "--seed 3 --seeds 4 5", "--seed 3"),
    ("pretrain", "remove_unused_columns", "--remove_unused_columns true", None),
    ("pretrain", "dataloader_drop_last", "--dataloader_drop_last true", None),
    ("pretrain", "dataloader_pin_memory", "--dataloader_pin_memory true", None),
    ("squad", "length_column_name", "--length_column_name a",
     "--length_column_name a --train_sampling_strategy group_by_length"),
    ("squad", "dataset_config_name", "--dataset_config_name a", "--dataset_config_name a --dataset_name b"),
    ("squad", "dataset_name", "--dataset_name a --train_file t.json --validation_file v.json",
     "--dataset_name a --train_file t.json"),
    ("squad", "train_file", "--train_file t.json --do_eval true", "--train_file t.json"),
    ("squad", "max_train_samples", "--max_train_samples 2 --do_eval true", "--max_train_samples 2"),
    ("squad", "validation_file", "--validation_file v.json --do_train true", "--validation_file v.json"),
    ("pretrain", "max_eval_samples", "--max_eval_samples 2 --do_train true", "--max_eval_samples 2"),
    ("squad", "test_file", "--test_file t.json", "--test_file t.json --do_predict true"),
    ("squad", "max_predict_samples", "--max_predict_samples 3", "--max_predict_samples 3 --do_predict true"),
    ("squad", "null_score_diff_threshold", "--null_score_diff_threshold 1",
     "--null_score_diff_threshold 1 --version_2_with_negative true"),
    ("pretrain", "text_column_name", "--text_column_name a --train_file t.txt.gz",
     "--text_column_name a --train_file t.txt t.csv"),
    ("pretrain", "strict", "--strict true", f"--strict true {NEW_TEXT}"),
    ("pretrain", "shuffle_buffer_size", f"--shuffle_buffer_size 9 {NEW_TEXT}",
     f"--shuffle_buffer_size 9 --streaming true {NEW_TEXT}"),
    ("pretrain", "streaming_validation_documents", "--streaming_validation_documents 9",
     f"--streaming_validation_documents 9 --streaming true {NEW_TEXT}"),
    ("pretrain", "validation_split_percentage", f"--validation_split_percentage 9 --validation_file v.txt {NEW_TEXT}",
     "--validation_split_percentage 9"),
    ("pretrain", "vocab_size", "--vocab_size 99 --tokenizer_name t", "--vocab_size 99"),
    ("pretrain", "alphabet_coverage", "--alphabet_coverage 0.99 --model_name_or_path m", "--alphabet_coverage 0.99"),
    ("pretrain", "attention_init", "--attention_init spectral --model_name_or_path m", "--attention_init spectral"),
    ("pretrain", "factorize_target_ratio", "--factorize_target_ratio 0.3",
     "--factorize_target_ratio 0.3 --factorize_at_step 0.2"),
    ("pretrain", "factorize_target_ratio", "--factorize_target_ratio 0.3 --factorize_at_step 0.2 --factorize_mode wide",
     "--factorize_target_ratio 0.3 --factorize_at_step 0.2"),
    ("pretrain", "factorize_mode", "--factorize_mode wide", "--factorize_mode wide --factorize_at_step 0.2"),
    ("pretrain", "factorize_init", "--factorize_init ones", "--factorize_init ones --factorize_at_step 0.2"),
    ("pretrain", "factorize_include", "--factorize_include q", "--factorize_include q --factorize_at_step 0.2"),
    ("pretrain", "sparse_last_layer", "--sparse_last_layer true --sparse_prediction false", "--sparse_last_layer true"),
]  # fmt: skip


KNOWN = {field.name for types in SCRIPTS.values() for each in types for field in dataclasses.fields(each)}
NEWER = {"activation_checkpointing_kwargs"} - KNOWN  # flags that an older Transformers does not have
CASES = [case for case in CASES if case[1] not in NEWER]


def found(script, words, tmp_path):
    """The sentences for a command line."""
    argv = [*words.split(), *BASE[script].split(), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    return unused_flags.unused_flags(given_flags(argv), *parse_arguments(SCRIPTS[script], argv))


@pytest.mark.parametrize("script, flag, without, having", CASES, ids=lambda value: str(value)[:40])
def test_a_flag_without_effect_is_named_with_the_reason(script, flag, without, having, tmp_path):
    sentences = found(script, without, tmp_path)
    about = [sentence for sentence in sentences if sentence.startswith(f"--{flag} (")]
    assert len(about) == 1 and " has no effect here: " in about[0] and "secret" not in about[0]
    if having is not None:
        assert not [sentence for sentence in found(script, having, tmp_path) if sentence.startswith(f"--{flag} (")]


def test_every_rule_has_a_case_and_names_flags_that_exist():
    flags = {flag for rule in RULES for flag in rule.flags} - NEWER
    assert flags == {flag for _, flag, _, _ in CASES} and flags <= KNOWN


@pytest.mark.parametrize("names", RECIPES, ids="+".join)
def test_no_recipe_has_a_flag_without_effect(names, tmp_path):
    files = " ".join(str(ROOT / "configs" / f"{name}.yaml") for name in names)
    second = "" if len(names) == 1 else " --model_name_or_path first"
    assert found("pretrain", files + second, tmp_path) == []
    assert found("squad", f"{ROOT}/configs/squad_sample.yaml", tmp_path) == []


def test_what_a_flag_is_given_last_counts_and_what_is_off_asks_for_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("adam-beta2: 0.5\nhub_strategy: end\nstreaming: false\n")
    given = given_flags([str(tmp_path / "c.yaml"), "--adam_beta2=0.7", "--train-file", "a", "b", "--fp16"])
    assert given == {
        "adam_beta2": "0.7", "hub_strategy": "end", "streaming": "false", "train_file": "a b", "fp16": "",
    }  # fmt: skip
    assert (
        found("pretrain", "--hub_always_push false --sparse_last_layer false --sparse_prediction false", tmp_path) == []
    )


def test_a_config_file_in_the_home_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("adam-beta2: 0.5\n")
    assert given_flags(["~/c.yaml"]) == {"adam_beta2": "0.5"}


def test_decay_of_a_model_without_products(tmp_path, dimensions, caplog):
    args = FnlTrainingArguments(str(tmp_path), do_train=True, use_cpu=True)
    argv = ["--frobenius_decay", "0.123", "--decay_mode", "weight", "--weight_decay", "0.1"]
    with caplog.at_level(logging.WARNING):
        warn_of_unused_decay(argv, args, FnlBertForMaskedLM(FnlBertConfig(**dimensions)))
        assert caplog.text == ""
        warn_of_unused_decay(argv, args, torch.nn.Linear(3, 2))
    said = [record.getMessage() for record in caplog.records]
    reason = "has no effect here: it needs a model with products (attention or factorized layers)"
    assert said == [f"--frobenius_decay (0.123) {reason}", f"--decay_mode (weight) {reason}"]
    caplog.clear()
    frozen = FnlBertForMaskedLM(FnlBertConfig(**dimensions)).requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        warn_of_unused_decay(["--frobenius_decay", "0.124", "--product_norms_steps", "3"], args, frozen)
    reason = reason.replace("products", "trainable products")
    assert [record.getMessage() for record in caplog.records] == [f"--frobenius_decay (0.124) {reason}"]


def test_a_run_warns_once(corpus, tmp_path, caplog):
    # Values of this test alone: what one process has said it does not say again.
    flags = {"max_steps": 1, "hub_model_id": "ada/never", "save_strategy": "no", "save_steps": 7919}
    run_pretrain.run(pretraining(corpus, tmp_path / "out", **flags))
    said = [record.getMessage() for record in caplog.records if "has no effect here" in record.getMessage()]
    assert said == [
        "--save_steps (7919) has no effect here: it needs --save_strategy steps",
        "--hub_model_id (ada/never) has no effect here: it needs --push_to_hub true",
    ]
