"""Phases and recipes: one config file is the same as a command line a phase; every recipe parses and builds."""

import json
import shutil
from unittest.mock import MagicMock

import pytest
import torch
import yaml

import run_pretrain
from fnl_hf import FnlBertForMaskedLM, UserInputError, frobenius_param_groups
from fnl_hf.runs.command_line import parse_arguments
from fnl_hf.runs.phases import phases_of
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.models import build_pretraining_config
from tests.bad_inputs import contents
from tests.conftest import ROOT, assert_same_weights, pretraining, weights

RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("squad"))
PHASES = [
    {"max_seq_length": 8, "max_steps": 7, "learning_rate": 1e-2},
    {"max_seq_length": 16, "max_steps": 5, "learning_rate": 2e-3, "warmup_steps": 2},
]


def as_mapping(command):
    return dict(zip([word.removeprefix("--") for word in command[::2]], command[1::2], strict=True))


def config_file(folder, corpus, phases=PHASES, **entries):
    flags = as_mapping([str(word) for word in pretraining(corpus, folder / "out", max_steps=None, **entries)])
    path = folder / "phases.yaml"
    path.write_text(yaml.safe_dump(flags | {"phases": phases}))
    return path


def optimizer_state(folder, step):
    return torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)


def test_command_lines_of_phases_by_hand(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "preset: tiny\nseed: 3\noutput_dir: out\nphases:\n- {max_steps: 7}\n- {max_steps: 5, optimizer_state: reset}\n"
        "- {seed: 4}\n"
    )
    flags = ["--preset", "mini", "--output_dir=a/b", "--bf16", "true"]
    first, second, third = phases_of([str(path), *flags])
    start = "--preset tiny --seed 3 --max_steps 7 --output_dir a/b/_phase-1 --preset mini --bf16 true "
    assert first == (start + "--push_to_hub false").split()
    start = "--seed 3 --max_steps 5 --output_dir a/b/_phase-2 --model_name_or_path a/b/_phase-1 --bf16 true "
    assert second == (start + "--push_to_hub false").split()
    start = "--seed 4 --output_dir a/b --model_name_or_path a/b/_phase-2 --optimizer_state_from a/b/_phase-2 "
    assert third == (start + "--bf16 true").split()
    assert phases_of([str(path), "--preset", "mini", "--output-dir", "a/b", "--bf16", "true"]) == [first, second, third]
    path.write_text("preset: tiny\n")
    for argv in ([str(path), "--seed", "1"], ["--seed", "1"], []):
        assert phases_of(argv) == [argv]


def test_phases_are_the_same_as_command_lines(corpus, tmp_path):
    """Carried and reset moments; each phase's own schedule; a second call that only does what is left to do."""
    path = config_file(tmp_path, corpus, save_steps=100)
    run_pretrain.run([str(path)])
    out = tmp_path / "out"
    base = {"save_steps": 100, "max_steps": None}
    run_pretrain.run([str(w) for w in pretraining(corpus, tmp_path / "first", **base | PHASES[0])])
    later = base | PHASES[1] | {"model_name_or_path": tmp_path / "first"}
    carried = later | {"optimizer_state_from": tmp_path / "first"}
    run_pretrain.run([str(w) for w in pretraining(corpus, tmp_path / "carried", **carried)])
    run_pretrain.run([str(w) for w in pretraining(corpus, tmp_path / "reset", **later)])
    assert_same_weights(out / "_phase-1", tmp_path / "first")
    assert_same_weights(out, tmp_path / "carried")
    key = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(weights(out)[key], weights(tmp_path / "reset")[key])

    steps = {name: next(iter(optimizer_state(tmp_path / name, 5)["state"].values())) for name in ("carried", "reset")}
    assert (steps["carried"]["step"], steps["reset"]["step"]) == (12, 5)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates[0] == pytest.approx(2e-3), "the schedule is the phase's own: at its third step, after warm-up"
    position = "bert.embeddings.position_embeddings.weight"
    before, after = weights(out / "_phase-1")[position], weights(out)[position]
    assert before.shape == after.shape == (512, 32)

    stamp = (out / "_phase-1" / "model.safetensors").stat().st_mtime_ns
    for path_ in out.iterdir():
        if path_.name != "_phase-1":
            shutil.rmtree(path_) if path_.is_dir() else path_.unlink()
    run_pretrain.run([str(path), "--resume_from_checkpoint", "auto"])
    assert_same_weights(out, tmp_path / "carried")
    assert (out / "_phase-1" / "model.safetensors").stat().st_mtime_ns == stamp, "what is finished is not done again"


