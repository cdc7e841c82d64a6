"""Decide what a run does with its output folder: start, resume, or nothing. Never overwrite anything unless asked."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME, logging

from fnl_hf.errors import UserInputError
from fnl_hf.runs.checkpoints import (
    STAGING_FOLDER,
    STATE_FILE,
    checksum,
    find_fault,
    list_checkpoints,
    newest_complete_checkpoint,
    not_of_the_run,
    read_state,
    remove,
)
from fnl_hf.runs.locks import LOCK_FILE, lock_folder, read_lock
from fnl_hf.runs.ownership import (
    RESULTS_FILE,
    STARTED_FILE,
    Output,
    holds_run,
    others_files,
    output_of,
    refuse_others_files,
    shortened,
    write_json,
)
from fnl_hf.runs.processes import decide_on_first_process
from fnl_hf.runs.provenance import mask_home, read_starts

logger = logging.get_logger(__name__)

# Flags that name the folder of a model or tokenizer that a run starts from.
STARTS_FROM = ("model_name_or_path", "teacher_name_or_path", "tokenizer_name", "config_name")
# Flags that name a file or folder; another name of the same file does not make another run.
PATHS = ("train_file", "validation_file", "test_file", "train_dir", "validation_dir", "idx_dir", "dataset_name",
         *STARTS_FROM)  # fmt: skip
# Arguments that identify a run, in addition to the scripts' own.
TRAINING_ARGUMENTS = (
    "optimizer",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "frobenius_decay",
    "decay_mode",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "ignore_data_skip",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "dataloader_drop_last",
    "average_tokens_across_devices",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
WITHOUT_EFFECT = ("cache_dir", "preprocessing_num_workers")
# How a global batch is divided into micro-batches; a run may resume with another division of the same batch.
SPLIT = ("world_size", "gradient_accumulation_steps")
LENGTH = "length"  # a run may be made longer or shorter
DATA_FINGERPRINT = "data_fingerprint"
VALIDATION_FINGERPRINT = "validation_fingerprint"
TEST_FINGERPRINT = "test_fingerprint"
START_WEIGHTS = "start_weights"
TEACHER_WEIGHTS = "teacher_weights"
EPOCH_ROUNDING = 1e-6  # the steps of an epoch are whole numbers, their share of it is not


@dataclass(frozen=True)
class RunPlan:
    """What to do with the output folder: resume from ``checkpoint``, start (None), or nothing (``finished``).

    ``continued`` is the folder of the run that is resumed, possibly from its beginning; None for a new run. ``lock`` is
    the result of :func:`fnl_hf.runs.locks.read_lock`.
    """

    checkpoint: str | None = None
    finished: bool = False
    continued: Path | None = None
    lock: bytes = b""


def describe_run(args, *script_arguments) -> dict[str, Any]:
    """What identifies a run: all arguments of the script, and those of Trainer that change its result."""
    described = {name: getattr(args, name) for name in TRAINING_ARGUMENTS}
    described[LENGTH] = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs} epochs"
    for arguments in script_arguments:
        described |= dataclasses.asdict(arguments)
    return {name: value for name, value in described.items() if name not in WITHOUT_EFFECT}


def plan_run(args, description: dict[str, Any], also: Sequence[str] = ()) -> RunPlan:
    """Decide from ``--output_dir``, ``--resume_from_checkpoint`` and ``--overwrite_output_dir``; changes no file.

    The first process decides for all, because disks may look different to different machines.

    Args:
        description: see :func:`describe_run`.
        also: names in the folder of what the script itself writes.

    Raises:
        UserInputError: the folder is in use, by a run that is alive, one with other arguments, or with files that are
            no run's; or the named checkpoint, or each of those that there are, is not complete.
    """

    def plan() -> RunPlan:
        folder = Path(args.output_dir)
        _validate_place(folder)
        lock = read_lock(folder)
        return replace(_plan(folder, args, description, output_of(args, *also)), lock=lock)

    return decide_on_first_process(plan)


def _plan(folder: Path, args, description: dict[str, Any], output: Output) -> RunPlan:
    resume = args.resume_from_checkpoint
    if resume is not None and args.overwrite_output_dir:
        raise UserInputError(
            f"--resume_from_checkpoint ({resume}) and --overwrite_output_dir exclude each other: leave one of them out"
        )
    in_use = folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())
    if resume not in (None, "auto"):
        plan = _plan_from_checkpoint(Path(resume), folder, in_use, description, args.allow_other_world_size)
        refuse_others_files(folder, output, anew=False)
        return plan
    if args.overwrite_output_dir:
        _refuse_own_start(folder, description)
        refuse_others_files(folder, output)
    if not in_use or args.overwrite_output_dir:
        return RunPlan()
    if resume is None or not args.do_train:
        raise UserInputError(f"--output_dir {folder} is not empty: {_remedies(folder, args, output)}")
    _validate_same_run(folder, description, args.allow_other_world_size, lambda: _remedies(folder, args, output))
    if is_finished(folder, args):
        return RunPlan(finished=True, continued=folder)
    checkpoint = newest_complete_checkpoint(folder)
    if checkpoint is None:
        return _plan_without_checkpoint(folder, args, output)
    refuse_others_files(folder, output, anew=False)
    _warn_of_another_length(folder, description)
    return RunPlan(checkpoint=str(checkpoint), continued=folder)


def _refuse_own_start(folder: Path, description: dict[str, Any]) -> None:
    """Refuse to delete what the run starts from."""
    for name in STARTS_FROM:
        given = description.get(name)
        if given is not None and os.path.lexists(given) and Path(given).resolve().is_relative_to(folder.resolve()):
            raise UserInputError(
                f"--{name} {given} is in the --output_dir, and --overwrite_output_dir would delete it: choose another "
                "--output_dir"
            )


def _plan_without_checkpoint(folder: Path, args, output: Output) -> RunPlan:
    """Start the run in ``folder`` again, if it was stopped before its first checkpoint."""
    if faulty := list_checkpoints(folder):
        raise UserInputError(
            f"--resume_from_checkpoint auto: {folder} has no complete checkpoint: "
            f"{'; '.join(f'{path.name}: {find_fault(path)}' for path in faulty)}. To start a new run, "
            f"{_remedies(folder, args, output)}"
        )
    if not holds_run(folder):
        raise UserInputError(
            f"--output_dir {folder} is not empty and contains no run to resume: {_remedies(folder, args, output)}"
        )
    refuse_others_files(folder, output, anew=False)
    if os.path.isfile(folder / RESULTS_FILE):
        raise UserInputError(
            f"--resume_from_checkpoint auto: the run in {folder} has ended and left no checkpoint to continue from: "
            f"{_remedies(folder, args, output)}"
        )
    return RunPlan(continued=folder)


def _remedies(folder: Path, args, output: Output) -> str:
    """What a user can do about an output folder in use; only suggests what would be accepted."""
    own = [path for path in list_checkpoints(folder) if path.name not in not_of_the_run(path)]
    is_run, others = holds_run(folder) or bool(own), others_files(folder, output)
    remedies = ["choose another folder"]
    if is_run and args.do_train and args.resume_from_checkpoint is None:
        remedies.append("resume its run with --resume_from_checkpoint auto")
    if not others:
        instead = " instead of --resume_from_checkpoint" if args.resume_from_checkpoint else ""
        what = "replace it" if is_run else "keep its files next to the new run"
        remedies.append(f"{what} with --overwrite_output_dir true{instead}")
    joined = f"{', '.join(remedies[:-1])}, or {remedies[-1]}" if len(remedies) > 1 else remedies[0]
    return joined + (f" ({shortened(others)} in it was not written by a run, or was changed since)" if others else "")


def _validate_place(folder: Path) -> None:
    """Raise UserInputError unless ``folder`` is writable, or can be created."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # to be made
    except OSError as error:
        raise UserInputError(f"--output_dir {folder}: {error.strerror}") from error
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(place):
        raise UserInputError(f"--output_dir {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserInputError(f"--output_dir {folder}: {place} is not writable")


def _plan_from_checkpoint(
    checkpoint: Path, folder: Path, in_use: bool, description: dict[str, Any], allow_other_world_size: bool
) -> RunPlan:
    if not os.path.isdir(checkpoint):
        raise UserInputError(
            f"--resume_from_checkpoint {checkpoint}: no such folder ('auto' resumes from the newest checkpoint)"
        )
    fault = find_fault(checkpoint)
    if fault is not None:
        raise UserInputError(f"--resume_from_checkpoint {checkpoint}: not a complete checkpoint: {fault}")
    parents = (checkpoint.parent.resolve(), checkpoint.resolve().parent)  # it may be a link
    if in_use and folder.resolve() not in parents:
        raise UserInputError(
            f"--output_dir {folder} is not empty, and is not the folder that contains {checkpoint}: choose another "
            "folder"
        )
    run = checkpoint.parent if read_started(checkpoint.parent) else checkpoint
    _validate_same_run(
        run, description, allow_other_world_size, lambda: "resume with the arguments that the run was started with"
    )
    _warn_of_another_length(run, description)
    return RunPlan(checkpoint=str(checkpoint), continued=run)


def read_started(folder: Path) -> dict[str, Any]:
    """The description of the run in a folder when it was started or last resumed; {} without one.

    A checkpoint that was moved out of its run's folder has a record of its own.
    """
    try:
        started = json.loads((folder / STARTED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        started = next((start.get("arguments") for start in reversed(read_starts(folder))), {})
    return started if isinstance(started, dict) else {}


def _validate_same_run(
    folder: Path, description: dict[str, Any], allow_other_world_size: bool, find_remedies: Callable[[], str]
) -> None:
    started = read_started(folder)
    different = {
        name
        for name, value in description.items()
        if name != LENGTH and name in started and not _is_same(name, started[name], value)
    }
    if "world_size" in different and different <= {*SPLIT}:
        _validate_split(folder, started, description, allow_other_world_size)
    elif different:
        here = {name: getattr(description[name], "value", description[name]) for name in different}  # of enumerations
        differences = [f"{name} was {started[name]} and is now {here[name]}" for name in sorted(different)]
        remedies = find_remedies()
        raise UserInputError(
            f"{folder} contains another run: {'; '.join(differences)}. {remedies[0].upper()}{remedies[1:]}"
        )


def _is_same(name: str, there: Any, here: Any) -> bool:
    """Whether an argument is the same, or another name of the same file; the record in a checkpoint has "~" instead of
    the user's home folder."""
    if there in (here, mask_home(here)):
        return True
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return all(_is_same(name, *pair) for pair in zip(there, here))
    if name not in PATHS or not (isinstance(there, str) and isinstance(here, str)):
        return False
    there = os.path.expanduser(there)
    if os.path.realpath(there) == os.path.realpath(here):
        return True
    # Moved, or relative to another working folder: fingerprints of the data and checksums of the weights decide.
    return Path(there).name == Path(here).name and os.path.lexists(here) and not os.path.lexists(there)


def _warn_of_another_length(folder: Path, description: dict[str, Any]) -> None:
    there, here = read_started(folder).get(LENGTH), description.get(LENGTH)
    if None not in (there, here) and there != here:
        logger.warning(
            f"{folder}: the run was started for {there} and now ends after {here} in total. From this step on, the "
            "learning rate follows the schedule for the new length"
        )


def _validate_split(folder: Path, started: dict[str, Any], here: dict[str, Any], allowed: bool) -> None:
    """Refuse another number of processes unless it is allowed and the global batch is the same."""
    batch, processes = here["per_device_train_batch_size"], here["world_size"]
    micro_batches = started["world_size"] * started["gradient_accumulation_steps"]
    if allowed and processes * here["gradient_accumulation_steps"] == micro_batches:
        return
    was = (
        f"the run in {folder} was started on {started['world_size']} process(es) x "
        f"{started['gradient_accumulation_steps']} accumulation step(s) x {batch} sequences; now they are "
        f"{processes} x {here['gradient_accumulation_steps']} x {batch}"
    )
    accumulation, rest = divmod(micro_batches, processes)
    if rest:
        raise UserInputError(
            f"{was}: {processes} processes cannot share its global batch of {micro_batches * batch} sequences. The "
            f"number of processes must divide {micro_batches}"
        )
    raise UserInputError(
        f"{was}: resume at the same sample position with --allow_other_world_size true "
        f"--gradient_accumulation_steps {accumulation}"
    )


def validate_data(plan: RunPlan, description: dict[str, Any]) -> None:
    """Compare the fingerprints of the prepared data in ``description`` with those at the run's start.

    Raises:
        UserInputError: the run that is continued, or finished, has other data.
    """
    started = {} if plan.continued is None else read_started(plan.continued)
    kinds = {DATA_FINGERPRINT: "data", VALIDATION_FINGERPRINT: "validation data", TEST_FINGERPRINT: "test data"}
    for name, kind in kinds.items():
        here, there = description.get(name), started.get(name)
        if None not in (here, there) and here != there:
            raise UserInputError(
                f"{plan.continued} contains a run on other {kind}: the fingerprint was {there} and is now {here}. "
                "Restore the old files to resume, or choose another --output_dir"
            )


def weights_checksum(name: str | None) -> str | None:
    """SHA-256 of the weights in a model's folder; None for a Hub name, or if the weights are in other files."""
    file = None if name is None else Path(name, SAFE_WEIGHTS_NAME)
    return checksum(file) if file is not None and os.path.isfile(file) else None


def validate_weights(plan: RunPlan, description: dict[str, Any]) -> None:
    """Compare the :func:`weights_checksum` of the initial weights and of the teacher in ``description`` with those at
    the run's start.

    Raises:
        UserInputError: the run that is continued, or finished, has others.
    """
    started = {} if plan.continued is None else read_started(plan.continued)
    for name, fault in (
        (START_WEIGHTS, "started from other weights"),
        (TEACHER_WEIGHTS, "has a teacher with other weights"),
    ):
        here, there = description.get(name), started.get(name)
        if None not in (here, there) and here != there:
            raise UserInputError(
                f"{plan.continued} contains a run that {fault}: the checksum was {there} and is now {here}. Restore "
                "the old weights to resume, or choose another --output_dir"
            )


def start_run(args, plan: RunPlan, description: dict[str, Any]) -> None:
    """Make and lock the output folder, delete the checkpoints of a run that is overwritten, and record this run.

    Raises:
        UserInputError: another process has begun a run there since this one was planned.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder, plan.lock)
    if not args.do_train:
        return
    remove(folder / STAGING_FOLDER)
    if args.overwrite_output_dir:
        for old in list_checkpoints(folder):
            if not not_of_the_run(old):
                remove(old, ignore_errors=False)  # it would be taken for one of this run
        for name in (RESULTS_FILE, STATE_FILE):
            (folder / name).unlink(missing_ok=True)
    write_json(folder / STARTED_FILE, description)  # a truncated file would let any other run resume


def is_finished(folder: Path, args) -> bool:
    """Whether the run in ``folder`` has ended and is as long as ``args`` request; the results are written last."""
    state = read_state(folder)
    if state is None or not os.path.isfile(folder / RESULTS_FILE) or state.global_step < state.max_steps:
        return False
    if args.do_eval and b'"eval_' not in (folder / RESULTS_FILE).read_bytes():  # it was only trained
        return False
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return (state.epoch or 0.0) >= args.num_train_epochs - EPOCH_ROUNDING  # Trainer's num_train_epochs is rounded up
