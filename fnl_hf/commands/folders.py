"""What the commands read and write: checkpoints with all that belongs to them, and the places where results go."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from fnl_hf.errors import UserInputError

# What a checkpoint has beside weights and tokenizer: for generation, of processors, of sentence-transformers.
COMPANIONS = (
    "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
    "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
MODULES_FILE = "modules.json"  # of sentence-transformers: the modules after the model, each in a folder of its own
MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
USUAL_MODULES = ("1_Pooling", "2_Dense")
NAMED_WEIGHTS = 3  # in a message
logger = logging.get_logger(__name__)


# ---- what is read ----


@contextmanager
def reading(source: str) -> Iterator[None]:
    """What is wrong with a checkpoint as UserInputError, whoever finds it: configurations and weights are read without
    checks, and by several packages."""
    try:
        yield
    except UserInputError:
        raise
    except Exception as error:
        says_what = isinstance(error, OSError | ValueError)  # a KeyError's message is a key
        kind = "" if says_what else f"it cannot be read: {type(error).__name__}: "
        raise UserInputError(f"{source}: {kind}{error}") from error


def refuse_misfits(source: str, model: PreTrainedModel, info: Mapping[str, Any], is_guessed: bool = False) -> None:
    """
    Args:
        info: what ``from_pretrained`` tells of the weights, without those that the class says may be ignored.
        is_guessed: the checkpoint does not say which head it has. One that does may have weights that its class drops.

    Raises:
        UserInputError: weights and class do not fit.
    """
    name = type(model).__name__
    changed = [f"{key} {tuple(saved)}, not {tuple(own)}" for key, saved, own in info["mismatched_keys"]]
    unused = info["unexpected_keys"] if is_guessed else ()
    for weights, problem in (
        (changed, f"{name} with this config.json has other shapes"),
        (unused, f"config.json does not name its class (architectures), and {name} has no place for all weights"),
    ):
        if weights:
            raise UserInputError(f"{source}: {problem}: {_list_names(weights)}")
    if info["missing_keys"]:  # some checkpoints lack what only pretraining needs
        logger.warning(f"{source} lacks weights of {name}, which are random now: {_list_names(info['missing_keys'])}")


def _list_names(weights: Iterable[str]) -> str:
    names = sorted(weights)
    return ", ".join(names[:NAMED_WEIGHTS]) + ", ..." * (len(names) > NAMED_WEIGHTS)


def find_files(source: str, names: Iterable[str]) -> dict[str, str]:
    """Those of the files that a checkpoint has -> where they are."""
    try:
        files = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names}
    except OSError as error:
        raise UserInputError(f"{source}: {error}") from error
    return {name: file for name, file in files.items() if file is not None}


def find_companions(source: str) -> dict[str, str]:
    """What a checkpoint has beside weights and tokenizer -> where it is."""
    found = find_files(source, (MODULES_FILE, *COMPANIONS))
    modules = _module_folders(found[MODULES_FILE]) if MODULES_FILE in found else []
    folders = dict.fromkeys((*USUAL_MODULES, *modules))
    return found | find_files(source, [f"{folder}/{file}" for folder in folders for file in MODULE_FILES])


def _module_folders(modules_file: str) -> list[str]:
    try:
        entries = json.loads(Path(modules_file).read_text(encoding="utf-8"))
        paths = [str(entry["path"]) for entry in entries]
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning(f"{modules_file} does not list modules of sentence-transformers: {error}")
        return []
    return [path for path in paths if re.fullmatch(r"\w[\w.-]*", path)]  # no other place than a folder beside it


# ---- what is written ----


def refuse_bad_folder(folder: Path) -> None:
    """
    Raises:
        UserInputError: there is something in it, it is a file, or it cannot be made.
    """
    _refuse_bad_place(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserInputError(f"{folder} is in use: name a folder that is empty or does not exist")


def refuse_bad_file(file: Path, suffix: str) -> None:
    """
    Raises:
        UserInputError: it has another suffix, exists, or cannot be made.
    """
    if file.suffix != suffix:
        raise UserInputError(f"{file}: the name of the file must end in {suffix}")
    _refuse_bad_place(file)
    if file.exists():
        raise UserInputError(f"{file} exists: name another file")


def _refuse_bad_place(path: Path) -> None:
    try:
        place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        path.exists()  # names that are too long
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path}: {error}") from error
    if place != path and not place.is_dir():
        raise UserInputError(f"{path}: {place} is not a folder")
    if not os.access(place, os.W_OK):
        raise UserInputError(f"{path}: {place} cannot be written")


@contextmanager
def complete_or_removed(folder: Path) -> Iterator[None]:
    """Whatever ends the block early, a folder that it made is gone; one that was there before is the user's."""
    existed = folder.exists()
    try:
        yield
    except BaseException as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | ValueError | SafetensorError) and not isinstance(error, UserInputError):
            raise UserInputError(f"{folder}: {error}") from error
        raise


def copy_companions(companions: Mapping[str, str], folder: Path) -> None:
    """Files that :func:`find_companions` found into ``folder``, but those that were written there already."""
    for name, file in companions.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(file, folder / name)
