"""Read local files as records, tolerantly: a broken record is a fault to count, not the end of the run.

The readers of ``datasets`` refuse a file for one broken line of JSON, accept any bytes as text, and silently leave out
or change broken cells of CSV.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Features, Value
from fsspec.compression import compr

from fnl_hf.data.zstd import open_zstd
from fnl_hf.errors import UserInputError

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}  # fsspec's names
LINE_FORMATS = ("text", "json")
PIECE_BYTES = 2**26
TABLE_ROWS, TABLE_CHARACTERS = 2**14, 2**22
# ``text`` is None in blank and in broken records; only broken records have a fault. The rows are all records or lines
# of the file, so the position of a row tells the user where to look.
RECORD_FEATURES = Features({"text": Value("large_string"), "fault": Value("string"), "file": Value("int32")})

Record = tuple[str | None, str | None]  # text, fault


@dataclass(frozen=True)
class Piece:
    """A part of a file that is read separately.

    Attributes:
        format: "text", "json" (objects a line), "array" (one JSON array), "csv" or "parquet".
        file: the position of the file among those that are read together.
        start, stop: bytes of a file of lines (the lines that begin there), row groups of a Parquet file; all of the
            file where ``stop`` is None.
    """

    path: str
    format: str
    column: str
    file: int
    start: int = 0
    stop: int | None = None

    @property
    def splittable_bytes(self) -> int:
        """Number of bytes within which the piece can be split: those of plain lines; 0 for other formats."""
        return self.stop - self.start if self.format in LINE_FORMATS and self.stop is not None else 0


# ---- files and their pieces ----


def check_file(file: str) -> str:
    """The format of a file that is not empty.

    Raises:
        UserInputError: it is missing, no file, of unknown type, or empty.
    """
    if not os.path.exists(file):
        raise UserInputError(f"{file}: no such file")
    if not os.path.isfile(file):
        raise UserInputError(f"{file}: not a file")
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FORMATS:
        raise UserInputError(
            f"{file}: unknown file type: use {', '.join(FORMATS)}, plain or compressed ({', '.join(COMPRESSIONS)})"
        )
    if os.path.getsize(file) == 0:
        raise UserInputError(f"{file}: the file is empty")
    return FORMATS[suffixes[-1]]


def split_files(files: Sequence[str], column: str = "text", piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The pieces of some files, in order.

    Raises:
        UserInputError: a file is missing, empty, of unknown type, given twice, unreadable, or without the column.
    """
    seen: set[str] = set()
    pieces: list[Piece] = []
    for index, file in enumerate(files):
        path = os.path.realpath(file)  # which tolerates circular links
        if path in seen:
            raise UserInputError(f"{file}: the file is given twice")
        seen.add(path)
        pieces += _split_file(file, column, index, piece_bytes)
    return pieces


def _split_file(file: str, column: str, index: int, piece_bytes: int) -> list[Piece]:
    kind = check_file(file)
    if kind == "parquet":
        with _open_parquet(file) as table:
            _check_parquet_column(file, table.schema_arrow, column)
            groups = table.num_row_groups
        bounds = [(0, groups)] if _is_compressed(file) else [(i, i + 1) for i in range(groups)]
        return [Piece(file, kind, column, index, *bound) for bound in bounds]
    beginning = _read_beginning(file, kind)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserInputError(f"{file}: the text is UTF-16: convert it to UTF-8")
    if ".json" in [suffix.lower() for suffix in Path(file).suffixes] and beginning.startswith(b"["):
        kind = "array"
    if kind in LINE_FORMATS and not _is_compressed(file):
        size = os.path.getsize(file)
        starts = range(0, size, piece_bytes)
        return [Piece(file, kind, column, index, start, min(start + piece_bytes, size)) for start in starts]
    return [Piece(file, kind, column, index)]


def split_for_shards(pieces: Sequence[Piece], shards: int) -> list[Piece]:
    """The same records in a multiple of ``shards`` pieces: the largest pieces are halved, the first of them first. If
    they cannot be split, the pieces unchanged."""
    if len(pieces) + sum(piece.splittable_bytes for piece in pieces) < shards:
        return list(pieces)
    split = list(pieces)
    while len(split) % shards:
        largest = max(range(len(split)), key=lambda i: split[i].splittable_bytes)
        piece = split[largest]
        if piece.splittable_bytes < 2:
            return list(pieces)
        middle = (piece.start + (piece.stop or 0)) // 2
        split[largest : largest + 1] = [replace(piece, stop=middle), replace(piece, start=middle)]
    return split


