"""Segment pairs for next sentence prediction."""

import random

import numpy as np
import pytest
from datasets import Dataset

from fnl_hf import UserInputError
from fnl_hf.data import encoding, pairs
from fnl_hf.data.pairs import Document, make_pairs, pair_documents
from fnl_hf.data.tokenizer import train_tokenizer

LENGTH = 31


def numbered(document, sentences):
    """Words that say where they stand, so that a segment is found in one place only."""
    draw = random.Random(document)
    words = iter(range(10_000))
    return " ".join(
        " ".join(f"d{document}w{next(words)}" for _ in range(1 + draw.randrange(8))) + draw.choice([" .", "?", "\n"])
        for _ in range(sentences)
    )


TEXTS = [numbered(document, 40 + 7 * document) for document in range(11)]


@pytest.fixture(scope="module")
def tokenizer():
    """Every word is a token of its own."""
    words = {word: 1 for text in TEXTS for word in text.replace("?", " ").replace(".", " ").split()}
    blank = train_tokenizer(Dataset.from_dict({"text": ["abc . ? ! d w 0123456789"]}), 60, 64)
    vocabulary = blank.get_vocab() | {word: len(blank) + i for i, word in enumerate(words)}
    return type(blank)(vocab=vocabulary, model_max_length=64)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    documents = Dataset.from_dict({"text": TEXTS * 9})
    return pair_documents(documents, tokenizer, LENGTH, cache_dir=str(tmp_path_factory.mktemp("pairs")))


def segments(row):
    first, length = row["first_length"], row["length"]
    return row["input_ids"][1 : first - 1], row["input_ids"][first : length - 1]


def find(part, tokens):
    places = [i for i in range(len(tokens) - len(part) + 1) if tokens[i : i + len(part)] == part]
    return places[0] if places else None


def test_rows_are_pairs_padded(made, tokenizer):
    assert set(made.column_names) == {"input_ids", "first_length", "length", "next_sentence_label"}
    for row in made:
        ids, first, length = row["input_ids"], row["first_length"], row["length"]
        assert len(ids) == LENGTH and 5 <= length <= LENGTH and 3 <= first <= length - 2
        assert ids[0] == tokenizer.cls_token_id and ids[length:] == [tokenizer.pad_token_id] * (LENGTH - length)
        assert [i for i, token in enumerate(ids) if token == tokenizer.sep_token_id] == [first - 1, length - 1]


def test_next_is_next_random_is_not_and_each_is_half(made, tokenizer):
    documents = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    following = 0
    for row in made:
        first, second = segments(row)
        homes = [i for i, tokens in enumerate(documents) if find(first, tokens) is not None]
        if len(first) == 1 or len(second) == 1:
            continue  # a lone full stop is found anywhere
        place, tokens = find(first, documents[homes[0]]), documents[homes[0]]
        if row["next_sentence_label"] == pairs.NEXT:
            following += 1
            if row["length"] < LENGTH:  # not truncated
                assert tokens[place : place + len(first) + len(second)] == first + second
            else:
                assert find(second, tokens[place + len(first) :]) is not None
        else:
            assert tokens[place + len(first) : place + len(first) + len(second)] != second
            assert any(find(second, tokens) is not None for tokens in documents)
    assert following > 100
    assert np.mean(made["next_sentence_label"][:]) == pytest.approx(0.5, abs=0.04)


def test_one_pair_in_ten_is_short(tokenizer):
    """In a document that does not end: a short pair has from 2 to ``limit`` tokens, each as likely."""
    endless = Document(np.arange(400_000) % 997, list(range(1, 400_001)))
    lengths = [len(p.first) + len(p.second) for p in make_pairs([endless, endless], 0, 28, random.Random(0))]
    short = [length for length in lengths[:-1] if length < 28]
    assert len(short) / len(lengths) == pytest.approx(0.1 * 26 / 27, abs=0.01)
    assert set(short) == set(range(2, 28)) and np.mean(short) == pytest.approx(14.5, abs=0.5)


