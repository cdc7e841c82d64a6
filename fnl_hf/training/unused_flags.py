"""Flags that were given but have no effect: a warning names each one once, with the reason.

Not in the table: flags that take effect with more processes or when a run is resumed, and flags for training in a run
that only evaluates. One recipe serves these runs, too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from fnl_hf.products.discovery import find_products
from fnl_hf.runs.command_line import expand_home
from fnl_hf.runs.config_files import with_config_files
from fnl_hf.training.optimizers import OPTIMIZERS, constructor_arguments

logger = logging.get_logger(__name__)

WITH_ADAM = "it needs --optimizer adamw, lamb or muon"
OFF = ("false", "no", "none", "null")  # values that turn a flag off
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
WITHOUT_KWARGS = ("constant", "constant_with_warmup")


class Rule(NamedTuple):
    """``flags`` have no effect, for the ``reason``, if ``is_unused(run)``; ``run`` has the values of all flags."""

    flags: tuple[str, ...]
    is_unused: Callable[[Any], bool]
    reason: str


def _optimizer_takes(run: Any, argument: str) -> bool:
    return argument in constructor_arguments(OPTIMIZERS[run.optimizer])


def _has_split_files(run: Any) -> bool:
    """Whether a file is named for each split that run_squad.py uses."""
    uses = {"train_file": run.do_train, "validation_file": run.do_eval, "test_file": run.do_predict}
    return hasattr(run, "test_file") and all(getattr(run, file) for file, is_used in uses.items() if is_used)


def _reads_text_files(run: Any) -> bool:
    files = run.train_file or ()
    return run.dataset_name is None and all(".txt" in Path(file).suffixes for file in files)


# For the flags of all scripts: a script that has a flag also has the flags that its rule reads.
RULES = (
    # the optimizer and its schedule
    Rule(("adam_beta1", "adam_beta2"), lambda run: not _optimizer_takes(run, "betas"), WITH_ADAM),
    Rule(("adam_epsilon",), lambda run: not _optimizer_takes(run, "eps"), WITH_ADAM),
    Rule(("frobenius_decay",), lambda run: run.decay_mode == "none", "it needs --decay_mode frobenius or weight"),
    Rule(("optim_target_modules",), lambda run: True, "no optimizer here uses it"),
    Rule(
        ("warmup_steps",),
        lambda run: run.lr_scheduler_type in WITHOUT_WARMUP and run.warmup_steps,
        "it needs an --lr_scheduler_type with a warmup, such as constant_with_warmup",
    ),
    Rule(
        ("lr_scheduler_kwargs",),
        lambda run: run.lr_scheduler_type in WITHOUT_KWARGS,
        "it needs an --lr_scheduler_type that takes arguments",
    ),
    Rule(("num_train_epochs",), lambda run: run.max_steps > 0, "--max_steps replaces it"),
    Rule(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        lambda run: not (run.gradient_checkpointing or getattr(run, "activation_checkpointing", None)),
        "it needs --gradient_checkpointing true",
    ),
    Rule(("torch_empty_cache_steps",), lambda run: run.device.type == "cpu", "it needs an accelerator"),
    Rule(("fsdp_config",), lambda run: not run.fsdp, "it needs --fsdp"),
    # when things happen
    Rule(("eval_steps",), lambda run: run.eval_strategy != "steps", "it needs --eval_strategy steps"),
    Rule(("eval_delay",), lambda run: run.eval_strategy == "no", "it needs --eval_strategy steps or epoch"),
    Rule(
        ("metric_for_best_model", "greater_is_better"),
        lambda run: run.eval_strategy == "no",
        "it needs --eval_strategy steps or epoch",
    ),
    Rule(
        (
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "prediction_loss_only",
            "bf16_full_eval",
            "fp16_full_eval",
            "n_best_size",
            "max_answer_length",
        ),
        lambda run: not (run.do_eval or run.do_predict),
        "it needs --do_eval true",
    ),
    Rule(("include_for_metrics",), lambda run: True, "no metric here uses it"),
    Rule(("save_steps",), lambda run: run.save_strategy != "steps", "it needs --save_strategy steps"),
    Rule(("save_total_limit",), lambda run: run.save_strategy == "no", "it needs --save_strategy steps, epoch or best"),
    Rule(
        ("logging_steps",),  # it stands for --eval_steps, too
        lambda run: run.logging_strategy != "steps" and run.eval_strategy != "steps",
        "it needs --logging_strategy steps",
    ),
    Rule(("run_name",), lambda run: not run.report_to, "it needs --report_to"),
    Rule(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda run: "trackio" not in run.report_to,
        "it needs --report_to trackio",
    ),
    Rule(
        ("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"),
        lambda run: not run.push_to_hub,
        "it needs --push_to_hub true",
    ),
    Rule(
        ("hub_always_push",),
        lambda run: run.push_to_hub and run.hub_strategy == "end",
        "it needs --hub_strategy every_save or checkpoint",
    ),
    Rule(("seed",), lambda run: getattr(run, "seeds", None) is not None, "--seeds replaces it"),
    # the data
    Rule(("remove_unused_columns",), lambda run: True, "the data of these scripts have no unused columns"),
    Rule(
        ("dataloader_drop_last",),
        lambda run: not hasattr(run, "test_file"),
        "an epoch consists of whole global batches anyway",
    ),
    Rule(("dataloader_pin_memory",), lambda run: run.device.type == "cpu", "it needs an accelerator"),
    Rule(
        ("length_column_name",),
        lambda run: run.train_sampling_strategy != "group_by_length",
        "it needs --train_sampling_strategy group_by_length",
    ),
    Rule(("dataset_config_name",), lambda run: run.dataset_name is None, "it needs --dataset_name"),
    Rule(("dataset_name",), _has_split_files, "the files that were given are read instead"),
    Rule(
        ("train_file", "max_train_samples"),
        lambda run: hasattr(run, "test_file") and not run.do_train,
        "it needs --do_train true",
    ),
    Rule(("validation_file",), lambda run: hasattr(run, "test_file") and not run.do_eval, "it needs --do_eval true"),
    Rule(("max_eval_samples",), lambda run: not run.do_eval, "it needs --do_eval true"),
    Rule(("test_file", "max_predict_samples"), lambda run: not run.do_predict, "it needs --do_predict true"),
    Rule(
        ("null_score_diff_threshold",),
        lambda run: not run.version_2_with_negative,
        "it needs --version_2_with_negative true",
    ),
    Rule(("text_column_name",), _reads_text_files, "it needs a data set or files with columns"),
    Rule(("strict",), lambda run: not (run.dataset_name or run.train_file), "it needs --train_file or --dataset_name"),
    Rule(("shuffle_buffer_size",), lambda run: not run.streaming, "it needs --streaming true"),
    Rule(
        ("streaming_validation_documents",),
        lambda run: not run.streaming or run.validation_file is not None,
        "it needs --streaming true and no --validation_file",
    ),
    Rule(
        ("validation_split_percentage",),
        lambda run: run.streaming or run.validation_file is not None,
        "it needs a run without --streaming and --validation_file",
    ),
    # the model to pretrain
    Rule(
        ("vocab_size", "alphabet_coverage"),
        lambda run: run.tokenizer_name is not None or run.model_name_or_path is not None,
        "it is for training a tokenizer, without --tokenizer_name and --model_name_or_path",
    ),
    Rule(
        ("attention_init",),
        lambda run: run.model_name_or_path is not None,
        "it is for a new model, without --model_name_or_path",
    ),
    Rule(
        ("mlm_probability", "whole_word_mask", "sparse_prediction", "sparse_last_layer"),
        lambda run: run.objective == "distill",
        "it needs --objective mlm or mlm_nsp",
    ),
    Rule(
        ("factorize_target_ratio", "factorize_mode", "factorize_init", "factorize_include"),
        lambda run: run.factorize_at_step is None,
        "it needs --factorize_at_step",
    ),
    Rule(
        ("factorize_target_ratio",), lambda run: run.factorize_mode != "low_rank", "it needs --factorize_mode low_rank"
    ),
    Rule(("sparse_last_layer",), lambda run: not run.sparse_prediction, "it needs --sparse_prediction true"),
)
OF_DECAY = ("frobenius_decay", "decay_mode")
OF_PRODUCTS = (*OF_DECAY, "product_norms_steps")


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """{flag: its values} of a command line and its config files; the last value counts."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in with_config_files(expand_home(argv)):
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            given[name] = [value] if equals else []
        elif name:
            given[name].append(word)
    return {name: " ".join(values) for name, values in given.items()}


