"""Text from files as the calibration data of conversions and factorizations."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf.data.corpus import load_text_files
from fnl_hf.errors import UserInputError

BATCH_SIZE = 16
SAMPLES, LENGTH = 256, 128  # unless the user says otherwise


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


def describe_calibration(files: Sequence[str], documents: int, max_seq_length: int) -> str:
    """For a model card."""
    names = ", ".join(name.rpartition("/")[2] for name in files)
    return f"{documents} documents of {names}, at most {max_seq_length} tokens of each"


def refuse_misfit(model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """
    Raises:
        UserInputError: texts longer than the model's positions, or ids beyond its table.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    if positions is not None and longest > positions:
        raise UserInputError(f"--max_seq_length ({longest}) must be at most {positions}, the model's positions")
    entries = model.get_input_embeddings().weight.shape[0]
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if largest >= entries:
        raise UserInputError(f"the tokenizer's id {largest} must be below {entries}, the entries of the model's table")