def test_every_token_stands_in_an_a_or_in_the_b_that_follows():
    """Unused segments are put back: without truncation, A and the B that follows are the document, end to end."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 4, 900)).tolist()
    documents = [Document(np.arange(ends[-1]) + 10_000 * i, ends) for i in range(3)]
    found = list(make_pairs(documents, 1, 50, random.Random(1)))
    told = [np.concatenate([p.first, p.second] if p.label == pairs.NEXT else [p.first]) for p in found]
    kept = np.concatenate(told)
    assert len(np.unique(kept)) == len(kept) and (np.diff(kept) > 0).all()
    assert len(kept) > 0.97 * ends[-1], "truncation drops a little"
    others = np.concatenate([p.second for p in found if p.label == pairs.RANDOM])
    assert {0, 2} == set((others // 10_000).tolist()), "random segments come from the other documents"


def short_documents():
    """Of 1 to 12 sentences of 3 to 25 tokens; tokens say where they stand: document x 1000 + position."""
    rng = np.random.default_rng(5)
    ends = [np.cumsum(rng.integers(3, 26, rng.integers(1, 13))).tolist() for _ in range(6000)]
    return [Document(1000 * i + np.arange(stops[-1]), stops) for i, stops in enumerate(ends)]


def best_threshold(values, labels):
    """The share of the labels that the best threshold on ``values`` tells, in either direction."""
    order = np.argsort(values, kind="stable")
    values, below = values[order], np.cumsum(labels[order])
    count = np.arange(1, len(labels) + 1)
    right = (below + (len(labels) - count) - (below[-1] - below)) / len(labels)  # 1 up to the threshold, 0 above
    right = right[np.append(values[1:] != values[:-1], True)]
    return max(right.max(), 1 - right.min())


@pytest.mark.parametrize("limit", [61, 509])
def test_a_pairs_form_does_not_tell_its_label(limit):
    """Where documents are shorter than pairs, and where they fill some: neither lengths nor where B begins and ends."""
    group = short_documents()
    found = [pair for i in range(len(group)) for pair in make_pairs(group, i, limit, random.Random(i))]
    labels = np.array([pair.label for pair in found])
    first, second = (
        np.array([len(segment) for segment in side]) for side in zip(*[(p.first, p.second) for p in found])
    )
    assert len(found) > 10_000 and labels.mean() == pytest.approx(0.5, abs=0.02)
    for lengths in (first, second, first + second):
        assert best_threshold(lengths, labels) < 0.53
    uncut = first + second < limit
    assert uncut[labels == 0].mean() == pytest.approx(uncut[labels == 1].mean(), abs=0.02)
    homes = [group[pair.second[0] // 1000] for pair in found]
    begins = np.array([p.second[0] % 1000 in {0, *home.sentence_stops} for p, home in zip(found, homes)])
    ends = np.array([p.second[-1] % 1000 + 1 in home.sentence_stops for p, home in zip(found, homes)])
    ends_document = np.array([p.second[-1] % 1000 + 1 == len(home.tokens) for p, home in zip(found, homes)])
    for marks in (begins, ends, ends_document):
        assert marks[labels == 0].mean() == pytest.approx(marks[labels == 1].mean(), abs=0.03)


@pytest.mark.parametrize("ends", [[1], [2], [9], [300], [3, 5], list(range(1, 200))])
def test_a_single_document_ends_and_never_repeats_itself(ends):
    found = list(make_pairs([Document(np.arange(ends[-1]), ends)], 0, 20, random.Random(2)))
    assert len(found) == 0 if ends == [1] else len(found) > 0
    for pair in found:
        adjacent = pair.second[0] == pair.first[-1] + 1
        assert pair.label == (pairs.NEXT if len(ends) < 9 else pair.label)
        if pair.label == pairs.RANDOM:
            assert not adjacent and not set(pair.first.tolist()) & set(pair.second.tolist())
    if len(ends) > 9:
        assert {pair.label for pair in found} == {pairs.NEXT, pairs.RANDOM}


def test_pairs_do_not_depend_on_the_number_of_processes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 3000)
    documents = Dataset.from_dict({"text": TEXTS})
    assert len(encoding.split_into_chunks(documents)) > 3
    made = [
        pair_documents(documents, tokenizer, LENGTH, processes, cache_dir=str(tmp_path / str(processes)))
        for processes in (1, 2)
    ]
    assert made[0][:] == made[1][:]


def test_documents_that_cannot_be_paired_are_refused(tokenizer, tmp_path):
    documents = Dataset.from_dict({"text": ["d1w1"]})
    with pytest.raises(UserInputError, match=r"1 documents\) is shorter than one sequence"):
        pair_documents(documents, tokenizer, LENGTH, cache_dir=str(tmp_path))
    with pytest.raises(UserInputError, match=r"--max_seq_length \(4\) must be at least 5"):
        pair_documents(documents, tokenizer, 4, cache_dir=str(tmp_path))
