"""The card of a run, against its flags and its weights; and a README.md that somebody wrote meanwhile."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

import run_pretrain
from tests.conftest import pretraining, weights


def table_below(text, header):
    """The rows of a Markdown table, by their first cell."""
    lines = text[text.index(header) :].splitlines()
    rows = [re.findall(r"(?<=\| )(.*?)(?= \|)", line) for line in lines[: lines.index("")]]
    return {row[0]: row[1:] for row in rows if row}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the Hub's client
def test_the_card_of_a_run_says_what_its_flags_were(corpus, tmp_path):
    flags = {
        "max_steps": 3, "logging_steps": 3, "save_strategy": "no", "per_device_train_batch_size": 2, "bf16": "true",
        "gradient_accumulation_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": 1, "seed": 11,
        "learning_rate": 0.03, "weight_decay": 0.07, "frobenius_decay": 0.13, "decay_mode": "weight",
        "mlm_probability": 0.3, "hub_language": "la", "hub_license": "mit", "attention_embedding_size": 6,
    }  # fmt: skip
    out = tmp_path / "out"
    run_pretrain.run(pretraining(corpus, out, **flags))
    card = ModelCard.load(out / "README.md")
    assert (card.data.language, card.data.license, card.data.base_model) == ("la", "mit", None)
    facts = {name: cells[0] for name, cells in table_below(card.text, "| architecture |").items()}
    expected = {
        "data": "corpus.txt", "optimizer": "adamw, peak learning rate 0.03, weight decay 0.07",
        "decay of the products": "weight, λ = 0.13", "sequence length": "16", "masked": "30.0% of the tokens",
        "steps": "3", "batch": "10 a step: 1 process x 2 x 5 accumulated", "schedule": "cosine, 1 steps of warm-up",
        "seed": "11", "precision": "mixed, bfloat16", "trained on": "1 process, CPU",
    }  # fmt: skip
    assert facts.items() >= expected.items()
    assert re.fullmatch(r"\d+ s", facts["training time"]) and f"torch {torch.__version__}," in facts["versions"]
    results, scores = json.loads((out / "all_results.json").read_text()), table_below(card.text, "| metric |")
    assert scores["Held-out loss"] == [f"{results['eval_loss']:.4g}"]
    assert scores["Unigram entropy of the held-out text"] == [f"{results['unigram_entropy']:.4g}"]
    (picture,) = re.findall(r"!\[training report\]\((.*?)\)", card.text)
    assert (out / picture).is_file()

    found = table_below(card.text, "| product |")
    for name, (left, right) in (("QKᵀ", ("query", "key")), ("VOᵀ", ("value", "output.dense"))):
        layers, count, frobenius, nuclear, bound = found[name]
        u, v = (_heads(out, part) for part in (left, right))
        products = u @ v.mT
        assert (layers, count) == ("0", "1")
        assert frobenius == f"{products.norm().item():.3g}"
        assert nuclear == f"{torch.linalg.svdvals(products).sum().item():.3g}"
        assert bound == f"{(u.square().sum() + v.square().sum()).item() / 2:.3g}"


def _heads(folder, part):
    """A factor of the only layer by heads, (2, 32, 3), in float64."""
    matrix = next(value for name, value in weights(folder).items() if re.search(rf"attention.*\b{part}\.weight", name))
    matrix = matrix.double()
    if part == "output.dense":
        matrix = matrix.T
    return matrix.unflatten(0, (2, 3)).mT


@pytest.mark.parametrize("before", [None, "card"])
def test_a_readme_that_was_written_meanwhile_is_kept(before, corpus, tmp_path, monkeypatch, caplog):
    """Also in place of an earlier card of the run's."""
    out, flags = tmp_path / "out", {"max_steps": 1, "save_strategy": "no"}
    if before:
        run_pretrain.run(pretraining(corpus, out, **flags))
    train_and_save = run_pretrain.train_and_save

    def train_while_the_user_writes(*args):
        (out / "README.md").write_text("mine")
        return train_and_save(*args)

    monkeypatch.setattr(run_pretrain, "train_and_save", train_while_the_user_writes)
    run_pretrain.run(pretraining(corpus, out, overwrite_output_dir="true", **flags))
    assert (out / "README.md").read_text() == "mine" and "it is kept, and no card written" in caplog.text
    assert "README.md" not in json.loads((out / "_written.json").read_text())
