"""Packed sequences from a stream of documents that need not fit on the disk, resumed exactly.

The stream is divided into V shards. Each is read separately, in buffers of rows that are shuffled. All rows of
micro-batch m of a run come from shard m % V, and rank r of W reads the micro-batches n W + r. So the order of the
micro-batches only depends on V and their size: not on W, and not on the number of DataLoader workers, each of which
reads its own shards.

The position in a shard is that of the current buffer: the state of ``datasets``' cursor before the document in which
the buffer starts, and the number of that document's tokens in earlier buffers. Resuming only reads that buffer again;
the shuffling of ``datasets`` would lose the contents of its buffer.

Shapes: B rows in a micro-batch, N rows in a buffer, S tokens in a row.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.corpus import DocumentStream
from fnl_hf.data.encoding import encode_documents, plain_backend, token_dtype
from fnl_hf.data.packing import PACKED, frame_rows
from fnl_hf.errors import UserInputError

STATE_FILE = "stream_state_{}.json"  # one per process, in a checkpoint


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
    """A position in a shard: the rest of one buffer, and everything after it.

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
    """The position of a run in its stream.

    Attributes:
        shards, batch_size, buffer_size: V, B, N; they decide the order of the rows.
        consumed: micro-batches that all processes together have used.
        cursors: the newest place of each shard that has been read.
    """

    shards: int
    batch_size: int
    buffer_size: int
    consumed: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)

    def advance(self, cursor: str, world_size: int) -> None:
        """Record that this process has used the micro-batch that came with ``cursor``, and every other process its
        own."""
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

    def count_batches(self, shard: int) -> int:
        """The number of micro-batches of a shard among those consumed."""
        return len(range(shard, self.consumed, self.shards))

    def validate(self) -> None:
        """Raise UserInputError unless the cursors agree with ``consumed``."""
        for shard in range(self.shards):
            cursor = self.cursors.get(shard, Cursor(shard))
            found = (cursor.buffer * self.buffer_size + cursor.row) // self.batch_size
            if found != self.count_batches(shard):
                raise UserInputError(
                    f"the state of the stream is incomplete: shard {shard} of {self.shards} is at micro-batch "
                    f"{found} instead of {self.count_batches(shard)}; the states of all processes are needed"
                )


