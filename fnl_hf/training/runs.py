"""A run and its output folder: start, resume, or nothing left to do. Never overwrite what is there unasked."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fnl_hf.errors import UserInputError
from fnl_hf.training.checkpoints import (
    STAGING_FOLDER,
    STATE_FILE,
    checkpoints,
    fault_of,
    newest_complete_checkpoint,
    read_state,
)

RESULTS_FILE = "all_results.json"
STARTED_FILE = "run_arguments.json"  # marks a folder as that of a run, before its first checkpoint
# What, beside the scripts' own arguments, makes two runs different ones.
TRAINING_ARGUMENTS = (
    "optimizer",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "frobenius_decay",
    "decay_mode",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "bf16",
    "fp16",
)
NO_DIFFERENCE = ("cache_dir", "preprocessing_num_workers")
# What must agree between a checkpoint and the model it is to continue.
ARCHITECTURE = (
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "attention_embedding_size",
)


@dataclass(frozen=True)
class RunPlan:
    """What to do with the output folder: continue from ``checkpoint``, start (None), or nothing (``finished``)."""

    checkpoint: str | None = None
    finished: bool = False


def describe_run(args, *script_arguments) -> dict[str, Any]:
    """What identifies a run: all of the script's own arguments, and those of Trainer's that change its result."""
    described = {name: getattr(args, name) for name in TRAINING_ARGUMENTS}
    for arguments in script_arguments:
        described |= dataclasses.asdict(arguments)
    return {name: value for name, value in described.items() if name not in NO_DIFFERENCE}


def plan_run(args, description: dict[str, Any]) -> RunPlan:
    """Decide from ``--output_dir``, ``--resume_from_checkpoint`` and ``--overwrite_output_dir``; changes no file.

    Raises:
        UserInputError: the folder is in use, its run has other arguments, or the named checkpoint is not complete.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise UserInputError(f"--output_dir {folder} is a file")
    if resume is not None and args.overwrite_output_dir:
        raise UserInputError(f"--resume_from_checkpoint ({resume}) and --overwrite_output_dir exclude each other")
    in_use = folder.is_dir() and any(folder.iterdir())
    if resume not in (None, "auto"):
        return _plan_from_checkpoint(Path(resume), folder, in_use, description)
    if not in_use or args.overwrite_output_dir:
        return RunPlan()
    if resume is None or not args.do_train:
        raise UserInputError(
            f"--output_dir {folder} is not empty: choose another, continue its training with --resume_from_checkpoint "
            "auto, or replace it with --overwrite_output_dir true"
        )
    _validate_same_run(folder, description)
    if is_finished(folder, args):
        return RunPlan(finished=True)
    checkpoint = newest_complete_checkpoint(folder)
    if checkpoint is None and not (folder / STARTED_FILE).is_file():
        raise UserInputError(
            f"--output_dir {folder} is not empty and holds no run to resume: choose another, or replace it with "
            "--overwrite_output_dir true"
        )
    return RunPlan(checkpoint=None if checkpoint is None else str(checkpoint))


def _plan_from_checkpoint(checkpoint: Path, folder: Path, in_use: bool, description: dict[str, Any]) -> RunPlan:
    fault = fault_of(checkpoint)
    if fault is not None:
        raise UserInputError(f"--resume_from_checkpoint {checkpoint}: no complete checkpoint there: {fault}")
    if in_use and checkpoint.resolve().parent != folder.resolve():
        raise UserInputError(f"--output_dir {folder} is not empty and not the folder of checkpoint {checkpoint}")
    _validate_same_run(checkpoint.parent, description)
    return RunPlan(checkpoint=str(checkpoint))


def _validate_same_run(folder: Path, description: dict[str, Any]) -> None:
    try:
        started = json.loads((folder / STARTED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    differences = [
        f"{name} is {started[name]} there and {value} here"
        for name, value in description.items()
        if name in started and started[name] != value
    ]
    if differences:
        raise UserInputError(
            f"{folder} holds another run: {'; '.join(differences)}. Choose another --output_dir, or replace it with "
            "--overwrite_output_dir true"
        )


def start_run(args, description: dict[str, Any]) -> None:
    """Make the output folder, drop the checkpoints of a run that is overwritten, and record what this run is."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.do_train:
        return
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
    if args.overwrite_output_dir:
        for old in checkpoints(folder):
            shutil.rmtree(old)
        for name in (RESULTS_FILE, STATE_FILE):
            (folder / name).unlink(missing_ok=True)
    (folder / STARTED_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_finished(folder: Path, args) -> bool:
    """Whether the run in ``folder`` ended and reached what ``args`` ask for; the results are written last."""
    state = read_state(folder)
    if state is None or not (folder / RESULTS_FILE).is_file() or state.global_step < state.max_steps:
        return False
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.num_train_epochs >= args.num_train_epochs


def validate_resume(checkpoint: str, model: PreTrainedModel) -> None:
    """Raise UserInputError if the checkpoint holds a model of another class or other shapes than ``model``."""
    saved = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    wanted = model.config.to_dict() | {"architectures": [type(model).__name__]}
    differences = [
        f"{name} is {saved.get(name)} there and {wanted.get(name)} here"
        for name in ARCHITECTURE
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise UserInputError(f"checkpoint {checkpoint} is of another architecture: {'; '.join(differences)}")
