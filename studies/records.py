"""The recorded lines, one for each finished run: their contents, and how they are read and appended."""

import fcntl
import json
import math
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from studies.study import ROOT, Run

CURVE_STEPS = 500  # minimum number of steps between two points of a curve
SCORES = ("eval_loss", "eval_validation_accuracy", "eval_f1")  # whose courses are kept
NORMS = "norms/"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a study, none if it has no file. A last line without its end was only partly written and is
    ignored."""
    try:
        *whole, _ = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in whole]


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Append a record as one line, atomically, even if others append at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with file.open("a+b", buffering=0) as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.seek(0)
        torn = opened.read().rpartition(b"\n")[2]
        opened.truncate(opened.seek(0, os.SEEK_END) - len(torn))
        if opened.write(data) < len(data):
            raise OSError(f"{file}: a line was only partly written")
        os.fsync(opened.fileno())


def record_of(run: Run, folder: Path, seconds: float, revision: str | None, diverged: bool = False) -> dict[str, Any]:
    """The line of a finished run, from the files in its folder. One that has ``diverged``, or whose metrics are not all
    finite, has none.

    Raises:
        OSError, ValueError, KeyError: a file is missing or not what a run leaves.
    """

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    start = read("provenance.json")["starts"][-1]
    line = {
        "study": run.study,
        "arm": run.arm,
        "seed": run.seed,
        "flags": dict(run.flags),
        "revision": revision,
        "versions": start["versions"],
        "machine": {"cpu": cpu_name(), "threads": 1, "devices": start["devices"], "platform": platform.machine()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
    }
    results = {} if diverged else read("all_results.json")
    metrics = {name: value for name, value in results.items() if isinstance(value, int | float)}
    if diverged or not all(map(math.isfinite, metrics.values())):
        return line | {"diverged": True, "metrics": None}
    history = read("trainer_state.json")["log_history"]
    return line | {
        "metrics": metrics,
        "curves": {
            **{name: points for name in SCORES if (points := curve(history, name))},
            "norms": norm_curves(history),
        },
        "norms": last_norms(history),
    }


def curve(history: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[step, value] of a logged quantity, at most every ``CURVE_STEPS`` steps, and the last."""
    points = {entry["step"]: [entry["step"], _rounded(entry[key])] for entry in history if key in entry}
    kept: list[list[float]] = []
    for step, point in points.items():
        if not kept or step - kept[-1][0] >= CURVE_STEPS or step == max(points):
            kept.append(point)
    return kept


def mean_norms(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{kind: {diagnostic: mean over the products}} of a log; ``tightness`` is the nuclear norm divided by its bound."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, value in entry.items():
        if key.startswith(NORMS):
            _, kind, name, diagnostic = key.split("/")
            found[kind][diagnostic].append(value)
            if diagnostic == "nuclear":
                found[kind]["tightness"].append(value / (entry[f"{NORMS}{kind}/{name}/bound"] or 1.0))
    return {kind: {name: _rounded(fmean(values)) for name, values in of.items()} for kind, of in found.items()}


def last_norms(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The norms of the last log that has any."""
    return next(filter(None, map(mean_norms, reversed(history))), {})


def norm_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    """{kind: {diagnostic: curve}}."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for entry in history:
        for kind, norms in mean_norms(entry).items():
            for name, value in norms.items():
                rows[kind, name].append({"step": entry["step"], name: value})
    curves: dict[str, dict[str, list[list[float]]]] = defaultdict(dict)
    for (kind, name), logged in rows.items():
        curves[kind][name] = curve(logged, name)
    return dict(curves)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def cpu_name() -> str:
    """The processor's model; outside of Linux, the name that Python gives."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The commit, with "+changes" if files other than those that studies write differ from it; None outside of git."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30)
        others = ["--", ".", ":(exclude)studies/results", ":(exclude)docs"]
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", *others], capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("" if same.returncode == 0 else "+changes")
