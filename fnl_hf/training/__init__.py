"""``transformers.Trainer`` with our optimizers, losses and checkpoints, and the flags of the training scripts."""

from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.trainer import FnlTrainer

__all__ = ["FnlTrainer", "FnlTrainingArguments"]
