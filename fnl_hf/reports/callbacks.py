"""Callbacks during training: diagnostics of the products, a readable progress bar, new masks in each epoch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from fnl_hf.products.diagnostics import diagnose_products
from fnl_hf.products.discovery import find_products
from fnl_hf.reports.throughput import ThroughputMeter

NORM_PREFIX = "norms/"
NOT_PRINTED = ("grad_norm", "data_wait", "peak_memory_gb", "epoch")  # logged with the loss for plots and trackers


def logged_diagnostics(model: torch.nn.Module, lr: float) -> dict[str, float]:
    """{"norms/<kind>/<product>/<diagnostic>": ...}: :func:`fnl_hf.diagnose_products` of every product of the model.

    All figures are copied to the host in one transfer.
    """
    products = find_products(model)
    kinds = {product.name: product.kind for product in products}
    figures = {
        f"{NORM_PREFIX}{kinds[name]}/{name}/{key}": value
        for name, values in diagnose_products(products, lr).items()
        for key, value in values.items()
    }
    return dict(zip(figures, torch.stack(list(figures.values())).tolist())) if figures else {}


class ProductNormsCallback(TrainerCallback):
    """Logs the diagnostics of all products through the Trainer's trackers.

    Args:
        trainer: the Trainer it is added to (``trainer.add_callback(ProductNormsCallback(trainer))``).
        every: optimizer steps between two logs; None for Trainer's own logging steps.
        paused: a context in which the diagnostics do not count as training time.
    """

    def __init__(self, trainer, every: int | None = None, paused: Callable[[], AbstractContextManager] = nullcontext):
        self.trainer, self.every, self.paused = trainer, every, paused

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log(control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        # DefaultFlowCallback runs first and has decided whether this step is logged.
        if control.should_log if self.every is None else state.global_step % self.every == 0:
            self._log(control, **kwargs)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.every is None and control.should_log:
            self._log(control, **kwargs)

    def _log(self, control, model=None, optimizer=None, **kwargs):
        should_log = control.should_log
        unwrapped = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)  # its names have no prefix
        with self.paused():
            self.trainer.log(logged_diagnostics(unwrapped, _learning_rate(optimizer)))
        control.should_log = should_log  # logging resets it; the loss of this step follows


def _learning_rate(optimizer) -> float:
    """The learning rate of the first group of products, else of the first group."""
    groups = sorted(optimizer.param_groups, key=lambda group: group.get("product") is None)
    return float(groups[0]["lr"])


class TrainingClockCallback(TrainerCallback):
    """Stops the clock of a :class:`ThroughputMeter` while Trainer logs, evaluates and saves after a step or an epoch.

    The next batch starts it again, or the next epoch, which first starts its workers.
    """

    def __init__(self, meter: ThroughputMeter):
        self.meter = meter

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_begun = False

    def on_step_end(self, args, state, control, **kwargs):
        self.has_begun = True
        if control.should_log or control.should_evaluate or control.should_save:
            self.meter.stop()

    on_epoch_end = on_step_end

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.has_begun:
            self.meter.start()


class _ReadableLogs:
    """Prints logs without the entries for plots and trackers."""

    training_bar: Any = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if any(name.startswith(NORM_PREFIX) for name in logs):
            return
        if "loss" in logs:
            logs = {name: value for name, value in logs.items() if name not in NOT_PRINTED}
        for unit in ("tokens", "images"):
            if f"{unit}_per_second" in logs and self.training_bar is not None:
                self.training_bar.set_postfix_str(f"{logs[f'{unit}_per_second']:,.0f} {unit}/s")
        super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[misc]


class ReadableProgressCallback(_ReadableLogs, ProgressCallback):
    """Trainer's progress bar with the last logged speed, in tokens or images per second."""


class ReadablePrinterCallback(_ReadableLogs, PrinterCallback):
    """What Trainer prints with ``disable_tqdm``."""


def add_fnl_callbacks(trainer) -> None:
    """Give a Trainer the callbacks above."""
    for stock, ours in ((ProgressCallback, ReadableProgressCallback), (PrinterCallback, ReadablePrinterCallback)):
        if trainer.pop_callback(stock) is not None:
            trainer.add_callback(ours)
    trainer.add_callback(ProductNormsCallback(trainer, trainer.args.product_norms_steps, trainer.throughput.paused))