def find_columns(piece: Piece, records: int = 100) -> list[str]:
    """The columns in the first lines of a file of JSON objects, or in an array of objects."""
    columns: dict[str, None] = {}
    with _naming_file(piece.path, piece.format):
        values: Iterator[Any] = iter(_load_array(piece)) if piece.format == "array" else _parse_whole_lines(piece)
        for value in islice(values, records):
            columns |= dict.fromkeys(value if isinstance(value, dict) else ())
    return list(columns)


def _parse_whole_lines(piece: Piece) -> Iterator[Any]:
    for line in _read_lines(piece):
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line.decode())


def missing_column(where: str, column: str, columns: Sequence[str]) -> UserInputError:
    return UserInputError(f"{where}: no column {column!r}, only {list(columns)}: set --text_column_name, or rename one")


def hash_files(files: Sequence[str]) -> list[str]:
    """A checksum of the contents of each file."""
    digests = []
    for file in files:
        with _naming_file(file, "a file"), open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest())
    return digests


# ---- pieces and their records ----


def read_records(piece: Piece) -> Iterator[Record]:
    """The records of a piece as (text, fault).

    Raises:
        UserInputError: the file is torn or not of its type; what has been read by then is right.
    """
    readers = {"text": _read_text, "json": _read_json_lines, "array": _read_json_array, "csv": _read_csv,
               "parquet": _read_parquet}  # fmt: skip
    with _naming_file(piece.path, piece.format):
        yield from readers[piece.format](piece)


def read_record_tables(pieces: Sequence[Piece]) -> Iterator[pa.Table]:
    """The records of some pieces as tables of :data:`RECORD_FEATURES`."""
    for piece in pieces:
        rows: list[Record] = []
        characters = 0
        for record in read_records(piece):
            rows.append(record)
            characters += len(record[0] or "")
            if len(rows) == TABLE_ROWS or characters >= TABLE_CHARACTERS:
                yield _make_table(rows, piece.file)
                rows, characters = [], 0
        if rows:
            yield _make_table(rows, piece.file)


def _make_table(rows: list[Record], file: int) -> pa.Table:
    columns = [*map(list, zip(*rows)), [file] * len(rows)]
    return pa.table(columns, schema=RECORD_FEATURES.arrow_schema)


def generate_records(pieces: Sequence[Piece]) -> Iterator[dict[str, str | None]]:
    """The records of some pieces for a generator of ``datasets``; blank ones are left out."""
    for piece in pieces:
        for text, fault in read_records(piece):
            if text is not None or fault is not None:
                yield {"text": text, "fault": fault}


def check_text(value: Any, column: str) -> Record:
    """The text of a record's value, or its fault; neither if it is blank."""
    if value is None:
        return None, f"no {column!r}"
    if not isinstance(value, str):
        return None, f"{column!r} is {type(value).__name__}, not text"
    if not value or value.isspace():
        return None, None
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, "\ud800"
        return None, "not Unicode"
    return value, None


def _check_object(value: Any, column: str) -> Record:
    return check_text(value.get(column), column) if isinstance(value, dict) else (None, "not an object")


def _read_lines(piece: Piece) -> Iterator[bytes]:
    """The lines that start within the piece."""
    with _open_decompressed(piece.path) as stream:
        position = 0
        if piece.start:
            stream.seek(piece.start - 1)  # a line that starts exactly at ``start`` belongs to this piece
            position = piece.start - 1 + len(stream.readline())
        while (piece.stop is None or position < piece.stop) and (line := stream.readline()):
            yield line.removeprefix(codecs.BOM_UTF8) if position == 0 else line
            position += len(line)


def _read_text(piece: Piece) -> Iterator[Record]:
    for line in _read_lines(piece):
        try:
            yield check_text(line.decode().rstrip("\r\n"), piece.column)
        except UnicodeDecodeError:
            yield None, "not UTF-8"


