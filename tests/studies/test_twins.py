"""Runs that are measured against their dense twin: by hand, and in the runner."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from studies.records import read_lines
from studies.study import Comparison
from studies.twins import compare_weights, distances_of, keep_weights
from tests.studies.fakes import command, fake_study

NAMES = ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.output.dense")
OTHER = "bert.encoder.layer.0.attention.output.dense.weight"  # no feed-forward layer


def test_distances_by_hand():
    first, second = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    twin = {f"{NAMES[0]}.weight": first, f"{NAMES[1]}.weight": second, OTHER: torch.eye(3)}
    u, m, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0, 0.0]])  # U M Vᵀ = [3 0; 6 0]
    own = {f"{NAMES[0]}.left": u, f"{NAMES[0]}.middle": m, f"{NAMES[0]}.right": v, f"{NAMES[1]}.weight": 3 * second}
    found = compare_weights(own, twin)
    assert found["distance"] == pytest.approx((52**0.5 / 5 + 2) / 2)  # [0 0; 6 -4] over 5; 4 over 2
    assert found["cosine"] == pytest.approx((9 / (45**0.5 * 5) + 1) / 2)
    assert found["norm"] == pytest.approx((45**0.5 / 5 + 3) / 2)


def test_checkpoints_that_both_have(tmp_path):
    for folder, scale, steps in (("twin", 1.0, (100, 500)), ("own", 1.5, (500, 1000, 100))):
        for step in steps:
            checkpoint = tmp_path / folder / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            save_file({f"{NAMES[0]}.weight": scale * torch.ones(2, 3)}, checkpoint / "model.safetensors")
    keep_weights(tmp_path / "twin", tmp_path / "kept")
    assert distances_of(tmp_path / "own", tmp_path / "kept")["distance"] == [[100, 0.5], [500, 0.5]]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no checkpoints of the same step"):
        distances_of(tmp_path / "own", tmp_path / "none")


def test_the_twin_is_run_first_and_the_others_are_measured_against_it(tmp_path, capsys):
    (tmp_path / "gate").touch()
    arms = {"A": {"low": {"arm": "low", "scale": 3}, "high": {"arm": "high", "scale": 2}}}
    command(tmp_path, "--arms", "*/low", arms=arms, twin="high", seeds=(1,), tuning_seeds=())
    assert not (tmp_path / "starts").exists(), "there is nothing to measure it against"
    command(tmp_path, arms=arms, twin="high", seeds=(1, 2), tuning_seeds=())
    lines = read_lines(tmp_path / "results" / "fake.jsonl")
    assert [(line["arm"], line["seed"]) for line in lines] == [("A/high", 1), ("A/low", 1), ("A/high", 2), ("A/low", 2)]
    assert [line["twin"]["distance"] for line in lines] == [0.0, 0.5, 0.0, 0.5]
    assert lines[1]["curves"]["twin"]["norm"] == [[1000, 1.5]]
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "results" / "fake.jsonl").write_text(json.dumps(lines[0]) + "\n")
    capsys.readouterr()
    assert command(tmp_path, "--seeds", "1", arms=arms, twin="high") == 0
    assert (
        "1 missing; the weights of A/high were deleted: delete their lines to run them again" in capsys.readouterr().err
    )


def test_places_are_no_part_of_what_is_recorded(tmp_path, monkeypatch, capsys):
    (tmp_path / "gate").touch()
    changes = {"places": {"folder": "FAKE_FOLDER"}}
    monkeypatch.delenv("FAKE_FOLDER", raising=False)
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, **changes)
    assert "fake needs the environment variables FAKE_FOLDER" in capsys.readouterr().err
    monkeypatch.setenv("FAKE_FOLDER", "some-place")
    command(tmp_path, "--arms", "A/low", "--seeds", "1", **changes)
    (line,) = read_lines(tmp_path / "results" / "fake.jsonl")
    assert line["flags"] == fake_study(tmp_path, **changes).flags("A/low") and line["metrics"]["folder"] == 10
    assert "some-place" not in json.dumps(line)


def test_the_same_command_line_in_another_group_is_run_once(tmp_path):
    (tmp_path / "gate").touch()
    arms = {group: {"low": {"arm": "low", "sizes": (2, 3)}} for group in "AB"}
    command(tmp_path, arms=arms, seeds=(1, 2), tuning_seeds=())
    lines = read_lines(tmp_path / "results" / "fake.jsonl")
    assert len((tmp_path / "starts").read_text().splitlines()) == 2
    assert [(line["arm"], line["seed"], line.get("copy_of")) for line in lines[2:]] == [
        ("B/low", 1, "A/low"), ("B/low", 2, "A/low")
    ]  # fmt: skip
    assert lines[2]["metrics"] == lines[0]["metrics"]


def test_of_several_arms_the_chosen_one_alone(tmp_path):
    (tmp_path / "gate").touch()
    arms = {"A": {"high": {"arm": "high"}, "x-1": {"arm": "low"}, "x-2": {"arm": "high", "rate": 2}}}
    changes = {"arms": arms, "comparisons": (Comparison("", "x-*", "high"),)}
    command(tmp_path, "--seeds", "11", **changes)
    command(tmp_path, "--chosen", **changes)
    lines = read_lines(tmp_path / "results" / "fake.jsonl")
    found = {arm: [line["seed"] for line in lines if line["arm"] == arm] for arm in ("A/high", "A/x-1", "A/x-2")}
    assert found == {"A/high": [11, 1, 2], "A/x-1": [11, 1, 2], "A/x-2": [11]}
