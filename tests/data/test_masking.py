"""Masks: a pure function of (seed, epoch, sample), one number a row, 80/10/10, whole words, documents."""

import re
from bisect import bisect_left
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from fnl_hf import UserInputError
from fnl_hf.data.masking import (
    IGNORED,
    MaskedLMDataset,
    MaskingTransform,
    choose_positions,
    draw_bits,
    masked_count,
)
from fnl_hf.data.packing import pack_documents
from fnl_hf.data.tokenizer import vocabulary_size
from fnl_hf.training.models import build_pretraining_config
from tests.small_tokenizers import KINDS

CLS, SEP, MASK, SPECIAL = 2, 3, 4, 5  # ids below SPECIAL are special; odd ones from 7 on go on with a word
VOCABULARY = 1000


class FakeTokenizer(SimpleNamespace):
    def __init__(self, pieces=True):
        super().__init__(
            mask_token_id=MASK, sep_token_id=SEP, all_special_ids=list(range(SPECIAL)), name_or_path="fake",
            backend_tokenizer=SimpleNamespace(normalizer=None, pre_tokenizer=None),
        )  # fmt: skip
        self.pieces = pieces

    def __len__(self):
        return VOCABULARY

    def get_vocab(self):
        return {str(i): i for i in range(VOCABULARY)}

    def convert_ids_to_tokens(self, ids):
        return [f"##{i}" if self.pieces and i > SPECIAL and i % 2 else str(i) for i in ids]


def rows(count, length, seed=0):
    ids = np.random.default_rng(seed).integers(SPECIAL, VOCABULARY, (count, length)).astype(np.uint16)
    ids[:, 0], ids[:, -1], ids[::2, length // 2] = CLS, SEP, SEP
    return ids


def transform(**kwargs):
    return MaskingTransform(FakeTokenizer(), **({"mlm_probability": 0.15, "seed": 3} | kwargs))


def dense(ids, inputs):
    """Labels (B, S), whichever way they are given."""
    labels = inputs["labels"].numpy()
    if "masked_positions" not in inputs:
        return labels
    full = np.full(ids.shape, IGNORED)
    positions = inputs["masked_positions"].numpy()
    for row in range(len(ids)):
        for position, label in zip(positions[row], labels[row], strict=True):
            if label != IGNORED:
                full[row, position] = label
    return full


def test_masks_are_a_pure_function_of_seed_epoch_and_sample():
    sequences = Dataset.from_dict({"input_ids": rows(11, 31)})

    def dataset(seed=3, **kwargs):
        return MaskedLMDataset(sequences, transform(seed=seed), **kwargs)

    first, second = dataset(), dataset()
    together, alone = first.__getitems__([4, 0, 2]), second.__getitems__([2])
    for name in ("input_ids", "labels", "masked_positions"):
        assert torch.equal(together[name][2:], alone[name])
    everything = list(range(len(first)))
    positions = first.__getitems__(everything)["masked_positions"]
    first.set_epoch(1)
    assert not torch.equal(first.__getitems__(everything)["masked_positions"], positions), "another epoch"
    assert not torch.equal(dataset(seed=4).__getitems__(everything)["masked_positions"], positions), "another seed"
    held_out = dataset(dynamic=False)
    held_out.set_epoch(1)
    assert torch.equal(held_out.__getitems__(everything)["masked_positions"], positions), "held-out masks stay"
    first.set_epoch(0)
    assert torch.equal(first.__getitems__(everything)["masked_positions"], positions)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("whole_word_mask", [True, False])
def test_masking_follows_80_10_10_and_spares_special_tokens(sparse, whole_word_mask):
    ids = rows(4000, 101)
    inputs = transform(mlm_probability=0.2, sparse=sparse, whole_word_mask=whole_word_mask)(ids, np.arange(4000))
    given_ids, labels = inputs["input_ids"].numpy(), dense(ids, inputs)
    chosen = labels != IGNORED
    assert not chosen[ids < SPECIAL].any()
    assert np.array_equal(labels[chosen], ids[chosen]) and np.array_equal(given_ids[~chosen], ids[~chosen])
    if not whole_word_mask:
        assert (chosen.sum(1) == np.rint(0.2 * (ids >= SPECIAL).sum(1))).all()
    else:  # what does not fit any more is left out
        assert 18 < chosen.sum(1).mean() < 19.6 and chosen.sum(1).max() <= 20
    masked, kept = (given_ids == MASK)[chosen].mean(), (given_ids == ids)[chosen].mean()
    assert masked == pytest.approx(0.8 + 0.1 / VOCABULARY, abs=0.005)
    assert kept == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.005)
    random = given_ids[chosen & (given_ids != ids) & (given_ids != MASK)]
    counts = np.bincount(random, minlength=VOCABULARY)
    assert counts.std() / counts.mean() < 0.5, "random tokens come from the whole vocabulary"
    frequency = chosen[1::2, 1:-1].mean(0)
    assert frequency.std() < 0.02, "no position is preferred"
    if not whole_word_mask:  # neighbors are independent, but for the fixed number a row: -1/(n - 1)
        correlation = np.corrcoef(chosen[1::2, 1:-2].ravel(), chosen[1::2, 2:-1].ravel())[0, 1]
        assert correlation == pytest.approx(-1 / 98, abs=0.01)
        assert np.corrcoef(chosen[:-2].ravel(), chosen[2:].ravel())[0, 1] == pytest.approx(0, abs=0.02)


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(3, 40),
    probability=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_whole_words_are_masked_whole(length, probability, seed, data):
    """Oracle: a row at a time, as the definition says it."""
    continues = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    maskable = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    starts, start = [], 0
    for position in range(length):
        start = start if continues[position] else position
        starts.append(start)
    words = draw_bits(seed, 0, np.array([7]), length)
    positions, meant = choose_positions(words, maskable[None], probability, np.array([starts]))
    assert positions.shape == (1, masked_count(length, probability))
    tokens = {s: [p for p in range(length) if starts[p] == s and maskable[p]] for s in set(starts)}
    in_order = sorted((s for s in tokens if tokens[s]), key=lambda s: int(words[0, s]) >> 16)
    budget = min(max(1, round(maskable.sum() * probability)), int(maskable.sum()))
    expected: list[int] = []
    for word in in_order:
        if len(expected) + len(tokens[word]) > budget:
            break
        expected += tokens[word]
    found = positions[0][meant[0]].tolist()
    if expected or not budget:
        assert found == sorted(expected)
    else:
        assert found == tokens[in_order[0]][:budget], "a first word that does not fit is masked in part"


