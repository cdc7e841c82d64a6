"""The commands of the documentation are real ones."""

import os
import re
import shlex
import stat
import subprocess

import pytest
from accelerate.commands.launch import launch_command_parser

from fnl_hf.cli import build_parser
from fnl_hf.training.arguments import FnlTrainingArguments, parse_arguments
from fnl_hf.training.phases import phases_of
from fnl_hf.training.pretraining_arguments import DataArguments, ModelArguments

from .conftest import ROOT

TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
SLURM = next(block for block in BLOCKS if "#SBATCH" in block)
KINDS = (ModelArguments, DataArguments, FnlTrainingArguments)
COMMANDS = [
    line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("accelerate launch")
]


def parse(words):
    for command in phases_of(words):
        parse_arguments(KINDS, [*command, "--use_cpu", "true"])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = launch_command_parser().parse_args(shlex.split(command)[2:])
    assert os.path.isfile(args.config_file) and args.training_script == "run_pretrain.py"
    parse(args.training_script_args)


def test_flags_exist():
    known = {
        name for kind in (ModelArguments, DataArguments, FnlTrainingArguments) for name in kind.__dataclass_fields__
    }
    named = {flag for text in re.findall(r"`(--[^`]*)`", TEXT) for flag in re.findall(r"--(\w+)", text)}
    others = {"help", "num_processes", "signal"}  # of the parser's, the launcher's, SLURM's own
    assert len(named) > 20 and named - known == others


@pytest.mark.parametrize("page", ["README.md", "docs/conversion.md"])
def test_commands_of_fnl_hf_parse(page):
    lines = re.findall(r"^fnl-hf .*", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert lines
    for line in lines:
        assert callable(build_parser().parse_args(shlex.split(line, comments=True)[1:]).run)


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (75, True)])
def test_the_slurm_script_requeues_what_was_preempted(tmp_path, monkeypatch, status, requeued):
    """With a ``srun`` of two tasks, whose status is the highest one of theirs."""
    stubs = {
        "scontrol": 'echo "$@" >> scontrol.log; echo first; echo second',
        "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@"; s=$?; done; exit $s',
        "python": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $@" >> python.log; exit {status}',
    }
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    variables = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "37"}
    environment = os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", SLURM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    tasks = [line.split() for line in (tmp_path / "python.log").read_text().splitlines()]
    assert [task[:5] for task in tasks] == [[i, i, "2", "first", "run_pretrain.py"] for i in "01"]
    assert ("requeue 37" in (tmp_path / "scontrol.log").read_text()) == requeued
    monkeypatch.chdir(ROOT)
    parse(tasks[0][5:])
