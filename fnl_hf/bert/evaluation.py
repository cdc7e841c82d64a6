# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""A context for evaluation mode. This file travels with checkpoints: it imports only torch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` within the context; afterwards each module is in its previous mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
