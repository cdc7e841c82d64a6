"""Text from files as the calibration data of conversions and factorizations."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf.data.corpus import load_text_files
from fnl_hf.data.readers import check_file
from fnl_hf.data.tokenizer import validate_vocabulary
from fnl_hf.errors import validate_bounds
from fnl_hf.training.models import usable_positions

BATCH_SIZE = 16
SAMPLES, LENGTH = 256, 128  # unless the user sets them


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[str], samples: int, max_seq_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs from the first ``samples`` documents of text files, each cut to ``max_seq_length`` tokens: the
    ``calibration`` of ``from_bert`` and :func:`fnl_hf.factorize`."""
    texts = load_text_files(list(files))["text"][:samples] if files else []
    can_pad = tokenizer.pad_token is not None
    size = BATCH_SIZE if can_pad else 1
    for start in range(0, len(texts), size):
        yield dict(
            tokenizer(
                texts[start : start + size],
                truncation=True,
                max_length=max_seq_length,
                padding=can_pad,
                return_tensors="pt",
            )
        )


def validate_calibration(files: Sequence[str], samples: int, max_seq_length: int) -> None:
    """What can be known before a model is loaded.

    Raises:
        UserInputError: a number below 1, or a file that cannot be read.
    """
    validate_bounds("calibration_samples", samples, 1)
    validate_bounds("max_seq_length", max_seq_length, 1)
    for file in files:
        check_file(file)


def describe_calibration(files: Sequence[str], documents: int, max_seq_length: int) -> str:
    """The calibration data in a model card."""
    names = ", ".join(name.rpartition("/")[2] for name in files)
    return f"{documents} documents of {names}, up to {max_seq_length} tokens each"


def usable_length(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_seq_length: int) -> int:
    """``max_seq_length``, limited by the model's positions.

    Raises:
        UserInputError: no room for a token beside the special ones, or a tokenizer with ids that the model has not.
    """
    config = model.config
    bounds = (getattr(config, "max_position_embeddings", None), usable_positions(model))
    length = min(max_seq_length, *filter(None, bounds))
    validate_bounds("max_seq_length", length, tokenizer.num_special_tokens_to_add() + 1)
    if hasattr(config, "vocab_size"):
        validate_vocabulary(tokenizer, config.vocab_size)
    return length
