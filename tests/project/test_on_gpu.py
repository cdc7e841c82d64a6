"""benchmarks/on_gpu.py: each stage runs to its end at tiny sizes, is not run twice, fails alone, and is shown."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

# One of the alike: the others differ in sizes and flags that tiny ones replace.
ALIKE = ("throughput-", "study-")


@pytest.fixture(scope="module")
def on_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT), *sys.path])
        yield importlib.import_module("on_gpu")


def stages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT), *sys.path])
        names = list(importlib.import_module("gpu.stages").STAGES)
    kept = [name for name in names if not name.startswith(ALIKE) and name != "tests"]
    return [*kept, "throughput-base-128", "study-frobenius-256"]


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", stages())
def test_each_stage_runs_to_its_end(on_gpu, tmp_path, corpus, name):
    file = tmp_path / "results" / "gpu.jsonl"
    words = [name, "--here", "--device", "cpu", "--tiny", "--results", str(file), "--text", str(corpus)]
    assert on_gpu.main(words) == 0
    lines = lines_of(file)
    assert lines[-1]["figure"] == "ended" and len(lines) > 1
    for line in lines:
        assert line["stage"] == name and line["device"].startswith("CPU") and line["tiny"]
        assert line["versions"]["torch"] == torch.__version__ and line["revision"]


def test_what_has_ended_is_not_run_again_and_what_fails_stops_nothing(on_gpu, tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.jsonl"
    ran = []

    def run(name, args):  # as in a process of its own
        ran.append(name)
        if name == "adamw":
            with pytest.raises(RuntimeError):
                on_gpu.run_here(name, args)
            return False
        on_gpu.run_here(name, args)
        return True

    def fail(recorder):
        raise RuntimeError("no kernel image\nfor this device")

    stage = on_gpu.STAGES["decay"]._replace
    made = {
        "decay": stage(run=lambda run: run.record("a", 1.23456, [1.0, 2.0], "ms", "<= 2")),
        "adamw": stage(run=fail),
        "lamb": stage(run=lambda run: run.record("b", 7)),
    }
    monkeypatch.setattr(on_gpu, "STAGES", made)
    monkeypatch.setattr(on_gpu, "run_apart", run)
    words = ["--device", "cpu", "--results", str(file)]
    assert on_gpu.main(words) == 1
    assert ran == ["decay", "adamw", "lamb"] and "failed: adamw" in capsys.readouterr().out
    assert on_gpu.main(words) == 1
    assert ran == ["decay", "adamw", "lamb", "adamw"]
    assert on_gpu.main(["decay", "--again", *words]) == 0
    figures = [(line["figure"], line["value"]) for line in lines_of(file)]
    assert figures[0] == ("a", 1.235) and figures[2] == ("failed", "RuntimeError: no kernel image")
    page = on_gpu.render(file)
    assert (
        "| decay | a | 1.235 ms | 1.0 to 2.0 | <= 2 |" in page
        and "no kernel image" in page
        and "none could" not in page
    )


def test_a_stage_has_a_process_and_a_bound_of_its_own(on_gpu, tmp_path, capfd):
    args = on_gpu.parse(["--device", "cpu", "--tiny", "--minutes", "0.001", "--results", str(tmp_path / "gpu.jsonl")])
    assert not on_gpu.run_apart("decay", args)
    assert "decay: stopped after 0.001 minutes" in capfd.readouterr().out


def test_stages_need_neither_pytest_nor_libraries_for_data(tmp_path):
    """What is missing is said; all else runs."""
    file = tmp_path / "gpu.jsonl"
    program = f"""
import runpy, sys
for name in ("pytest", "datasets", "evaluate", "pytorch_optimizer", "matplotlib", "pyarrow", "tensorboard"):
    sys.modules[name] = None
sys.argv = ["on_gpu.py", "tests", "steps", "decay", "lamb", "resume", "throughput-tiny-128", "study-none-512",
            "--here", "--device", "cpu", "--tiny", "--results", {str(file)!r}]
runpy.run_path({str(ROOT / "benchmarks" / "on_gpu.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "all finished" in done.stdout, done.stderr[-3000:]
    skipped = {line["stage"]: line["value"] for line in lines_of(file) if line["figure"] == "skipped"}
    assert set(skipped) == {"tests", "lamb", "resume", "study-none-512"}
    assert skipped["study-none-512"] == "study-none-512: datasets, evaluate not installed"


def test_the_tests_that_need_a_gpu_are_those_that_are_run_there(on_gpu):
    needed = importlib.import_module("gpu.correctness").NEED_A_GPU
    marked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
              if re.search(r"skipif\(not torch\.cuda\.is_available", path.read_text(encoding="utf-8"))}  # fmt: skip
    assert marked == set(needed)
    for file, words in needed.items():
        assert re.search(f"def test_.*{words}", (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "words, message", [(["nothing"], "unknown stage nothing"), ([], "there is no CUDA device: use")]
)
def test_bad_words_are_one_line(on_gpu, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        on_gpu.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_page_is_that_of_the_recorded_lines(on_gpu):
    assert on_gpu.PAGE.read_text(encoding="utf-8") == on_gpu.render(on_gpu.RESULTS)
