"""``fnl-hf report`` on runs of the script: the picture, and the files that it does not touch."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from fnl_hf.commands import cli
from fnl_hf.runs.ownership import Output, others_files
from tests.conftest import ROOT


def test_two_runs_in_one_picture(workspace):
    """One of them was killed before its end."""
    killed = shutil.copytree(workspace.run, workspace.here / "killed")
    for name in ("trainer_state.json", "all_results.json", "model.safetensors"):
        (killed / name).unlink()
    file = workspace.here / "new" / "compare.png"
    words = ["report", str(killed), str(workspace.stream), "--output", str(file)]
    command = [sys.executable, "-c", "from fnl_hf.commands.cli import main; main()", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    first, second, last = result.stdout.splitlines()
    assert "streaming false, " in first and ": 4 steps, training loss " in first and first.endswith(f"; in {killed}")
    assert "streaming true, " in second and ": 4 steps, training loss " in second and ", held-out loss " in second
    assert last == str(file) and [path.name for path in file.parent.iterdir()] == ["compare.png"]
    with Image.open(file) as picture:
        assert picture.format == "PNG" and 1000 <= picture.width <= 1500


def test_a_picture_is_replaced_on_demand_and_others_files_never(workspace, capsys):
    run, own = shutil.copytree(workspace.run, workspace.here / "run"), workspace.here / "own.png"
    Image.new("RGB", (3, 5)).save(own)
    report, content = run / "training_report.png", own.read_bytes()
    before = report.read_bytes()

    def refusal(file, *flags):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["report", str(workspace.stream), "--output", str(file), *flags])
        (line,) = capsys.readouterr().err.splitlines()
        return line

    for flags in ((), ("--overwrite",)):
        assert (
            refusal(own, *flags)
            == f"fnl-hf: error: {own} exists and is not a picture that fnl-hf drew: choose another file name"
        )
    assert refusal(report).endswith(
        "training_report.png exists: choose another file name, or replace it with --overwrite"
    )
    assert own.read_bytes() == content and report.read_bytes() == before
    cli.main(["report", str(workspace.stream), "--output", str(report), "--overwrite"])
    assert report.read_bytes() != before
    assert others_files(run, Output(("training_report.png",))) == [], "it remains the run's"
    assert "training_report.png" in json.loads((run / "_written.json").read_text())
