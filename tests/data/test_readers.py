"""Reading files: faults, pieces, torn files, and what the cache serves."""

import csv
import errno
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fnl_hf import UserInputError
from fnl_hf.data import corpus as corpus_module
from fnl_hf.data import readers, zstd
from fnl_hf.data.corpus import load_text_files, read_documents
from fnl_hf.data.readers import generate_records, read_records, split_files, split_for_shards
from fnl_hf.data.source import Source


def load(path, tmp_path, **kwargs):
    return load_text_files([str(path)], cache_dir=str(tmp_path / "cache"), **kwargs)["text"][:]


@pytest.fixture
def warnings_of(monkeypatch):
    messages = []
    monkeypatch.setattr(corpus_module.logger, "warning", messages.append)
    return messages


RECORDS = [
    (b'{"text": "good"}', "good", None),
    (b"", None, None),
    (b'{"text": " \\u2003 "}', None, None),
    (b'{"text": "torn', None, "not JSON"),
    (b'{"text": 5}', None, "'text' is int, not text"),
    (b'{"text": ["a"]}', None, "'text' is list, not text"),
    (b'{"title": "none"}', None, "no 'text'"),
    (b'{"text": null}', None, "no 'text'"),
    (b'["text"]', None, "not an object"),
    (b'{"text": "\xff"}', None, "not UTF-8"),
    (b'{"text": "\\ud800"}', None, "not Unicode"),
    (b"[" * 100_000, None, "not JSON"),
    (b'{"text": "' + b"9" * 200_000 + b'"}', "9" * 200_000, None),
    (b'{"text": "\\u6771\\n\\u4eac", "more": {}}\r', "東\n京", None),
]


def test_faults_of_json_lines(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _, _ in RECORDS))
    [piece] = split_files([str(path)])
    assert list(read_records(piece)) == [(text, fault) for _, text, fault in RECORDS]
    assert [r["fault"] for r in generate_records([piece])] == [f for _, t, f in RECORDS if t or f]


def test_faults_of_csv(tmp_path):
    path = tmp_path / "corpus.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text\n1,"two\nlines"\n2\n3,\n4,a,b\n5,\xff\n\n6,"x"y\n7,' + b"z" * 200_000 + b"\n"
    )
    [piece] = split_files([str(path)])
    assert list(read_records(piece)) == [
        ("two\nlines", None), (None, "no 'text'"), (None, None), (None, "more cells than columns"), (None, "not UTF-8"),
        (None, None), (None, "not CSV"), ("z" * 200_000, None),
    ]  # fmt: skip


def test_faults_of_parquet(tmp_path):
    path = tmp_path / "corpus.parquet"
    offsets, data = pa.py_buffer(pa.array([0, 1, 2, 2, 2], pa.int32()).buffers()[1]), pa.py_buffer(b"a\xff")
    broken = pa.Array.from_buffers(pa.string(), 4, [pa.py_buffer(bytes([0b0111])), offsets, data])
    pq.write_table(pa.table({"text": broken}), path, row_group_size=3)
    pieces = split_files([str(path)])
    assert [list(read_records(piece)) for piece in pieces] == [
        [("a", None), (None, "not UTF-8"), (None, None)],
        [(None, "no 'text'")],
    ]
    (tmp_path / "packed.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    [piece] = split_files([str(tmp_path / "packed.parquet.gz")])
    assert list(read_records(piece)) == [r for piece in pieces for r in read_records(piece)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["", "a", "bc", "größer", "\u2028x", "d\x0ce\x85f"]), min_size=1), st.integers(1, 9))
def test_pieces_of_any_size_hold_each_line_once(tmp_path, lines, piece_bytes):
    """Bytes decide where a piece ends, lines which piece has them; only a newline ends a line."""
    path = tmp_path / "corpus.txt"
    path.write_bytes("\n".join([*lines, "end"]).encode())
    pieces = split_files([str(path)], piece_bytes=piece_bytes)
    assert [text for piece in pieces for text, _ in read_records(piece)] == [line or None for line in lines] + ["end"]


def test_broken_records_are_counted_or_refused(tmp_path, warnings_of):
    """Also when the cache serves them, across pieces, and in the file where they are."""
    good, bad = tmp_path / "good.txt", tmp_path / "bad.jsonl"
    good.write_text("one\n\ntwo\n")
    lines = [json.dumps({"text": str(i)}) for i in range(30)]
    lines[7:9], lines[21] = ["{", "null"], '{"texts": "x"}'
    lines.insert(3, "")
    bad.write_text("\n".join(lines))
    for _ in range(2):
        texts = load_text_files([str(good), str(bad)], cache_dir=str(tmp_path / "cache"))["text"][:]
        assert texts == ["one", "two"] + [str(i) for i in range(30) if i not in (7, 8, 21)]
        assert warnings_of.pop() == (
            f"{bad}: 3 of 30 lines are broken and were left out: 1 not JSON (first: line 9), 1 not an object "
            "(first: line 10), 1 no 'text' (first: line 23). Set --strict true to stop at broken records"
        )
        assert not warnings_of
    with pytest.raises(
        UserInputError, match=f"{bad}: 3 of 30 lines are broken: 1 not JSON .*leave out --strict to skip them"
    ):
        load(bad, tmp_path, strict=True)
    assert load(good, tmp_path, strict=True) == ["one", "two"]


