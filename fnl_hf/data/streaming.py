"""Packed sequences from a stream of documents that need not fit on the disk, exact to resume.

The stream is cut into V shards, each read on its own, in buffers of rows that are shuffled. Micro-batch m of a run
comes wholly from shard m % V, and rank r of W reads the micro-batches n W + r, so that the order of the micro-batches
depends on V and their size alone: not on W, and not on the number of DataLoader workers, each of which reads its own
shards.

A shard's place is that of the buffer it is in: the state of ``datasets``' own cursor before the document in which the
buffer begins, and how many of that document's tokens came before. Resuming reads that buffer again, and nothing else.
"""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from fnl_hf.data.packing import MIN_LENGTH, encode_documents, plain_backend, token_dtype, validate_length
from fnl_hf.data.readers import check_text
from fnl_hf.errors import UserInputError

logger = logging.get_logger(__name__)

Transform = Callable[[np.ndarray, np.ndarray], dict[str, Any]]


def validate_shards(shards: int, world_size: int, workers: int) -> None:
    """Raise UserInputError unless each process and each of its workers can have the same number of shards."""
    readers = world_size * max(1, workers)
    if shards < 1 or shards % readers:
        raise UserInputError(
            f"--streaming_shards ({shards}) must be a multiple of {readers}: {world_size} processes x "
            f"--dataloader_num_workers ({workers}, at least 1)"
        )


@dataclass(frozen=True)
class Cursor:
    """A place in a shard: what is left of one buffer, and all that follows.

    Attributes:
        source: ``datasets``' state before the document in which the buffer begins; None at the shard's beginning.
        skip: how many of that document's tokens are in earlier buffers.
        epoch: how often the shard's documents have ended before.
        buffer: the number of the buffer.
        row: how many of its rows are used.
    """

    shard: int
    source: dict | None = None
    skip: int = 0
    epoch: int = 0
    buffer: int = 0
    row: int = 0


@dataclass
class StreamState:
    """Where a run stands in its stream.

    Attributes:
        shards, batch_size, buffer_size: V, rows in a micro-batch, rows in a buffer; they decide the order of the rows.
        consumed: micro-batches that all processes together have used.
        cursors: the newest place of each shard that has been read.
    """

    shards: int
    batch_size: int
    buffer_size: int
    consumed: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)

    def take(self, cursor: str, world_size: int) -> None:
        """Note that this process has used the micro-batch that came with ``cursor``, and each other process its own."""
        place = Cursor(**json.loads(cursor))
        self.cursors[place.shard] = place
        self.consumed += world_size

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "StreamState":
        values = json.loads(text)
        values["cursors"] = {int(shard): Cursor(**cursor) for shard, cursor in values["cursors"].items()}
        return cls(**values)

    def batches_of(self, shard: int) -> int:
        """How many micro-batches of a shard are among those consumed."""
        return len(range(shard, self.consumed, self.shards))

    def validate(self) -> None:
        """Raise UserInputError unless the cursors are where ``consumed`` says."""
        for shard in range(self.shards):
            cursor = self.cursors.get(shard, Cursor(shard))
            found = (cursor.buffer * self.buffer_size + cursor.row) // self.batch_size
            if found != self.batches_of(shard):
                raise UserInputError(
                    f"the state of the stream is incomplete: shard {shard} of {self.shards} stands at micro-batch "
                    f"{found}, not {self.batches_of(shard)}; the state of every process is needed"
                )


def merge(states: Sequence[StreamState]) -> StreamState:
    """The state of a run from those of its processes, for any number of processes to go on from.

    Raises:
        UserInputError: they are not of one moment of one run, or one is missing.
    """
    first = states[0]
    merged = dataclasses.replace(first, cursors={})
    for state in states:
        for name in ("shards", "batch_size", "buffer_size", "consumed"):
            if getattr(state, name) != getattr(first, name):
                raise UserInputError(
                    f"the states of the stream differ in {name}: {getattr(first, name)} and {getattr(state, name)}"
                )
        for shard, cursor in state.cursors.items():
            newest = merged.cursors.get(shard, cursor)
            merged.cursors[shard] = max(newest, cursor, key=lambda place: (place.buffer, place.row))
    merged.validate()
    return merged


