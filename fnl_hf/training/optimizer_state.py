"""Optimizer states of one run that another starts from: ``--optimizer_state_from``."""

from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback

from fnl_hf.errors import UserInputError
from fnl_hf.runs.checkpoints import newest_complete_checkpoint
from fnl_hf.runs.plan import ARCHITECTURE, read_started, validate_resume


def optimizer_checkpoint(args, model: PreTrainedModel) -> Path | None:
    """The newest complete checkpoint of the run in ``--optimizer_state_from``; None without this flag.

    Raises:
        UserInputError: there is none, it is another optimizer's or of another model, or it is about to be deleted.
    """
    folder = args.optimizer_state_from
    if folder is None:
        return None
    if args.overwrite_output_dir and Path(folder).resolve() == Path(args.output_dir).resolve():
        raise UserInputError(f"--optimizer_state_from {folder} is the --output_dir that is to be overwritten")
    checkpoint = newest_complete_checkpoint(Path(folder))
    if checkpoint is None:
        raise UserInputError(f"--optimizer_state_from {folder}: no complete checkpoint there")
    other = read_started(Path(folder)).get("optimizer", args.optimizer)
    if other != args.optimizer:
        raise UserInputError(f"--optimizer_state_from {folder}: its optimizer is {other}, this one is {args.optimizer}")
    validate_resume(checkpoint, model, ARCHITECTURE)
    return checkpoint


class OptimizerStateCallback(TrainerCallback):
    """Starts a run from another's optimizer state (moments and step counts), with settings and schedule of its own."""

    def __init__(self, trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        schedule = lr_scheduler.state_dict()
        try:
            self.trainer._load_optimizer_and_scheduler(str(self.checkpoint))  # knows how sharded states are kept
        except ValueError as error:
            raise UserInputError(f"--optimizer_state_from {self.checkpoint.parent}: {error}") from error
        lr_scheduler.load_state_dict(schedule)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
