"""Runs in phases: one config file whose ``phases:`` are trained one after the other, each from the one before.

BERT is pretrained on short sequences first and on long ones at the end (Devlin et al. 2019: 128, then 512). Each phase
is a run of its own, in ``<output_dir>/_phase-<n>``, the last in ``<output_dir>``: with its own schedule, checkpoints
and report, resumed and skipped when finished like any other; the last one alone is uploaded. The same can be had with
two command lines, ``--model_name_or_path`` and ``--optimizer_state_from`` naming the first one's folder.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from fnl_hf.errors import UserInputError
from fnl_hf.runs.checkpoints import newest_complete_checkpoint
from fnl_hf.runs.config_files import as_arguments, as_flags, is_config_file, read_config
from fnl_hf.runs.plan import ARCHITECTURE, PHASE_PREFIX, RunPlan, read_started, validate_resume

OPTIMIZER_STATES = ("carry", "reset")
SET_BY_PHASES = ("output_dir", "model_name_or_path", "optimizer_state_from", "phases")
# What a later phase takes from the model of the one before.
FROM_THE_MODEL = ("preset", "config_name", "model_name_or_path", "tokenizer_name")
# What Accelerate and torch keep for the whole process, as the first phase sets it.
OF_THE_PROCESS = ("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cpu",
                  "fsdp", "fsdp_config", "ddp_backend", "ddp_timeout")  # fmt: skip


def phases_of(argv: Sequence[str]) -> list[list[str]]:
    """The command line of each phase; ``argv`` alone if it names no config file with ``phases:``.

    A phase is a mapping of flags to values over those of the file; flags of ``argv`` override both, in every phase.
    ``optimizer_state: carry`` (the default) goes on with the moments of the phase before, ``reset`` starts them anew.

    Raises:
        UserInputError: phases that are no list of mappings, a flag that they set themselves, or no output folder.
    """
    if not argv or not is_config_file(argv[0]):
        return [list(argv)]
    config = read_config(argv[0])
    if "phases" not in config:
        return [list(argv)]
    phases = _validated(argv[0], config.pop("phases"))
    given, flags = _split(argv[1:], ("output_dir",))
    output_dir = given.get("output_dir", config.pop("output_dir", None))
    if not isinstance(output_dir, str):
        raise UserInputError(f"{argv[0]}: phases need --output_dir ({output_dir}), the name of a folder")
    commands: list[list[str]] = []
    previous = None
    for number, phase in enumerate(phases, start=1):
        entries = config | phase
        state = entries.pop("optimizer_state", OPTIMIZER_STATES[0])
        last = number == len(phases)
        entries["output_dir"] = str(output_dir if last else Path(output_dir) / f"{PHASE_PREFIX}{number}")
        if previous is not None:
            entries = {name: value for name, value in entries.items() if name not in FROM_THE_MODEL}
            entries["model_name_or_path"] = previous
            if state == "carry":
                entries["optimizer_state_from"] = previous
            flags = _split(flags, FROM_THE_MODEL)[1]
        commands.append(as_arguments(entries) + flags + ([] if last else ["--push_to_hub", "false"]))
        previous = entries["output_dir"]
    return commands


def validate_phases(runs: Sequence[tuple[Any, RunPlan]]) -> None:
    """Raise UserInputError if, by its arguments and plan, a phase cannot follow the one before in one process."""
    for (before, plan), (args, next_plan) in pairwise(runs):
        if not plan.finished and (next_plan.finished or next_plan.checkpoint is not None):
            raise UserInputError(
                f"{before.output_dir} holds no finished run, but the phase after it has begun in {args.output_dir}: "
                "bring the finished one back, or train all phases anew with --overwrite_output_dir true"
            )
        for name in OF_THE_PROCESS:
            one, other = getattr(before, name), getattr(args, name)
            if one != other:
                raise UserInputError(
                    f"--{name} is {one} in the phase of {before.output_dir} and {other} in that of {args.output_dir}: "
                    "it must be the same in all phases"
                )
        if args.optimizer_state_from == before.output_dir:
            carry = f"optimizer_state: carry from {before.output_dir}"
            if before.save_strategy == "no":
                raise UserInputError(f"{carry} needs its checkpoints: not with --save_strategy no")
            if args.optimizer != before.optimizer:
                raise UserInputError(
                    f"{carry}: its --optimizer is {before.optimizer}, that of the next {args.optimizer}"
                )


def _validated(file: str, phases: Any) -> list[dict[str, Any]]:
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
        raise UserInputError(f"{file}: phases must be a list of mappings of flags to values")
    phases = [as_flags(f"{file}: phase {number}", phase) for number, phase in enumerate(phases, start=1)]
    for number, phase in enumerate(phases, start=1):
        taken = [name for name in SET_BY_PHASES if name in phase]
        if taken:
            raise UserInputError(f"{file}: phase {number} cannot set {taken[0]}: it follows from the phases' order")
        state = phase.get("optimizer_state", OPTIMIZER_STATES[0])
        if state not in OPTIMIZER_STATES:
            raise UserInputError(f"{file}: phase {number}: optimizer_state ({state}) must be one of {OPTIMIZER_STATES}")
    return phases


def _split(flags: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of some flags, and the other flags."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, exit_on_error=False
    )
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    try:
        found, others = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserInputError(str(error)) from error
    return vars(found), others


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
