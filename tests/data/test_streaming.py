"""Streams: every token once an epoch, the same order for any number of readers, resume equal to never stopping."""

import dataclasses
import gzip
import itertools
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fnl_hf import UserInputError
from fnl_hf.data import corpus, streaming
from fnl_hf.data.corpus import DocumentStream, read_documents
from fnl_hf.data.masking import MaskedStream
from fnl_hf.data.readers import generate_records, split_files
from fnl_hf.data.source import Source
from fnl_hf.data.streaming import Cursor, StreamedRows, StreamOrder, StreamState, merge_states
from fnl_hf.data.tokenizer import train_tokenizer

LENGTH, SIZE, BUFFER, SHARDS = 7, 2, 6, 4
TEXTS = [" ".join(f"w{i} x{j}" for j in range(1 + 7 * i % 23)) for i in range(29)]
KINDS = ("pieces", "files", "compressed", "parquet", "json")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": TEXTS}), 90, model_max_length=64)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """The documents by each way of reading: pieces that are a multiple of the shards, fewer files, Arrow-based ones."""
    folder = tmp_path_factory.mktemp("streams")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    lines[3:3] = ["\n", '{"text": " "}\n', "torn\n"]
    files = [folder / f"{i}.jsonl" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text("".join(lines[i * 11 : i * 11 + 11]))
        (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        part = Dataset.from_dict({"text": TEXTS[i * 10 : i * 10 + 10]})
        part.to_parquet(folder / f"{i}.parquet", batch_size=4)
        part.to_json(folder / f"clean{i}.jsonl")

    def generated(names, **kwargs):
        pieces = split_files([str(folder / name) for name in names], **kwargs)
        return IterableDataset.from_generator(generate_records, gen_kwargs={"pieces": pieces})

    def loaded(builder, pattern):
        files = [str(folder / pattern.format(i)) for i in range(3)]
        return load_dataset(builder, data_files=files, streaming=True, split="train")

    pieces = generated(["0.jsonl", "1.jsonl", "2.jsonl"], piece_bytes=len("".join(lines)) // 11)
    assert pieces.num_shards == 12 and pieces.num_shards % SHARDS == 0
    return {
        "pieces": pieces,
        "files": generated(["0.jsonl", "1.jsonl", "2.jsonl"]),
        "compressed": generated(["0.jsonl.gz", "1.jsonl.gz", "2.jsonl.gz"]),
        "parquet": loaded("parquet", "{}.parquet"),
        "json": loaded("json", "clean{}.jsonl"),
    }


def stream_rows(
    records, tokenizer, shards, buffer_size=BUFFER, seed=5, rank=0, world_size=1, state=None, size=SIZE, **kwargs
):
    order = StreamOrder(size, buffer_size, seed, rank, world_size, state)
    return StreamedRows(DocumentStream(records, shards, **kwargs), tokenizer, LENGTH, order)


@pytest.fixture
def make(streams, tokenizer):
    def make(kind="pieces", rank=0, world_size=1, shards=SHARDS, state=None, **kwargs):
        return stream_rows(streams[kind], tokenizer, shards, BUFFER - 1, 5, rank, world_size, state, **kwargs)

    return make


def as_worker(iterator, index, workers):
    """What a dataset gives in a DataLoader's worker, here."""
    module = torch.utils.data._utils.worker
    while True:
        module._worker_info = SimpleNamespace(id=index, num_workers=workers)
        try:
            batch = next(iterator)
        finally:
            module._worker_info = None
        yield batch