def test_single_tokens_are_chosen_by_their_own_draw():
    words = draw_bits(1, 0, np.arange(5), 13)
    maskable = np.ones((5, 13), dtype=bool)
    maskable[:, [0, 12]] = maskable[2, 3:] = False
    positions, meant = choose_positions(words, maskable, 0.3)
    assert meant.sum(1).tolist() == [3, 3, 1, 3, 3]  # of 11 and of 2 tokens
    for row in range(5):
        smallest = sorted(np.flatnonzero(maskable[row]), key=lambda p: int(words[row, p]))[: meant[row].sum()]
        assert positions[row][meant[row]].tolist() == sorted(smallest)
        assert not positions[row][~meant[row]].any()


def test_sparse_and_dense_labels_say_the_same():
    ids, samples = rows(7, 23), np.arange(7)
    sparse, full = transform()(ids, samples, 2), transform(sparse=False)(ids, samples, 2)
    assert torch.equal(sparse["input_ids"], full["input_ids"])
    assert sparse["labels"].shape == (7, 3) and np.array_equal(dense(ids, sparse), full["labels"].numpy())


def test_documents_by_hand():
    ids = np.array([[CLS, 9, 9, SEP, 9, SEP, 9, SEP], [CLS, 9, 9, 9, 9, 9, 9, SEP]], dtype=np.uint16)
    masked = transform(documents="mask")(ids, np.arange(2))
    assert masked["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1], list(range(8))]
    blocks = [[row.index(d) for d in row] for row in masked["document_ids"].tolist()]
    assert blocks == [[0, 0, 0, 0, 4, 4, 6, 6], [0] * 8]
    varlen = transform(documents="varlen")(ids, np.arange(2))
    assert torch.equal(varlen["position_ids"], masked["position_ids"]) and "document_ids" not in varlen
    assert varlen["cu_seq_lens_q"].tolist() == varlen["cu_seq_lens_k"].tolist() == [0, 4, 6, 8, 16]
    assert varlen["cu_seq_lens_q"].dtype == torch.int32 and varlen["max_length_q"] == varlen["max_length_k"] == 8
    assert "position_ids" not in transform()(ids, np.arange(2))


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, float("nan")])
def test_bad_masking_rates_are_refused(probability):
    with pytest.raises(UserInputError, match=r"--mlm_probability"):
        transform(mlm_probability=probability)


