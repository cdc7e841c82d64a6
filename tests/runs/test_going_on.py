"""A run that goes on is the one that was left, wherever its folder lies by now and however its flags spell a path."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerState

import run_pretrain
from fnl_hf import UserInputError
from fnl_hf.publishing.cards import describe_source
from fnl_hf.runs.checkpoints import drop_checkpoints
from fnl_hf.runs.command_line import parse_arguments
from fnl_hf.runs.ownership import others_files, output_of
from fnl_hf.runs.plan import is_finished, plan_run
from fnl_hf.runs.seeds import commands_of_seeds
from fnl_hf.training import resuming
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.pretraining_trainer import PretrainingTrainer
from fnl_hf.training.resuming import complete_metrics, find_best_checkpoint
from tests.conftest import assert_same_weights, pretraining

# The largest loss is the first evaluation's.
BEST = {
    "max_steps": 9, "save_steps": 3, "eval_steps": 3, "eval_strategy": "steps", "load_best_model_at_end": "true",
    "metric_for_best_model": "loss", "greater_is_better": "true", "save_total_limit": 1,
}  # fmt: skip


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **flags)])


@pytest.fixture(scope="module")
def best(corpus, tmp_path_factory):
    """A finished run whose best checkpoint is its first, and that run as it was after its second checkpoint."""
    folder = tmp_path_factory.mktemp("best")
    run(corpus, folder / "whole", **BEST, do_train="true")
    state = json.loads((folder / "whole" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 3
    assert [path.name for path in (folder / "whole").glob("checkpoint-*")] == ["checkpoint-3"]
    run(corpus, folder / "stopped", **BEST | {"save_total_limit": 3}, do_train="true")
    shutil.rmtree(folder / "stopped" / "checkpoint-9")
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (folder / "stopped" / name).unlink()
    return folder


def spelled_otherwise(out):
    return os.path.relpath(out)


def renamed(out):
    return out.rename(out.with_name("renamed"))


def copied(out):
    """What was recorded is there, too, and gets worse."""
    shutil.copytree(out, out.with_name("copy"))
    for weights in out.glob("checkpoint-*/model.safetensors"):
        weights.write_bytes(b"torn")
    return out.with_name("copy")


@pytest.mark.parametrize("moved", [spelled_otherwise, renamed, copied])
def test_the_best_model_is_found_where_the_run_now_lies(best, corpus, tmp_path, moved):
    out = tmp_path / "out"
    shutil.copytree(best / "stopped", out)
    for file in out.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(file.read_text())
        recorded = state["best_model_checkpoint"] and str(out / Path(state["best_model_checkpoint"]).name)
        file.write_text(json.dumps(state | {"best_model_checkpoint": recorded}))
        (file.parent / "checksums.json").unlink()
    out = moved(out)
    run(corpus, out, **BEST, do_train="true", resume_from_checkpoint="auto")
    assert_same_weights(best / "whole", out)


def test_a_best_checkpoint_that_is_gone_leaves_its_place_to_the_next(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resuming, "find_fault", lambda path: None if path.is_dir() else "it is gone")
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)

    def found(there, asked=True, step=5):
        args = SimpleNamespace(load_best_model_at_end=asked, metric_for_best_model="loss")
        state = TrainerState(best_global_step=step, best_metric=1.5, best_model_checkpoint=there)
        find_best_checkpoint(args, state, tmp_path / "run")
        return state.best_model_checkpoint, state.best_metric, state.best_global_step

    assert found("gone/checkpoint-2", step=2) == (str(tmp_path / "run" / "checkpoint-2"), 1.5, 2)
    assert found("gone/checkpoint-5", asked=False) == (None, 1.5, 5)
    elsewhere = tmp_path / "other" / "checkpoint-5"
    elsewhere.mkdir(parents=True)
    assert found(str(elsewhere)) == (str(elsewhere), 1.5, 5)
    assert not caplog.text
    assert found("gone/checkpoint-5") == (None, None, None)
    assert "checkpoint-5 had the best loss (1.5), but is missing or incomplete: the" in caplog.text


def test_only_a_run_s_own_checkpoints_are_dropped_and_never_the_best(tmp_path, monkeypatch):
    for step in (2, 3, 5, 7, 11):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / "checksums.json").write_text("{}")
    (tmp_path / "run" / "checkpoint-2" / "checksums.json").unlink()
    (tmp_path / "run" / "checkpoint-13").write_text("mine")
    (tmp_path / "run" / "checkpoint-7").rename(tmp_path / "seven")
    (tmp_path / "run" / "checkpoint-7").symlink_to(tmp_path / "seven")
    monkeypatch.chdir(tmp_path)

    def left(*arguments, **keywords):
        drop_checkpoints(tmp_path / "run", *arguments, **keywords)
        return {path.name.split("-")[1] for path in Path("run").iterdir()}

    assert left(4) == {"2", "3", "5", "7", "11", "13"}
    assert left(3, "run/checkpoint-3") == {"2", "3", "7", "11", "13"}
    assert left(1, "./run/../run/checkpoint-3") == {"2", "3", "11", "13"}
    assert (tmp_path / "seven" / "checksums.json").is_file(), "of a link, the link alone"
    assert left(1, "run/checkpoint-3", keep_newest=False) == {"2", "3", "13"}


def test_what_a_kill_leaves_of_a_dropped_checkpoint_is_no_checkpoint(tmp_path, monkeypatch):
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "checksums.json").write_text("{}")
    monkeypatch.setattr(shutil, "rmtree", lambda *args: None)
    drop_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint")] == ["checkpoint-3"]
    (tmp_path / "run_arguments.json").write_text("{}")
    assert others_files(tmp_path, output_of(FnlTrainingArguments(str(tmp_path), do_train=True, use_cpu=True))) == []


def test_an_export_of_the_model_that_a_run_replaces_is_kept_and_named(corpus, tmp_path, caplog):
    (tmp_path / "out" / "onnx").mkdir(parents=True)
    (tmp_path / "out" / "onnx" / "model.onnx").write_text("mine")
    run(corpus, tmp_path / "out", max_steps=2, save_strategy="no", overwrite_output_dir="true")
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "mine"
    assert f"{tmp_path / 'out' / 'onnx' / 'model.onnx'}: exported from an earlier model" in caplog.text


def test_a_limit_of_one_keeps_the_last_checkpoint_of_a_last_model(corpus, tmp_path):
    run(corpus, tmp_path / "out", **BEST | {"load_best_model_at_end": "false"}, do_train="true")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["global_step"]) == (3, 9)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-9"}


@pytest.fixture
def plan(tmp_path):
    """Plans a run in "out" that was started with some arguments."""

    def plan(there, here):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "run_arguments.json").write_text(json.dumps(there))
        args = FnlTrainingArguments(str(tmp_path / "out"), do_train=True, resume_from_checkpoint="auto", use_cpu=True)
        return plan_run(args, here)

    return plan


def test_other_names_of_the_same_file_make_no_other_run(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "data")
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("text")
    (tmp_path / "link.txt").symlink_to("home/data/a.txt")
    spellings = ["a.txt", "./a.txt", "../data/a.txt", str(Path.cwd() / "a.txt"), str(tmp_path / "link.txt")]
    for there in [*spellings, "~/data/a.txt"]:
        for here in spellings:
            assert plan({"train_file": [there, "b.txt"]}, {"train_file": [here, "./b.txt"]}).continued
            assert plan(
                {"train_file": there, "model_name_or_path": "."}, {"train_file": here, "model_name_or_path": "../data"}
            )
    # Moved together with the run, from another working folder: fingerprints and checksums decide.
    assert plan({"train_file": ["corpora/a.txt"]}, {"train_file": ["a.txt"]}).continued
    assert plan({"idx_dir": "/before/data"}, {"idx_dir": str(Path.cwd())}).continued
    assert plan({"model_name_or_path": "data/"}, {"model_name_or_path": str(Path.cwd())}).continued


@pytest.mark.parametrize("name, there, here", [
    ("train_file", ["a.txt"], ["b.txt"]),
    ("train_file", ["a.txt"], ["a.txt", "a.txt"]),
    ("train_file", ["a.txt"], None),
    ("train_file", "a.txt", "other/a.txt"),  # both are there
    ("model_name_or_path", "one/bert", "another/bert"),
    ("model_name_or_path", "ada/other", "eve/other"),  # on the Hub
    ("objective", "mlm", "./mlm"),
])  # fmt: skip
def test_other_files_make_another_run(plan, tmp_path, monkeypatch, name, there, here):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for file in ("a.txt", "b.txt", "other/a.txt"):
        Path(file).write_text("text")
    with pytest.raises(UserInputError, match=f"contains another run: {name} was "):
        plan({name: there}, {name: here})


@pytest.mark.parametrize("trained, asked, finished", [
    ({"epoch": 11 / 7, "max_steps": 11}, {"num_train_epochs": 1.5}, True),
    ({"epoch": 11 / 7, "max_steps": 11}, {"num_train_epochs": 2}, False),
    ({"epoch": 11 / 7, "max_steps": 11}, {"num_train_epochs": 1.2}, True),
    ({"epoch": 2.0, "max_steps": 14}, {"num_train_epochs": 2}, True),
    ({"epoch": 1 + 0.15 - 1e-12, "max_steps": 23}, {"num_train_epochs": 1.15}, True),
    ({"epoch": 11 / 7, "max_steps": 11}, {"max_steps": 11}, True),
    ({"epoch": 11 / 7, "max_steps": 11}, {"max_steps": 12}, False),
    ({"epoch": 0.5, "max_steps": 11, "global_step": 4}, {"num_train_epochs": 0.5}, False),
])  # fmt: skip
def test_a_run_is_finished_when_it_has_trained_what_is_asked_for(tmp_path, trained, asked, finished):
    """Trainer's own record of the epochs is rounded up."""
    state = {"global_step": trained["max_steps"], "num_train_epochs": 2, "train_batch_size": 5} | trained
    TrainerState(**state).save_to_json(str(tmp_path / "trainer_state.json"))
    (tmp_path / "all_results.json").write_text('{"eval_loss": 1.0}')
    assert is_finished(tmp_path, FnlTrainingArguments(str(tmp_path), use_cpu=True, **asked)) is finished


