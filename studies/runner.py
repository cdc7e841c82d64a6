"""Launch the missing runs of a study, each in a process with one thread, and record their results.

A run has a folder of its own under ``output/studies``, which is deleted when its line is written. The runner holds a
lock beside that folder. The launched process holds it, too: if the runner is killed, the run is not started a second
time while it still works.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from studies.records import append_line, git_revision, read_lines, record_of
from studies.study import ROOT, Run, Study, identity, twin_of

POLL_SECONDS = 0.2
GRACE_SECONDS = 120.0  # after SIGTERM, a process saves a checkpoint
TAIL_LINES = 6
DIVERGED = 3  # exit status of the scripts
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def command_of(study: Study, run: Run, folder: Path) -> list[str]:
    """The command line of a run; flags with several values are lists.

    Raises:
        KeyError: an environment variable of ``study.places`` is not set.
    """
    places = {flag: os.environ[variable] for flag, variable in study.places.items()}
    flags: dict[str, Any] = {**run.flags, **places, "seed": run.seed, "output_dir": folder}
    flags |= {"resume_from_checkpoint": "auto", "report_to": "none", "disable_tqdm": True}
    words = [sys.executable, str(ROOT / study.script)]
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def done_of(results: Path) -> set[str]:
    """The identities of the runs that are recorded."""
    return {identity(line) for line in read_lines(results)}


def claim(file: Path) -> BinaryIO | None:
    """The lock of a run, to be closed afterwards; None if another process has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = file.open("ab")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    return opened


