"""Several training runs in one picture."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fnl_hf.commands.folders import refuse_bad_name
from fnl_hf.errors import UserInputError
from fnl_hf.reports.comparison import LoggedRun, draw_runs, read_runs
from fnl_hf.reports.plots import CREATOR
from fnl_hf.runs.ownership import staying_recorded

SUFFIXES = (".png", ".pdf", ".svg")


def report_runs(folders: Sequence[str], file: Path, overwrite: bool) -> dict[str, LoggedRun]:
    """:func:`fnl_hf.reports.plot_runs` into a file that appears when it is whole; its folder is made if it is missing.

    Args:
        overwrite: replace a picture that fnl_hf has drawn.

    Raises:
        UserInputError: the file has another suffix, exists or cannot be written; see ``plot_runs``, too.
    """
    refuse_bad_name(file, *SUFFIXES)
    if file.exists():
        _refuse_others_file(file, overwrite)
    runs = read_runs(folders)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder, staying_recorded(file):
            drawn = Path(folder, file.name)
            draw_runs(runs, drawn)
            drawn.replace(file)
    except OSError as error:
        raise UserInputError(f"{file}: {error}") from error
    return runs


def _refuse_others_file(file: Path, overwrite: bool) -> None:
    try:
        is_ours = file.is_file() and CREATOR.encode() in file.read_bytes()
    except OSError as error:
        raise UserInputError(f"{file}: {error}") from error
    if not is_ours:
        raise UserInputError(f"{file} exists and is not a picture that fnl-hf drew: choose another file name")
    if not overwrite:
        raise UserInputError(f"{file} exists: choose another file name, or replace it with --overwrite")