def unused_flags(given: Mapping[str, str], *arguments: Any) -> list[str]:
    """A sentence for each flag that was given and has no effect.

    Args:
        given: see :func:`given_flags`.
        *arguments: the script's dataclasses with the values of all its flags.
    """
    run: Any = SimpleNamespace(**{name: value for each in arguments for name, value in vars(each).items()})
    run.device = next(each.device for each in arguments if hasattr(each, "device"))
    return [
        _sentence(flag, given[flag], rule.reason)
        for rule in RULES
        for flag in rule.flags
        if flag in given and hasattr(run, flag) and given[flag].lower() not in OFF and rule.is_unused(run)
    ]


def warn_of_unused_flags(argv: Sequence[str], *arguments: Any) -> None:
    """Warn, on the first process, of each flag of a command line that has no effect.

    Args:
        argv: the command line as the user gave it, without the script's name.
        *arguments: the script's dataclasses.
    """
    args = next(each for each in arguments if hasattr(each, "process_index"))
    if args.process_index == 0:
        for sentence in unused_flags(given_flags(argv), *arguments):
            logger.warning_once(sentence)


def warn_of_unused_decay(argv: Sequence[str], args: Any, model: torch.nn.Module) -> None:
    """Warn of flags for products if ``model`` has none, and of flags for their decay if all of them are frozen."""
    given = given_flags(argv)
    flags = [flag for flag in OF_PRODUCTS if flag in given and given[flag].lower() not in OFF]
    if not flags or not args.do_train or args.process_index != 0:
        return
    products = find_products(model)
    are_frozen = not any(weight.requires_grad for product in products for weight in product.weights)
    for flag in flags:
        if not products or are_frozen and flag in OF_DECAY:
            kind = "trainable products" if products else "products"
            reason = f"it needs a model with {kind} (attention or factorized layers)"
            logger.warning_once(_sentence(flag, given[flag], reason))


def _sentence(flag: str, value: str, reason: str) -> str:
    value = "set" if "token" in flag else value
    return f"--{flag} ({value}) has no effect here: {reason}"
