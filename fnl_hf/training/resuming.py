"""What a run that goes on takes from its checkpoint, and what from its command line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from fnl_hf.runs.checkpoints import abandon_later_checkpoints, random_state_file


class ResumeCallback(TrainerCallback):
    """Where a run starts, logging, evaluation and saving follow its command line, not the checkpoint's; checkpoints
    beyond the one that it goes on from are set aside."""

    def __init__(self):
        self.checkpoint: str | None = None  # what the run goes on from

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)
        if args.should_save:
            abandon_later_checkpoints(Path(args.output_dir), state.global_step, self.checkpoint)
        if self.checkpoint is not None:
            seed_new_process(args, self.checkpoint, state.global_step)


def seed_new_process(args, checkpoint: str, step: int) -> None:
    """Give a process that the checkpoint does not know a random state of its own; Trainer leaves it as it is, the same
    in all of them."""
    if Path(checkpoint, random_state_file(args.process_index, args.world_size)).is_file():
        return
    entropy = [args.seed, step, args.process_index]
    set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


@contextmanager
def expecting_other_steps() -> Iterator[None]:
    """Trainer warns that it keeps a checkpoint's logging, evaluation and saving steps, which :class:`ResumeCallback`
    does not let it."""
    logger = logging.getLogger("transformers.trainer_utils")
    logger.addFilter(_is_no_warning_of_other_steps)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_warning_of_other_steps)


def _is_no_warning_of_other_steps(record: logging.LogRecord) -> bool:
    return "do not match the ones in the `trainer_state.json`" not in record.getMessage()


@contextmanager
def loading_tied_weights(model: torch.nn.Module) -> Iterator[None]:
    """A tied weight, which is saved once, is not among the missing ones that ``model.load_state_dict`` returns."""
    hook = model.register_load_state_dict_post_hook(_leave_out_tied)
    try:
        yield
    finally:
        hook.remove()


def _leave_out_tied(model: torch.nn.Module, keys: Any) -> None:
    names = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in names.items() if name not in keys.missing_keys}
    keys.missing_keys[:] = [name for name in keys.missing_keys if id(names.get(name)) not in loaded]
