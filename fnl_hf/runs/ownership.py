"""Which files of an output folder belong to a run: a run only overwrites and deletes files that a run wrote.

A run records the checksums of its files. If a file with one of their names is not recorded, or has changed since, it
belongs to the user.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import fnl_hf.bert
from fnl_hf.errors import UserInputError
from fnl_hf.runs.checkpoints import STAGING_FOLDER, STATE_FILE, checksum, list_checkpoints, not_of_the_run
from fnl_hf.runs.provenance import PROVENANCE_FILE

RESULTS_FILE = "all_results.json"
STARTED_FILE = "run_arguments.json"  # marks a folder as a run's, even before its first checkpoint
RECORD_FILE = "_written.json"  # name -> SHA-256; nothing whose name begins with "_" is uploaded
# Patterns of the files written during training and evaluation, ...
STARTED = (STARTED_FILE, PROVENANCE_FILE)
SCORES = (
    *(f"{split}_results.json" for split in ("all", "train", "eval", "predict")),
    *(
        f"{split}_{of}.json"
        for split in ("eval", "predict")
        for of in ("predictions", "nbest_predictions", "null_odds")
    ),
)
# ... and of the final model: weights, configuration, code, preprocessing, card and report.
MODEL = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *(path.name for path in Path(fnl_hf.bert.__path__[0]).glob("[!_]*.py")),
    *("factorized_layers.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "processor_config.json", "preprocessor_config.json"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]_*"),
    *("training_args.bin", STATE_FILE, "README.md", "training_report.png"),
)
SHOWN = 3  # maximum number of names in a message


@dataclass(frozen=True)
class Output:
    """What a run writes: name patterns in its folder, and whether it writes checkpoints."""

    patterns: tuple[str, ...]
    has_checkpoints: bool = False


def output_of(args, *also: str) -> Output:
    """What a run of ``TrainingArguments`` writes; a model that is only evaluated is saved again if it is pushed.

    Args:
        also: other names, of what the script itself writes.
    """
    if args.do_train:
        return Output((*STARTED, *SCORES, *MODEL, *also), has_checkpoints=True)
    return Output((*SCORES, *MODEL) if args.push_to_hub else SCORES)


def holds_run(folder: Path) -> bool:
    """Whether a run was started in a folder."""
    return os.path.isfile(folder / STARTED_FILE)


def others_files(folder: Path, output: Output, anew: bool = True) -> list[str]:
    """Names of files in a folder that no run wrote and that a run would overwrite or delete.

    Args:
        output: what it writes.
        anew: whether it starts anew, or goes on with what is there: then checkpoints stay.
    """
    if not folder.is_dir():
        return []
    record, found = _read_record(folder), []
    for path in _matching(folder, output.patterns):
        files = [path] if path.is_symlink() or not path.is_dir() else _files_below(path)
        found += [file.relative_to(folder).as_posix() for file in files if not _is_run_s(file, folder, record)]
    if output.has_checkpoints and anew:
        for checkpoint in list_checkpoints(folder):
            found += not_of_the_run(checkpoint)
        if os.path.lexists(folder / STAGING_FOLDER) and not holds_run(folder):
            found.append(STAGING_FOLDER)
    return found


def refuse_others_files(folder: Path, output: Output, anew: bool = True) -> None:
    """
    Raises:
        UserInputError: see :func:`others_files`; names them.
    """
    if found := others_files(folder, output, anew):
        raise UserInputError(
            f"--output_dir {folder}: {shortened(found)} was not written by a run, or was changed since, and this "
            "run would overwrite or delete it: move it away, or choose another folder"
        )


def shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def begin_writing(folder: Path) -> None:
    """Record that the run's results are being written: until :func:`record_written`, files with their names are its
    own. Delete the scores of the model that is replaced: a run that stops before it has new ones is not finished."""
    write_json(folder / RECORD_FILE, {})
    for path in _matching(folder, SCORES):
        path.unlink()


def record_written(folder: Path, patterns: Sequence[str]) -> None:
    """Record the current matching files as a run's; other entries do not change."""
    files = [
        file for path in _matching(folder, patterns) for file in ([path] if path.is_file() else _files_below(path))
    ]
    sums = {file.relative_to(folder).as_posix(): checksum(file) for file in files if file.is_file()}
    write_json(folder / RECORD_FILE, (_read_record(folder) or {}) | sums)


@contextmanager
def staying_recorded(path: Path) -> Iterator[None]:
    """Within the context, our own tools may change a file that a run wrote; it stays recorded."""
    record = _read_record(path.parent) or {}
    was_recorded = path.is_file() and record.get(path.name) == checksum(path)
    yield
    if was_recorded:
        record_written(path.parent, [path.name])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    written = path.with_name(f"{path.name}.new")
    written.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(written, path)


def _is_run_s(file: Path, folder: Path, record: dict[str, str] | None) -> bool:
    name = file.relative_to(folder).as_posix()
    is_run = holds_run(folder)
    if is_run and any(fnmatchcase(name, pattern) for pattern in (*STARTED, *SCORES)):
        return True
    # Its results are being written, or were; runs of earlier versions have no record and write results last.
    if is_run and (record == {} or (record is None and os.path.isfile(folder / RESULTS_FILE))):
        return True
    if record is None or name not in record or not os.path.isfile(file):
        return False
    return name == STATE_FILE or checksum(file) == record[name]


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
