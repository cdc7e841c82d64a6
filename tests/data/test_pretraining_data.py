"""Corpora, packing, masks and the held-out metrics."""

import gzip
import json
import lzma
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from fnl_hf import UserInputError
from fnl_hf.data import tokenizer as tokenizer_module
from fnl_hf.data.corpus import Documents, load_text_files, read_documents
from fnl_hf.data.rows import RowOptions, make_rows
from fnl_hf.data.source import Source, embedded_corpus
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.squad.features import FeatureMaker
from fnl_hf.training.metrics import pretraining_metrics, pretraining_statistics
from tests.conftest import TEXTS

# ---- corpora ----


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz", "c.json", "c.jsonl", "c.jsonl.xz", "c.csv", "c.parquet"])
def test_every_file_type_gives_the_same_documents(tmp_path, documents, name):
    path = tmp_path / name
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    if name == "c.txt":
        path.write_text("\n\n".join(TEXTS), encoding="utf-8")  # with blank lines, which are dropped
    elif name == "c.txt.gz":
        path.write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    elif name == "c.json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    elif name == "c.jsonl":
        path.write_text(lines, encoding="utf-8")
    elif name == "c.jsonl.xz":
        path.write_bytes(lzma.compress(lines.encode()))
    elif name == "c.csv":
        documents.to_csv(path)
    else:
        documents.to_parquet(path)
    assert load_text_files([str(path)], cache_dir=str(tmp_path))["text"][:] == TEXTS


def test_text_column_and_split(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"body": t, "text": 5}) + "\n" for t in TEXTS), encoding="utf-8")
    files, cache = {"train_file": [str(path)], "text_column": "body"}, {"cache_dir": str(tmp_path)}
    corpus = read_documents(Source(**files), 20, **cache)
    assert (len(corpus.train), len(corpus.held_out)) == (17, 4)
    assert sorted([*corpus.train["text"], *corpus.held_out["text"]]) == sorted(TEXTS)
    assert read_documents(Source(validation_file=[str(path)], **files), **cache).held_out["text"][:] == TEXTS


def test_hub_data_set_from_a_local_folder(tmp_path):
    """``--dataset_name`` takes what ``datasets.load_dataset`` takes, a folder on disk too."""
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n", encoding="utf-8")
    corpus = read_documents(Source(str(tmp_path / "data")), cache_dir=str(tmp_path / "cache"))
    assert (corpus.train["text"][:], corpus.held_out["text"][:]) == (["train"], ["validation"])
    with pytest.raises(UserInputError, match="--dataset_name no/such"):
        read_documents(Source("no/such"))


def test_embedded_corpus_is_prose_of_some_size():
    texts = embedded_corpus()["text"]
    assert len(texts) > 400 and sum(map(len, texts)) > 1_500_000
    assert any("An iterator is an object" in t or "generator" in t for t in texts)


BAD_FILES = {
    "missing.txt": (None, "no such file"),
    "empty.txt": (b"", "the file is empty"),
    "blank.txt": (b"\n  \n", "no text"),
    "bytes.jsonl": (b'{"text": "bad \xff"}\n', "no text, all records are broken: not UTF-8"),
    "torn.json": (b'[{"text": "a"}, {"te', "cannot be read as array: Unterminated string"),
    "column.jsonl": (b'{"title": "b"}\n', r"no column 'text', only \['title'\]: set --text_column_name"),
    "column.csv": (b"title\nb\n", r"no column 'text', only \['title'\]: set --text_column_name"),
    "numbers.jsonl": (b'{"text": 1}\n{"text": 2}\n', "no text, all records are broken: 'text' is int, not text"),
    "zip.txt.gz": (b"not gzip", "cannot be read as text"),
    "table.parquet": (b"not parquet", "cannot be read as parquet"),
    "corpus.pdf": (b"%PDF", "unknown file type"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserInputError, match=f"{name}: {message}"):
        load_text_files([str(tmp_path / name)], cache_dir=str(tmp_path / "cache"))


def test_bad_corpus_arguments_are_refused(tmp_path):
    (tmp_path / "one.txt").write_text("a single document\n")
    one = [str(tmp_path / "one.txt")]
    with pytest.raises(UserInputError, match="1 documents, too few to hold out"):
        read_documents(Source(train_file=one), cache_dir=str(tmp_path))
    with pytest.raises(UserInputError, match="not both"):
        Source(train_file=one, dataset_name="x")
    with pytest.raises(UserInputError, match="--validation_file .* needs --train_file"):
        Source(validation_file=one)
    with pytest.raises(UserInputError, match=r"--validation_split_percentage \(0.0\)"):
        read_documents(Source(train_file=one), 0.0, cache_dir=str(tmp_path))


# ---- tokenizers ----


def test_tokenizer_training_is_reproducible_in_other_processes(documents, tokenizer, tmp_path):
    """Two runs with one seed must see the same ids; the library's own trainer numbers pieces by a random hash."""
    documents.to_json(tmp_path / "corpus.jsonl")
    code = (
        "import sys, json, datasets; from fnl_hf.data.tokenizer import train_tokenizer; "
        "d = datasets.Dataset.from_json(sys.argv[1], cache_dir=sys.argv[2]); "
        "print(json.dumps(train_tokenizer(d, 120, 64).get_vocab()))"
    )
    for _ in range(2):
        command = [sys.executable, "-c", code, str(tmp_path / "corpus.jsonl"), str(tmp_path)]
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}
        )
        assert json.loads(result.stdout.splitlines()[-1]) == tokenizer.get_vocab()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.tokenize("the lazy dogx") == ["the", "lazy", "dog", "##x"]


