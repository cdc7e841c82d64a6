"""The command line of ``fnl-hf``: its help, and names that are no use."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fnl_hf
from fnl_hf.commands import cli


def sub_commands():
    parser = cli.build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return commands.choices


@pytest.mark.parametrize("name", sub_commands())
def test_every_command_says_what_it_does_and_shows_how(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    command = sub_commands()[name]
    assert len(command.description) > 60 and " ".join(command.description.split()[:5]) in capsys.readouterr().out
    program, *words = shlex.split(command.epilog.removeprefix("example: "))
    assert program == "fnl-hf" and cli.build_parser().parse_args(words).run is command.get_default("run")


def test_the_version():
    printed = subprocess.run([sys.executable, "-m", "fnl_hf", "--version"], capture_output=True, text=True, check=True)
    assert printed.stdout == f"fnl-hf {fnl_hf.__version__}\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["convert", "", "new"], "source is empty: give a name"),
        (["convert", "{here}", ""], "folder is empty: give a name"),
        (["merge", "{here}", "{file}"], "text.txt is a file: choose a folder that is empty or does not exist"),
        (["factorize", "{here}", "{file}/new"], "text.txt/new: {file} is not a folder"),
        (["convert", "{here}", "{file}/new"], "text.txt/new: {file} is not a folder"),
        (["convert", "{here}", "{here}/" + "x" * 300], "File name too long"),
        (["convert", "{here}", "{here}/new"], "no tokenizer in {here}"),
        (["export", "{here}", "{here}/model.onnx"], "{here}: "),
        *[
            ([command, "{here}/" + "x" * 300, "{here}/new"], "File name too long")
            for command in ("convert", "factorize", "merge", "export", "push", "ask")
        ],
        (["ask", "{here}", "--questions_file", "{here}/" + "x" * 300], "questions_file: "),
        (["factorize", "nobody/nothing", "{here}/new", "--calibration_file", "{here}/a.txt"], "a.txt: no such file"),
        (["convert", "nobody/nothing", "{here}/new", "--calibration_file", "{here}/a.txt"], "a.txt: no such file"),
        (["factorize", "{here}", "{here}/new", "--target_ratio", "50%"], "--target_ratio: invalid float value: '50%'"),
        (["factorize", "{here}", "{here}/new", "--target-ratio", "50%"], "--target_ratio: invalid float value: '50%'"),
        (["factorize", "{here}/none/such", "{here}/new", "--target-ratio=0.5"], "{here}/none/such: no such folder"),
        (["factorize", "{here}"], "the following arguments are required: folder"),
        (["convert", "{here}", "{here}/new", "--calibration_file", ""], "calibration_file is empty: give a name"),
        (["push", "", "me/mine"], "folder is empty: give a name"),
        (["push", "{file}", "me/mine"], "text.txt contains no saved model"),
        (["ask", "{here}", "Who?", "Ada."], "no question answering model in {here}"),
        (["ask", "{here}", "--questions_file", "{here}"], "{here}: not a file"),
        (["ask", "{here}", "--questions_file", ""], "questions_file is empty: give a name"),
        (["report", "{here}", "--output", "{here}/a.png"], "{here} contains no run: neither it nor a checkpoint"),
        (["report", "{file}", "--output", "{here}/new/a.png"], "text.txt contains no run"),
        (["report", "{here}", "--output", "{here}/a.jpg"], "a.jpg: the file name must end in .png or .pdf or .svg"),
        (["report", "{here}", "--output", "{file}/a.png"], "text.txt/a.png: {file} is not a folder"),
        (["report", "", "--output", "{here}/a.png"], "runs is empty: give a name"),
        (["report", "{here}", "--output", "{here}/" + "x" * 300 + ".png"], "File name too long"),
    ],
)
def test_files_and_folders_that_are_no_use_are_refused_in_one_line(tmp_path, capsys, words, message):
    names = {"here": str(tmp_path), "file": str(tmp_path / "text.txt")}
    (tmp_path / "text.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        cli.main([word.format(**names) for word in words])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fnl-hf: error: ") and message.format(**names) in line
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_the_home_folder_is_taken_for_a_tilde(tmp_path, monkeypatch):
    """Which a shell leaves as it is in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["convert", "~/bert", "~/new", "--calibration_file", "~/text.txt", "text.txt"]
    args = cli.build_parser().parse_args(words)
    cli.take_places(args)
    assert [args.source, args.folder] == [str(tmp_path / "bert"), str(tmp_path / "new")]
    assert args.calibration_file == [str(tmp_path / "text.txt"), "text.txt"] and not Path("~").exists()


@pytest.mark.parametrize(
    "words, unused",
    [
        (["convert", "a", "b", "--calibration_samples", "5"], ["calibration_samples"]),
        (["convert", "a", "b", "--max_seq_length", "5", "--calibration_samples", "5"],
         ["calibration_samples", "max_seq_length"]),
        (["convert", "a", "b", "--text_column_name", "c"], ["text_column_name"]),
        (["convert", "a", "b", "--max_seq_length", "5", "--calibration_file", "c"], []),
        (["ask", "a", "b", "c", "--null_score_diff_threshold", "0"], ["null_score_diff_threshold"]),
        (["ask", "a", "b", "c", "--null_score_diff_threshold", "0", "--version_2_with_negative"], []),
        (["ask", "a", "b", "c"], []),
    ],
)  # fmt: skip
def test_a_flag_that_changes_nothing_is_one_line(words, unused, monkeypatch, capsys):
    monkeypatch.setattr(cli, "convert_checkpoint", lambda *args: (_Sized(), _Sized(), []))
    monkeypatch.setattr(cli, "ask", lambda *args, **options: [{"answer": "", "score": 0.0}])
    cli.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("--")[1].split(" ")[0] for line in lines] == unused


class _Sized:
    def num_parameters(self):
        return 3
