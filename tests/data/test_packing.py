"""Packing: every token once, whatever the text, the number of processes and the cache."""

import math
import multiprocessing
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as SequenceFeature
from hypothesis import given, settings
from hypothesis import strategies as st

from fnl_hf import UserInputError
from fnl_hf.data import arrow_cache, encoding
from fnl_hf.data.arrow_cache import cached_dataset
from fnl_hf.data.corpus import load_text_files
from fnl_hf.data.encoding import plain_backend, split_text
from fnl_hf.data.packing import pack_documents
from fnl_hf.data.rows import Column, data_fingerprint, unigram_entropy
from fnl_hf.data.tokenizer import train_tokenizer
from tests.conftest import TEXTS
from tests.small_tokenizers import KINDS


def stream(texts, tokenizer):
    """The tokens by the tokenizer's own method, a [SEP] after each document."""
    return [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.sep_token_id]]


@pytest.mark.parametrize("batch_bytes", [1, 50, 2**20])
def test_packing_keeps_every_token_in_order(documents, tokenizer, tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(encoding, "BATCH_BYTES", batch_bytes)
    packed = pack_documents(documents, tokenizer, 13, cache_dir=str(tmp_path))
    rows = np.array(packed["input_ids"][:])
    assert packed.column_names == ["input_ids"] and rows.shape[1] == 13
    assert (rows[:, 0] == tokenizer.cls_token_id).all() and (rows[:, -1] == tokenizer.sep_token_id).all()
    tokens = stream(TEXTS, tokenizer)
    assert rows[:, 1:-1].ravel().tolist() == tokens[: len(rows) * 11]
    assert len(tokens) - len(rows) * 11 < 11, "less than one sequence is dropped"
    assert tokenizer.unk_token_id not in tokens[:20]


def test_rows_do_not_depend_on_processes_and_follow_the_documents(documents, tokenizer, tmp_path, monkeypatch):
    """Chunk by chunk, also where the documents are a shuffled selection of a table of several pieces."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 200)
    order = np.random.default_rng(0).permutation(2 * len(TEXTS))[:-5]
    chosen = concatenate_datasets([documents, documents]).select(order)
    chunks = encoding.split_into_chunks(chosen)
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])] and chunks[-1][1] == len(order)
    texts = [(TEXTS * 2)[i] for i in order]
    for start, stop in chunks[:-1]:
        sizes = [len(text.encode()) for text in texts[:stop]]
        assert len(chunks) > 5 and sum(sizes) // 200 > sum(sizes[:-1]) // 200, "cut where 200 more bytes are full"
        assert start < stop
    expected = []
    for start, stop in chunks:
        tokens = stream(texts[start:stop], tokenizer)
        expected += [tokens[i : i + 5] for i in range(0, len(tokens) - 4, 5)]
    for num_proc in (1, 2):
        packed = pack_documents(chosen, tokenizer, 7, num_proc, cache_dir=str(tmp_path / str(num_proc)))
        assert [row[1:-1] for row in packed["input_ids"][:]] == expected


def test_the_cache_serves_the_same_input_and_nothing_else(documents, tokenizer, tmp_path, monkeypatch):
    cache = {"cache_dir": str(tmp_path)}
    first = pack_documents(documents, tokenizer, 13, **cache)
    other = train_tokenizer(documents, 90, model_max_length=64)
    changed = Dataset.from_dict({"text": ["!" + TEXTS[0], *TEXTS[1:]]})
    assert len(pack_documents(documents, tokenizer, 11, **cache)["input_ids"][0]) == 11
    fingerprints = {data_fingerprint(pack_documents(documents, other, 13, **cache)), data_fingerprint(first)}
    fingerprints |= {data_fingerprint(pack_documents(changed, tokenizer, 13, **cache))}
    assert len(fingerprints) == 3
    monkeypatch.setattr(arrow_cache.Tables, "_generate_tables", None)
    for num_proc in (None, 1, 2):
        again = pack_documents(Dataset.from_dict({"text": TEXTS}), pickle.loads(pickle.dumps(tokenizer)), 13, num_proc,
                               **cache)  # fmt: skip
        assert data_fingerprint(again) == data_fingerprint(first)


ROWS = [[2, 3], [5, 7], [11, 13], [17, 19], [23, 29]]


def _tables(pieces):
    for piece in pieces:
        yield pa.table({"input_ids": pa.array([piece], pa.list_(pa.int32(), 2))})


def _cached(cache, num_proc=None):
    features = Features({"input_ids": SequenceFeature(Value("int32"), length=2)})
    return cached_dataset("primes", _tables, ROWS, {}, features, "f", str(cache), num_proc, rows_per_batch=1)


def _without_last_batch(path):
    """The file as it was before its last record batch: a stream that can be read."""
    with pa.memory_map(str(path)) as source:
        batches = list(pa.ipc.open_stream(source))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches[:-1]:
            stream.write_batch(batch)


def _cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "cut": ("*.arrow", _cut),
    "cut between record batches": ("*.arrow", _without_last_batch),
    "emptied": ("*.arrow", lambda path: path.write_bytes(b"")),
    "without rows": ("*.arrow", Path.unlink),
    "without a record": ("dataset_info.json", Path.unlink),
    "a record emptied": ("dataset_info.json", lambda path: path.write_bytes(b"")),
    "a record of nothing": ("dataset_info.json", lambda path: path.write_text("{}")),
    "a record of something else": ("dataset_info.json", lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, name, num_proc):
    """As a full disk, a kill or a cleaner of scratch disks leaves it; in one file of several, too."""
    messages = []
    monkeypatch.setattr(arrow_cache.logger, "warning", messages.append)
    assert _cached(tmp_path, num_proc)["input_ids"][:] == ROWS
    pattern, damage = DAMAGES[name]
    damage(sorted(tmp_path.rglob(pattern))[-1])
    for _ in range(2):
        assert _cached(tmp_path)["input_ids"][:] == ROWS
    assert len(messages) == (0 if name == "without a record" else 1)
    assert all(f"The cache in {tmp_path / 'primes' / 'f'} is damaged and is built again" in said for said in messages)


def _fingerprint_of(file, tokenizer, cache, results):
    packed = pack_documents(load_text_files([file], cache_dir=cache), tokenizer, 13, cache_dir=cache)
    results.put(data_fingerprint(packed))


def test_two_runs_started_at_once_share_one_cache(documents, tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    fork = multiprocessing.get_context("fork")
    results, arguments = fork.Queue(), (str(tmp_path / "corpus.txt"), tokenizer, str(tmp_path / "cache"))
    runs = [fork.Process(target=_fingerprint_of, args=(*arguments, results)) for _ in range(3)]
    for run in runs:
        run.start()
    found = [results.get(timeout=60) for _ in runs]
    for run in runs:
        run.join()
    assert set(found) == {data_fingerprint(pack_documents(documents, tokenizer, 13, cache_dir=str(tmp_path / "own")))}
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 1


ANY_TEXT = st.lists(
    st.sampled_from([" ", "\n", "\t", "  ", "\r\n", "\u3000", "\x1f", "\u0301", "ß", "東", "wörd"])
    | st.text(st.characters(exclude_categories=["Cs"])),
    max_size=30,
).map("".join)
ANY_TOKENIZER = train_tokenizer(Dataset.from_dict({"text": ["wörd größe 東 京 ab ba xyz 012 é"]}), 60, 64)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, st.integers(4, 40))
def test_cuts_at_white_space_change_no_token(text, limit):
    backend = plain_backend(ANY_TOKENIZER)
    cut = list(split_text(memoryview(text.encode()), limit))
    parts = [part for part, _ in cut]
    assert "".join(parts) == text and all(len(part.encode()) <= limit for part in parts)
    assert [last for _, last in cut] == [False] * (len(cut) - 1) + [True]
    if all(part[0] in " \n\t\r" for part in parts[1:]):
        whole = backend.encode(text, add_special_tokens=False).ids
        assert [i for part in parts for i in backend.encode(part, add_special_tokens=False).ids] == whole
    else:
        assert max(len(word.encode()) for word in re.split("[ \n\t\r]", text)) >= limit


SPACED = "the quick\n\nbrown fox,  jumps\t\tover\r\n the   lazy \n dog.\n\n\n" * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_cuts_change_no_token_of_bytes_and_of_sentencepiece(kind, add_prefix_space):
    """Whose pieces may be several spaces long."""
    tokenizer = KINDS[kind]([SPACED] * 9, add_prefix_space=add_prefix_space)
    backend = plain_backend(tokenizer)
    if kind == "roberta":
        assert backend.token_to_id("ĊĊ") is not None
    whole = backend.encode(SPACED, add_special_tokens=False).ids
    for limit in range(23, 60):
        parts = [part for part, _ in split_text(memoryview(SPACED.encode()), limit)]
        assert len(parts) > 1 and "".join(parts) == SPACED
        assert [i for part in parts for i in backend.encode(part, add_special_tokens=False).ids] == whole


def test_long_documents_are_cut_and_lose_nothing(tokenizer, tmp_path):
    words = " ".join(TEXTS * 1000)
    documents = Dataset.from_dict({"text": [words, "short", "x" * 200_000 + " dog"]})
    assert len(words) > 5 * encoding.PART_BYTES
    packed = pack_documents(documents, tokenizer, 7, cache_dir=str(tmp_path))
    tokens = np.array(packed["input_ids"][:])[:, 1:-1].ravel().tolist()
    expected = stream([words, "short"], tokenizer)
    assert tokens[: len(expected)] == expected
    # The word of 200,000 letters is cut into four, each of them unknown.
    rest = [tokenizer.unk_token_id] * 4 + tokenizer.encode("dog", add_special_tokens=False)
    assert tokens[len(expected) :] == rest[: len(tokens) - len(expected)] and len(tokens) > len(expected)


def test_special_tokens_in_the_text_stay_text(tokenizer, tmp_path):
    documents = Dataset.from_dict({"text": ["the [SEP] dog [MASK] [CLS][PAD]"] * 5})
    rows = np.array(pack_documents(documents, tokenizer, 23, cache_dir=str(tmp_path))["input_ids"][:])
    special = np.isin(rows[:, 1:-1], [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id])
    expected = len(stream(["the [ sep ] dog [ mask ] [ cls ] [ pad ]"], tokenizer))
    assert special.sum() == rows[:, 1:-1].size // expected, "only the separators between documents"
    assert tokenizer.encode("[SEP]", add_special_tokens=False) == [tokenizer.sep_token_id], "the original is unchanged"


def test_bad_lengths_are_refused(documents, tokenizer, tmp_path):
    with pytest.raises(UserInputError, match="shorter than one sequence of --max_seq_length 5000"):
        pack_documents(documents, tokenizer, 5000, cache_dir=str(tmp_path))
    with pytest.raises(UserInputError, match=r"--max_seq_length \(2\) must be at least 3"):
        pack_documents(documents, tokenizer, 2, cache_dir=str(tmp_path))


def test_rows_are_the_columns_rows(documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 100)
    packed = pack_documents(documents, tokenizer, 7, cache_dir=str(tmp_path))
    expected = np.array(packed["input_ids"][:])
    assert packed.data.column("input_ids").num_chunks > 5
    chosen = np.array([3, 0, 11, 3, len(packed) - 1])
    order = np.random.default_rng(0).permutation(len(packed))
    for dataset, values in (
        (packed, expected),
        (packed.select(range(2, len(packed))), np.concatenate([expected[2:], expected[:2]])),
        (packed.select(order), expected[order]),
        (Dataset.from_dict({"input_ids": expected.tolist()}), expected),
    ):
        rows = Column(dataset)
        found = rows[chosen[: -1 if len(dataset) < len(packed) else None]]
        assert np.array_equal(found, values[chosen][: len(found)])
        assert np.array_equal(pickle.loads(pickle.dumps(rows))[chosen[:3]], values[chosen[:3]])
        assert np.array_equal(np.concatenate(list(rows.blocks(5))), values[: len(dataset)])
    assert Column(packed)[chosen].dtype == np.uint16 and len(Column(packed)) == len(packed)


def test_data_fingerprint_is_that_of_the_rows(documents, tokenizer, tmp_path):
    packed = pack_documents(documents, tokenizer, 7, cache_dir=str(tmp_path))
    order = np.arange(len(packed))
    same = data_fingerprint(packed.select(order[::-1]).select(order[::-1]))
    assert same == data_fingerprint(packed) == data_fingerprint(packed.flatten_indices())
    others = [packed.select(order[::-1]), packed.select(range(len(packed) - 1))]
    assert len({same, data_fingerprint(packed, packed), *map(data_fingerprint, others)}) == 4


def test_unigram_entropy_by_hand():
    rows = Dataset.from_dict({"input_ids": [[2, 5, 5, 7, 3], [2, 5, 9, 7, 3]]})  # 5: 3/6, 7: 2/6, 9: 1/6
    expected = -(1 / 2 * math.log(1 / 2) + 1 / 3 * math.log(1 / 3) + 1 / 6 * math.log(1 / 6))
    assert unigram_entropy(rows, special_ids=[0, 1, 2, 3, 4]) == pytest.approx(expected, rel=1e-12)
