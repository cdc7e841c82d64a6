"""Whether a checkpoint's model is the one at hand."""

import json
from collections.abc import Collection
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from fnl_hf.bert.configuration_fnl_bert import ORIGIN_ENTRIES
from fnl_hf.errors import UserInputError

# Arguments on which the optimizer state depends.
ARCHITECTURE = (
    "model_type",
    "architectures",
    "vocab_size",
    "type_vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "attention_embedding_size",
)
# Entries of a configuration that Trainer sets before it saves a model.
SET_BY_TRAINER = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


def validate_same_model(checkpoint: str | Path, model: PreTrainedModel, names: Collection[str] | None = None) -> None:
    """Compare class and configuration of a checkpoint's model with ``model``'s; only the entries ``names``, if given.

    Raises:
        UserInputError: they differ, or the checkpoint's cannot be read.
    """
    here = model.config.to_dict() | {"architectures": [type(model).__name__]}
    try:
        saved = dict(json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8")))
        there = type(model.config).from_dict(saved).to_dict()  # most defaults are not saved
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserInputError(f"checkpoint {checkpoint}: config.json cannot be read: {error}") from error
    there |= {name: saved.get(name) for name in ("model_type", "architectures")}
    ignored = {*ORIGIN_ENTRIES, *SET_BY_TRAINER} - {*ARCHITECTURE}
    differences = [
        f"{name} is {there.get(name)} in the checkpoint and {here.get(name)} in this model"
        for name in names or sorted(here.keys() - ignored)
        if there.get(name) != here.get(name) and not name.startswith("_")
    ]
    if differences:
        raise UserInputError(f"checkpoint {checkpoint} belongs to another model: {'; '.join(differences)}")
