"""The studies of the repository: each arm is a command line that its script takes, and says nothing in vain."""

import sys

import pytest

from fnl_hf.runs.command_line import parse_arguments
from fnl_hf.training.unused_flags import given_flags, unused_flags
from studies.definitions import load_studies
from studies.runner import command_of
from studies.study import ROOT, runs_of
from tests.training.test_unused_flags import SCRIPTS

STUDIES = load_studies()
NAMES = {"run_pretrain.py": "pretrain", "run_squad.py": "squad", "examples/image_classification/train.py": "image"}


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_is_a_command_line_of_its_script(name, tmp_path, monkeypatch):
    study = STUDIES[name]
    for variable in study.places.values():
        monkeypatch.setenv(variable, "elsewhere")
    classes, seen = SCRIPTS[NAMES[study.script]], set()
    for run in runs_of(name, study, seeds=[1]):
        executable, script, *words = command_of(study, run, tmp_path / "run")
        assert (executable, script) == (sys.executable, str(ROOT / study.script))
        words += ["--use_cpu", "true"]  # recipes for GPUs want one
        unused = unused_flags(given_flags(words), *parse_arguments(classes, words))
        assert not unused, run.arm
        seen.add((run.arm.partition("/")[0], str(words)))
    assert len(seen) == len(study.names()), "two arms of a group are the same"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_whole(name):
    study = STUDIES[name]
    assert study.question.endswith("?") and study.effect > 0 and len(study.seeds) >= 3
    assert not {*study.seeds} & {*study.tuning_seeds}
    assert all(study.reference in arms for arms in study.arms.values())
    for comparison in study.comparisons:
        for group in comparison.groups or study.arms:
            sides = [study.names(f"{group}/{side}") for side in (comparison.arm, comparison.reference)]
            assert all(sides) and sides[0] != sides[1], comparison
            assert study.tuning_seeds or max(map(len, sides)) == 1, "the best of several needs seeds to choose on"


def test_narrow_models_cost_what_the_products_cost():
    """By the parameters of models on the meta device and the FLOPs of their matrix multiplications."""
    import torch

    from fnl_hf import FnlBertConfig, FnlBertForMaskedLM
    from fnl_hf.reports.flops import training_flops
    from studies.definitions.low_rank import NARROW

    def costs(size, ratio=1.0):
        config = FnlBertConfig(hidden_size=size, intermediate_size=4 * size, num_hidden_layers=2,
                               num_attention_heads=2, vocab_size=4096)  # fmt: skip
        with torch.device("meta"):
            parameters = FnlBertForMaskedLM(config).num_parameters()
        # Of 32 tokens 6 are predicted; the last layer has keys and values for all, the rest for these.
        flops = training_flops(config, 32, 6, 6)
        matrices = 6 * size**2 * (32 * 12 + 32 * 2 + 6 * 10)
        return parameters - (1 - ratio) * 24 * size**2, flops - (1 - ratio) * matrices

    for ratio, sizes in NARROW.items():
        parameters, flops = costs(128, ratio)
        assert costs(sizes["parameters"])[0] == pytest.approx(parameters, rel=0.02)
        assert costs(sizes["flops"])[1] == pytest.approx(flops, rel=0.02)


def test_costs_are_those_of_six_operations_a_parameter_and_token():
    """BERT-Base: 12 · 12 · 768² parameters of layers; of the head's, 15% of the tokens. Scores come on top."""
    from studies.costs import cost_rows

    name, flops, *hours = next(iter(cost_rows(STUDIES["paper_scale"].costs)))
    tokens = 7038 * 65536 * 128 + 1563 * 32768 * 512
    least = 6 * tokens * (12 * 12 * 768**2 + 0.15 * 768 * (768 + 30528))
    assert name == "BERT-Base" and 0.9 * least < float(flops) < 1.1 * least
    expected = [float(flops) / (0.4 * 989e12 * count * 3600) for count in (1, 8, 64)]
    assert [float(value) for value in hours] == pytest.approx(expected, rel=0.03)