def test_broken_records_of_the_hub_are_counted_or_refused(tmp_path, warnings_of):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": ["a", None, " ", "b", None]}).to_parquet(tmp_path / "data" / "train.parquet")
    source, cache = Source(str(tmp_path / "data")), {"cache_dir": str(tmp_path / "cache")}
    corpus = read_documents(source, 50, **cache)
    assert sorted([*corpus.train["text"], *corpus.held_out["text"]]) == ["a", "b"]
    assert "split train: 2 of 5 records are broken and were left out: 2 no 'text' (first: record 2)" in warnings_of[0]
    with pytest.raises(UserInputError, match="split train: 2 of 5 records are broken: 2 no 'text'"):
        read_documents(source, strict=True, **cache)


def test_a_torn_compressed_file_is_refused_whole(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(10_000)))
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.txt").write_text("other\n")
    for num_proc in (1, 2):  # an error must find its way out of another process too
        with pytest.raises(UserInputError, match="corpus.jsonl.gz: cannot be read as json: Compressed file ended"):
            load_text_files([str(path), str(tmp_path / "other.txt")], cache_dir=str(tmp_path / "c"), num_proc=num_proc)
    path.write_bytes(whole)
    assert len(load(path, tmp_path)) == 10_000, "a failed reading leaves nothing behind"


ZSTD = ["zstandard", "backports.zstd", "compression.zstd"]  # any of which fsspec may have found


@pytest.fixture(params=ZSTD)
def compress(request, monkeypatch):
    """Reading by one package of those that decompress zstd, and what compresses with it."""
    package = pytest.importorskip(request.param)
    if request.param == "zstandard":
        monkeypatch.setitem(readers.compr, "zstd", None)  # ours is used
        return package.compress
    monkeypatch.setattr(zstd, "zstandard", None)
    monkeypatch.setitem(readers.compr, "zstd", package.ZstdFile)
    return package.compress


def test_zstd_files_are_read_to_the_end_or_refused(tmp_path, compress, monkeypatch):
    """Of any number of frames, wherever a block of the file ends."""
    texts = [f"line {i} " + "x" * (i % 61) for i in range(3000)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    whole = compress(b"".join(lines[:1000])) + compress(b"") + compress(b"".join(lines[1000:]))
    path = tmp_path / "corpus.jsonl.zst"
    path.write_bytes(whole)
    for block in (7, 2**17):
        monkeypatch.setattr(zstd, "BLOCK_BYTES", block)
        assert [text for piece in split_files([str(path)]) for text, _ in read_records(piece)] == texts
    pq.write_table(pa.table({"text": texts}), tmp_path / "plain.parquet")
    (tmp_path / "c.parquet.zst").write_bytes(compress((tmp_path / "plain.parquet").read_bytes()))
    [piece] = split_files([str(tmp_path / "c.parquet.zst")])
    assert [text for text, _ in read_records(piece)] == texts


def test_archives_of_zstd_have_long_windows(tmp_path):
    """As ``zstd --long=31`` writes them."""
    package = pytest.importorskip("zstandard")
    options = package.ZstdCompressionParameters.from_level(1, window_log=28, write_content_size=False)
    compressor = package.ZstdCompressor(compression_params=options).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(b'{"text": "one"}\n') + compressor.flush())
    [piece] = split_files([str(tmp_path / "a.jsonl.zst")])
    assert list(read_records(piece)) == [("one", None)]


def test_a_torn_zstd_file_is_refused_as_a_torn_gzip_one(tmp_path, compress):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(10_000))
    for name, whole in (("a.jsonl.zst", compress(lines)), ("b.jsonl.zst", compress(lines) + compress(lines))):
        (tmp_path / name).write_bytes(whole[:-20])
        with pytest.raises(UserInputError, match=f"{name}: cannot be read as json: Compressed file ended before"):
            load(tmp_path / name, tmp_path)
    (tmp_path / "c.jsonl.zst").write_bytes(compress(lines)[:-20] + b"0" * 99)
    with pytest.raises(UserInputError, match="c.jsonl.zst: cannot be read as json: .{9}"):
        load(tmp_path / "c.jsonl.zst", tmp_path)


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("one\n")
    monkeypatch.setattr(readers, "_read_lines", lambda piece: (_ for _ in ()).throw(EOFError()))
    with pytest.raises(UserInputError, match="corpus.txt: cannot be read as text: EOFError$"):
        load(tmp_path / "corpus.txt", tmp_path)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    path, other = tmp_path / "corpus.txt", tmp_path / "other.txt"
    path.write_text("one\ntwo\n"), other.write_text("three\n")
    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr("datasets.arrow_writer.ArrowWriter.write_table", lambda *args: (_ for _ in ()).throw(error))
        for processes in (1, 2):  # of two, the error arrives as text
            with pytest.raises(UserInputError, match=r"--cache_dir .*cache.*: not writable: .*No space left on device"):
                load_text_files([str(path), str(other)], cache_dir=str(tmp_path / "cache"), num_proc=processes)
    assert load(path, tmp_path) == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n"])