def merge_states(states: Sequence[StreamState]) -> StreamState:
    """The state of a run, merged from those of its processes, from which any number of processes can resume.

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


def read_state(checkpoint: str) -> StreamState:
    """The position of a checkpoint's run in its stream, merged from the states of all its processes.

    Raises:
        UserInputError: a state is missing or cannot be read.
    """
    states = []
    for file in sorted(Path(checkpoint).glob(STATE_FILE.format("*"))):
        try:
            states.append(StreamState.from_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserInputError(f"{file} is not the state of a stream: {error}") from error
    if not states:
        raise UserInputError(
            f"checkpoint {checkpoint} has no {STATE_FILE.format(0)}: the position of its stream is lost"
        )
    return merge_states(states)


@dataclass(frozen=True)
class StreamOrder:
    """What determines the order of a stream's rows, in addition to its shards, and which rows a process reads.

    Attributes:
        batch_size: B, all of one process's rows of one forward pass.
        buffer_size: rows that are shuffled at a time; N is the next multiple of B.
        rank, world_size: r, W.
        state: where to begin; None: at the beginning. Its V, B and buffer size must be those given here.
    """

    batch_size: int
    buffer_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    state: StreamState | None = None


class StreamedRows(torch.utils.data.IterableDataset):
    """Endless micro-batches of packed rows [CLS] text [SEP] text ... [SEP].

    Each is {"input_ids": (B, S) token ids, "sample_ids": (B,) a number that no other row of the run has, "cursor": JSON
    for :meth:`StreamState.advance`}. Use it with ``DataLoader(batch_size=None)``. When a shard's documents end, it
    begins again. Tokens are never dropped.

    Attributes:
        state: where the run stands. Call ``state.advance`` for each micro-batch that was used, and save ``state`` of
            every process; iterating begins where it says.

    Raises:
        UserInputError: V does not suit the processes and workers, a state of another stream, a shard without documents.
    """

    def __init__(
        self, documents: DocumentStream, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, order: StreamOrder
    ):
        PACKED.validate_length(max_seq_length)
        validate_shards(documents.shards, order.world_size, 1)
        try:
            np.empty((order.buffer_size, max_seq_length), token_dtype(tokenizer))  # reserves memory without filling it
        except (MemoryError, ValueError) as error:
            raise UserInputError(
                f"the buffer of --shuffle_buffer_size ({order.buffer_size}) sequences does not fit into memory: {error}"
            ) from error
        self.documents, self.tokenizer, self.max_seq_length, self.order = documents, tokenizer, max_seq_length, order
        batches = -(-order.buffer_size // order.batch_size)
        fresh = StreamState(documents.shards, order.batch_size, batches * order.batch_size)
        self.state = fresh if order.state is None else order.state
        for name in ("shards", "batch_size", "buffer_size"):
            there, here = getattr(self.state, name), getattr(fresh, name)
            if there != here:
                raise UserInputError(f"the stream cannot be resumed: {name} was {there} and is now {here}")
        self.state.validate()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A copy, because the state itself advances while the micro-batches are used.
        return self._micro_batches(copy.deepcopy(self.state))

    def _micro_batches(self, state: StreamState) -> Iterator[dict[str, Any]]:
        """The micro-batches of this process and worker, from its shards in turn."""
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        validate_shards(state.shards, self.order.world_size, workers)
        readers: dict[int, Iterator[dict[str, Any]]] = {}
        number = state.consumed + index * self.order.world_size + self.order.rank
        while True:
            shard = number % state.shards
            if shard not in readers:
                readers[shard] = self._read_shard(state.cursors.get(shard, Cursor(shard)))
            yield next(readers[shard])
            number += workers * self.order.world_size

    def _read_shard(self, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """The micro-batches of one shard."""
        size, shards = self.state.batch_size, self.state.shards
        for rows, start, following in self._fill_buffers(cursor):
            bits = np.random.PCG64([self.order.seed % 2**64, start.shard, start.buffer]).random_raw(len(rows))
            order = np.argsort(bits, kind="stable")  # (N,)
            for row in range(start.row, len(rows), size):
                chosen = order[row : row + size]  # (B,)
                sample_ids = (start.buffer * len(rows) + chosen) * shards + start.shard
                used = row + size
                place = following if used == len(rows) else dataclasses.replace(start, row=used)
                cursor_json = json.dumps(dataclasses.asdict(place))
                yield {"input_ids": rows[chosen], "sample_ids": sample_ids, "cursor": cursor_json}

    def _fill_buffers(self, cursor: Cursor) -> Iterator[tuple[np.ndarray, Cursor, Cursor]]:
        """Buffers (N, S), each with its own position and that of the next."""
        dtype, capacity = token_dtype(self.tokenizer), self.state.buffer_size * (self.max_seq_length - 2)
        buffer, filled = np.empty(capacity, dtype), 0  # (N (S - 2),)
        for tokens, place in self._encode_shard(cursor):
            used = 0
            while used < len(tokens):
                count = min(len(tokens) - used, capacity - filled)
                buffer[filled : filled + count] = tokens[used : used + count]
                used, filled = used + count, filled + count
                if filled == capacity:
                    rows = frame_rows(buffer, self.tokenizer, self.max_seq_length)
                    following = dataclasses.replace(place, skip=place.skip + used, buffer=cursor.buffer + 1, row=0)
                    yield rows, cursor, following
                    cursor, filled = following, 0

    def _encode_shard(self, cursor: Cursor) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Arrays of tokens, each with its position: the state before its document, and the number of the document's
        earlier tokens."""
        backend, dtype, skip = plain_backend(self.tokenizer), token_dtype(self.tokenizer), cursor.skip
        for text, source, epoch in self.documents.read_shard(cursor.shard, cursor.source, cursor.epoch):
            position = 0
            document = memoryview(text.encode())
            for tokens in encode_documents(backend, [document], self.tokenizer.sep_token_id, dtype):
                known = min(max(skip - position, 0), len(tokens))  # in buffers before the cursor
                place = Cursor(cursor.shard, source, position + known, epoch)
                position += len(tokens)
                yield tokens[known:], place
            skip = 0
