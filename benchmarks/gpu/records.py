"""Record the measurements of a stage as lines of JSON, and time functions."""

import json
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import optimizer_step
import torch
import transformers

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
ENDED, FAILED, SKIPPED = "ended", "failed", "skipped"


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"


def has_ended(stage: str, file: Path, device: torch.device) -> bool:
    return any(
        line["stage"] == stage and line["figure"] == ENDED and line["device"] == device_name(device)
        for line in read_lines(file)
    )


class Recorder:
    """A running stage: its device and its lines. Leaving the context records that it ended, or how it failed.

    ``tiny``: use sizes that only test the code.
    """

    def __init__(self, stage: str, device: torch.device, tiny: bool, file: Path, options: Any = None):
        self.stage, self.device, self.tiny, self.file, self.options = stage, device, tiny, file, options
        self.is_gpu = device.type == "cuda"
        revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        self.common = {
            "device": device_name(device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
            "revision": revision.stdout.strip() or "unknown",
        } | ({"tiny": True} if tiny else {})

    def __enter__(self) -> "Recorder":
        self.began = time.perf_counter()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.record(ENDED, time.perf_counter() - self.began, unit="s")
        elif isinstance(error, Exception):
            traceback.print_exception(error)
            self.record(FAILED, f"{kind.__name__}: {error}".splitlines()[0][:300])

    def record(self, figure: str, value: Any, spread: Any = None, unit: str = "", goal: str = "") -> None:
        """Record one line; ``goal`` is the expected figure, for example "<= 0.2"."""
        line = {"stage": self.stage, "figure": figure, "value": _rounded(value), "spread": _rounded(spread),
                "unit": unit, "goal": goal, **self.common}  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"   {figure}: {line['value']} {unit}" + (f" (goal {goal})" if goal else ""), flush=True)

    def skip(self, what: str, reason: str) -> None:
        """Record that a figure, or the whole stage, cannot be measured here."""
        self.record(SKIPPED, f"{what}: {reason}")

    def needs(self, *packages: str) -> bool:
        """Whether these packages can be imported; if not, records that."""
        missing = [name for name in packages if not _is_importable(name)]
        if missing:
            self.skip(self.stage, f"{', '.join(missing)} not installed")
        return not missing

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def measure(self, functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        """Seconds of each, measured alternately in a new order each time, after two warm-up rounds."""
        return optimizer_step.measure(functions, repeats, self.device.type)

    def record_times(
        self, prefix: str, times: Mapping[str, list[float]], goals: Mapping[str, str] | None = None
    ) -> None:
        """Record the milliseconds of each, and the ratios of the first to the others, run by run."""
        ours, *others = times
        for name, seconds in times.items():
            self.record(
                f"{prefix}{name}", 1e3 * statistics.median(seconds), quartiles([1e3 * s for s in seconds]), "ms"
            )
        for other in others:
            ratios = [a / b for a, b in zip(times[ours], times[other])]
            goal = (goals or {}).get(other, "")
            self.record(f"{prefix}{ours} / {other}", statistics.median(ratios), quartiles(ratios), goal=goal)

    def kernels(self, step: Callable[[], Any]) -> int:
        """Kernels that ``step`` launches, from the profiler; operations on a CPU."""
        activity = torch.profiler.ProfilerActivity
        step()
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if self.is_gpu else [])]) as profile:
            step()
            self.synchronize()
        if not self.is_gpu:
            return sum(event.name.startswith("aten::") for event in profile.events())
        return sum(event.name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
                   for event in profile.events())  # fmt: skip


def quartiles(values: list[float]) -> list[float] | None:
    return [quantile for i, quantile in enumerate(statistics.quantiles(values, n=4)) if i != 1] if values[1:] else None


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _is_importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True
