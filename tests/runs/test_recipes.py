"""Config files, one after the other, and the recipes: every one parses and builds."""

import json

import pytest
import torch

import run_pretrain
from fnl_hf import FnlBertForMaskedLM, frobenius_param_groups
from fnl_hf.runs.command_line import parse_arguments
from fnl_hf.runs.config_files import with_config_files
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.models import build_pretraining_config
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
SECOND = {"phase_512": ("bert_base", "bert_base_half"), "phase_512_large": ("bert_large", "bert_large_half"),
          "phase_64_smoke": ("smoke",)}  # fmt: skip
FIRST = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith(("squad", "phase"))]
RECIPES = [(name,) for name in FIRST] + [(first, second) for second, firsts in SECOND.items() for first in firsts]


def test_config_files_by_hand(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.json"
    first.write_text("preset: tiny\nseed: 3\ntrain_file: [a.txt, b.txt]\nmax-steps: 7\n")
    second.write_text('{"max_steps": 5, "preset": null, "train-file": ["c.txt"], "bf16": true}')
    flags = ["--seed", "1", "--preset=mini"]
    alone = ["--preset", "tiny", "--seed", "3", "--train_file", "a.txt", "b.txt", "--max_steps", "7"]
    assert with_config_files([str(first), *flags]) == alone + flags
    both = ["--seed", "3", "--train_file", "c.txt", "--max_steps", "5", "--bf16", "true"]
    assert with_config_files([str(first), str(second), *flags]) == both + flags
    both = ["--max_steps", "7", "--preset", "tiny", "--train_file", "a.txt", "b.txt", "--bf16", "true", "--seed", "3"]
    assert with_config_files([str(second), str(first)]) == both
    for argv in (flags, []):
        assert with_config_files(argv) == argv
    # YAML 1.1 would read the first two as false, the third as 8 and the fourth as 3,723.
    first.write_text(
        "save_strategy: no\nhub_language: off\nseed: 010\nrun_name: 1:02:03\nmax_steps: 1_000\nbf16: True\n"
    )
    words = "--save_strategy no --hub_language off --seed 10 --run_name 1:02:03 --max_steps 1000 --bf16 true"
    assert with_config_files([str(first)]) == words.split()


def test_the_help_gives_the_defaults_that_are_values(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments((run_pretrain.ModelArguments, run_pretrain.DataArguments), ["--help"])
    lines = " ".join(capsys.readouterr().out.split())
    assert "trained on the corpus. (default: 30522)" in lines and "(default: None)" not in lines
    assert "The same as --sparse_prediction false." in lines


@pytest.mark.parametrize(
    "given, trains, evaluates",
    [
        ("", True, True),
        ("--do_train", True, False),
        ("--do_eval true", False, True),
        ("--do_train false", False, True),
        ("--do_eval false", True, False),
        ("--do_predict", False, False),
        ("--do_predict --do_eval false", False, False),
        ("--do_train --eval_strategy steps", True, True),
    ],
)
def test_what_is_not_switched_off_is_done_when_nothing_is_asked_for(tmp_path, given, trains, evaluates):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", *given.split()]
    (args,) = parse_arguments(FnlTrainingArguments, flags)
    assert (args.do_train, args.do_eval) == (trains, evaluates)


def parse_recipe(names, *flags):
    """The arguments of a recipe, on a machine without a GPU."""
    files = [str(CONFIGS / f"{name}.yaml") for name in names]
    types = (run_pretrain.ModelArguments, run_pretrain.DataArguments, FnlTrainingArguments)
    return parse_arguments(types, [*files, "--use_cpu", "true", *flags])


class FakeTokenizer:
    pad_token_id = 0

    def get_vocab(self):
        return {str(index): index for index in range(30522)}


def test_every_second_phase_is_tried():
    assert {path.stem for path in CONFIGS.glob("phase*.yaml")} == SECOND.keys()


@pytest.mark.parametrize("names", RECIPES, ids="+".join)
def test_every_recipe_parses_and_builds(tmp_path, names):
    config = build_pretraining_config(parse_recipe(names[:1])[0], FakeTokenizer(), 32)
    config.save_pretrained(tmp_path)
    from_first = ("--model_name_or_path", str(tmp_path)) if len(names) > 1 else ()
    model_args, data_args, args = parse_recipe(names, *from_first)
    built = build_pretraining_config(model_args, FakeTokenizer(), data_args.max_seq_length)
    assert built.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}
    with torch.device("meta"):
        model = FnlBertForMaskedLM(built)
    groups = frobenius_param_groups(model, args.weight_decay, args.frobenius_decay, args.decay_mode)
    assert len(groups) > 2
    if names[0].startswith("bert"):
        assert built.vocab_size % 64 == 0 and args.max_steps * args.learning_rate > 1


def test_halving_e_removes_what_the_recipes_say():
    sizes = {}
    for name in ("bert_base", "bert_base_half", "bert_large", "bert_large_half"):
        model_args, data_args, _ = parse_recipe([name])
        with torch.device("meta"):
            config = build_pretraining_config(model_args, FakeTokenizer(), data_args.max_seq_length)
            sizes[name] = FnlBertForMaskedLM(config).num_parameters() / 1e6
    assert sizes["bert_base"] - sizes["bert_base_half"] == pytest.approx(14.2, abs=0.05)
    assert sizes["bert_large"] - sizes["bert_large_half"] == pytest.approx(50.4, abs=0.05)


@pytest.mark.parametrize("processes, accumulation", [(1, [128, 256]), (8, [16, 32]), (64, [2, 4])])
def test_one_recipe_fits_any_number_of_processes(monkeypatch, processes, accumulation):
    monkeypatch.setattr(FnlTrainingArguments, "world_size", processes)
    parsed = [parse_recipe(["bert_base"]), parse_recipe(["bert_base", "phase_512"])]
    assert [args.gradient_accumulation_steps for _, _, args in parsed] == accumulation


def test_the_smoke_recipe_trains(tmp_path):
    flags = ["--report_to", "none", "--use_cpu", "true", "--cache_dir", str(tmp_path)]
    first, second = (str(CONFIGS / f"{name}.yaml") for name in ("smoke", "phase_64_smoke"))
    run_pretrain.run([first, *flags, "--output_dir", str(tmp_path / "first")])
    flags += ["--model_name_or_path", str(tmp_path / "first"), "--optimizer_state_from", str(tmp_path / "first")]
    run_pretrain.run([first, second, *flags, "--output_dir", str(tmp_path / "second")])
    results = json.loads((tmp_path / "second" / "all_results.json").read_text())
    assert results["eval_loss"] < 6.9 and json.loads((tmp_path / "first" / "all_results.json").read_text())
    model = FnlBertForMaskedLM.from_pretrained(tmp_path / "second")
    assert model.config.attention_embedding_size == 64 and model.config.sparse_last_layer
