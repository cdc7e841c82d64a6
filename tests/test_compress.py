"""``fnl-hf factorize`` and ``fnl-hf merge``: checkpoints of any architecture, with tokenizer and card."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoTokenizer, BertForMaskedLM

from fnl_hf import cli

from .conftest import ROOT, WITHOUT_FNL_HF
from .test_surgery import IDS, IMAGES, bert, factorized_names, vit


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path / "bert"


def test_there_and_back(checkpoint, tmp_path, capsys):
    small, dense = tmp_path / "small", tmp_path / "dense"
    options = ["--target_ratio", "0.5", "--include", "Linear", "query", "--exclude", "layer.1.*"]
    cli.main(["factorize", str(checkpoint), str(small), *options])
    printed = capsys.readouterr().out
    assert "layer.0.attention.self.query" in printed and "layer.1" not in printed
    model = BertForMaskedLM.from_pretrained(small).eval()
    assert len(factorized_names(model)) == 3 and f"{model.num_parameters():,} parameters, before" in printed
    card = (small / "README.md").read_text(encoding="utf-8")
    assert "import fnl_hf  # factorized layers\nfrom transformers import AutoModelForMaskedLM, AutoTokenizer\n" in card
    assert "license: mit" in card and "bibtex" in card
    assert "bert, with factorized layers" in card and "layer.0.attention.self.query" in card
    AutoTokenizer.from_pretrained(small)

    cli.main(["merge", str(small), str(dense)])
    assert "import fnl_hf" not in (dense / "README.md").read_text(encoding="utf-8")
    code = f"""{WITHOUT_FNL_HF}
import torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained({str(dense)!r}).eval()
torch.save(model(torch.load(sys.argv[1])).logits, sys.argv[2])
"""
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", code, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(IDS).logits, rtol=0, atol=1e-5)


def test_image_models(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    cli.main(["factorize", str(tmp_path / "vit"), str(tmp_path / "new"), "--energy", "0.5"])
    assert (tmp_path / "new" / "preprocessor_config.json").exists()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "new").eval()
    assert model(IMAGES).logits.shape == (3, 3) and len(factorized_names(model)) == 13
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "from transformers import AutoModelForImageClassification, AutoProcessor\n" in card
    assert "pipeline_tag: image-classification" in card and "attention" not in card.split("## Method")[1]


@pytest.mark.parametrize(
    "command, words, message",
    [
        ("factorize", ["--energy", "2"], "--energy (2.0) must be above 0 and at most 1"),
        ("factorize", ["--include", "layer.9.*"], "'layer.9.*' names no layer that can be factorized"),
        ("merge", [], "has no factorized layers"),
    ],
)
def test_bad_input_leaves_nothing(checkpoint, tmp_path, capsys, command, words, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(checkpoint), str(tmp_path / "new"), *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["factorize", str(checkpoint), str(checkpoint)])
    assert "is in use" in capsys.readouterr().err
