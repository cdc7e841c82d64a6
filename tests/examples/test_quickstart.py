"""examples/quickstart.ipynb: its code runs in order in a process of its own, for a few steps."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT


def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    program = "\n\n".join(code)
    short = program.replace("STEPS = 300", "STEPS = 21")
    assert short != program
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", short], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = done.stdout.splitlines()
    assert [line.split(":")[0] for line in printed if ": loss" in line] == ["frobenius", "weight", "none"]
    parameters = [int(line.split()[1].replace(",", "")) for line in printed if line.endswith("parameters")]
    assert parameters[0] == parameters[2] > parameters[1]
    assert (tmp_path / "quickstart-model" / "model.safetensors").exists()
