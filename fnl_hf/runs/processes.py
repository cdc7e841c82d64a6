"""Decisions that several processes must make alike."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fnl_hf.errors import UserInputError

Decision = TypeVar("Decision")


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, by rank. All processes must call this, with picklable values."""
    if not _is_distributed():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def decide_on_first_process(decide: Callable[[], Decision]) -> Decision:
    """Return the result of ``decide`` on the first process, or raise its UserInputError, on all processes; also for a
    disk that is full or a folder that cannot be read, at which the others would wait for the first one's decision."""
    decision: Any = None
    if not _is_distributed() or torch.distributed.get_rank() == 0:
        try:
            decision = decide()
        except UserInputError as error:
            decision = error
        except OSError as error:
            decision = UserInputError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    decision = gather_objects(decision)[0]
    if isinstance(decision, UserInputError):
        raise decision
    return decision


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
