"""SIGTERM: a checkpoint on all processes together, an exit status for schedulers, and the same model in the end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

import run_pretrain
from fnl_hf.errors import Preempted
from fnl_hf.runs.checkpoints import find_fault, newest_complete_checkpoint
from fnl_hf.runs.command_line import run_script
from fnl_hf.runs.preemption import PreemptionCallback, signals_handled_by
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.trainer import FnlTrainer
from tests.conftest import RESUMES_ON_CPUS, ROOT, assert_same_weights, launch, pretraining

# Seven steps an epoch; the default dropout is on.
FLAGS = {"max_train_samples": 61, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 4}


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a terminal; in a background job of a shell script, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **FLAGS | flags)])


def signalled(monkeypatch, method, step, number=signal.SIGTERM):
    """Signal this process when ``method`` of the trainer is called in the step with this number."""
    original = getattr(FnlTrainer, method)

    def patched(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FnlTrainer, method, patched)


STRATEGIES = {
    "steps": {},
    "epoch": dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "epoch"),
}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preemption")
    for name, flags in STRATEGIES.items():
        run(corpus, folder / name, **flags)
    return folder


@pytest.mark.parametrize(
    "strategy, method, step, stopped",
    [
        ("steps", "training_step", 5, 6),  # in the first epoch; a step that saves nothing by itself
        ("steps", "training_step", 7, 8),  # in the second epoch; a step that evaluates
        ("steps", "evaluation_loop", 8, 9),  # while evaluating
        ("steps", "_save_rng_state", 5, 6),  # while saving
        ("epoch", "training_step", 6, 7),  # at the end of the epoch, which logs, evaluates and saves
        ("epoch", "training_step", 8, 9),  # where nothing of that is due
    ],
)
def test_sigterm_saves_and_stops_and_the_run_goes_on(
    whole, corpus, tmp_path, monkeypatch, strategy, method, step, stopped
):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signalled(patch, method, step)
        with pytest.raises(Preempted, match="75") as stop:
            run(corpus, out, **STRATEGIES[strategy])
    assert f"stopped by SIGTERM after step {stopped} of 12, saved in {out / f'checkpoint-{stopped}'}: " in (
        stop.value.message
    )
    assert signal.getsignal(signal.SIGTERM) is before
    assert newest_complete_checkpoint(out) == out / f"checkpoint-{stopped}"
    assert not {"all_results.json", "model.safetensors", "trainer_state.json"} & set(os.listdir(out)), "not finished"
    run(corpus, out, resume_from_checkpoint="auto", **STRATEGIES[strategy])
    assert_same_weights(whole / strategy, out)
    first, second = (json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (whole / strategy, out))
    evaluated = [[(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e] for history in (first, second)]
    assert evaluated[0] == evaluated[1] != [], "no evaluation is lost or added"


@pytest.mark.parametrize(
    "flags, step",
    [
        ({"eval_strategy": "epoch", "save_steps": 7}, 7),  # the step saves, and its epoch's end evaluates
        ({"save_strategy": "best", "metric_for_best_model": "runtime"}, 8),  # evaluated, and not the best
        ({"save_strategy": "best", "metric_for_best_model": "runtime"}, 4),  # evaluated, and the best
    ],
)
def test_the_step_of_the_stop_is_saved_once(corpus, tmp_path, monkeypatch, flags, step):
    saved, original = [], FnlTrainer._finalize_checkpoint

    def finalize(self, *args):
        saved.append(self.state.global_step)
        original(self, *args)

    monkeypatch.setattr(FnlTrainer, "_finalize_checkpoint", finalize)
    monkeypatch.setattr(FnlTrainer, "_determine_best_metric", lambda self, metrics, trial: first_is_best(self))
    signalled(monkeypatch, "training_step", step - 1)
    with pytest.raises(Preempted):
        run(corpus, tmp_path / "out", **flags)
    assert saved.count(step) == 1 and newest_complete_checkpoint(tmp_path / "out").name == f"checkpoint-{step}"
    state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry][-1] == step


def test_a_second_signal_during_the_save_changes_nothing(whole, corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signalled(patch, "training_step", 5)
        signalled(patch, "_save_rng_state", 6)
        with pytest.raises(Preempted):
            run(corpus, tmp_path / "out")
    assert find_fault(tmp_path / "out" / "checkpoint-6") is None
    run(corpus, tmp_path / "out", resume_from_checkpoint="auto")
    assert_same_weights(whole / "steps", tmp_path / "out")


def test_ctrl_c_saves_too_and_a_second_one_stops_at_once(whole, corpus, tmp_path, monkeypatch, capfd):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        signalled(patch, "training_step", 6, signal.SIGINT)
        with pytest.raises(Preempted, match="130") as stop:
            run(corpus, out)
    assert stop.value.message.startswith(f"stopped by Ctrl-C after step 7 of 12, saved in {out / 'checkpoint-7'}: ")
    assert "Press Ctrl-C again to stop at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    with monkeypatch.context() as patch:
        signalled(patch, "training_step", 8, signal.SIGINT)
        signalled(patch, "_save_rng_state", 9, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, out, resume_from_checkpoint="auto")
    assert newest_complete_checkpoint(out) == out / "checkpoint-7"
    run(corpus, out, resume_from_checkpoint="auto")
    assert_same_weights(whole / "steps", out)


def test_ctrl_c_stays_ignored_where_it_was():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_handled_by(lambda *args: None):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_outside_of_training_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/some/run_pretrain.py"])
    monkeypatch.setattr("signal.signal", lambda *args: None)
    with pytest.raises(SystemExit) as end:
        run_script(lambda argv: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60))
    assert end.value.code == 130 and capsys.readouterr().err == "run_pretrain.py: stopped by Ctrl-C\n"


def test_a_signal_in_the_last_step_lets_the_run_finish(whole, corpus, tmp_path, monkeypatch):
    signalled(monkeypatch, "training_step", 11)
    run(corpus, tmp_path / "out")
    assert_same_weights(whole / "steps", tmp_path / "out")
    assert (tmp_path / "out" / "all_results.json").is_file()


def test_the_best_checkpoint_s_limit_of_one_does_not_take_the_newest(corpus, tmp_path, monkeypatch):
    flags = {"load_best_model_at_end": "true", "save_total_limit": 1, "save_steps": 4, "learning_rate": 1e-4,
             "metric_for_best_model": "runtime"}  # fmt: skip
    monkeypatch.setattr(FnlTrainer, "_determine_best_metric", lambda self, metrics, trial: first_is_best(self))
    signalled(monkeypatch, "training_step", 8)
    with pytest.raises(Preempted):
        run(corpus, tmp_path / "out", **flags)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-9"}


def first_is_best(trainer):
    is_first = trainer.state.best_global_step is None
    if is_first:
        trainer.state.best_global_step, trainer.state.best_metric = trainer.state.global_step, 0.0
    return is_first


def test_the_flag_leaves_the_signal_alone(corpus, tmp_path, monkeypatch):
    seen = []
    original = FnlTrainer.training_step
    monkeypatch.setattr(
        FnlTrainer,
        "training_step",
        lambda self, *args: seen.append(signal.getsignal(signal.SIGTERM)) or original(self, *args),
    )
    before = signal.getsignal(signal.SIGTERM)
    run(corpus, tmp_path / "out", enable_jit_checkpoint="false", max_steps=1)
    assert seen == [before]
    run(corpus, tmp_path / "on", max_steps=1)
    assert seen[1] != before


def test_a_trainer_can_be_made_and_run_in_another_thread(corpus, tmp_path):
    errors = []

    def train():
        try:
            run(corpus, tmp_path / "out", max_steps=1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert errors == [] and (tmp_path / "out" / "all_results.json").is_file()


def test_on_an_accelerator_processes_ask_each_other_every_ten_steps(monkeypatch):
    questions = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: questions.append(op) or tensor.fill_(1))
    args = SimpleNamespace(world_size=2, device=torch.device("meta"))
    callback, asked = PreemptionCallback(), []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1)
    for step in range(9, 22):
        asked.append(callback._was_any_requested(args, SimpleNamespace(global_step=step)))
    assert asked == [step in (10, 20) for step in range(9, 22)]
    assert questions == [torch.distributed.ReduceOp.MAX] * 2


def test_a_signal_outside_of_training_ends_the_script_at_once(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["/some/run_pretrain.py"])
    try:
        with pytest.raises(SystemExit) as end:
            run_script(lambda argv: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes it on once more
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 75
    assert capsys.readouterr().err == (
        "run_pretrain.py: stopped by SIGTERM: start the same command with --resume_from_checkpoint auto to continue\n"
    )


DYING = """
import os, signal
from torch.utils.data import DataLoader
from fnl_hf.runs.preemption import surviving_signals
if __name__ == "__main__":
    signal.alarm(100)  # a process that hangs goes, whoever waits for it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    loader = DataLoader(range(10), 2, num_workers=2, worker_init_fn=surviving_signals(), persistent_workers=True)
    for batch in loader:
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_workers_end_with_a_process_that_is_interrupted(tmp_path):
    """They ignore SIGTERM as long as they are needed: Python's exit, which sends it, would wait for them for ever."""
    (tmp_path / "dying.py").write_text(DYING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "dying.py")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == -signal.SIGINT and ended.stderr.count("Traceback") == 1, ended.stderr
    assert ended.stderr.strip().endswith("KeyboardInterrupt")


