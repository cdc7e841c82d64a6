"""Evaluation in half precision that leaves the model unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def keeping_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within the context, a model may be cast or moved in place; afterwards its tensors are the original ones,
    bit-identical and without a copy. Not for sharded models, whose parameters are views of their shards.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    tensors = [(tensor, tensor.data) for tensor in [*parameters, *gradients]]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for tensor, data in tensors:
            tensor.data = data
        for module, own in buffers:  # Module.to replaces them
            module._buffers.update(own)