def chinese(characters):
    """Sentences of words of three characters of so many, some far rarer than others, and a Latin word."""
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(20, characters + 20)
    drawn = rng.choice(characters, size=(4000, 30), p=frequencies / frequencies.sum())
    return Dataset.from_dict({"text": ["".join(chr(0x4E00 + c) for c in row) + " sat." for row in drawn.tolist()]})


def shares(tokenizer, texts):
    """Of unknown tokens and of all characters but white space that are tokens, counted by hand."""
    tokens = [token for text in texts for token in tokenizer.tokenize(text)]
    known, letters = set(tokenizer.get_vocab()), "".join(texts).replace(" ", "")
    return tokens.count("[UNK]") / len(tokens), sum(letter in known for letter in letters) / len(letters)


def test_the_alphabet_follows_the_text():
    """As sentencepiece does, not by a fixed number: a script of thousands of letters is known, too."""
    documents = chinese(3000)
    texts = documents["text"][:]
    for coverage in (0.9995, 0.98, 1.0):
        tokenizer = train_tokenizer(documents, 30522, 64, alphabet_coverage=coverage)
        unknown, covered = shares(tokenizer, texts)
        assert covered >= coverage and unknown == pytest.approx((1 - covered) * 34 / 32)  # letters by tokens in a line
        assert sum(piece.startswith("##") and not piece.isascii() for piece in tokenizer.get_vocab()) == 0
    assert len(tokenizer) > len(set("".join(texts)))
    letters = len(set("".join(texts)) - {" "})
    small = train_tokenizer(documents, 500, 64)
    assert (
        len(small) == 500
        and 400 < sum(len(piece) == 1 and not piece.isascii() for piece in small.get_vocab()) < letters
    )
    for coverage in (0.0, 1.01, float("nan")):
        with pytest.raises(UserInputError, match=r"--alphabet_coverage \(.*\) must be above 0 and at most 1"):
            train_tokenizer(documents, 500, 64, alphabet_coverage=coverage)


def test_a_tokenizer_that_does_not_fit_is_told(tmp_path, monkeypatch):
    """One that is too small for the corpus, and a named one of another language; each kind of data once."""
    messages = []
    monkeypatch.setattr(tokenizer_module.logger, "warning", messages.append)
    documents, cache = chinese(900), {"cache_dir": str(tmp_path)}
    halves = Documents(Source(), documents.select(range(0, 4000, 2)), documents.select(range(1, 4000, 2)))
    make_rows(halves, train_tokenizer(halves.train, 2000, 64), RowOptions(32), **cache)
    assert not messages
    small = train_tokenizer(halves.train, 600, 64)
    unknown = shares(small, halves.held_out["text"][:])[0]
    make_rows(halves, small, RowOptions(32), **cache)
    assert [said.split(":")[0] for said in messages] == ["training data", "held-out data"]
    told = float(re.search(r": (.*)% of [0-9,]+ tokens are \[UNK\]: the tokenizer \(trained on the", messages[1])[1])
    assert told == pytest.approx(100 * unknown, abs=0.1) and unknown > 0.02
    messages.clear()
    make_rows(halves, small, RowOptions(32, "mlm_nsp"), **cache)
    assert len(messages) == 2
    questions = {"id": ["a"], "question": ["\u4e00."], "context": ["\u5fff\u5ffe."], "answers": [None]}
    questions["answers"] = [{"text": [], "answer_start": []}]
    maker = FeatureMaker(small, 32, 8, **cache)
    messages.clear()
    maker.warn_of_unknown_tokens(maker.eval_dataset(Dataset.from_dict(questions)), "validation questions")
    assert messages[0].startswith("validation questions: 40.0% of 5 tokens are [UNK]")


# ---- held-out metrics ----


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_held_out_metrics_weigh_tokens_not_batches(sparse, pairs):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.full((3, 5), -100)
    labels[0, 1], labels[2, 0], labels[2, 3] = 4, 6, 0
    chosen = [(0, 1, 4), (2, 0, 6), (2, 3, 0)]
    losses = [-torch.log_softmax(logits[i, j].double(), 0)[t].item() for i, j, t in chosen]
    correct = sum(logits[i, j].argmax().item() == t for i, j, t in chosen)
    if sparse:  # at the positions 1, 0 and 3, of which some only fill a row
        positions = torch.tensor([[1, 0], [0, 0], [0, 3]])
        logits = logits[torch.arange(3)[:, None], positions]
        labels = torch.tensor([[4, -100], [-100, -100], [6, 0]])
    sentence_logits = torch.tensor([[2.0, 1.0], [0.0, 0.5], [1.0, -1.0]])
    given = ((logits, sentence_logits), (labels, torch.tensor([0, 1, 1]))) if pairs else (logits, labels)
    statistics = pretraining_statistics(*given)
    assert statistics[:, 0].tolist() == [1, 0, 2]
    assert statistics[:, 1].tolist() == pytest.approx([losses[0], 0, losses[1] + losses[2]], rel=1e-5)
    metrics = pretraining_metrics(SimpleNamespace(predictions=statistics.numpy()))
    mlm_loss = sum(losses) / 3
    assert metrics["perplexity"] == pytest.approx(math.exp(mlm_loss), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(correct / 3)
    if not pairs:
        assert metrics["loss"] == pytest.approx(mlm_loss, rel=1e-5) and "nsp_loss" not in metrics
        return
    nsp_loss = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.5)) + math.log1p(math.exp(2))) / 3
    assert metrics["nsp_loss"] == pytest.approx(nsp_loss, rel=1e-6)
    assert metrics["nsp_accuracy"] == pytest.approx(2 / 3) and metrics["mlm_loss"] == pytest.approx(mlm_loss, rel=1e-5)
    assert metrics["loss"] == pytest.approx(mlm_loss + nsp_loss, rel=1e-5)
