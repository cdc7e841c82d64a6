"""A run and its output folder: start, resume, or nothing left to do. Never overwrite what is there unasked."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from fnl_hf.errors import UserInputError

logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
RESULTS_FILE = "all_results.json"
STARTED_FILE = "run_arguments.json"  # marks a folder as that of a run, before its first checkpoint
CHECKPOINT_FILES = (STATE_FILE, "config.json", "optimizer.pt", "scheduler.pt")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
# What must agree between a checkpoint and the model it is to continue.
ARCHITECTURE = (
    "model_type",
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


def plan_run(args) -> RunPlan:
    """Decide from ``--output_dir``, ``--resume_from_checkpoint`` and ``--overwrite_output_dir``; changes no file.

    Raises:
        UserInputError: the folder is in use, or the named checkpoint is not complete.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserInputError(f"--output_dir {folder} is a file")
    resume = args.resume_from_checkpoint
    if resume not in (None, "auto"):
        if not is_complete(Path(resume)):
            raise UserInputError(f"--resume_from_checkpoint {resume}: no complete checkpoint there")
        return RunPlan(checkpoint=str(resume))
    in_use = folder.is_dir() and any(folder.iterdir())
    if not args.do_train or not in_use or args.overwrite_output_dir:
        return RunPlan()
    if resume is None:
        raise UserInputError(
            f"--output_dir {folder} is not empty: choose another, continue its run with --resume_from_checkpoint auto, "
            "or replace it with --overwrite_output_dir true"
        )
    if is_finished(folder, args):
        return RunPlan(finished=True)
    checkpoint = newest_complete_checkpoint(folder)
    if checkpoint is None and not (folder / STARTED_FILE).is_file():
        raise UserInputError(
            f"--output_dir {folder} is not empty and holds no run to resume: choose another, or replace it with "
            "--overwrite_output_dir true"
        )
    return RunPlan(checkpoint=None if checkpoint is None else str(checkpoint))


def start_run(args, plan: RunPlan, arguments: dict) -> None:
    """Make the output folder, drop the checkpoints of a run that is overwritten, and record this run's arguments."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.do_train and args.overwrite_output_dir and plan.checkpoint is None:
        for old in checkpoints(folder):
            shutil.rmtree(old)
        for name in (RESULTS_FILE, STATE_FILE):
            (folder / name).unlink(missing_ok=True)
    (folder / STARTED_FILE).write_text(json.dumps(arguments, indent=2, default=str) + "\n", encoding="utf-8")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def is_complete(checkpoint: Path) -> bool:
    """Trainer writes the state last, so a readable one beside the other files means a complete checkpoint."""
    return (
        read_state(checkpoint) is not None
        and all((checkpoint / name).is_file() for name in CHECKPOINT_FILES)
        and any((checkpoint / name).is_file() for name in WEIGHT_FILES)
    )


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be resumed; torn ones are passed over with a warning."""
    for checkpoint in checkpoints(folder):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning(f"{checkpoint} is not complete: passing it over")
    return None


def read_state(folder: Path) -> TrainerState | None:
    """The Trainer's state in a folder, or None if it is missing or torn."""
    try:
        return TrainerState.load_from_json(str(folder / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return None


def is_finished(folder: Path, args) -> bool:
    """Whether the run in ``folder`` ended and reached what ``args`` ask for; the results are written last."""
    state = read_state(folder)
    if state is None or not (folder / RESULTS_FILE).is_file() or state.global_step < state.max_steps:
        return False
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.num_train_epochs >= args.num_train_epochs


def validate_resume(checkpoint: str, config: PreTrainedConfig) -> None:
    """Raise UserInputError if the checkpoint holds a model of another architecture than ``config``."""
    saved = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    wanted = config.to_dict()
    differences = [
        f"{name} is {saved.get(name)} there and {wanted.get(name)} here"
        for name in ARCHITECTURE
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise UserInputError(f"checkpoint {checkpoint} is of another architecture: {'; '.join(differences)}")
