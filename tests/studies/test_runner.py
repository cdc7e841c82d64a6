"""The runner, on a script that leaves what a run leaves: what is launched, recorded, skipped, resumed and told."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from studies import records
from studies.records import append_line, read_lines
from tests.studies import fakes
from tests.studies.fakes import command, fake_study

ALL = [(arm, seed) for group in (("A/low", "A/high"), ("B/low",)) for seed in (1, 11, 2) for arm in group]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "gate").touch()
    return tmp_path


def lines_of(folder):
    return read_lines(folder / "results" / "fake.jsonl")


def runs_in(lines):
    return [(line["arm"], line["seed"]) for line in lines]


def starts(folder):
    file = folder / "starts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def in_background(folder, *arguments):
    words = [sys.executable, fakes.__file__, str(folder), *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_runs_are_launched_in_order_and_recorded(folder):
    assert command(folder) == 0
    lines = lines_of(folder)
    assert runs_in(lines) == ALL
    assert [start[:5] for start in starts(folder)][-3:] == [
        ["low", s, ["2", "3"], "1", False] for s in ("1", "11", "2")
    ]
    line = lines[3]
    assert (line["study"], line["flags"]) == ("fake", fake_study(folder).flags("A/high"))
    assert line["metrics"] == {"eval_loss": 4.671875}  # 4.5 + 11/64
    qk = {"nuclear": [[0, 0.5], [1000, 3.5]], "bound": [[0, 0.5], [1000, 4.5]], "tightness": [[0, 1.0], [1000, 0.75]]}
    assert line["curves"] == {
        "eval_loss": [[100, 904.672], [600, 404.672], [1000, 4.67188]],
        "norms": {"qk": qk, "vo": {"bound": [[0, 0.5], [1000, 7.0]]}},
    }
    assert line["norms"] == {"qk": {"nuclear": 3.5, "bound": 4.5, "tightness": 0.75}, "vo": {"bound": 7.0}}
    assert line["versions"]["torch"] == "2" and line["machine"]["cpu"] and line["seconds"] > 0
    assert str(folder) not in json.dumps({**line, "flags": {}})
    assert list((folder / "work" / "fake").iterdir()) == []


def test_what_is_recorded_is_not_run_again_unless_its_flags_changed(folder):
    command(folder, "--arms", "A/*", "--seeds", "2")
    command(folder, "--arms", "*/low")
    assert runs_in(lines_of(folder)) == [("A/low", 2), ("A/high", 2), ("A/low", 1), ("A/low", 11), *ALL[-3:]]
    assert len(starts(folder)) == 7
    changed = {"base": fake_study(folder).base | {"rate": 0.5}}
    command(folder, "--arms", "A/low", "--seeds", "2", **changed)
    assert runs_in(lines_of(folder))[7:] == [("A/low", 2)]


def test_a_failure_is_told_and_stops_nothing(folder, capfd):
    arms = {"A": {name: {"arm": name} for name in ("broken", "empty", "low")}}
    assert command(folder, "--seeds", "5", arms=arms) == 1
    told = capfd.readouterr().err
    assert "A/broken, seed 5: failed with exit status 1\n" + "  first\n" * 5 + "  what is wrong\n" in told
    assert "A/empty, seed 5: wrote no results: FileNotFoundError" in told
    assert "1 of 3 runs recorded, 2 missing; 2 failed" in told
    assert runs_in(lines_of(folder)) == [("A/low", 5)]


@pytest.mark.parametrize("arm", ["stopped", "nan"])
def test_a_diverged_run_is_recorded_without_metrics_and_not_run_again(folder, capfd, arm):
    """Neither products nor the distance to the twin are measured on what it leaves."""
    changes = {"arms": {"A": {"low": {"arm": "low", "scale": 2}, arm: {"arm": arm}}}, "twin": "low", "spectra": False}
    for _ in range(2):
        assert command(folder, "--seeds", "5", **changes) == 0
        assert "2 of 2 runs recorded, 0 missing\n" in capfd.readouterr().err
    assert len(starts(folder)) == 2
    whole, diverged = lines_of(folder)
    assert (diverged["arm"], diverged["diverged"], diverged["metrics"]) == (f"A/{arm}", True, None)
    assert "diverged" not in whole and diverged["versions"] == whole["versions"] and diverged["seconds"] > 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_ends_its_children_and_resumes_them_later(tmp_path, signum):
    runner = in_background(tmp_path, "--workers", "2", "--arms", "A/low")
    wait_for(lambda: len(starts(tmp_path)) == 2)
    runner.send_signal(signum)
    _, told = runner.communicate(timeout=120)
    assert runner.returncode == 128 + signum, told
    assert "0 of 3 runs recorded, 3 missing" in told and "failed" not in told
    assert not any(is_alive(start[-1]) for start in starts(tmp_path))
    assert lines_of(tmp_path) == []
    (tmp_path / "gate").touch()
    assert command(tmp_path, "--arms", "A/low") == 0
    assert [start[4] for start in starts(tmp_path)] == [False, False, True, True, False]
    assert runs_in(lines_of(tmp_path)) == [("A/low", 1), ("A/low", 11), ("A/low", 2)]


def test_minutes_end_what_is_at_work(tmp_path):
    assert command(tmp_path, "--minutes", "0.05", "--arms", "A/low") == 0
    assert [start[:2] for start in starts(tmp_path)] == [["low", "1"]]
    assert not is_alive(starts(tmp_path)[0][-1])
    assert lines_of(tmp_path) == []


def test_two_runners_share_a_study(tmp_path):
    first, second = (in_background(tmp_path, "--workers", "2") for _ in range(2))
    wait_for(lambda: len(starts(tmp_path)) == 4)
    (tmp_path / "gate").touch()
    told = [runner.communicate(timeout=120)[1] for runner in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), told
    assert sorted(runs_in(lines_of(tmp_path))) == sorted(ALL)
    assert len(starts(tmp_path)) == len(ALL)


def test_a_run_whose_runner_was_killed_is_left_to_itself_and_recorded_later(tmp_path):
    runner = in_background(tmp_path, "--arms", "A/low", "--seeds", "1")
    wait_for(lambda: len(starts(tmp_path)) == 1)
    runner.kill()
    runner.communicate()
    assert command(tmp_path, "--arms", "A/low", "--seeds", "1") == 0
    assert len(starts(tmp_path)) == 1 and lines_of(tmp_path) == []
    (tmp_path / "gate").touch()
    wait_for(lambda: list(tmp_path.glob("work/fake/*/run/all_results.json")) and not is_alive(starts(tmp_path)[0][-1]))
    assert command(tmp_path, "--arms", "A/low", "--seeds", "1") == 0
    assert runs_in(lines_of(tmp_path)) == [("A/low", 1)]


def test_a_line_that_was_cut_off_is_replaced(tmp_path):
    file = tmp_path / "lines.jsonl"
    append_line(file, {"seed": 1})
    file.write_text(file.read_text() + '{"seed": 2, "arm')
    assert read_lines(file) == [{"seed": 1}]
    append_line(file, {"seed": 3})
    assert file.read_text() == '{"seed": 1}\n{"seed": 3}\n'
    with pytest.raises(ValueError, match="Out of range"):
        append_line(file, {"loss": float("nan")})
    assert read_lines(file) == [{"seed": 1}, {"seed": 3}]


def test_the_revision_does_not_change_with_what_studies_write(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.git_revision() is None
    files = [tmp_path / name for name in ("studies/results/a.jsonl", "docs/results.md", "code.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    for file, revision in zip(files, (commit, commit, f"{commit}+changes")):
        file.write_text("after")
        assert records.git_revision() == revision


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nix"], "unknown study 'nix': choose from fake"),
        ([], "give the name of a study (fake) or --list"),
        (["fake", "--arms", "C*"], "--arms C* matches no arm of fake: A/low, A/high, B/low"),
        (["fake", "--seeds", "2", "2"], "--seeds (2 2) must be different seeds of at least 0"),
        (["fake", "--workers", "0"], "--workers (0) must be at least 1"),
        (["fake", "--minutes", "nan"], "--minutes (nan) must be above 0"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        fakes.main(arguments, {"fake": fake_study(tmp_path)}, tmp_path, tmp_path)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"studies: error: {message}\n")


def test_list_says_what_is_left_and_how_long_it_takes(folder, capfd):
    command(folder, "--arms", "A/low", "--seeds", "1")
    file = folder / "results" / "fake.jsonl"
    file.write_text(json.dumps(lines_of(folder)[0] | {"seconds": 1800.0}) + "\n")
    capfd.readouterr()
    command(folder, "--list", "--workers", "4")
    output = capfd.readouterr()
    assert "1 of 9 runs recorded, 8 missing, about 1.0 h at 1800 s per run with 4 in parallel" in output.err
    assert output.out.splitlines()[0].split() == ["A/low", "done", "1;", "missing", "11", "2"]
    assert len(starts(folder)) == 1
