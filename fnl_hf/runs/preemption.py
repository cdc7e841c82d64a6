"""SIGTERM, which schedulers send before they take a machine away, and Ctrl-C: save, and exit with a status that says
so."""

import atexit
import multiprocessing
import os
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


SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@contextmanager
def signals_handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within the context, SIGTERM and Ctrl-C call ``handler``. Outside of the main thread, Python does not allow
    handlers and nothing changes; nor does it for Ctrl-C where it is ignored, as in a background job of a shell script.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, handler) for number in SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, signal.SIG_DFL if own is None else own)


def surviving_signals(then: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """A ``worker_init_fn`` for workers that ignore SIGTERM and Ctrl-C but still end with this process.

    A scheduler or terminal also signals the workers, but the checkpoint needs them for its last step.

    Args:
        then: another one, which is called as well.
    """
    _register_end_of_workers()
    return partial(ignore_signals, then)


def ignore_signals(then: Callable[[int], None] | None, worker: int) -> None:
    """Make a worker ignore SIGTERM and Ctrl-C."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
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
        self.signal = signal.SIGTERM  # if another process was signalled
        self.is_stopping = False
        self.saved_step: int | None = None

    def request(self, signum: int, frame: Any) -> None:
        """The handler of SIGTERM and Ctrl-C. A second SIGTERM, even during the save, has no effect; a second Ctrl-C
        ends at once and leaves earlier checkpoints.

        Raises:
            KeyboardInterrupt: the second Ctrl-C.
        """
        if signum == signal.SIGINT:
            if self.is_requested and self.signal == signal.SIGINT:
                raise KeyboardInterrupt
            # not with print: the signal may come within a print
            os.write(2, b"\nSaving a checkpoint after this step, then stopping. Press Ctrl-C again to stop at once\n")
        self.is_requested, self.signal = True, signal.Signals(signum)

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
