"""One run at a time in an output folder: POSIX record locks, which end with their process and work on shared disks.

A process loses a lock when it closes any descriptor of the file, so nothing else here opens it. Worker processes do not
inherit the lock, so none of them keeps that of a dead run.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from fnl_hf.errors import UserInputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

LOCK_FILE = "_lock"  # stays in the folder: the lock, not the file, shows whether a run is alive
LENGTH = 4096  # maximum size of its content
NO_LOCKS = "{} is on a disk that does not support locks: another process could start a run there at the same time"
_held: dict[str, int] = {}  # real path of a folder -> descriptor


@contextmanager
def folders_in_use() -> Iterator[None]:
    """Release the folders that were locked in the context, or in a decorated function, at its end."""
    before = set(_held)
    try:
        yield
    finally:
        for folder in _held.keys() - before:
            os.close(_held.pop(folder))


def read_lock(folder: Path) -> bytes:
    """The content that the folder's last run left in its lock file; empty if there was none. Changes no file.

    Raises:
        UserInputError: a run in another process is alive there.
    """
    if (own := _held.get(os.path.realpath(folder))) is not None:
        return os.pread(own, LENGTH, 0)
    if fcntl is None or not os.path.lexists(folder / LOCK_FILE):
        return b""
    descriptor = _open(folder)
    try:
        _lock(folder, descriptor)
        return os.pread(descriptor, LENGTH, 0)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, seen: bytes) -> None:
    """Lock a folder until the end of :func:`folders_in_use`, or of this process.

    Args:
        seen: what :func:`read_lock` gave when the run was planned.

    Raises:
        UserInputError: a run in another process is alive there, or has been since.
    """
    key = os.path.realpath(folder)
    if key in _held:
        return
    if fcntl is None:
        logger.warning_once(NO_LOCKS.format(folder))
        return
    descriptor = _open(folder)
    try:
        _lock(folder, descriptor)
        if (now := os.pread(descriptor, LENGTH, 0)) != seen:
            raise UserInputError(
                f"--output_dir {folder}: {_describe(now)} started a run there after this one was planned: start "
                "this command again"
            )
        owner = {"process": os.getpid(), "host": socket.gethostname(), "time": time.time_ns()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[key] = descriptor


def _open(folder: Path) -> int:
    try:
        return os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserInputError(f"--output_dir {folder}: {LOCK_FILE} in it is not writable: {error.strerror}") from error


def _lock(folder: Path, descriptor: int) -> None:
    """Lock a file, unless its disk does not support locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning_once(NO_LOCKS.format(folder))
            return
        owner = _describe(os.pread(descriptor, LENGTH, 0))
        raise UserInputError(
            f"--output_dir {folder} is in use by a run in {owner}: wait until it ends, or choose another folder"
        ) from error


def _describe(content: bytes) -> str:
    try:
        owner = json.loads(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(owner["time"] / 1e9))
        return f"process {owner['process']} on {owner['host']}, since {since}"
    except (ValueError, KeyError, TypeError):  # it has just been locked
        return "another process"
