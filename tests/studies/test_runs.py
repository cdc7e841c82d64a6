"""What is measured on a saved model, and a study that launches a script of the repository."""

import math

import numpy as np
import pytest
import torch

from studies.__main__ import main
from studies.records import read_lines
from studies.spectra import effective_rank, singular_values
from studies.study import Study
from tests.conftest import pretraining


def test_effective_rank_by_hand():
    values = torch.tensor([[2.0, 2.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 0.0]])
    last = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(values).tolist() == pytest.approx([2, 1, 1, last])


@pytest.mark.parametrize("middle", [(), (2, 3, 5)])
def test_singular_values_are_those_of_the_product(middle):
    shapes = [(2, 7, 3), *([middle] if middle else []), (2, 11, 5 if middle else 3)]
    factors = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    left, *between, right = [factor.double().numpy() for factor in factors]
    product = (left @ between[0] if between else left) @ right.transpose(0, 2, 1)
    expected = np.linalg.svd(product, compute_uv=False)[:, :3]
    np.testing.assert_allclose(singular_values(factors), expected, rtol=1e-10)


def test_a_study_of_a_real_script(corpus, tmp_path):
    words = pretraining(corpus, tmp_path, eval_strategy="steps", eval_steps=3, max_steps=6, max_eval_samples=5)
    base = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    base = {name: value for name, value in base.items() if name not in ("seed", "output_dir", "report_to")}
    arms = {"E16": {"weight": {"attention_embedding_size": 16, "decay_mode": "weight", "frobenius_decay": 0.3}}}
    study = Study("Does it run?", "run_pretrain.py", base, arms, reference="weight", effect=1.0, seeds=(3,))
    assert main(["real", "--workers", "1"], {"real": study}, tmp_path / "results", tmp_path / "work") == 0
    (line,) = read_lines(tmp_path / "results" / "real.jsonl")
    assert [step for step, _ in line["curves"]["eval_loss"]] == [3, 6]
    assert line["curves"]["eval_loss"][-1][1] == pytest.approx(line["metrics"]["eval_loss"], rel=1e-5)
    for kind in ("qk", "vo"):
        spectra, logged = line["spectra"][kind], line["norms"][kind]
        assert 1 < spectra["effective_rank"] <= 8  # two heads of rank 8
        assert spectra["frobenius"] == pytest.approx(logged["frobenius"], rel=1e-4)
        assert spectra["nuclear"] == pytest.approx(logged["nuclear"], rel=1e-4)
    assert list((tmp_path / "work" / "real").iterdir()) == []
