"""The output heads of Transformers models."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def find_heads(model: nn.Module) -> Iterator[nn.Module]:
    """For ``model`` and each Transformers model inside of it, the modules outside of its base model, and its output
    embeddings. A task model without a base model has its own layers instead, unless it is a part of another model."""
    inner: set[nn.Module] = set()
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        if part.base_model is not part:
            of_base = set(part.base_model.modules())
            yield from (module for module in part.modules() if module not in of_base)
        elif part not in inner and not type(part).__name__.endswith("Model"):
            yield from (child for child in part.children() if not any(child.children()))
        head = part.get_output_embeddings()
        if head is not None:
            yield from head.modules()
        inner.update(part.modules())