def _read_json_lines(piece: Piece) -> Iterator[Record]:
    for line in _read_lines(piece):
        try:
            yield _check_object(json.loads(line.decode()), piece.column) if line.strip() else (None, None)
        except UnicodeDecodeError:
            yield None, "not UTF-8"
        except (ValueError, RecursionError):
            yield None, "not JSON"


def _read_json_array(piece: Piece) -> Iterator[Record]:
    for value in _load_array(piece):
        yield _check_object(value, piece.column)


def _load_array(piece: Piece) -> list:
    with _open_decompressed(piece.path) as stream:
        return json.loads(stream.read().decode("utf-8-sig"))


def _read_csv(piece: Piece) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the longest cell; the default is 128 KB
    with (
        _open_decompressed(piece.path) as stream,
        # Bytes that are not UTF-8 become lone surrogates, which mark the cell without losing the position in the file.
        io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        rows = csv.reader(text, strict=True)
        header = next((row for row in rows if row), None)
        if header is None:
            raise ValueError("it has no header")
        if piece.column not in header:
            raise missing_column(piece.path, piece.column, header)
        position = header.index(piece.column)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield None, "not CSV"
                continue
            yield _check_row(row, position, len(header), piece.column)


def _check_row(row: list[str], position: int, columns: int, column: str) -> Record:
    if not row:
        return None, None
    if len(row) > columns:
        return None, "more cells than columns"
    text, fault = check_text(row[position] if position < len(row) else None, column)
    return text, "not UTF-8" if fault == "not Unicode" else fault


def _check_parquet_column(file: str, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise missing_column(file, column, schema.names)
    if schema.names.count(column) > 1:
        raise UserInputError(f"{file}: {schema.names.count(column)} columns are named {column!r}")
    dtype = schema.field(column).type
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if dtype not in (pa.string(), pa.large_string(), pa.null()):
        raise UserInputError(f"{file}: column {column!r} contains {dtype}, not text")


def _read_parquet(piece: Piece) -> Iterator[Record]:
    with _open_parquet(piece.path) as table:
        groups = list(range(piece.start, table.num_row_groups if piece.stop is None else piece.stop))
        for batch in table.iter_batches(batch_size=2**10, row_groups=groups, columns=[piece.column]):
            # As bytes: otherwise one string that is not UTF-8 would keep Arrow from returning the others.
            for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
                try:
                    yield check_text(None if value is None else value.decode(), piece.column)
                except UnicodeDecodeError:
                    yield None, "not UTF-8"


# ---- opening ----


@contextlib.contextmanager
def _naming_file(file: str, kind: str) -> Iterator[None]:
    """Attribute all errors within to the file: each codec has its own classes of errors."""
    try:
        yield
    except UserInputError:
        raise
    except Exception as error:
        raise UserInputError(f"{file}: cannot be read as {kind}: {str(error) or type(error).__name__}") from error


def _is_compressed(file: str) -> bool:
    return Path(file).suffix.lower() in COMPRESSIONS


@contextlib.contextmanager
def _open_decompressed(file: str) -> Iterator[BinaryIO]:
    codec = COMPRESSIONS.get(Path(file).suffix.lower())
    if codec is not None and codec not in compr:
        package = {"zstd": "zstandard"}.get(codec, codec)
        raise UserInputError(f"{file}: reading it needs the package {package}: pip install {package}")
    with open(file, "rb") as plain:
        if codec is None:
            yield plain
            return
        with open_zstd(plain) if codec == "zstd" else compr[codec](plain, mode="rb") as stream:
            yield stream


def _read_beginning(file: str, kind: str) -> bytes:
    """Some bytes, from the first one that is neither white space nor a byte order mark."""
    with _naming_file(file, kind), _open_decompressed(file) as stream:
        while (block := stream.read(2**12)) and not (text := block.removeprefix(codecs.BOM_UTF8).lstrip()):
            pass
        return text if block else b""


def _open_parquet(file: str) -> pq.ParquetFile:
    with _naming_file(file, "parquet"):
        if not _is_compressed(file):
            return pq.ParquetFile(file)
        with _open_decompressed(file) as stream:
            return pq.ParquetFile(pa.BufferReader(stream.read()))
