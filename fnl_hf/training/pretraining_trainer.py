"""Pretraining: the data's order does not depend on the number of processes."""

from transformers.trainer_utils import has_length

from fnl_hf.errors import UserInputError
from fnl_hf.training.sampling import EpochSampler
from fnl_hf.training.trainer import FnlTrainer

SAMPLING_STRATEGIES = ("random", "sequential")


class PretrainingTrainer(FnlTrainer):
    """FnlTrainer whose epochs consist of whole global batches, the same ones however they are split.

    Raises:
        UserInputError: another ``train_sampling_strategy`` than random or sequential, or fewer sequences to train on
            than one global batch.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        strategy = self.args.train_sampling_strategy
        if strategy not in SAMPLING_STRATEGIES:
            raise UserInputError(f"--train_sampling_strategy ({strategy}) must be one of {SAMPLING_STRATEGIES}")
        if self.args.do_train:
            self._get_train_sampler()  # refuses too few sequences before anything is written

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        global_batch = self._train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochSampler(len(dataset), global_batch, seed, args.train_sampling_strategy == "random")
