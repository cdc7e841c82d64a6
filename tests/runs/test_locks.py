"""One run at a time in an output folder, whichever process and machine it is on."""

import json
import os
import signal
import subprocess
import sys

import pytest

import run_pretrain
from fnl_hf import UserInputError
from fnl_hf.runs import locks
from fnl_hf.runs.locks import LOCK_FILE, folders_in_use, lock_folder, read_lock
from tests.bad_inputs import resumed
from tests.conftest import pretraining

# Another machine's run: only the system's own lock says that it is alive.
OTHER = """
import fcntl, sys
file = open(sys.argv[1], "r+" if len(sys.argv) > 2 else "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write('{"process": 4711, "host": "node7", "time": 1700000000000000000}')
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""
IN_USE = (
    r"/out is in use by a run in process 4711 on node7, since 2023-11-14 22:13:20 UTC: wait until it ends, or choose"
)


@pytest.fixture
def alive(tmp_path):
    """Starts another process that holds the folder "out"."""
    processes = []

    def start():
        (tmp_path / "out").mkdir(exist_ok=True)
        command = [sys.executable, "-c", OTHER, tmp_path / "out" / LOCK_FILE]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in processes:
        process.communicate()


@pytest.mark.parametrize(
    "flags",
    [
        {"resume_from_checkpoint": "auto"},
        {"resume_from_checkpoint": None, "overwrite_output_dir": "true"},
        {"resume_from_checkpoint": None, "overwrite_output_dir": "true", "do_eval": "true"},
        {"resume_from_checkpoint": "<here>/out/checkpoint-2"},
    ],
)
def test_a_second_run_is_refused_with_the_first_one_s_process_and_machine(workspace, alive, flags):
    command = resumed(**flags)(workspace)
    alive()
    before = sorted(path.name for path in (workspace.here / "out").iterdir())
    with pytest.raises(UserInputError, match=IN_USE):
        run_pretrain.run(command)
    assert sorted(path.name for path in (workspace.here / "out").iterdir()) == before


def test_a_dead_run_s_lock_is_none(workspace, alive, corpus):
    command = resumed()(workspace)
    first = alive()
    first.send_signal(signal.SIGKILL)
    first.wait()
    run_pretrain.run(command)
    assert (workspace.here / "out" / "all_results.json").is_file()


def test_of_two_runs_that_were_planned_the_second_to_start_is_refused(tmp_path, alive):
    out = tmp_path / "out"
    assert read_lock(out) == b""
    first = alive()
    with pytest.raises(UserInputError, match=IN_USE):
        lock_folder(out, b"")
    first.communicate()
    with pytest.raises(
        UserInputError, match="out: process 4711 on node7, since .* started a run there after this one was pla"
    ):
        lock_folder(out, b"")
    with folders_in_use():
        lock_folder(out, read_lock(out))


def is_free(folder):
    """Whether another process gets the folder's lock."""
    program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    result = subprocess.run([sys.executable, "-c", program, folder / LOCK_FILE], capture_output=True, text=True)
    assert result.returncode == 0 or "BlockingIOError" in result.stderr
    return result.returncode == 0


def test_a_folder_is_locked_as_long_as_its_run_lives_and_forks_do_not_free_it(tmp_path):
    with folders_in_use():
        lock_folder(tmp_path, b"")
        lock_folder(tmp_path / ".", b"")  # the same run again
        owner = json.loads(read_lock(tmp_path))
        assert (owner["process"], owner["host"]) == (os.getpid(), os.uname().nodename)
        child = os.fork()
        if child == 0:  # as a DataLoader's worker
            os.closerange(3, 64)
            os._exit(0)
        os.waitpid(child, 0)
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch, folders_in_use():
        patch.setattr(locks.fcntl, "lockf", unsupported)
        lock_folder(tmp_path, b"")
        assert "is on a disk that does not support locks: another process could start a run there" in caplog.text
    monkeypatch.setattr(locks, "fcntl", None)
    assert read_lock(tmp_path) == b""
    lock_folder(tmp_path, b"")


def test_a_folder_with_nothing_but_a_lock_is_empty(corpus, tmp_path):
    """A run that was killed before it could record anything."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_FILE).write_text("")
    flags = {"max_steps": 1, "save_strategy": "no", "do_train": "true"}
    run_pretrain.run(pretraining(corpus, tmp_path / "out", **flags))
    assert (tmp_path / "out" / "all_results.json").is_file()