def test_a_csv_without_a_header_is_told(tmp_path, content):
    path = tmp_path / "corpus.csv.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(UserInputError, match="corpus.csv.gz: cannot be read as csv: it has no header"):
        load(path, tmp_path)


def test_a_csv_may_begin_with_blank_lines(tmp_path):
    (tmp_path / "corpus.csv").write_text("\nid,text\n1,one\n")
    assert load(tmp_path / "corpus.csv", tmp_path) == ["one"]


def test_a_codec_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(readers.compr, "zstd", raising=False)
    (tmp_path / "corpus.txt.zst").write_bytes(b"x")
    with pytest.raises(UserInputError, match="corpus.txt.zst: reading it needs the package zstandard"):
        load(tmp_path / "corpus.txt.zst", tmp_path)


def test_a_changed_file_is_never_served_stale(tmp_path, monkeypatch):
    path = tmp_path / "corpus.txt"
    path.write_text("one\n")
    before = path.stat()
    assert load(path, tmp_path) == ["one"]
    path.write_text("two\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert load(path, tmp_path) == ["two"]
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / "corpus.txt")
    monkeypatch.setattr(readers, "_read_lines", None)
    assert load(moved, tmp_path) == ["two"], "from the cache: the contents are the same"


def test_documents_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(readers.split_files, "__defaults__", ("text", 100))
    path = tmp_path / "corpus.txt"
    lines = [f"line {i} " + "x" * (i % 17) for i in range(70)]
    path.write_text("\n".join(lines))
    assert len(split_files([str(path)])) > 5
    for num_proc in (1, 2):
        found = load_text_files([str(path)], cache_dir=str(tmp_path / str(num_proc)), num_proc=num_proc)
        assert found["text"][:] == lines


def test_several_files_keep_their_order_and_none_is_given_twice(tmp_path):
    names = [str(tmp_path / name) for name in ("b.txt", "a.jsonl", "c.csv")]
    (tmp_path / "b.txt").write_text("1\n2\n")
    (tmp_path / "a.jsonl").write_text('{"text": "3"}\n')
    with open(names[2], "w", newline="") as file:
        csv.writer(file).writerows([["text"], ["4"], ["5"]])
    arguments = {"cache_dir": str(tmp_path / "cache")}
    assert load_text_files(names, **arguments)["text"][:] == list("12345")
    assert load_text_files(names[::-1], **arguments)["text"][:] == list("45312")
    corpus = read_documents(Source(train_file=names[:2], validation_file=names[2:]), **arguments)
    assert (corpus.train["text"][:], corpus.held_out["text"][:]) == (list("123"), list("45"))
    os.symlink(names[0], tmp_path / "link.txt")
    with pytest.raises(UserInputError, match="link.txt: the file is given twice"):
        load_text_files([*names, str(tmp_path / "link.txt")])


@settings(max_examples=50)
@given(st.lists(st.text("ab\n", max_size=30).map(str.encode), min_size=1, max_size=3), st.integers(1, 7))
def test_pieces_for_shards_hold_the_same_records(tmp_path_factory, texts, shards):
    folder = tmp_path_factory.mktemp("pieces")
    files = [folder / f"{index}.txt" for index in range(len(texts))]
    for file, text in zip(files, texts):
        file.write_bytes(b"first line\n" + text)
    pieces = split_files([str(file) for file in files], piece_bytes=17)
    split = split_for_shards(pieces, shards)
    assert len(split) % shards == 0 and len(split) < len(pieces) + shards
    assert [record for piece in split for record in read_records(piece)] == [
        record for piece in pieces for record in read_records(piece)
    ]


def test_what_cannot_be_split_for_shards_is_read_whole(tmp_path, warnings_of):
    for name, opened in (("a.txt.gz", gzip.open), ("b.txt", open)):
        with opened(tmp_path / name, "wt") as file:
            file.write("one\ntwo\nthree\n")
    packed, plain = split_files([str(tmp_path / "a.txt.gz")]), split_files([str(tmp_path / "b.txt")])
    assert split_for_shards(packed, 2) == packed and len(split_for_shards(plain, 2)) == 2
    held_out = [str(tmp_path / "b.txt")]
    read_documents(Source(train_file=[str(tmp_path / "b.txt")], validation_file=held_out, shards=2))
    assert not warnings_of
    read_documents(Source(train_file=[str(tmp_path / "a.txt.gz")], validation_file=held_out, shards=2))
    assert "1 part(s), fewer than its 2 shards: each shard reads the whole stream" in warnings_of[0]