def test_a_run_of_part_of_an_epoch_goes_on_to_its_end(corpus, tmp_path):
    flags = {"max_steps": None, "max_train_samples": 29, "do_train": "true", "save_strategy": "epoch"}
    for epochs, steps in ((1.5, 5), (2, 6)):  # three a whole epoch
        run(corpus, tmp_path / "out", **flags, num_train_epochs=epochs, resume_from_checkpoint="auto")
        assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == steps


def test_metrics_of_a_run_that_was_stopped_are_of_all_of_it():
    """Two logs of 3 steps and of 2 before it goes on at 6, whose last step is in no log; then 4 steps."""
    history = [
        {"loss": 7.0, "step": 3},
        {"eval_loss": 1.0, "step": 4},
        {"loss": 5.0, "step": 5},
        {"loss": 9.0, "step": 8},
    ]
    metrics = {"train_loss": 2.0, "train_runtime": 1.5, "train_samples_per_second": 8.0, "total_flos": 3.0}
    complete_metrics(metrics, history, 6, 10)
    assert metrics == {
        "train_loss": (3 * 7.0 + 2 * 5.0 + 4 * 2.0) / 9, "train_runtime": 1.5, "train_samples_per_second": 8.0,
        "total_flos": 3.0,
    }  # fmt: skip
    nothing = {"train_loss": 0.0, "train_runtime": 1e-3, "train_samples_per_second": 0.0, "train_steps_per_second": 0.0}
    metrics = nothing | {"total_flos": 3.0}
    complete_metrics(metrics, history, 6, 6)
    assert metrics == {"train_loss": 31 / 5, "total_flos": 3.0}
    metrics = dict(nothing)
    complete_metrics(metrics, [], 6, 6)
    assert metrics == {}