def test_a_resumed_phase_keeps_its_own_optimizer_state(corpus, tmp_path):
    """It needs none of the phase before, whose checkpoints may be gone."""
    path = config_file(tmp_path, corpus, save_steps=3)
    run_pretrain.run([str(path)])
    out = tmp_path / "out"
    whole = weights(out)
    for checkpoint in (out / "checkpoint-5", *(out / "_phase-1").glob("checkpoint-*")):
        shutil.rmtree(checkpoint)
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    run_pretrain.run([str(path), "--resume_from_checkpoint", "auto"])
    assert all(torch.equal(whole[name], value) for name, value in weights(out).items())


def test_a_phase_belongs_to_the_one_before(corpus, tmp_path, monkeypatch):
    path, out = config_file(tmp_path, corpus), tmp_path / "out"
    run_pretrain.run([str(path)])
    finished = contents(out)
    first, aside = out / "_phase-1", tmp_path / "aside"
    go_on = [str(path), "--resume_from_checkpoint", "auto"]

    first.rename(aside)
    with pytest.raises(UserInputError, match="_phase-1 holds no finished run, but the phase after it has begun in .*"):
        run_pretrain.run(go_on)
    aside.rename(first)
    trained = (first / "model.safetensors").read_bytes()
    shutil.copy(first / "checkpoint-5" / "model.safetensors", first)
    with pytest.raises(UserInputError, match="out holds a run that was started from other weights: their checksum is"):
        run_pretrain.run(go_on)
    (first / "model.safetensors").write_bytes(trained)
    run_pretrain.run(go_on)
    assert contents(out) == finished, "the phases are finished"

    with monkeypatch.context() as patch:
        patch.setattr(run_pretrain, "train_and_save", MagicMock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_pretrain.run([str(path), "--overwrite_output_dir", "true", "--seed", "8"])
    assert not list(out.rglob("checkpoint-*")) and not list(out.rglob("all_results.json"))
    run_pretrain.run([*go_on, "--seed", "8"])
    assert (out / "model.safetensors").read_bytes() != finished["model.safetensors"]


# ---- recipes ----


def parse_recipe(path, *flags):
    """The arguments of each phase, on a machine without a GPU."""
    types = (run_pretrain.ModelArguments, run_pretrain.DataArguments, FnlTrainingArguments)
    return [parse_arguments(types, [*command, "--use_cpu", "true", *flags]) for command in phases_of([str(path)])]


class FakeTokenizer:
    pad_token_id = 0

    def __len__(self):
        return 30522


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_builds(path):
    first = parse_recipe(path)[0][0]
    for model_args, data_args, args in parse_recipe(path):
        names = ("preset", "attention_embedding_size", "config_overrides", "attention_init")
        for name in names:  # a later phase takes them from the model before it
            setattr(model_args, name, getattr(first, name))
        model_args.model_name_or_path = None
        config = build_pretraining_config(model_args, FakeTokenizer(), data_args.max_seq_length)
        with torch.device("meta"):
            model = FnlBertForMaskedLM(config)
        groups = frobenius_param_groups(model, args.weight_decay, args.frobenius_decay, args.decay_mode)
        assert len(groups) > 2
        if path.stem.startswith("bert"):
            assert config.vocab_size % 64 == 0 and args.max_steps * args.learning_rate > 1


def test_halving_e_removes_what_the_recipes_say():
    sizes = {}
    for name in ("bert_base", "bert_base_half", "bert_large", "bert_large_half"):
        model_args, data_args, _ = parse_recipe(ROOT / "configs" / f"{name}.yaml")[0]
        with torch.device("meta"):
            config = build_pretraining_config(model_args, FakeTokenizer(), data_args.max_seq_length)
            sizes[name] = FnlBertForMaskedLM(config).num_parameters() / 1e6
    assert sizes["bert_base"] - sizes["bert_base_half"] == pytest.approx(14.2, abs=0.05)
    assert sizes["bert_large"] - sizes["bert_large_half"] == pytest.approx(50.4, abs=0.05)


@pytest.mark.parametrize("processes, accumulation", [(1, [128, 256]), (8, [16, 32]), (64, [2, 4])])
def test_one_recipe_fits_any_number_of_processes(monkeypatch, processes, accumulation):
    monkeypatch.setattr(FnlTrainingArguments, "world_size", processes)
    parsed = parse_recipe(ROOT / "configs" / "bert_base.yaml")
    assert [args.gradient_accumulation_steps for _, _, args in parsed] == accumulation


def test_the_smoke_recipe_trains(tmp_path):
    run_pretrain.run([str(ROOT / "configs" / "smoke.yaml"), "--output_dir", str(tmp_path / "out"), "--report_to",
                      "none", "--use_cpu", "true", "--cache_dir", str(tmp_path)])  # fmt: skip
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_loss"] < 6.9 and json.loads((tmp_path / "out" / "_phase-1" / "all_results.json").read_text())
    model = FnlBertForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.attention_embedding_size == 64 and model.config.sparse_last_layer
