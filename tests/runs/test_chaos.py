"""Four SIGKILLs at random moments of one run, two of them during a save: the end is that of a run left alone."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT, TINY, pretraining


def test_four_kills_change_nothing(corpus, tmp_path):
    recipe = pretraining(corpus, None, config_overrides=f"{TINY},hidden_dropout_prob=0.1", max_steps=700,
                         save_steps=None, logging_steps=None, output_dir=None)  # fmt: skip
    command = [sys.executable, ROOT / "benchmarks" / "chaos.py", "--kills", "4", "--output_dir", tmp_path, *recipe]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    kills, saves = map(int, re.search(r"(\d+) kills, (\d+) of them during a save", result.stdout).groups())
    assert kills == 4 and saves >= 2
    assert "700 steps; weights bit-identical" in result.stdout