def run(make, count, world_size=1, workers=0, state=None, **kwargs):
    """The first micro-batches of all processes in order, and each process's state after them."""
    text = None if state is None else state.to_json()
    datasets = [
        make(rank=rank, world_size=world_size, state=text and StreamState.from_json(text), **kwargs)
        for rank in range(world_size)
    ]
    readers = [[as_worker(iter(d), i, workers) for i in range(workers)] or [iter(d)] for d in datasets]
    batches = []
    for n in range(count // world_size):
        for dataset, reader in zip(datasets, readers):
            batch = next(reader[n % len(reader)])
            batches.append((batch["input_ids"].tolist(), batch["sample_ids"].tolist()))
            dataset.state.advance(batch["cursor"], world_size)
    return batches, [dataset.state for dataset in datasets]


def expected_rows(streams, tokenizer, kind, shard, epochs=4, shards=SHARDS, skip=0):
    """A shard's rows in the order of its documents, by ``datasets`` and the tokenizer's own method."""
    part = corpus.split_dataset_by_node(streams[kind], rank=shard, world_size=shards)
    texts = [record["text"] for record in part if (record["text"] or "").strip()][skip:]
    assert len(texts) > 2
    epoch = [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.sep_token_id]]
    tokens = epoch * epochs
    return [
        [tokenizer.cls_token_id, *tokens[i : i + LENGTH - 2], tokenizer.sep_token_id]
        for i in range(0, len(tokens) - LENGTH + 3, LENGTH - 2)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_comes_once_an_epoch_in_shuffled_buffers(streams, tokenizer, make, kind):
    rows = [expected_rows(streams, tokenizer, kind, shard) for shard in range(SHARDS)]
    buffers = min(map(len, rows)) // BUFFER
    count = buffers * BUFFER // SIZE * SHARDS
    batches, [state] = run(make, count, kind=kind)
    seen = {shard: [] for shard in range(SHARDS)}
    for number, (ids, numbers) in enumerate(batches):
        shard = number % SHARDS
        assert all(n % SHARDS == shard for n in numbers), "wholly from one shard, in turn"
        assert ids == [rows[shard][n // SHARDS] for n in numbers]
        seen[shard] += [n // SHARDS for n in numbers]
    for places in seen.values():
        for start in range(0, len(places), BUFFER):
            assert sorted(places[start : start + BUFFER]) == list(range(start, start + BUFFER))
        assert places != sorted(places), "shuffled"
    assert max(cursor.epoch for cursor in state.cursors.values()) >= 2
    texts = {text for shard in range(SHARDS) for text in streaming_texts(streams[kind], shard)}
    assert texts == set(TEXTS)


def streaming_texts(stream, shard):
    part = corpus.split_dataset_by_node(stream, rank=shard, world_size=SHARDS)
    return [record["text"] for record in part if (record["text"] or "").strip()]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_every_position_is_never_stopping(make, kind):
    """Through JSON, over the ends of buffers and epochs, for each of ``datasets``' ways to keep its place."""
    whole, _ = run(make, 60, kind=kind)
    for position in range(1, 52):
        _, [state] = run(make, position, kind=kind)
        following, _ = run(make, 8, state=state, kind=kind)
        assert following == whole[position : position + 8]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 12),
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([0, 1, 2])),
    st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1])),
)
def test_order_depends_on_neither_processes_nor_workers_also_after_a_resume(make, position, before, after):
    whole, _ = run(make, 40)
    first, states = run(make, 2 * position, *before)
    assert first == whole[: 2 * position]
    states = [StreamState.from_json(state.to_json()) for state in states]
    following, _ = run(make, 16, *after, state=merge_states(states))
    assert following == whole[2 * position : 2 * position + 16]


def test_real_workers_give_the_same(make):
    whole, _ = run(make, 12)
    loader = torch.utils.data.DataLoader(make(), batch_size=None, num_workers=2)
    found = [(b["input_ids"].tolist(), b["sample_ids"].tolist()) for b in itertools.islice(loader, 12)]
    assert found == whole


def test_seed_and_transform(make, streams, tokenizer):
    def transform(ids, numbers):
        return {"input_ids": -ids.astype(int), "numbers": numbers}

    plain, given = next(iter(make())), next(iter(MaskedStream(make(), transform)))
    assert plain.keys() == {"input_ids", "sample_ids", "cursor"} and given.keys() == {"input_ids", "numbers", "cursor"}
    assert np.array_equal(given["input_ids"], -plain["input_ids"].astype(int))
    assert np.array_equal(given["numbers"], plain["sample_ids"])
    other = stream_rows(streams["pieces"], tokenizer, SHARDS, seed=6)
    orders = [[b["sample_ids"].tolist() for b in itertools.islice(d, 12)] for d in (make(), other)]
    assert orders[0] != orders[1] and sorted(sum(orders[0], [])) == sorted(sum(orders[1], []))


