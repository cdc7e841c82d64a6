"""What a resumed run takes from its checkpoint, and what from its command line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import get_logger

from fnl_hf.runs.checkpoints import abandon_later_checkpoints, find_fault, random_state_file

logger = get_logger(__name__)

# Parts of warnings of Trainer that are not true here.
MENDED = ("do not match the ones in the `trainer_state.json`", "recorded in the resumed state does not exist anymore")


class ResumeCallback(TrainerCallback):
    """At the start of a run, logging, evaluation and saving follow its command line, not the checkpoint. Checkpoints
    later than the resumed one are set aside, and the best checkpoint is located."""

    def __init__(self):
        self.checkpoint: str | None = None  # the checkpoint from which the run resumes
        self.first_step = 0  # steps before the start; Trainer has no public name for them

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        state.compute_steps(args, state.max_steps)
        if args.should_save:
            abandon_later_checkpoints(Path(args.output_dir), state.global_step, self.checkpoint)
        if self.checkpoint is not None:
            find_best_checkpoint(args, state, Path(self.checkpoint).parent)
            seed_new_process(args, self.checkpoint, state.global_step)


def find_best_checkpoint(args, state: TrainerState, run: Path) -> None:
    """Point the state to the best checkpoint next to the resumed one. The recorded path may lead nowhere, or to an old
    copy, if the run's folder was renamed or the path was relative to another working folder.

    If the best checkpoint is missing or incomplete and the best model is needed, it is chosen among later evaluations.
    """
    if state.best_global_step is None:
        return
    best = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    places = [run / best, state.best_model_checkpoint]
    found = next((str(place) for place in places if place is not None and find_fault(Path(place)) is None), None)
    if found is None and args.load_best_model_at_end:
        logger.warning(
            f"{run / best} had the best {args.metric_for_best_model} ({state.best_metric:.4g}), but is missing or "
            "incomplete: the best model is chosen among the checkpoints evaluated from now on"
        )
        state.best_metric = state.best_global_step = None
    state.best_model_checkpoint = found


def complete_metrics(metrics: dict[str, Any], history: list[dict[str, Any]], first_step: int, last_step: int) -> None:
    """Correct Trainer's metrics of a run that resumed at ``first_step``: the mean loss includes the steps logged
    before. If no step was left to train, speeds are removed."""
    logged = [(row["step"], row["loss"]) for row in history if "loss" in row and row["step"] <= first_step]
    starts = [0, *(step for step, _ in logged)]
    total = sum(loss * (step - start) for (step, loss), start in zip(logged, starts))
    trained = last_step - first_step
    total += metrics.pop("train_loss") * trained
    if steps := starts[-1] + trained:
        metrics["train_loss"] = total / steps
    if not trained:
        for name in ("train_runtime", "train_samples_per_second", "train_steps_per_second"):
            metrics.pop(name, None)


def seed_new_process(args, checkpoint: str, step: int) -> None:
    """Give a process without a random state in the checkpoint its own random state; Trainer would leave all such
    processes with the same state."""
    if Path(checkpoint, random_state_file(args.process_index, args.world_size)).is_file():
        return
    entropy = [args.seed, step, args.process_index]
    set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


@contextmanager
def without_mended_warnings() -> Iterator[None]:
    """Suppress two warnings of Trainer that are not true here: that it keeps a checkpoint's logging, evaluation and
    saving steps, and that the best checkpoint has moved. :class:`ResumeCallback` handles both."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    for each in loggers:
        each.addFilter(_is_no_mended_warning)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(_is_no_mended_warning)


def _is_no_mended_warning(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in MENDED)


@contextmanager
def loading_tied_weights(model: torch.nn.Module) -> Iterator[None]:
    """Exclude tied weights, which are saved once, from the missing keys that ``model.load_state_dict`` returns."""
    hook = model.register_load_state_dict_post_hook(_leave_out_tied)
    try:
        yield
    finally:
        hook.remove()


def _leave_out_tied(model: torch.nn.Module, keys: Any) -> None:
    names = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in names.items() if name not in keys.missing_keys}
    keys.missing_keys[:] = [name for name in keys.missing_keys if id(names.get(name)) not in loaded]
