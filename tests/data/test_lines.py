"""One sequence per document: the tokens of the tokenizer's own truncation, masks that do not see the padding."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import run_pretrain
from fnl_hf import UserInputError
from fnl_hf.data import encoding
from fnl_hf.data.masking import IGNORED, MaskedLMDataset, MaskingTransform, UnmaskedTransform
from fnl_hf.data.packing import separate_documents
from fnl_hf.runs.command_line import parse_arguments
from fnl_hf.training.pretraining_arguments import DataArguments
from tests.conftest import TEXTS, pretraining
from tests.small_tokenizers import KINDS

SHORT = ["fox", "the quick", "\x00", "dog " * 30]


@pytest.mark.parametrize("batch_bytes", [1, 50, 2**20])
def test_rows_are_those_of_the_tokenizer(tokenizer, tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(encoding, "BATCH_BYTES", batch_bytes)
    texts = [text for text in TEXTS + SHORT if text != "\x00"]  # of which no token is left
    documents = Dataset.from_dict({"text": TEXTS + SHORT})
    found = separate_documents(documents, tokenizer, 13, cache_dir=str(tmp_path))
    expected = tokenizer(texts, truncation=True, max_length=13, padding="max_length")
    assert found["input_ids"][:] == expected["input_ids"]
    assert found["length"][:] == [sum(mask) for mask in expected["attention_mask"]]
    assert min(found["length"]) < 5 and max(found["length"]) == 13


def test_a_batch_is_as_long_as_its_longest_text(tokenizer, tmp_path):
    found = separate_documents(Dataset.from_dict({"text": SHORT}), tokenizer, 23, cache_dir=str(tmp_path))
    transform = UnmaskedTransform(tokenizer)
    batch = MaskedLMDataset(found, transform).__getitems__([1, 0])
    expected = tokenizer([SHORT[1], SHORT[0]], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    for name, values in batch.items():
        assert torch.equal(values, expected[name])


def test_a_separator_in_the_text_does_not_end_it(tmp_path):
    """A Unigram vocabulary has its special tokens as pieces of text, too."""
    tokenizer = KINDS["xlm-roberta"](TEXTS)
    texts = ["fox </s> dog", "dog"]
    found = separate_documents(Dataset.from_dict({"text": texts}), tokenizer, 23, cache_dir=str(tmp_path))
    assert len(found) == 2


@pytest.mark.parametrize("sparse", [True, False])
def test_masks_are_those_of_the_text_alone(tokenizer, tmp_path, sparse):
    """Whatever else is in the batch; and padding is neither masked nor predicted."""
    found = separate_documents(Dataset.from_dict({"text": SHORT}), tokenizer, 23, cache_dir=str(tmp_path))
    data = MaskedLMDataset(found, MaskingTransform(tokenizer, 0.4, seed=5, sparse=sparse))
    together = data.__getitems__([0, 1, 2])
    for index in range(3):
        alone = data.__getitems__([index])
        size = found["length"][index]
        assert torch.equal(together["input_ids"][index, :size], alone["input_ids"][0])
        assert (together["input_ids"][index, size:] == tokenizer.pad_token_id).all()
        labels = [batch["labels"][row] for batch, row in ((together, index), (alone, 0))]
        assert labels[0][labels[0] != IGNORED].tolist() == labels[1][labels[1] != IGNORED].tolist() != []


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_tokenizers_are_framed_as_they_do_it_themselves(documents, kind, tmp_path):
    tokenizer = KINDS[kind](TEXTS)
    found = separate_documents(documents, tokenizer, 13, cache_dir=str(tmp_path))
    assert found["input_ids"][:] == tokenizer(TEXTS, truncation=True, max_length=13, padding="max_length")["input_ids"]
    tokenizer.padding_side = "left"
    with pytest.raises(UserInputError, match="pads on the left, but .*: set --line_by_line false$"):
        separate_documents(documents, tokenizer, 13, cache_dir=str(tmp_path))
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    with pytest.raises(UserInputError, match="has no pad_token$"):
        separate_documents(documents, tokenizer, 13, cache_dir=str(tmp_path))


@pytest.mark.parametrize("words, expected", [([], None), (["--line_by_line"], True), (["--line_by_line", "no"], False)])
def test_the_flag_needs_no_value(words, expected):
    assert parse_arguments((DataArguments,), words)[0].line_by_line is expected


def test_the_script_trains_on_single_texts(corpus, tmp_path):
    flags = {"max_steps": 3, "save_strategy": "no", "validation_file": corpus, "logging_steps": 1}
    for name in ("true", "false"):
        run_pretrain.run(pretraining(corpus, tmp_path / name, **flags, line_by_line=name))
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("true", "false")]
    texts = [text for text in corpus.read_text().splitlines() if text.strip()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "true")
    tokens = np.concatenate(tokenizer(texts, truncation=True, max_length=16, add_special_tokens=False)["input_ids"])
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / counts.sum()
    assert results[0]["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), abs=0.1)
    assert results[0]["eval_loss"] != results[1]["eval_loss"]
