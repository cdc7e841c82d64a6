"""Load the optimizer state of another run: ``--optimizer_state_from``."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerCallback

from fnl_hf.errors import UserInputError
from fnl_hf.runs.checkpoints import find_fault, list_checkpoints, newest_complete_checkpoint
from fnl_hf.runs.plan import read_started
from fnl_hf.runs.same_model import ARCHITECTURE, validate_same_model


def optimizer_checkpoint(args, model: PreTrainedModel) -> Path | None:
    """The newest complete checkpoint of the run in ``--optimizer_state_from`` that has the weights of ``model``; None
    without this flag. Moments belong to the weights at which they were computed: a run may end with the weights of its
    best checkpoint, and a model may be any of its checkpoints.

    Raises:
        UserInputError: there is none, it is another optimizer's or of another model, or it is about to be deleted.
    """
    folder = args.optimizer_state_from
    if folder is None:
        return None
    if args.overwrite_output_dir and Path(folder).resolve() == Path(args.output_dir).resolve():
        raise UserInputError(
            f"--optimizer_state_from {folder} is the --output_dir, which --overwrite_output_dir would delete: choose "
            "another --output_dir"
        )
    newest = newest_complete_checkpoint(Path(folder))
    if newest is None:
        raise UserInputError(f"--optimizer_state_from {folder}: no complete checkpoint in this folder")
    other = read_started(Path(folder)).get("optimizer", args.optimizer)
    if other != args.optimizer:
        raise UserInputError(
            f"--optimizer_state_from {folder}: that run uses --optimizer {other}, this one {args.optimizer}: use the "
            "same"
        )
    validate_same_model(newest, model, ARCHITECTURE)
    for checkpoint in list_checkpoints(Path(folder)):
        if has_weights(checkpoint, model) and (checkpoint == newest or find_fault(checkpoint) is None):
            return checkpoint
    raise UserInputError(
        f"--optimizer_state_from {folder}: no complete checkpoint in it has the weights that this run starts from: "
        f"set --model_name_or_path to one of its checkpoints, for example the newest, {newest}"
    )


def has_weights(checkpoint: Path, model: PreTrainedModel) -> bool:
    """Whether the weights in a checkpoint are bit-identical to those of ``model``."""
    own = model.state_dict()
    files = sorted(checkpoint.glob("model*.safetensors"))
    try:
        for file in files:
            with safe_open(file, "pt") as saved:
                names = saved.keys()
                if not all(name in own and _is_equal(saved.get_tensor(name), own[name].cpu()) for name in names):
                    return False
    except (OSError, SafetensorError):
        return False
    return bool(files)


def _is_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


class OptimizerStateCallback(TrainerCallback):
    """Starts a run from another run's optimizer state (moments and step counts), with its own settings and schedule."""

    def __init__(self, trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        schedule = lr_scheduler.state_dict()
        try:
            self.trainer._load_optimizer_and_scheduler(str(self.checkpoint))  # handles sharded states
        except ValueError as error:
            raise UserInputError(f"--optimizer_state_from {self.checkpoint.parent}: {error}") from error
        lr_scheduler.load_state_dict(schedule)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
