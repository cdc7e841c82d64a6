"""Text from files as the calibration data of conversions and factorizations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf.data.corpus import load_text_files
from fnl_hf.data.readers import check_file
from fnl_hf.data.tokenizer import validate_vocabulary
from fnl_hf.errors import validate_bounds
from fnl_hf.training.models import usable_positions

BATCH_SIZE = 16
SAMPLES, LENGTH = 256, 128  # unless the user sets them


@dataclass(frozen=True)
class CalibrationText:
    """Documents on which a trained model's truncation is calibrated.

    Args:
        files: text files; none if the weights alone say which directions count.
        samples: the number of documents, from the first one on.
        max_seq_length: to which each document is cut, in tokens, special ones included.
        text_column: the column with the text in files that have columns.
    """

    files: Sequence[str] = ()
    samples: int = SAMPLES
    max_seq_length: int = LENGTH
    text_column: str = "text"

    def validate(self) -> None:
        """What can be known before a model is loaded.

        Raises:
            UserInputError: a number below 1, or a file that cannot be read.
        """
        validate_bounds("calibration_samples", self.samples, 1)
        validate_bounds("max_seq_length", self.max_seq_length, 1)
        for file in self.files:
            check_file(file)

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, torch.Tensor]]:
        """The ``calibration`` of ``from_bert`` and :func:`fnl_hf.factorize`.

        Raises:
            UserInputError: a file without text, or without the column.
        """
        files = list(self.files)
        texts = load_text_files(files, self.text_column, strict=None)["text"][: self.samples] if files else []
        can_pad = tokenizer.pad_token is not None
        size = BATCH_SIZE if can_pad else 1
        for start in range(0, len(texts), size):
            yield dict(
                tokenizer(
                    texts[start : start + size],
                    truncation=True,
                    max_length=self.max_seq_length,
                    padding=can_pad,
                    return_tensors="pt",
                )
            )

    def describe(self, documents: int) -> str:
        """What a model card says of it."""
        names = ", ".join(name.rpartition("/")[2] for name in self.files)
        return f"{documents} documents of {names}, up to {self.max_seq_length} tokens each"

    def cut_for(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> "CalibrationText":
        """The same documents, cut to the positions of ``model``.

        Raises:
            UserInputError: no room for a token beside the special ones, or a tokenizer with ids that the model has not.
        """
        config = model.config
        bounds = (getattr(config, "max_position_embeddings", None), usable_positions(model))
        length = min([self.max_seq_length, *filter(None, bounds)])
        validate_bounds("max_seq_length", length, tokenizer.num_special_tokens_to_add() + 1)
        if hasattr(config, "vocab_size"):
            validate_vocabulary(tokenizer, config.vocab_size)
        return replace(self, max_seq_length=length)


WEIGHTS_ALONE = CalibrationText()