KILLING = """
import multiprocessing, sys
from torch.utils.data import DataLoader
from fnl_hf.runs import preemption
preemption.GRACE_SECONDS = 0.1
persistent = sys.argv[1] == "True"
loader = DataLoader(
    range(10), 2, num_workers=2, worker_init_fn=preemption.surviving_signals(), persistent_workers=persistent
)
batches = iter(loader)
assert [next(batches).tolist(), next(batches).tolist()] == [[0, 1], [2, 3]]  # one of each worker: both have begun
workers = [worker for worker in multiprocessing.active_children() if worker.daemon]
for worker in workers:
    worker.terminate()
assert [batch.tolist() for batch in batches] == [[4, 5], [6, 7], [8, 9]], "SIGTERM changes nothing"
for worker in [] if persistent else workers:
    worker.join()
batches = iter(loader)
next(batches), next(batches)  # one of each: they have begun
workers = multiprocessing.active_children()
preemption.end_workers()
for worker in workers:
    worker.join()
print(len(workers), {worker.exitcode for worker in workers}, multiprocessing.active_children())
"""


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_ignore_sigterm_are_killed(persistent):
    """In a process of its own: torch's handler of SIGCHLD takes a killed worker for an error of the process."""
    command = [sys.executable, "-c", KILLING, str(persistent)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    killed = -signal.SIGKILL.value
    assert ended.stdout.split("\n")[0] == f"2 {{{killed}}} []", ended.stderr


BROKEN = """
import os, runpy, signal, sys
from fnl_hf.training.trainer import FnlTrainer
signal.alarm(200)
original = getattr(FnlTrainer, sys.argv[1])
def broken(self, *args, **kwargs):
    if self.state.global_step == 2 and os.environ["RANK"] == "1":
        raise ZeroDivisionError
    return original(self, *args, **kwargs)
setattr(FnlTrainer, sys.argv[1], broken)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_unforeseen_error_of_one_process_ends_all(corpus, tmp_path):
    """In an evaluation while training, whose workers persist: there are some of both."""
    (tmp_path / "broken.py").write_text(BROKEN)
    flags = {"dataloader_num_workers": 2, "per_device_train_batch_size": 4, "max_steps": 3, "eval_strategy": "steps",
             "eval_steps": 2, "dataloader_persistent_workers": "true"}  # fmt: skip
    words = ["prediction_step", ROOT / "run_pretrain.py", *pretraining(corpus, tmp_path / "out", **FLAGS | flags)]
    ended = launch(tmp_path / "broken.py", *words, processes=2, check=False, timeout=240)
    assert ended.returncode == 1 and "ZeroDivisionError" in ended.stderr
    left = [child.info for child in psutil.process_iter(["cmdline"]) if str(tmp_path) in (child.info["cmdline"] or [])]
    assert left == []


STOPPED = """
from fnl_hf.errors import Preempted
from fnl_hf.runs.command_line import run_script
def run(argv):
    raise Preempted("stopped by SIGTERM")
run_script(run)
"""


def test_accelerate_launch_can_be_told_to_leave_its_traceback_out(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    ended = launch(tmp_path / "stopped.py", check=False, options=["--quiet"])
    assert (ended.returncode, ended.stderr) == (1, "stopped.py: stopped by SIGTERM\n")


def wait_for_checkpoint(process, folder, step):
    deadline = time.monotonic() + 120
    while not (folder / f"checkpoint-{step}").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


LONG = {"max_steps": 150, "save_steps": 20, "eval_strategy": "no", "logging_steps": 50, "save_total_limit": 3}


def start(command, corpus, folder, **flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = pretraining(corpus, folder, resume_from_checkpoint="auto", **FLAGS | LONG | flags)
    return subprocess.Popen(
        [sys.executable, *command, str(ROOT / "run_pretrain.py"), *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_a_launched_run_with_workers_ends_with_75(corpus, tmp_path):
    """The signal goes to all processes of the job, as SLURM sends it, the data's workers among them."""
    out, flags = tmp_path / "out", {"dataloader_num_workers": 2}
    run(corpus, tmp_path / "whole", **LONG)
    with start([], corpus, out, **flags) as process:
        wait_for_checkpoint(process, out, 20)
        os.killpg(process.pid, signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 75, error
    lines = [line for line in error.splitlines() if "run_pretrain.py: stopped by SIGTERM after step" in line]
    assert len(lines) == 1 and "Traceback" not in error
    run(corpus, out, resume_from_checkpoint="auto", **LONG | flags)
    assert_same_weights(tmp_path / "whole", out)


@RESUMES_ON_CPUS
def test_two_processes_stop_together_when_one_is_told(corpus, tmp_path):
    out, flags = tmp_path / "out", {"per_device_train_batch_size": 4}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with start(torchrun, corpus, out, **flags) as process:
        wait_for_checkpoint(process, out, 20)
        children = psutil.Process(process.pid).children(recursive=True)
        ranks = {child.environ().get("RANK"): child for child in children}
        ranks["1"].send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 1 and "exitcode  : 75" in error, error
    lines = [line for line in error.splitlines() if "run_pretrain.py: stopped by SIGTERM after step" in line]
    assert len(lines) == 1, "only the main process speaks"
    assert re.search(
        r"^ +traceback : stopped by SIGTERM after step .*", error[error.index("Root Cause") :], re.MULTILINE
    )
    newest = newest_complete_checkpoint(out)
    assert str(newest) in lines[0] and {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(newest))
    for folder, resume in ((out, {"resume_from_checkpoint": "auto"}), (tmp_path / "whole", {})):
        launch("run_pretrain.py", *pretraining(corpus, folder, **FLAGS | LONG | flags | resume), processes=2)
    assert_same_weights(tmp_path / "whole", out)


def test_trainer_s_own_handler_is_never_installed(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    args = FnlTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = FnlTrainer(torch.nn.Linear(2, 3), args)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "JITCheckpointCallback" not in names and "PreemptionCallback" in names
    assert signal.getsignal(signal.SIGTERM) is before and args.enable_jit_checkpoint
