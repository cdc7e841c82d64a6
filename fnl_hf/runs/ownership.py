"""Whose the files of an output folder are: a run overwrites and deletes what a run wrote there, and nothing else.

A run records the checksums of what it leaves. A file of one of its names that is not recorded, or has changed since, is
somebody else's.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fnl_hf.errors import UserInputError
from fnl_hf.runs.checkpoints import STAGING_FOLDER, STATE_FILE, checksum, list_checkpoints, not_of_the_run
from fnl_hf.runs.provenance import PROVENANCE_FILE

RESULTS_FILE = "all_results.json"
STARTED_FILE = "run_arguments.json"  # marks a folder as that of a run, before its first checkpoint
RECORD_FILE = "_written.json"  # name -> SHA-256; nothing whose name begins with "_" is uploaded
# Patterns of what is written while a run trains and evaluates, ...
MEANWHILE = (STARTED_FILE, PROVENANCE_FILE, "*_results.json", "*_predictions.json", "*_null_odds.json")
# ... and of the model that it leaves: weights, configuration, code, what prepares its inputs, card and report.
AT_THE_END = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "*.py"),
    *("factorized_layers.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "*processor_config.json", "merged"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*"),
    *("training_args.bin", STATE_FILE, "README.md", "training_report.png"),
)
EVALUATION = MEANWHILE[2:]
ALL = (*MEANWHILE, *AT_THE_END)
SHOWN = 3  # names in a message


def holds_run(folder: Path) -> bool:
    """Whether a run was started in a folder."""
    return os.path.isfile(folder / STARTED_FILE)


def others_files(folder: Path, patterns: Sequence[str] = ALL, anew: bool = True) -> list[str]:
    """What in a folder is not a run's and would be overwritten or deleted by another one, by its name there.

    Args:
        patterns: what it writes; of ``ALL``, its checkpoints, too.
        anew: whether it starts anew, or goes on with what is there: then checkpoints stay, and what a run has written
            and somebody has changed is the run's.
    """
    if not folder.is_dir():
        return []
    record, found = _read_record(folder), []
    for path in _matching(folder, patterns):
        files = [path] if path.is_symlink() or not path.is_dir() else _files_below(path)
        found += [file.relative_to(folder).as_posix() for file in files if not _is_run_s(file, folder, record, anew)]
    if patterns is ALL and anew:
        for checkpoint in list_checkpoints(folder):
            found += not_of_the_run(checkpoint)
        if os.path.lexists(folder / STAGING_FOLDER) and not holds_run(folder):
            found.append(STAGING_FOLDER)
    return found


def refuse_others_files(folder: Path, patterns: Sequence[str] = ALL, anew: bool = True) -> None:
    """
    Raises:
        UserInputError: see :func:`others_files`; names them.
    """
    if found := others_files(folder, patterns, anew):
        raise UserInputError(
            f"--output_dir {folder}: {shortened(found)} there is not as a run has written it, and this run would "
            "overwrite or delete it: move it away, or choose another folder"
        )


def shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def begin_writing(folder: Path) -> None:
    """Note that the run's end is being written: until :func:`record_written`, what has its names is its own."""
    write_json(folder / RECORD_FILE, {})


def record_written(folder: Path, patterns: Sequence[str] = ALL) -> None:
    """Record what matches, as it is now, as a run's; no other entry is changed."""
    files = [
        file for path in _matching(folder, patterns) for file in ([path] if path.is_file() else _files_below(path))
    ]
    sums = {file.relative_to(folder).as_posix(): checksum(file) for file in files if file.is_file()}
    write_json(folder / RECORD_FILE, (_read_record(folder) or {}) | sums)


@contextmanager
def staying_recorded(path: Path) -> Iterator[None]:
    """Within the context our own tools may change a file that a run wrote; it remains the run's."""
    record = _read_record(path.parent) or {}
    was_recorded = path.is_file() and record.get(path.name) == checksum(path)
    yield
    if was_recorded:
        record_written(path.parent, [path.name])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is never torn."""
    written = path.with_name(f"{path.name}.new")
    written.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(written, path)


def _is_run_s(file: Path, folder: Path, record: dict[str, str] | None, anew: bool) -> bool:
    name = file.relative_to(folder).as_posix()
    is_run = holds_run(folder)
    if is_run and any(fnmatchcase(name, pattern) for pattern in MEANWHILE):
        return True
    # Its end is, or was, being written; runs of earlier versions leave no record, and their results last.
    if is_run and (record == {} or (record is None and os.path.isfile(folder / RESULTS_FILE))):
        return True
    if record is None or name not in record or not os.path.isfile(file):
        return False
    return not anew or name == STATE_FILE or checksum(file) == record[name]


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if any(fnmatchcase(path.name, pattern) for pattern in patterns)]


def _files_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]


def _read_record(folder: Path) -> dict[str, str] | None:
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
