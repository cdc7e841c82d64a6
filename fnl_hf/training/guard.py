"""A non-finite loss or gradient never reaches the weights: its step is skipped and counted. Spikes are reported."""

import math
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from fnl_hf.errors import TrainingDiverged
from fnl_hf.optim import Lamb
from fnl_hf.runs.checkpoints import newest_complete_checkpoint

logger = logging.get_logger(__name__)

SKIPPED, SPIKES = "skipped_steps", "spikes"  # entries of the log: the number in the run so far
# spikes are values above these multiples of the running median of the last logged values
SPIKE_FACTORS = {"loss": 2.0, "grad_norm": 10.0}
MEDIAN_OF, MEDIAN_FROM = 20, 5  # maximum and minimum number of logged values


def nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself, or NaN with a NaN gradient if it is not finite.

    An infinite loss can have a finite gradient. All processes see the same gradients, so they agree on which steps to
    skip.
    """
    factor = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
    return loss * factor.to(loss.dtype)


class LossGuard(TrainerCallback):
    """Skips the optimizer step if the gradient norm over all processes is not finite.

    Weights, moments and the optimizer's step counts stay unchanged; learning rate and data advance. On an accelerator
    with fused kernels, nothing waits for the norm: the kernels skip by themselves, and the count is read when logs are
    written and checkpoints saved. Muon and kernels that are not fused cannot skip, so each step waits for its norm.
    With fp16, the loss scaler skips steps as usual; only those whose loss itself is not finite are counted.

    Raises:
        TrainingDiverged: more than ``args.max_skipped_steps`` steps of the run were skipped.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.is_scaled = self.trainer.accelerator.scaler is not None
        self.optimizer: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate's is a wrapper
        self.is_synchronous = args.device.type == "cpu" or not _supports_found_inf(self.optimizer)
        self.skipped = next((row[SKIPPED] for row in reversed(state.log_history) if SKIPPED in row), 0)
        self.skipped_before = self.skipped  # in earlier starts of the run
        self.not_counted = torch.zeros((), device=args.device)

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss_before = self.trainer._tr_loss.clone()

    def examine(self, norm: torch.Tensor) -> None:
        """Decide whether to skip the step whose gradients have this norm, before the optimizer step."""
        loss = self.trainer._tr_loss  # summed for the log, where a single NaN would persist
        if self.is_scaled:  # the gradients may only have overflowed; the loss is that of one process
            bad = self.trainer.accelerator.gather((~torch.isfinite(loss)).float().reshape(1)).any()
        else:
            bad = ~torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        loss.copy_(torch.where(bad, self.loss_before, loss))
        self.not_counted += bad
        if self.is_scaled:
            return
        # The first step creates the optimizer state: if it is skipped, torch's fused SGD creates it from uninitialized
        # memory.
        if self.is_synchronous or not self.optimizer.state:
            if bad:
                self.optimizer.zero_grad(set_to_none=True)
        else:
            self.optimizer.found_inf = bad.float()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if hasattr(self.optimizer, "found_inf"):
            del self.optimizer.found_inf

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_synchronous or control.should_log:
            self.count()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.count()

    def count(self) -> None:
        """Add up and log the steps skipped since the last count; waits for the device."""
        trainer, state, bound = self.trainer, self.trainer.state, self.trainer.args.max_skipped_steps
        new = int(self.not_counted.item())
        if new == 0:
            return
        self.not_counted.zero_()
        self.skipped += new
        trainer._globalstep_last_logged += new  # the logged loss is a mean over the steps that were not skipped
        if trainer.is_world_process_zero():
            logger.warning(
                f"skipped {new} step(s) up to step {state.global_step}: the loss or gradient is not finite. Skipped "
                f"in all: {self.skipped}, allowed: {bound}"
            )
        should_log = trainer.control.should_log
        trainer.log({SKIPPED: self.skipped})
        trainer.control.should_log = should_log  # logging resets it
        if self.skipped > bound:
            newest = newest_complete_checkpoint(Path(trainer.args.output_dir))
            raise TrainingDiverged(
                f"step {state.global_step}: the loss or gradient was not finite in {self.skipped} steps, more than "
                f"--max_skipped_steps ({bound}). "
                + (f"The newest complete checkpoint is {newest}" if newest else "There is no complete checkpoint yet")
            )

    def mean_of_trained(self, mean_loss: float, steps: int) -> float:
        """The mean loss of this start's steps without those that were skipped, whose loss counts as 0 in Trainer's."""
        trained = steps - (self.skipped - self.skipped_before)
        return mean_loss * steps / trained if trained > 0 else mean_loss

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        found = [spike for name in SPIKE_FACTORS if (spike := _spike(state.log_history, name))]
        if found:
            if self.trainer.is_world_process_zero():
                logger.warning(f"step {state.global_step}: spike: {'; '.join(found)}")
            before = next((row[SPIKES] for row in reversed(state.log_history) if SPIKES in row), 0)
            self.trainer.log({SPIKES: before + 1})


def _spike(history: list[dict[str, float]], name: str) -> str | None:
    """A description of the newest value of that name if it is a spike."""
    values = (row[name] for row in reversed(history) if math.isfinite(row.get(name, math.nan)))
    newest = history[-1].get(name, math.nan)
    past = list(islice(values, 1, 1 + MEDIAN_OF)) if math.isfinite(newest) else []
    usual = statistics.median(past) if len(past) >= MEDIAN_FROM else math.inf
    if newest > SPIKE_FACTORS[name] * usual:
        return f"{name} {newest:.4g} is above {SPIKE_FACTORS[name]:g} times its running median {usual:.4g}"
    return None


def _supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` changes nothing if ``optimizer.found_inf`` is 1, without synchronizing with the host.

    Fused kernels support it. A loaded state may have replaced the kernels that the optimizer was created with.
    """
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    return is_fused and (isinstance(optimizer, Lamb) or getattr(optimizer, "_step_supports_amp_scaling", False))
