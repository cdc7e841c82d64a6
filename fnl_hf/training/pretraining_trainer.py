"""Pretraining: the order of the data does not depend on the number of processes, and streams resume at their
position."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from fnl_hf.data.masking import MaskedStream
from fnl_hf.data.streaming import STATE_FILE
from fnl_hf.runs.preemption import surviving_signals
from fnl_hf.training.sampling import epoch_sampler, validate_sampling_strategy
from fnl_hf.training.trainer import FnlTrainer


class StreamProgressCallback(TrainerCallback):
    """A stream has no epochs, so logs show the share of the steps instead."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class PretrainingTrainer(FnlTrainer):
    """FnlTrainer whose epochs consist of whole global batches, the same for any number of processes.

    The training data may be a ``MaskedStream``: its state is saved in each checkpoint.

    Raises:
        UserInputError: another ``train_sampling_strategy`` than random or sequential, or fewer sequences to train on
            than one global batch.
    """

    def __init__(self, model=None, args=None, train_dataset=None, **kwargs):
        # Trainer's constructor makes the output folder, so bad input is refused before it.
        validate_sampling_strategy(args)
        if args.do_train and has_length(train_dataset):
            epoch_sampler(train_dataset, args, args.train_batch_size)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.stream = self.train_dataset if isinstance(self.train_dataset, MaskedStream) else None
        if self.stream is not None:
            self.args.ignore_data_skip = True  # it starts at the position in its state
            self.add_callback(StreamProgressCallback)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        return epoch_sampler(dataset, self.args, self._train_batch_size)

    def get_train_dataloader(self) -> DataLoader:
        """Like Trainer's; a stream knows its process and makes whole micro-batches, so Accelerate does not wrap it."""
        if self.stream is None:
            return super().get_train_dataloader()
        args = self.args
        return DataLoader(
            self.stream,
            batch_size=None,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=surviving_signals(),
            # Not the global generator, whose state was restored before and from which dropout draws.
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.stream is not None:
            for batch in batches:
                self.stream.state.advance(batch.pop("cursor"), self.args.world_size)
        return batches, items

    def save_data_position(self, folder: Path) -> None:
        if self.stream is not None:
            file = folder / STATE_FILE.format(self.args.process_index)
            file.write_text(self.stream.state.to_json() + "\n", encoding="utf-8")
