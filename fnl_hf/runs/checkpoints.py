"""Atomic checkpoints: written under a temporary name, synced, renamed last, and checked before they are used.

A checkpoint is complete if its folder has a list of its files with checksums that agree. The folder is renamed after
all files have reached the disk, so whatever kills a run leaves the older checkpoints intact.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from fnl_hf.runs.provenance import PROVENANCE_FILE, read_starts

logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
CHECKSUMS_FILE = "checksums.json"
# Within the output folder, so that renaming moves no data. Trainer uploads nothing whose name begins with "_".
STAGING_FOLDER = "_incomplete"
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+")
CHECKPOINT_FILES = (STATE_FILE, "config.json", "optimizer.pt", "scheduler.pt")


def list_checkpoints(folder: Path) -> list[Path]:
    """The paths in a folder that are named like checkpoints, newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((folder / name for name in names if _CHECKPOINT_NAME.fullmatch(name)), key=_step_of, reverse=True)


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be resumed; others are skipped with a warning that gives the reason."""
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning(f"skipping {checkpoint}: {fault}")
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. A checkpoint without checksums, as stock Trainer writes it, is checked
    by the presence of its files, their ends and the header of its weights only."""
    needed = [*CHECKPOINT_FILES, *_random_states(checkpoint)]
    missing = [name for name in needed if not os.path.isfile(checkpoint / name)]
    if missing:
        return f"{missing[0]} is missing"
    if read_state(checkpoint) is None:
        return f"{STATE_FILE} cannot be read"
    if (checkpoint / CHECKSUMS_FILE).is_file():
        return _wrong_file(checkpoint)
    for path in sorted(checkpoint.glob("*.pt*")):
        if not zipfile.is_zipfile(path):  # what torch.save writes; its directory is at the end
            return f"{path.name} is truncated"
    if (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return None
    try:
        with safe_open(checkpoint / SAFE_WEIGHTS_NAME, "pt"):  # reads the header and checks the file's length
            return None
    except (OSError, SafetensorError) as error:
        return f"{SAFE_WEIGHTS_NAME} cannot be read: {error}"


def read_state(folder: Path) -> TrainerState | None:
    """The Trainer's state in a folder, or None if it is missing or truncated."""
    try:
        state = TrainerState.load_from_json(str(folder / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return None
    numbers = (state.global_step, state.max_steps, state.num_train_epochs, state.train_batch_size)
    return state if all(isinstance(number, int) for number in numbers) else None


def finalize_checkpoint(staged: Path, checkpoint: Path) -> None:
    """Give a checkpoint that was written to ``staged`` its checksums and, after everything is on the disk, its name."""
    files = [path for path in sorted(staged.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(staged).as_posix(): checksum(path) for path in files}
    (staged / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    for path in [*files, staged / CHECKSUMS_FILE, *(p for p in staged.rglob("*") if p.is_dir()), staged]:
        _sync(path)
    if os.path.lexists(checkpoint):
        _abandon(checkpoint)
    staged.rename(checkpoint)
    _sync(checkpoint.parent)


def not_of_the_run(checkpoint: Path) -> list[str]:
    """The files under a checkpoint's name that no run wrote: all of them without our record, otherwise those added
    later. Names start at the run's folder; targets of links are ignored."""
    if not any(os.path.isfile(checkpoint / name) for name in (CHECKSUMS_FILE, PROVENANCE_FILE)):
        return [checkpoint.name]
    if checkpoint.is_symlink():
        return []
    try:
        listed = set(json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        listed = set()
    if not listed:  # truncated
        return []
    files = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir())
    return [f"{checkpoint.name}/{name}" for name in files if name not in listed and name != CHECKSUMS_FILE]


def drop_checkpoints(folder: Path, keep: int, best: str | None = None, keep_newest: bool = True) -> None:
    """Delete a run's oldest checkpoints until this number is left. The best is never deleted, the newest only if
    requested; checkpoints that are not the run's are neither counted nor deleted. Paths may be spelled in any way."""
    own = [checkpoint for checkpoint in list_checkpoints(folder) if not not_of_the_run(checkpoint)]
    kept = {os.path.realpath(path) for path in own[:keep_newest]} | ({os.path.realpath(best)} if best else set())
    droppable = [checkpoint for checkpoint in own if os.path.realpath(checkpoint) not in kept]
    excess = len(own) - max(keep, len(own) - len(droppable))
    for checkpoint in reversed(droppable[len(droppable) - excess :]):
        if checkpoint.is_symlink():
            remove(checkpoint)
            continue
        # Under its name, what a kill leaves of it would look like a user's. The next save deletes this folder.
        staging = folder / STAGING_FOLDER
        staging.mkdir(exist_ok=True)
        checkpoint.rename(staging / checkpoint.name)
        remove(staging)


def remove(path: Path, ignore_errors: bool = True) -> None:
    """Delete a folder, or a link without its target; nothing if the path does not exist."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors)


def abandon_later_checkpoints(folder: Path, step: int, resumed: str | None) -> None:
    """Rename the checkpoints of a run after ``step``, from which it now resumes, except the resumed one.

    Otherwise they would be taken for newer than those that the run is going to write.
    """
    for checkpoint in list_checkpoints(folder):
        is_resumed = resumed is not None and os.path.realpath(checkpoint) == os.path.realpath(resumed)
        if _step_of(checkpoint) > step and not is_resumed and not_of_the_run(checkpoint) != [checkpoint.name]:
            _abandon(checkpoint)


def _abandon(checkpoint: Path) -> None:
    """Rename it; a folder that was renamed earlier is deleted if it belongs to a run."""
    aside = checkpoint.with_name(f"_abandoned-{checkpoint.name}")
    if os.path.lexists(aside) and not not_of_the_run(aside):
        remove(aside)
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = checkpoint.with_name(f"_abandoned-{checkpoint.name}-{number}")
    checkpoint.rename(aside)
    logger.warning(f"renamed {checkpoint} to {aside.name}: the run resumes from an earlier step")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _random_states(checkpoint: Path) -> list[str]:
    """The random state files of all processes that wrote the checkpoint; none without a record of the run."""
    starts = read_starts(checkpoint)
    processes = starts[-1].get("world_size") if starts else None
    if not isinstance(processes, int):
        return []
    return [random_state_file(process, processes) for process in range(processes)]


def random_state_file(process: int, processes: int) -> str:
    """Trainer's file name for the random state of one of so many processes."""
    return "rng_state.pth" if processes == 1 else f"rng_state_{process}.pth"


def is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for lack of space; torch and safetensors report it in different ways."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return "No space left" in text or "PytorchStreamWriter failed" in text or "file in archive is not in" in text


def _wrong_file(checkpoint: Path) -> str | None:
    try:
        checksums = json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        unlisted = [name for name in CHECKPOINT_FILES if name not in checksums]
        if unlisted:
            return f"{CHECKSUMS_FILE} does not list {unlisted[0]}"
        for name, expected in checksums.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if checksum(path) != expected:
                return f"{name} was changed after it was written: its checksum differs"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS_FILE} cannot be read: {error}"
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