def test_resume_tokenizes_one_buffer_again_and_no_more(make, tokenizer, monkeypatch):
    _, [state] = run(make, 55, shards=1)
    assert state.cursors[0].buffer > 15 and state.cursors[0].row > 0
    encoded, encode = [], streaming.encode_documents
    monkeypatch.setattr(streaming, "encode_documents", lambda *args: encoded.append(args[1]) or encode(*args))
    run(make, 1, state=state, shards=1)
    shortest = min(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in TEXTS)
    assert 1 <= len(encoded) <= BUFFER * (LENGTH - 2) // shortest + 2, "one at each end may reach beyond the buffer"


def test_long_documents_span_buffers(tokenizer):
    """A document of many buffers: each resume skips into it."""
    texts = [" ".join(TEXTS) * 3, "short"]
    stream = Dataset.from_dict({"text": texts}).to_iterable_dataset()

    def make(rank, world_size, state):
        return stream_rows(stream, tokenizer, 1, BUFFER, 5, rank, world_size, state)

    whole, _ = run(make, 100)
    for position in (1, 50, 77):
        _, [state] = run(make, position)
        assert state.cursors[0].skip > 0 or state.cursors[0].buffer == 0
        assert run(make, 9, state=state)[0] == whole[position : position + 9]


def test_held_out_documents_never_come(streams, tokenizer, make):
    held = DocumentStream(streams["files"], SHARDS, hold_out=2).read_held_out()
    assert len(held) == 2 * SHARDS and set(held) < set(TEXTS)
    rows = [expected_rows(streams, tokenizer, "files", shard, skip=2) for shard in range(SHARDS)]
    batches, [state] = run(make, 40, kind="files", hold_out=2)
    for ids, numbers in batches:
        assert ids == [rows[n % SHARDS][n // SHARDS] for n in numbers]
    assert run(make, 8, kind="files", hold_out=2, state=state)[0] == run(make, 48, kind="files", hold_out=2)[0][40:]


def test_corpora_as_streams(tmp_path, tokenizer):
    """Files with a column of their own, and what ``--dataset_name`` names; both travel to spawned workers."""
    Dataset.from_dict({"body": TEXTS}).to_json(tmp_path / "train.jsonl")
    lines = [str(tmp_path / "train.jsonl")]
    names = {"validation_file": lines, "text_column": "body", "shards": 1}
    files = read_documents(Source(train_file=lines, **names)).train
    hub = read_documents(Source(str(tmp_path), **names)).train
    assert (files.text_column, hub.text_column) == ("text", "body")
    batches = []
    for stream in (files, hub):
        stream = dataclasses.replace(stream, shards=SHARDS)
        dataset = StreamedRows(stream, tokenizer, LENGTH, StreamOrder(SIZE, BUFFER, 5))
        batches.append([b["input_ids"].tolist() for b in itertools.islice(pickle.loads(pickle.dumps(dataset)), 20)])
    assert batches[0] == batches[1]
    with pytest.raises(UserInputError, match=r"no column 'text', only \['body'\]: set --text_column_name"):
        read_documents(Source(str(tmp_path), shards=SHARDS))
    with pytest.raises(UserInputError, match="--dataset_name no/such: "):
        read_documents(Source("no/such", shards=SHARDS))
    with pytest.raises(UserInputError, match="--streaming needs one of --dataset_name and --train_file"):
        Source(shards=SHARDS)


def test_shards_share_any_larger_number_of_parts(tmp_path, tokenizer):
    """Seven files among three shards: each file is read once an epoch, and the order can be resumed anywhere."""
    for index in range(7):
        Dataset.from_dict({"text": TEXTS[4 * index : 4 * index + 4]}).to_parquet(tmp_path / f"{index}.parquet")
    files = [str(tmp_path / f"{index}.parquet") for index in range(7)]
    read: list[str] = []

    def noted(parts):
        for part in parts:
            read.append(part)
            yield from ({"text": text, "fault": None} for text in Dataset.from_parquet(part)["text"])

    records = IterableDataset.from_generator(noted, gen_kwargs={"parts": files})
    stream = DocumentStream(records, 3)
    documents = [list(itertools.islice(stream.read_shard(shard), count)) for shard, count in enumerate((12, 8, 8))]
    assert sorted(read) == files
    assert sorted(text for shard in documents for text, _, _ in shard) == sorted(TEXTS[:28])
    for shard, found in enumerate(documents):
        _, place, epoch = found[5]
        again = itertools.islice(stream.read_shard(shard, place, epoch), len(found) - 5)
        assert [text for text, _, _ in again] == [text for text, _, _ in found[5:]]


def test_a_column_of_a_data_set_is_no_fault_of_its_records(tmp_path):
    Dataset.from_dict({"text": TEXTS, "fault": ["theirs"] * len(TEXTS)}).to_json(tmp_path / "train.jsonl")
    documents = read_documents(Source(str(tmp_path), shards=1), held_out_documents=2)
    assert documents.held_out["text"][:] == TEXTS[:2]
    read = itertools.islice(documents.train.read_shard(0), len(TEXTS) - 2)
    assert [text for text, _, _ in read] == TEXTS[2:]


# ---- states ----


def test_states_of_processes_merge_into_that_of_one(make):
    _, [alone] = run(make, 12)
    _, states = run(make, 12, world_size=2)
    assert set(states[0].cursors) == {0, 2} and merge_states(states) == merge_states(states[::-1]) == alone
    _, later = run(make, 4, world_size=2, state=merge_states(states))
    assert later[0].cursors[1] == states[1].cursors[1], "not its own: as it was"
    assert merge_states(later) == run(make, 16)[1][0]


def test_states_that_do_not_fit_are_refused(make, streams, tokenizer):
    _, states = run(make, 10, world_size=2)
    with pytest.raises(UserInputError, match="incomplete: shard 1 of 4 is at micro-batch 0 instead of 3"):
        merge_states(states[:1])
    other = StreamState.from_json(states[1].to_json())
    other.consumed = 8
    with pytest.raises(UserInputError, match="states of the stream differ in consumed: 10 and 8"):
        merge_states([states[0], other])
    with pytest.raises(UserInputError, match="cannot be resumed: shards was 4 and is now 2"):
        make(shards=2, state=merge_states(states))
    with pytest.raises(UserInputError, match="cannot be resumed: batch_size was 2 and is now 3"):
        stream_rows(streams["pieces"], tokenizer, SHARDS, size=3, state=merge_states(states))
    with pytest.raises(UserInputError, match="cannot be resumed: buffer_size was 6 and is now 8"):
        stream_rows(streams["pieces"], tokenizer, SHARDS, 7, state=merge_states(states))
    assert Cursor(**json.loads(json.dumps(states[0].cursors[0].__dict__))) == states[0].cursors[0]


def test_bad_streams_are_refused(make, tokenizer, monkeypatch):
    with pytest.raises(UserInputError, match=r"--streaming_shards \(4\) must be a multiple of 3: 3 processes"):
        make(world_size=3)
    with pytest.raises(UserInputError, match=r"multiple of 8: 2 processes x --dataloader_num_workers \(4"):
        next(as_worker(iter(make(world_size=2)), 0, 4))
    stream = Dataset.from_dict({"text": ["one", "", "two"]}).to_iterable_dataset()
    with pytest.raises(UserInputError, match="shard 1 of 3 of the stream has 0 documents and 0 broken records, but 0"):
        next(iter(stream_rows(stream, tokenizer, 3, rank=1, world_size=3)))
    with pytest.raises(
        UserInputError, match="stream has 2 documents and 0 broken records, but 2 documents are to be held"
    ):
        next(iter(stream_rows(stream, tokenizer, 1, hold_out=2)))
    with pytest.raises(
        UserInputError, match="shard 0 of 4 of the stream: 1 broken records, the last: not JSON. Correct"
    ):
        run(make, 40, strict=True)
    messages = []
    monkeypatch.setattr(corpus.logger, "warning", messages.append)
    run(make, 200)
    assert [message for message in messages if "broken" in message] == [
        "shard 0 of 4 of the stream: 1 broken records, the last: not JSON; they are left out. Set --strict true to "
        "stop at broken records"
    ]
    assert messages.count("The stream starts again: epoch 1") == 1