def test_a_run_that_was_killed_before_its_results_has_those_of_its_training(corpus, tmp_path):
    flags = {"max_steps": 4, "save_steps": 2, "logging_steps": 2, "do_train": "true"}
    run(corpus, tmp_path / "out", **flags)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for name in ("all_results.json", "train_results.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    run(corpus, tmp_path / "out", **flags, resume_from_checkpoint="auto")
    again = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert again["train_loss"] == pytest.approx(results["train_loss"], rel=1e-6) and again["train_loss"] > 1
    assert not [name for name in again if name.endswith("_per_second")]


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_scores_are_those_of_the_model_beside_them(corpus, tmp_path, monkeypatch):
    """A run that is made longer and stopped in its last evaluation is not finished; nor is one that was only trained,
    if it is to be evaluated."""
    flags, out = {"save_steps": 2, "resume_from_checkpoint": "auto"}, tmp_path / "out"

    def scores():
        return json.loads((out / "all_results.json").read_text())

    run(corpus, out, **flags, max_steps=4)
    before = scores()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PretrainingTrainer, "evaluate", stop)
        run(corpus, out, **flags, max_steps=6)
    assert not (out / "all_results.json").exists()
    run(corpus, out, **flags, max_steps=6)
    assert scores()["eval_loss"] != before["eval_loss"]
    run(corpus, out, **flags, max_steps=8, do_train="true", do_eval="false")
    assert "train_loss" in scores() and "eval_loss" not in scores() and not (out / "eval_results.json").exists()
    run(corpus, out, **flags, max_steps=8, do_train="true", do_eval="true")
    assert scores()["eval_loss"] < before["eval_loss"]


