# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation mode for a while. This file travels with checkpoints: it imports only torch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()``; afterwards each of its modules is in the mode that it was in, which need not be the same."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
