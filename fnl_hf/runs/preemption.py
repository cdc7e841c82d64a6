"""SIGTERM, which schedulers send before they take a machine away: save, and exit with a status that means "try
again"."""

import atexit
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from transformers import TrainerCallback

AGREEMENT_STEPS = 10  # between two queries of all processes on an accelerator, where reading the answer synchronizes
GRACE_SECONDS = 1.0  # time for child processes to end on SIGTERM


@contextmanager
def sigterm_handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within the context, SIGTERM calls ``handler``. Outside of the main thread, Python does not allow handlers and
    nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def surviving_sigterm(then: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """A ``worker_init_fn`` for workers that ignore SIGTERM but still end with this process.

    A scheduler also signals the workers, but the checkpoint needs them for its last step.

    Args:
        then: another one, which is called as well.
    """
    _register_end_of_workers()
    return partial(ignore_sigterm, then)


def ignore_sigterm(then: Callable[[int], None] | None, worker: int) -> None:
    """Make a worker ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)


@cache
def _register_end_of_workers() -> None:
    atexit.register(end_workers)  # runs before multiprocessing's own handler, which was registered earlier


def end_workers() -> None:
    """End all daemonic processes of ``multiprocessing``, as the interpreter does at its end, including those that
    ignore SIGTERM. The interpreter sends SIGTERM and waits: for ever, if an exception's traceback keeps a DataLoader's
    iterator and its workers alive.
    """
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if not workers:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is killed
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        worker.kill()


class PreemptionCallback(TrainerCallback):
    """Stops training at the end of a step, on all processes together, when one process was asked to stop.

    A last step ends training as usual. Otherwise the trainer saves once, after the logs and evaluations of the step and
    its epoch, unless ``saved_step`` is this step: replacing a checkpoint would leave none for a moment.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.is_requested = False
        self.is_stopping = False
        self.saved_step: int | None = None

    def request(self, signum: int, frame: Any) -> None:
        """The signal's handler; a second signal, even during the save, has no effect."""
        self.is_requested = True

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_training_stop and self._was_any_requested(args, state):
            self.is_stopping = control.should_training_stop = True
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        """Trainer ends the epoch here, complete or not."""
        if self.is_stopping:
            control.should_save = False
            if not float(state.epoch).is_integer():
                control.should_log = control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step

    def _was_any_requested(self, args, state) -> bool:
        """Whether any process was asked to stop; the same answer on all of them."""
        if args.world_size == 1:
            return self.is_requested
        if args.device.type != "cpu" and state.global_step % AGREEMENT_STEPS:
            return False
        requested = torch.tensor(self.is_requested, dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX)
        return bool(requested.item())