@pytest.mark.parametrize("name, here, there", [
    ("metric_for_best_model", "accuracy", "loss"),  # the best accuracy would be compared with a loss
    ("dataloader_drop_last", "True", "False"),
])  # fmt: skip
def test_what_would_change_the_result_is_another_run(best, corpus, name, here, there):
    with pytest.raises(UserInputError, match=f"contains another run: .*{name} was {there} and is now {here}"):
        run(corpus, best / "stopped", **BEST | {name: here}, do_train="true", resume_from_checkpoint="auto")


def test_a_run_does_not_delete_what_it_starts_from(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out, max_steps=2, save_steps=1)
    for start in (out, out / "checkpoint-1"):
        with pytest.raises(UserInputError, match=f"^--model_name_or_path {start} is in the --output_dir, and --overw"):
            run(corpus, out, preset=None, config_overrides=None, model_name_or_path=start, overwrite_output_dir="true")
    assert (out / "checkpoint-1" / "model.safetensors").is_file()


LONG = ", ".join(f"part-of-a-corpus-{number:02}.jsonl" for number in range(12))


def test_many_files_have_no_name_together(corpus, tmp_path):
    """Their names are longer than that of a file may be."""
    files = [tmp_path / name for name in LONG.split(", ")]
    for file in files:
        shutil.copy(corpus, file.with_suffix(".txt"))
    words = [
        str(word) for word in pretraining(corpus, tmp_path / "out", max_steps=1, save_strategy="no", do_train="true")
    ]
    at = words.index("--train_file") + 1
    words[at : at + 1] = [str(file.with_suffix(".txt")) for file in files]
    run_pretrain.run(words)
    assert LONG.replace(".jsonl", ".txt") in (tmp_path / "out" / "README.md").read_text()


def test_a_source_with_too_long_a_name_is_on_no_disk(tmp_path):
    assert describe_source(LONG * 9)[0] == LONG * 9


def test_home_is_expanded_in_flags_and_config_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("train_file: [~/a.txt, b~.txt]\noutput_dir: ~/out\ncache_dir: '~'\n")
    arguments = (run_pretrain.ModelArguments, run_pretrain.DataArguments, FnlTrainingArguments)
    words = ["~/a.yaml", "--tokenizer_name=~/t", "--validation_file", "~/v.txt", "w.txt", "--use_cpu", "true"]
    model_args, data_args, args = parse_arguments(arguments, words)
    assert data_args.train_file == [f"{tmp_path}/a.txt", "b~.txt"] and data_args.cache_dir == str(tmp_path)
    assert data_args.validation_file == [f"{tmp_path}/v.txt", "w.txt"]
    assert (args.output_dir, model_args.tokenizer_name) == (f"{tmp_path}/out", f"{tmp_path}/t")


def test_a_summary_of_seeds_overwrites_none_but_its_own(tmp_path):
    args = SimpleNamespace(
        seeds=[3, 5], do_train=True, do_eval=True, push_to_hub=False, resume_from_checkpoint=None, output_dir=tmp_path
    )
    for mine in ("[3, 5]", '{"seeds": "mine"}', "{"):
        (tmp_path / "seeds.json").write_text(mine)
        with pytest.raises(UserInputError, match="seeds.json in it was not written by --seeds: move it away"):
            commands_of_seeds([], args)
    (tmp_path / "seeds.json").write_text('{"seeds": [3, 5], "scores": {}}')
    assert len(commands_of_seeds([], args)) == 2