def test_whole_words_need_pieces_that_show_them():
    message = "^--whole_word_mask needs .* that marks word pieces with '##', '▁' or 'Ġ': that of fake does not$"
    with pytest.raises(UserInputError, match=message):
        MaskingTransform(FakeTokenizer(pieces=False), 0.15, 0, whole_word_mask=True)


SPOKEN = ["the quick brown fox, jumps over ## the #lazy ##dog.", "größer:\n\n東京!  \tpack my box\nwith liquor"] * 9


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_bytes_and_of_sentencepiece_stand_between_white_space(kind):
    """Oracle: the text itself, by the characters that tokens come from. RoBERTa's own vocabulary, too, has "##"."""
    tokenizer = KINDS[kind](SPOKEN)
    tokenizer.add_tokens(["lazy"])
    documents = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in SPOKEN[:2]]
    ids, words = [tokenizer.cls_token_id], [-1]
    for number, (text, document) in enumerate(zip(SPOKEN, documents)):
        bounds = [found.end() for found in re.finditer(r"\S+", text)]
        for index, (start, end) in zip(document["input_ids"], document["offset_mapping"]):
            ids.append(index)
            words.append(100 * number + bisect_left(bounds, end) if text[start:end].strip() else None)
        ids.append(tokenizer.sep_token_id)
        words.append(-2)
    masking = MaskingTransform(tokenizer, 0.3, seed=0, whole_word_mask=True)
    rows = np.array([ids] * 200)
    chosen = dense(rows, masking(rows, np.arange(200))) != IGNORED
    pieces = tokenizer.convert_ids_to_tokens(ids)
    several = 0
    for word in {word for word in words if word is not None and word >= 0}:
        tokens = [i for i, other in enumerate(words) if other == word]
        if "lazy" in (pieces[i] for i in tokens):
            continue  # an added token is a word of its own
        several += len(tokens) > 1
        assert (chosen[:, tokens] == chosen[:, tokens[:1]]).all(), [pieces[i] for i in tokens]
    assert several > 4 and not chosen[:, [i for i, word in enumerate(words) if word in (-1, -2)]].any()
    assert pieces.count("lazy") == 1 and len({chosen[:, i].tobytes() for i in range(len(ids))}) > 18


def test_ids_with_holes_between_them(tmp_path):
    """A tokenizer may have more ids than tokens: the largest id bounds tables, and none is drawn from a hole."""
    words = {f"w{i}": 70_000 + 3 * i for i in range(5)} | {f"##p{i}": 70_001 + 3 * i for i in range(5)}
    specials = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    tokenizer = BertTokenizer(vocab=specials | words)
    assert len(tokenizer) == 15 and vocabulary_size(tokenizer) == 70_014
    document = " ".join(f"w{i}p{j}" for i in range(5) for j in range(5))
    packed = pack_documents(Dataset.from_dict({"text": [document] * 400}), tokenizer, 22, cache_dir=str(tmp_path))
    ids = np.array(packed["input_ids"][:])
    assert set(np.unique(ids).tolist()) == {2, 3, *words.values()}
    masking = MaskingTransform(tokenizer, 0.5, seed=1, whole_word_mask=True)
    corrupted = masking(ids, np.arange(len(ids)))["input_ids"].numpy()
    assert set(np.unique(corrupted).tolist()) == {*specials.values(), *words.values()}
    arguments = SimpleNamespace(
        **dict.fromkeys(("preset", "config_name", "model_name_or_path", "attention_embedding_size", "attention_init")),
        config_overrides=None, sparse_prediction=True, sparse_last_layer=True,
    )  # fmt: skip
    assert build_pretraining_config(arguments, tokenizer, 22).vocab_size == 70_014
    arguments.config_overrides = "vocab_size=70013"
    with pytest.raises(
        UserInputError, match=r"needs a vocabulary of 70014, more than the model's vocab_size \(70013\)"
    ):
        build_pretraining_config(arguments, tokenizer, 22)
