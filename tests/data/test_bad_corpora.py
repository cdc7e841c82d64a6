"""Corpora that run_pretrain.py refuses."""

import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from tests.bad_inputs import TEXT, assert_launch_refused, assert_refused, corpus, flags, itself
from tests.conftest import STREAM

# name -> what makes the bad input, and what the message says of it
CORPORA = {
    "missing": (flags(train_file="/no/such.txt"), "^/no/such.txt: no such file$"),
    "a folder": (corpus("c.txt", Path.mkdir), "c.txt: not a file$"),
    "a folder without suffix": (corpus("texts", Path.mkdir), "texts: not a file$"),
    "a folder to validate on": (
        corpus("texts", Path.mkdir, train_file="<corpus>", validation_file="<here>/texts"), "texts: not a file$"
    ),
    "a folder to stream": (corpus("texts", Path.mkdir, **STREAM), "texts: not a file$"),
    "a link to itself": (corpus("c.txt", itself), "c.txt: no such file$"),
    "empty": (corpus("c.txt", ""), "c.txt: the file is empty$"),
    "wrong suffix": (corpus("c.doc", TEXT), "c.doc: unknown file type: use .txt, .json, .jsonl"),
    "only blank lines": (corpus("c.txt", "\n \n\t\n"), "c.txt: no text$"),
    "not UTF-8": (corpus("c.txt", "Müller\n".encode("latin1") * 99), "c.txt: no text, all .* broken: not UTF-8$"),
    "UTF-16": (corpus("c.csv", f"text\n{TEXT}".encode("utf-16")), "c.csv: the text is UTF-16: convert it to UTF-8$"),
    "torn gzip": (corpus("c.txt.gz", gzip.compress(TEXT.encode())[:-20]), "c.txt.gz: cannot be read as text: .*ended"),
    "torn xz": (corpus("c.txt.xz", lzma.compress(TEXT.encode())[:-20]), "c.txt.xz: cannot be read as text: .*ended"),
    "no such column": (corpus("c.jsonl", '{"body": "a"}\n' * 9), r"c.jsonl: no column 'text', only \['body'\]"),
    "every record broken": (corpus("c.jsonl", "{\n" * 9), "c.jsonl: no text, all records are broken: not JSON$"),
    "one broken record": (corpus("c.jsonl", '{"text": "a"}\n{\n', strict="true"), "1 of 2 lines .* leave out --strict"),
    "torn JSON array": (corpus("c.json", '[{"text": "a"}, {"te'), "c.json: cannot be read as array: Unterminated"),
    "unreadable Parquet": (corpus("c.parquet", b"PAR1 torn"), "c.parquet: cannot be read as parquet: .*magic"),
    "a column of numbers": (corpus("c.parquet", pa.table({"text": [1, 2]})), "column 'text' contains int64, not text$"),
    "two columns of one name": (
        corpus("c.parquet", pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"])),
        "c.parquet: 2 columns are named 'text'$",
    ),
    "the same file twice": (
        lambda workspace: [*workspace.command(), "--train_file", *[str(workspace.corpus)] * 2],
        "corpus.txt: the file is given twi",
    ),
    "too few documents": (corpus("c.txt", "a single one"), "1 documents, too few to hold out 5.0%: give a --valid"),
    "shorter than a sequence": (corpus("c.txt", "a b\nc"), r"^training data: .* \(1 documents\) is shorter than one"),
    "held-out shorter than one": (flags(max_seq_length=512), "^held-out data: .* shorter .* --max_seq_length 512$"),
    "fewer than a global batch": (
        flags(max_train_samples=23, gradient_accumulation_steps=3), "are 23 samples, fewer than .* batch of 24 "
    ),
    "a stream of another column": (corpus("c.jsonl", '{"body": "a"}\n' * 99, **STREAM), "c.jsonl: no column 'text'"),
    "a stream of broken records": (
        corpus("c.jsonl", "{\n" * 99, **STREAM), "has 0 documents and 99 broken records, but 9 documents are to be held"
    ),
    "a stream of nothing": (flags(**STREAM, train_file=None), "^--streaming needs one of --dataset_name and --train_f"),
    "two sources": (flags(dataset_name="x"), r"give --dataset_name \(x\) or --train_file \(.*\), not both"),
    "not on the Hub": (flags(train_file=None, dataset_name="no/such"), "^--dataset_name no/such: "),
}  # fmt: skip


@pytest.mark.parametrize("name", CORPORA)
def test_a_bad_corpus_is_refused_in_one_line_and_changes_nothing(workspace, name):
    assert_refused(workspace, *CORPORA[name])


def test_the_launched_script_prints_the_line_and_no_traceback(workspace):
    assert_launch_refused(workspace, *CORPORA["torn gzip"])
