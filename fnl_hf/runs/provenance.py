"""The origin of a model: software, devices, arguments and data of every start of its run, saved with the model."""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fnl_hf.version import __version__

PROVENANCE_FILE = "provenance.json"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
HIDDEN = "<hidden>"
_SECRET_FLAG = re.compile(r"--?[\w-]*(token|password|secret)$")
_GIT_SECONDS = 5


def collect_provenance() -> dict[str, Any]:
    """Versions, git revision (None outside a checkout), platform and devices of this process. Not the host's name."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    # with its build, for example 2.13.0+cu130, which the package's metadata may lack
    versions["torch"] = torch.__version__
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "versions": {"fnl_hf": __version__, "python": platform.python_version(), **versions},
        "git_revision": git_revision(Path(__file__).parents[1]),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in gpus] or ["CPU"],
    }


def git_revision(package: Path) -> str | None:
    """The commit of the checkout that contains ``package``, with "+changes" if tracked files differ from it; None
    outside of a checkout, for example in an installed package."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes")


def record_start(args, checkpoint: str | None, argv: Sequence[str], description: dict[str, Any]) -> None:
    """Append this start to those that led to ``checkpoint``, or begin a new list, in the output folder.

    Tokens and passwords are left out, and the user's home folder is written as "~".

    Args:
        args: ``TrainingArguments``.
        checkpoint: what the run goes on from, or None.
        argv: the command line without the script's name.
        description: the script's own arguments, from :func:`fnl_hf.runs.plan.describe_run`; where it has a
            "data_fingerprint", that identifies the training data as the model sees them.
    """
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "resumed_from": None if checkpoint is None else Path(checkpoint).name,
        **collect_provenance(),
        "world_size": args.world_size,
        "command": _mask_secrets(argv),
        "data_fingerprint": description.get("data_fingerprint"),
        "arguments": description,
        "training_arguments": json.loads(args.to_json_string()),  # which masks tokens
    }
    starts = [] if checkpoint is None else read_starts(checkpoint)
    text = json.dumps({"starts": [*starts, mask_home(start)]}, indent=2)
    Path(args.output_dir, PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")


def read_starts(folder: str | Path) -> list[dict[str, Any]]:
    """The starts recorded in a run's folder or checkpoint, oldest first; none if the file is missing or truncated."""
    try:
        record = json.loads(Path(folder, PROVENANCE_FILE).read_text(encoding="utf-8"))
        return [dict(start) for start in record["starts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def copy_provenance(source: str | Path, target: str | Path) -> None:
    """Copy the record of its run into a checkpoint; nothing if the run has no record, because it did not use the
    scripts."""
    record = Path(source, PROVENANCE_FILE)
    if record.is_file() and Path(target).resolve() != Path(source).resolve():
        shutil.copy2(record, target)


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _mask_secrets(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    for word in map(str, argv):
        flag, equals, _ = word.partition("=")
        if equals and _SECRET_FLAG.match(flag):
            words.append(f"{flag}={HIDDEN}")
        else:
            words.append(HIDDEN if words and _SECRET_FLAG.match(words[-1]) else word)
    return words


def mask_home(value: Any) -> Any:
    """A value of the record in which all strings have "~" instead of the user's home folder."""
    if isinstance(value, dict):
        return {key: mask_home(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [mask_home(entry) for entry in value]
    return value.replace(f"{Path.home()}/", "~/") if isinstance(value, str) else value
