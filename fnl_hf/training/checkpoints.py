"""Checkpoints that are whole or not there: written aside, synced, named last; checked before they are trusted.

A checkpoint is complete when its folder holds a list of its files with their checksums and they agree. The folder gets
its name when everything in it has reached the disk, so whatever kills a run leaves the older checkpoints as they were.
"""

import errno
import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
CHECKSUMS_FILE = "checksums.json"
STAGING_FOLDER = ".incomplete"  # within the output folder, so that renaming moves no data
CHECKPOINT_FILES = (STATE_FILE, "config.json", "optimizer.pt", "scheduler.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be resumed; others are passed over with a warning that says why."""
    for checkpoint in checkpoints(folder):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning(f"{checkpoint} is passed over: {fault}")
    return None


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. One without checksums, as stock Trainer writes it, is checked by its
    files' presence, their ends and the header of its weights alone."""
    missing = [name for name in CHECKPOINT_FILES if not (checkpoint / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    if read_state(checkpoint) is None:
        return f"{STATE_FILE} cannot be read"
    if (checkpoint / CHECKSUMS_FILE).is_file():
        return _wrong_file(checkpoint)
    for path in sorted(checkpoint.glob("*.pt*")):
        if not zipfile.is_zipfile(path):  # what torch.save writes; its directory is at the end
            return f"{path.name} is torn"
    if (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return None
    try:
        with safe_open(checkpoint / SAFE_WEIGHTS_NAME, "pt"):  # reads the header and checks the file's length
            return None
    except (OSError, SafetensorError) as error:
        return f"{SAFE_WEIGHTS_NAME} cannot be read: {error}"


def read_state(folder: Path) -> TrainerState | None:
    """The Trainer's state in a folder, or None if it is missing or torn."""
    try:
        state = TrainerState.load_from_json(str(folder / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return None
    numbers = (state.global_step, state.max_steps, state.num_train_epochs, state.train_batch_size)
    return state if all(isinstance(number, int) for number in numbers) else None


def publish(staged: Path, checkpoint: Path) -> None:
    """Give a checkpoint that was written to ``staged`` its checksums and, once all is on the disk, its name."""
    files = [path for path in sorted(staged.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(staged).as_posix(): checksum(path) for path in files}
    (staged / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    for path in [*files, staged / CHECKSUMS_FILE, *(p for p in staged.rglob("*") if p.is_dir()), staged]:
        _sync(path)
    if os.path.lexists(checkpoint):  # a torn one, or that of a run which is done once more from an earlier checkpoint
        replaced = staged.with_name(f"replaced-{checkpoint.name}")
        checkpoint.rename(replaced)
        staged.rename(checkpoint)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        staged.rename(checkpoint)
    _sync(checkpoint.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for lack of space; torch and safetensors say so in their own ways."""
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
                return f"{name} is not what was written: its checksum differs"
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