class StreamingDataset(torch.utils.data.IterableDataset):
    """Micro-batches of packed rows [CLS] text [SEP] text ... [SEP], without end.

    Each is {"input_ids": (B, S) token ids, "sample_ids": (B,) a number that no other row of the run has, "cursor": JSON
    for :meth:`StreamState.take`}, with ``transform`` {**transform(input_ids, sample_ids), "cursor": ...}. Use it with
    ``DataLoader(batch_size=None)``. When a shard's documents end, it begins again. Tokens are never dropped.

    Args:
        stream: documents, with the text in ``text_column`` and, where readers have found one, a "fault".
        batch_size: B, rows in a micro-batch: all of one process's rows of one forward pass.
        buffer_size: rows that are shuffled at a time, rounded up to a multiple of B.
        state: where to begin; its V, B and buffer size must be those given here.
        hold_out: documents at the beginning of each shard that are left out, see :func:`held_out_documents`.
        strict: refuse broken records; otherwise they are left out and counted in warnings, shard by shard.

    Attributes:
        state: where the run stands. Call ``state.take`` for each micro-batch that was used, and save ``state`` of every
            process; iterating begins where it says.

    Raises:
        UserInputError: V does not suit the processes and workers, a state of another stream, a shard without documents.
    """

    def __init__(
        self,
        stream: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        batch_size: int,
        shards: int,
        buffer_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        state: StreamState | None = None,
        transform: Transform | None = None,
        text_column: str = "text",
        hold_out: int = 0,
        strict: bool = False,
    ):
        validate_length(max_seq_length, MIN_LENGTH, "[CLS], a token, [SEP]")
        validate_shards(shards, world_size, 1)
        try:
            np.empty((buffer_size, max_seq_length), token_dtype(tokenizer))  # claims memory without filling it
        except (MemoryError, ValueError) as error:
            raise UserInputError(f"--shuffle_buffer_size ({buffer_size}) does not fit into memory: {error}") from error
        self.stream, self.tokenizer, self.max_seq_length = stream, tokenizer, max_seq_length
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.transform, self.text_column, self.hold_out, self.strict = transform, text_column, hold_out, strict
        fresh = StreamState(shards, batch_size, -(-buffer_size // batch_size) * batch_size)
        self.state = fresh if state is None else state
        for name in ("shards", "batch_size", "buffer_size"):
            there, here = getattr(self.state, name), getattr(fresh, name)
            if there != here:
                raise UserInputError(f"the stream cannot be resumed: {name} is {there} there and {here} here")
        self.state.validate()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A copy: the state itself moves on while the micro-batches are used.
        return self._micro_batches(copy.deepcopy(self.state))

    def _micro_batches(self, state: StreamState) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        validate_shards(state.shards, self.world_size, workers)
        readers: dict[int, Iterator[dict[str, Any]]] = {}
        number = state.consumed + index * self.world_size + self.rank
        while True:
            shard = number % state.shards
            if shard not in readers:
                readers[shard] = self._batches(state.cursors.get(shard, Cursor(shard)))
            yield next(readers[shard])
            number += workers * self.world_size

    def _batches(self, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """The micro-batches of one shard."""
        size, shards = self.state.batch_size, self.state.shards
        for rows, start, following in self._buffers(cursor):
            words = np.random.PCG64([self.seed % 2**64, start.shard, start.buffer]).random_raw(len(rows))
            order = np.argsort(words, kind="stable")
            for row in range(start.row, len(rows), size):
                chosen = order[row : row + size]
                ids, numbers = rows[chosen], (start.buffer * len(rows) + chosen) * shards + start.shard
                given = self.transform(ids, numbers) if self.transform else {"input_ids": ids, "sample_ids": numbers}
                used = row + size
                place = following if used == len(rows) else dataclasses.replace(start, row=used)
                yield {**given, "cursor": json.dumps(dataclasses.asdict(place))}

    def _buffers(self, cursor: Cursor) -> Iterator[tuple[np.ndarray, Cursor, Cursor]]:
        """Buffers (N, S), each with its own place and that of the next."""
        dtype, content, size = token_dtype(self.tokenizer), self.max_seq_length - 2, self.state.buffer_size
        buffer, filled = np.empty(size * content, dtype), 0
        for tokens, place in self._tokens(cursor):
            used = 0
            while used < len(tokens):
                count = min(len(tokens) - used, len(buffer) - filled)
                buffer[filled : filled + count] = tokens[used : used + count]
                used, filled = used + count, filled + count
                if filled == len(buffer):
                    rows = np.empty((size, self.max_seq_length), dtype)
                    rows[:, 0], rows[:, -1] = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
                    rows[:, 1:-1] = buffer.reshape(size, content)
                    skip = place.skip + used
                    following = dataclasses.replace(place, skip=skip, buffer=cursor.buffer + 1, row=0)
                    yield rows, cursor, following
                    cursor, filled = following, 0

    def _tokens(self, cursor: Cursor) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Tokens, each array with its place: the state before its document, and the document's tokens before it."""
        backend, dtype, skip = plain_backend(self.tokenizer), token_dtype(self.tokenizer), cursor.skip
        for text, source, epoch in self._documents(cursor):
            position = 0
            document = memoryview(text.encode())
            for tokens in encode_documents(backend, [document], self.tokenizer.sep_token_id, dtype):
                known = min(max(skip - position, 0), len(tokens))
                place = Cursor(cursor.shard, source, position + known, epoch)
                position += len(tokens)
                yield tokens[known:], place
            skip = 0

    def _documents(self, cursor: Cursor) -> Iterator[tuple[str, dict | None, int]]:
        """A shard's documents over and over, each with the source's state before it and the epoch."""
        shard, source, epoch = cursor.shard, cursor.source, cursor.epoch
        where = _named(shard, self.state.shards)
        while True:
            stream = split_dataset_by_node(self.stream, rank=shard, world_size=self.state.shards)
            left_out, count, broken = self.hold_out if source is None else 0, 0, 0
            if source is not None:
                stream.load_state_dict(source)
            before = source
            for record in records(stream):
                text, fault = _text_of(record, self.text_column)
                if fault is not None:
                    broken += 1
                    self._report(f"{where}: {broken} broken records, the last: {fault}", broken, epoch)
                if text is not None:
                    count += 1
                    if count > left_out:
                        yield text, before, epoch
                before = stream.state_dict()
            if source is None and count <= left_out:
                raise _too_few(where, count, broken, left_out)
            source, epoch = None, epoch + 1
            if shard == 0:
                logger.warning(f"The stream begins again: epoch {epoch}")

    def _report(self, message: str, broken: int, epoch: int) -> None:
        if self.strict:
            raise UserInputError(f"{message}; --strict refuses them")
        if epoch == 0 and broken & (broken - 1) == 0:  # at 1, 2, 4, 8: a shard may be too long to wait for its end
            logger.warning(f"{message}; they are left out, --strict refuses them")


def held_out_documents(stream: IterableDataset, shards: int, count: int, text_column: str = "text") -> list[str]:
    """The first ``count`` documents of each shard: those that ``StreamingDataset(hold_out=count)`` leaves out.

    Raises:
        UserInputError: a shard has no others.
    """
    held: list[str] = []
    for shard in range(shards):
        found, broken = [], 0
        for record in records(split_dataset_by_node(stream, rank=shard, world_size=shards)):
            text, fault = _text_of(record, text_column)
            broken += fault is not None
            if text is not None:
                found.append(text)
            if len(found) > count:
                break
        else:
            raise _too_few(_named(shard, shards), len(found), broken, count)
        held += found[:count]
    return held


def _named(shard: int, shards: int) -> str:
    return f"shard {shard} of {shards} of the stream"


def _too_few(where: str, documents: int, broken: int, held_out: int) -> UserInputError:
    return UserInputError(
        f"{where} has {documents} documents and {broken} broken records, and {held_out} documents are to be held out: "
        "lower --streaming_validation_documents or --streaming_shards"
    )


def records(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """All records of a stream, also in a worker of a DataLoader, where ``datasets`` would give a part of them."""
    if get_worker_info() is not None:
        fsspec.asyn.reset_lock()  # held by threads of the parent process, which are not here to release it
    iterator = iter(stream)
    with _no_worker():  # ``datasets`` asks when the first record is fetched
        first = next(iterator, None)
    if first is not None:
        yield first
        yield from iterator


@contextlib.contextmanager
def _no_worker() -> Iterator[None]:
    module = torch.utils.data._utils.worker
    info, module._worker_info = module._worker_info, None
    try:
        yield
    finally:
        module._worker_info = info


def _text_of(record: dict[str, Any], column: str) -> tuple[str | None, str | None]:
    fault = record.get("fault")
    return (None, fault) if fault is not None else check_text(record.get(column), column)