@dataclass
class Child:
    """A run in progress."""

    run: Run
    folder: Path
    lock: BinaryIO
    process: subprocess.Popen
    started: float
    revision: str | None

    @property
    def seconds_before(self) -> float:
        """The duration of earlier starts of the same run."""
        try:
            return float((self.folder / "seconds").read_text())
        except (OSError, ValueError):
            return 0.0

    def add_seconds(self) -> float:
        seconds = self.seconds_before + time.monotonic() - self.started
        (self.folder / "seconds").write_text(f"{seconds:.1f}")
        return seconds

    def last_words(self) -> str:
        lines = (self.folder / "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][-TAIL_LINES:])


class Runner:
    """Runs of one study, ``workers`` at a time.

    Args:
        results: the file of lines.
        work: where the runs have their folders.
        minutes: after this time, runs in progress are stopped; they resume from their checkpoints the next time.
    """

    def __init__(
        self, study: Study, runs: Sequence[Run], results: Path, work: Path, workers: int, minutes: float | None = None
    ):
        self.study, self.runs, self.results, self.work, self.workers = study, runs, results, work, workers
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.signal: int | None = None
        self.children: list[Child] = []
        self.failed = self.elsewhere = 0

    def run(self) -> int:
        """Launch and record until nothing is left, or until stopped; returns the exit status: 1 if a run failed."""
        done = done_of(self.results)
        waiting = deque(run for run in self.runs if run.identity not in done)
        for run in self.runs:
            if run.identity in done:
                self._clear(run)
        total = len(self.runs)
        with (
            self._signals(),
            tqdm(total=total, initial=total - len(waiting), unit="run", dynamic_ncols=True) as self.bar,
        ):
            try:
                while not self._is_over():
                    while len(self.children) < self.workers and (run := self._next(waiting)):
                        self._start(run)
                    if not self.children:
                        break
                    time.sleep(POLL_SECONDS)
                    self._collect()
            finally:
                self._stop_children()
        return self._say_what_is_left()

    def _is_over(self) -> bool:
        return self.signal is not None or (self.end is not None and time.monotonic() >= self.end)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Record signals instead of raising them, so that a line is never written partly."""

        def note(signum, frame):
            self.signal = signum

        before = {signum: signal.signal(signum, note) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _place(self, run: Run) -> tuple[Path, Path]:
        folder = self.work / run.study / run.folder
        return folder, folder.with_name(f"{folder.name}.lock")

    def _twin(self, run: Run) -> Path:
        """The folder in which a run's weights are kept, for runs that are compared with them."""
        return self.work / run.study / "twins" / run.folder

    def _next(self, waiting: deque[Run]) -> Run | None:
        """Take the first run that can be started: if it has a twin, the twin's weights must exist."""
        for run in waiting:
            twin = twin_of(self.study, run)
            if twin is None or self._twin(twin).exists():
                waiting.remove(run)
                return run
        return None

    def _clear(self, run: Run) -> None:
        """Remove the folder of a recorded run, if its runner was killed before it removed the folder."""
        folder, lock_file = self._place(run)
        lock = claim(lock_file) if folder.exists() else None
        if lock is not None:
            self._release(folder, lock_file, lock)

    def _release(self, folder: Path, lock_file: Path, lock: BinaryIO) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        lock.close()

    def _start(self, run: Run) -> None:
        folder, lock_file = self._place(run)
        lock = claim(lock_file)
        if lock is None:
            self.elsewhere += 1
            return
        if run.identity in done_of(self.results) or self._copy(run):  # by another runner in the meantime
            self._release(folder, lock_file, lock)
            self.bar.update()
            return
        folder.mkdir(exist_ok=True)
        with (folder / "stdout").open("ab") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                command_of(self.study, run, folder / "run"),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # Ctrl-C only reaches the runner, which asks its children to save
            )
        self.children.append(Child(run, folder, lock, process, time.monotonic(), git_revision()))
        self._show()

    def _copy(self, run: Run) -> bool:
        """If an arm of another group with the same flags and seed is recorded, record a copy of its line."""
        for line in read_lines(self.results):
            if identity({**line, "arm": run.arm}) == run.identity:
                append_line(self.results, {**line, "arm": run.arm, "copy_of": line["arm"]})
                return True
        return False

    def _show(self) -> None:
        self.bar.set_description_str(", ".join(f"{child.run.arm} {child.run.seed}" for child in self.children))

    def _collect(self) -> None:
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            self._finish(child)
            self._show()

    def _finish(self, child: Child) -> None:
        seconds, status = child.add_seconds(), child.process.returncode
        if status in (0, DIVERGED):
            try:
                self._record(child, seconds, status == DIVERGED)
                return
            except (OSError, ValueError, KeyError) as error:
                self._fail(child, f"wrote no results: {error!r}")
        elif not self._is_over():
            self._fail(child, f"failed with exit status {status}")
        child.lock.close()

    def _record(self, child: Child, seconds: float, diverged: bool) -> None:
        record = record_of(child.run, child.folder / "run", seconds, child.revision, diverged)
        has_weights = not record.get("diverged")
        if self.study.spectra and has_weights:
            from studies.spectra import spectra_of  # imports torch, which is only needed here

            record["spectra"] = spectra_of(child.folder / "run")
        if self.study.twin is not None and has_weights:
            self._measure_twins(child, record)
        append_line(self.results, record)
        self._release(child.folder, self._place(child.run)[1], child.lock)
        self.bar.update()

    def _measure_twins(self, child: Child, record: dict[str, Any]) -> None:
        from studies.twins import distances_of, keep_weights

        twin = twin_of(self.study, child.run) or child.run
        kept = self._twin(twin)
        if twin is child.run:
            kept.parent.mkdir(exist_ok=True)
            keep_weights(child.folder / "run", kept)
        curves = distances_of(child.folder / "run", kept)
        record["curves"]["twin"] = curves
        record["twin"] = {name: points[-1][1] for name, points in curves.items()}

    def _fail(self, child: Child, how: str) -> None:
        self.failed += 1
        self.bar.write(f"{child.run.arm}, seed {child.run.seed}: {how}\n{child.last_words()}", file=sys.stderr)

    def _stop_children(self) -> None:
        """Ask all children to end, and kill those that do not."""
        for child in self.children:
            child.process.terminate()
        patience = time.monotonic() + GRACE_SECONDS
        for child in self.children:
            try:
                child.process.wait(max(0.0, patience - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._collect()

    def _say_what_is_left(self) -> int:
        done = done_of(self.results)
        left = sum(run.identity not in done for run in self.runs)
        others = f", {self.elsewhere} of them in progress in another runner" if self.elsewhere else ""
        failed = f"; {self.failed} failed" if self.failed else ""
        twins = {run.identity: twin_of(self.study, run) for run in self.runs if run.identity not in done}
        lost = {twin.arm for twin in twins.values() if twin and twin.identity in done and not self._twin(twin).exists()}
        names = ", ".join(sorted(lost))
        gone = f"; the weights of {names} were deleted: delete their lines to run them again" if lost else ""
        print(
            f"{len(self.runs) - left} of {len(self.runs)} runs recorded, {left} missing{others}{failed}{gone}",
            file=sys.stderr,
        )
        return 128 + self.signal if self.signal is not None else int(self.failed > 0)
