"""The order of the training data, independent of the number of processes and of interruptions."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from fnl_hf.errors import UserInputError

SAMPLING_STRATEGIES = ("random", "sequential")
GROUPED = (*SAMPLING_STRATEGIES, "group_by_length")
# Python integers are created for this many indices at a time: for a large corpus, an epoch would take gigabytes
_BLOCK = 2**16


class EpochSampler(Sampler[int]):
    """Each epoch's order is a permutation that only depends on (seed, epoch), cut to whole global batches.

    So each epoch has the same optimizer steps and each step the same global batch, however it is divided into
    processes, accumulation steps and per-device batches. The cut leaves out other samples in each epoch, unless the
    order is sequential.

    Args:
        length: samples in the dataset.
        global_batch: samples in one optimizer step, of all processes and accumulation steps together.
        seed: >= 0.
        shuffle: False for the dataset's own order.

    Raises:
        UserInputError: fewer samples than one global batch.
    """

    def __init__(self, length: int, global_batch: int, seed: int, shuffle: bool = True):
        if length < global_batch:
            raise UserInputError(
                f"the training data are {length} samples, fewer than one global batch of {global_batch} "
                "(--per_device_train_batch_size x processes x --gradient_accumulation_steps): use more data or a "
                "smaller batch"
            )
        self.length, self.global_batch = length, global_batch
        self.used = length - length % global_batch
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.used

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            yield from range(self.used)
            return
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)[: self.used]
        for start in range(0, self.used, _BLOCK):
            yield from order[start : start + _BLOCK].tolist()


class LengthSampler(Sampler[int]):
    """The order of ``group_by_length``, drawn for each epoch from (seed, epoch) alone: a resumed epoch goes on, and all
    processes have the same."""

    def __init__(self, grouped: LengthGroupedSampler, seed: int):
        self.grouped, self.seed = grouped, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        self.grouped.generator = torch.Generator().manual_seed(int(state[0]))

    def __len__(self) -> int:
        return len(self.grouped)

    def __iter__(self) -> Iterator[int]:
        return iter(self.grouped)


def validate_sampling_strategy(args, known: tuple[str, ...] = SAMPLING_STRATEGIES) -> None:
    """Raise UserInputError unless the order that ``args`` request is one of those that a resumed run continues; by
    default those of :class:`EpochSampler`."""
    if args is not None and args.train_sampling_strategy not in known:
        raise UserInputError(f"--train_sampling_strategy ({args.train_sampling_strategy}) must be one of {known}")


def order_seed(args) -> int:
    """The seed of the order of the training data."""
    return args.seed if args.data_seed is None else args.data_seed


def epoch_sampler(dataset, args, batch_size: int) -> EpochSampler:
    """The order of the training data that ``args`` describe, for micro-batches of ``batch_size`` per process."""
    validate_sampling_strategy(args)
    global_batch = batch_size * args.world_size * args.gradient_accumulation_steps
    return EpochSampler(len(dataset), global_batch, order_seed(args), args.train_sampling_strategy == "random")


@contextmanager
def keeping_last_batch(args) -> Iterator[None]:
    """``dataloader_drop_last`` is for training: what is evaluated is all samples, but Trainer drops the last there,
    too."""
    given, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = given


def count_steps(args, dataset) -> int:
    """Optimizer steps of a run over epochs of whole global batches."""
    if args.max_steps > 0:
        return args.max_steps
    sampler = epoch_sampler(dataset, args, args.train_batch_size)
    return ceil(args.num_train_epochs * (len(sampler) // sampler.global_batch))


def find_sampler(dataloader: DataLoader) -> Sampler | None:
    """The sampler inside the batch samplers that Accelerate wraps around it to distribute or skip batches."""
    batches: Any = dataloader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


class EpochCallback(TrainerCallback):
    """Tells the training data and their sampler the epoch. With several processes Accelerate does not reach the data,
    and in an epoch that is resumed in its middle not the sampler."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        for part in (train_dataloader.dataset, find_sampler(train_dataloader)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(int(state.epoch + 1e-6))
