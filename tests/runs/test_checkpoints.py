"""Checkpoints are whole or not there, and only whole ones are resumed."""

import errno
import json
import shutil

import pytest

import run_pretrain
from fnl_hf import UserInputError
from fnl_hf.runs.checkpoints import (
    CHECKSUMS_FILE,
    STAGING_FOLDER,
    finalize_checkpoint,
    find_fault,
    newest_complete_checkpoint,
)
from fnl_hf.training.trainer import FnlTrainer
from tests.bad_inputs import edit
from tests.conftest import RESUMES_ON_CPUS, assert_same_weights, launch, pretraining


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **flags)])


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run of twelve steps with checkpoints 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    run(corpus, folder)
    return folder


def copy_before_its_end(whole, folder):
    shutil.copytree(whole, folder)
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-12")
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the run as it was before its end."""
    return copy_before_its_end(whole, tmp_path / "out")


def at_step_10(monkeypatch, error):
    """Let the checkpoint of step 10 fail when half of its files are written."""
    save = FnlTrainer._save_rng_state

    def failing(self, output_dir):
        if self.state.global_step == 10:
            raise error
        save(self, output_dir)

    monkeypatch.setattr(FnlTrainer, "_save_rng_state", failing)


def names(folder):
    return sorted(path.name for path in folder.glob("*") if "checkpoint" in path.name or path.name == STAGING_FOLDER)


def test_checkpoints_are_complete_and_nothing_is_left_beside_them(whole):
    assert names(whole) == ["checkpoint-10", "checkpoint-12", "checkpoint-5"]
    for checkpoint in whole.glob("checkpoint-*"):
        listed = json.loads((checkpoint / CHECKSUMS_FILE).read_text())
        files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
        assert listed.keys() == files - {CHECKSUMS_FILE} and "rng_state.pth" in listed
        assert find_fault(checkpoint) is None


def test_a_death_within_a_save_leaves_the_older_checkpoint(whole, corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step_10(patch, KeyboardInterrupt())  # passes every handler, as a kill does
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "out")
    assert names(tmp_path / "out") == [STAGING_FOLDER, "checkpoint-5"]
    run(corpus, tmp_path / "out", resume_from_checkpoint="auto")
    assert names(tmp_path / "out") == ["checkpoint-10", "checkpoint-12", "checkpoint-5"]
    assert_same_weights(whole, tmp_path / "out")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_a_full_disk_is_one_clear_error_and_loses_nothing(corpus, tmp_path, monkeypatch, error):
    at_step_10(monkeypatch, error)
    with pytest.raises(UserInputError, match="checkpoint-10 could not be written: the disk is full .* are intact"):
        run(corpus, tmp_path / "out")
    assert names(tmp_path / "out") == ["checkpoint-5"] and find_fault(tmp_path / "out" / "checkpoint-5") is None


def test_another_error_is_not_taken_for_a_full_disk(corpus, tmp_path, monkeypatch):
    at_step_10(monkeypatch, RuntimeError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        run(corpus, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_a_changed_file_is_noticed(copied, name):
    file = copied / "checkpoint-10" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert find_fault(copied / "checkpoint-10") == f"{name} was changed after it was written: its checksum differs"
    assert newest_complete_checkpoint(copied) == copied / "checkpoint-5"


def test_a_tampered_checkpoint_is_passed_over_and_written_anew(whole, copied, corpus):
    with (copied / "checkpoint-10" / "optimizer.pt").open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        UserInputError, match="not a complete checkpoint: optimizer.pt was changed after it was written"
    ):
        run(corpus, copied, resume_from_checkpoint=copied / "checkpoint-10")
    run(corpus, copied, resume_from_checkpoint="auto")
    assert_same_weights(whole, copied)
    assert find_fault(copied / "checkpoint-10") is None
    assert names(copied) == ["_abandoned-checkpoint-10", *names(whole)]


@RESUMES_ON_CPUS
def test_two_processes_write_one_checkpoint_and_resume_to_the_same_weights(corpus, tmp_path):
    """Each process has its own random state, and all of them are in the list of what belongs to the checkpoint."""
    flags = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    launch("run_pretrain.py", *pretraining(corpus, tmp_path / "whole", **flags), processes=2)
    assert names(tmp_path / "whole") == ["checkpoint-10", "checkpoint-12", "checkpoint-5"]
    listed = json.loads((tmp_path / "whole" / "checkpoint-10" / CHECKSUMS_FILE).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= listed.keys()
    out = copy_before_its_end(tmp_path / "whole", tmp_path / "out")
    (out / "checkpoint-10" / "rng_state_1.pth").write_bytes(b"torn")
    started = json.loads((out / "run_arguments.json").read_text())
    arguments = pretraining(corpus, out, resume_from_checkpoint="auto", **flags)
    resumed = launch("run_pretrain.py", *arguments, processes=2)
    assert "checkpoint-10: rng_state_1.pth was changed after it was written" in resumed.stderr
    assert json.loads((out / "run_arguments.json").read_text()) == started
    assert_same_weights(tmp_path / "whole", out)


def test_faults_are_named(copied, tmp_path):
    checkpoint = copied / "checkpoint-10"
    (checkpoint / CHECKSUMS_FILE).write_text("{")
    assert "checksums.json cannot be read" in find_fault(checkpoint)
    (checkpoint / CHECKSUMS_FILE).unlink()
    assert find_fault(checkpoint) is None, "as stock Trainer writes it"
    edit("checkpoint-10/provenance.json", starts=[{"world_size": 2}])(copied)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert find_fault(checkpoint) == "rng_state_1.pth is missing"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert find_fault(checkpoint) is None
    (checkpoint / "model.safetensors").write_bytes(b"torn")
    assert "model.safetensors cannot be read" in find_fault(checkpoint)
    (checkpoint / "trainer_state.json").write_text("{")
    assert find_fault(checkpoint) == "trainer_state.json cannot be read"
    (checkpoint / "optimizer.pt").unlink()
    assert find_fault(checkpoint) == "optimizer.pt is missing"


def test_what_has_the_name_is_set_aside(tmp_path):
    staged, checkpoint = tmp_path / "aside" / "checkpoint-3", tmp_path / "checkpoint-3"
    for folder, text in ((staged, "new"), (checkpoint, "old")):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text(text)
    finalize_checkpoint(staged, checkpoint)
    assert (checkpoint / "inner" / "file").read_text() == "new" and list((tmp_path / "aside").iterdir()) == []
    assert (tmp_path / "_abandoned-checkpoint-3" / "inner" / "file").read_text() == "old"


def test_limit_and_best_checkpoint(corpus, tmp_path):
    run(corpus, tmp_path / "out", save_steps=2, eval_steps=2, eval_strategy="steps", save_total_limit=2,
        load_best_model_at_end="true", metric_for_best_model="loss")  # fmt: skip
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    best = tmp_path / "out" / f"checkpoint-{state['best_global_step']}"
    assert state["best_model_checkpoint"] == str(best) and find_fault(best) is None
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("scheduler", ["linear", "reduce_lr_on_plateau"])  # the second asks for it before
def test_a_metric_that_no_evaluation_has_is_refused_with_those_that_it_has(corpus, tmp_path, scheduler):
    flags = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "f1", "lr_scheduler_type": scheduler}
    with pytest.raises(UserInputError, match=r"--metric_for_best_model \(f1\) must be one of loss, accuracy, perplex"):
        run(corpus, tmp_path / "out", **flags)
