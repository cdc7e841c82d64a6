"""Checks of the paths for the commands' results."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fnl_hf.errors import UserInputError


def refuse_bad_folder(folder: Path) -> None:
    """
    Raises:
        UserInputError: there is something in it, it is a file, or it cannot be made.
    """
    _refuse_bad_place(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fault = "is not empty" if folder.is_dir() else "is a file"
        raise UserInputError(f"{folder} {fault}: choose a folder that is empty or does not exist")


def refuse_bad_file(file: Path, suffix: str) -> None:
    """
    Raises:
        UserInputError: it has another suffix, exists, or cannot be made.
    """
    refuse_bad_name(file, suffix)
    if file.exists():
        raise UserInputError(f"{file} exists: choose another file name")


def refuse_bad_name(file: Path, *suffixes: str) -> None:
    """
    Raises:
        UserInputError: it has another suffix, or cannot be made.
    """
    if file.suffix not in suffixes:
        raise UserInputError(f"{file}: the file name must end in {' or '.join(suffixes)}")
    _refuse_bad_place(file)


def _refuse_bad_place(path: Path) -> None:
    try:
        place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        path.exists()  # names that are too long
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path}: {error}") from error
    if place != path and not place.is_dir():
        raise UserInputError(f"{path}: {place} is not a folder")
    if not os.access(place, os.W_OK):
        raise UserInputError(f"{path}: {place} is not writable")


@contextmanager
def complete_or_removed(folder: Path) -> Iterator[None]:
    """If the block ends early, delete the folder that it made; a folder that existed before belongs to the user."""
    existed = folder.exists()
    try:
        yield
    except BaseException as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | ValueError | SafetensorError) and not isinstance(error, UserInputError):
            raise UserInputError(f"{folder}: {error}") from error
        raise
