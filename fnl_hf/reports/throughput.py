"""Speed of a training run: tokens or images per second, model FLOPs utilization, waiting for data, memory.

Shapes: P processes, B batch, S sequence, d hidden size.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import BertPreTrainedModel

from fnl_hf.layers import FactorizedLayer
from fnl_hf.reports.flops import device_peak_flops, synchronize, training_flops

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass
class Window:
    """The work of one process between two log entries. Counts that only the device knows stay there until they are
    read."""

    seconds: float = 0.0  # of training
    waited: float = 0.0  # part of these seconds, waiting for batches
    tokens: int | torch.Tensor = 0  # or images
    flops: int = 0
    predicted: int | torch.Tensor = 0  # positions of the masked language modeling head that ``flops`` does not include

    def __add__(self, other: "Window") -> "Window":
        return Window(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class ThroughputMeter:
    """Counts and times the batches of a training loop on each process; its figures are for all processes together.
    Batches with "pixel_values" are counted in images, all others in tokens.

    The clock starts with the first batch and stands still in :meth:`paused`. Reading figures is a collective operation
    and waits for the device; counting never does. Positions beyond the sequence's end are computed, so that they count
    for utilization, but are no tokens.

    Args:
        model: figures of utilization are given for BERT, ours or stock, unless it has factorized layers.
        device: where this process trains.
        dtype: of the matrix multiplications.
        gather: concatenates tensors (1, n) of all processes along the first dimension.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.watch(model)
        self.device, self.dtype, self.gather = device, dtype, gather
        self.unit = "tokens"
        self._reset()

    def watch(self, model: torch.nn.Module) -> None:
        """From now on, count the operations of this model in its current form."""
        self.config, self.predicts_tokens, self.pools_first_token = None, False, False
        is_factorized = any(isinstance(module, FactorizedLayer) for module in model.modules())
        if isinstance(model, BertPreTrainedModel) and not is_factorized:
            self.config = model.config
            self.predicts_tokens = model.get_output_embeddings() is not None
            self.pools_first_token = model.base_model.pooler is not None

    def _reset(self) -> None:
        self._running_since: float | None = None
        self._window = Window()
        self._first: Window | None = None
        self._total = Window()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def batches(self, iterator: Iterator[Mapping[str, torch.Tensor]]) -> Iterator[Mapping[str, torch.Tensor]]:
        """The same batches, counted; measures the time spent waiting for them."""
        self.start()
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._window.waited += time.perf_counter() - asked
            self._count(batch)
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Logging, saving and evaluation do not count as training; pending work of the device does, so wait for it
        first."""
        was_running = self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()

    def close_window(self) -> dict[str, float]:
        """Figures since the last call: "tokens_per_second" or "images_per_second", "mfu" (0 to 1), "data_wait" (share
        of the training time, of the process that waited longest) and "peak_memory_gb" (10⁹ bytes, of the process that
        needs most: the tensors on its GPU since the run began, elsewhere all that it has had since its start)."""
        window, self._window = self._window, Window()
        if self._first is None:
            self._first = window
        else:
            self._total += window
        return self._figures(window)

    def close_run(self) -> dict[str, float]:
        """The same figures, as "train_...", of the whole run without its first window, in which caches fill and graphs
        are compiled; of the first window if it is the only one."""
        self.stop()
        total = self._total + self._window
        if self._first is not None and not int(total.tokens):
            total = self._first
        figures = self._figures(total)
        self._reset()
        return {f"train_{name}": value for name, value in figures.items()}

    def peak(self) -> str:
        """The peak rate to which "mfu" refers, in words, for example "989 TFLOP/s per device: data sheet of NVIDIA
        H100, bfloat16"."""
        flops, origin = device_peak_flops(self.device, self.dtype)
        return f"{1e-12 * flops:.3g} TFLOP/s per device: {origin}"

    def start(self) -> None:
        """Start the clock, unless it is running."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def stop(self) -> bool:
        """Stop the clock after the device has finished; False if it was not running."""
        if self._running_since is None:
            return False
        synchronize(self.device)
        self._window.seconds += time.perf_counter() - self._running_since
        self._running_since = None
        return True

    def _count(self, batch: Mapping[str, torch.Tensor]) -> None:
        if "pixel_values" in batch:
            self.unit = "images"
            self._window.tokens += len(batch["pixel_values"])
            return
        ids = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]  # (..., S)
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            self._window.tokens += mask.ne(0).sum()
        else:
            self._window.tokens += ids.numel()
        if self.config is not None:
            self._count_flops(batch, ids.numel() // ids.shape[-1], ids.shape[-1])

    def _count_flops(self, batch: Mapping[str, torch.Tensor], sequences: int, length: int) -> None:
        predicted, last_layer_positions = 0, None
        if self.predicts_tokens and "labels" in batch:
            if "masked_positions" in batch:
                predicted = batch["masked_positions"].shape[1]
                if getattr(self.config, "sparse_last_layer", False) and "cu_seq_lens_q" not in batch:
                    last_layer_positions = predicted + self.pools_first_token
            elif getattr(self.config, "sparse_prediction", False):
                self._window.predicted += batch["labels"].ne(-100).sum()
            else:
                predicted = length
        self._window.flops += sequences * training_flops(self.config, length, predicted, last_layer_positions)

    def _figures(self, window: Window) -> dict[str, float]:
        head_flops = 0 if self.config is None else training_flops(self.config, 0, int(window.predicted))
        peak = 0.0 if self.config is None else device_peak_flops(self.device, self.dtype)[0]
        memory = peak_memory(self.device)
        own = [int(window.tokens), window.flops + head_flops, window.seconds, window.waited, peak, memory]
        rows = self.gather(torch.tensor([[float(value) for value in own]], device=self.device))  # (P, 6)
        tokens, flops, seconds, waited, peaks, memories = rows.cpu().unbind(dim=1)
        if not seconds.min() > 0.0:
            return {}
        figures = {f"{self.unit}_per_second": tokens.sum() / seconds.max()}
        if self.config is not None:
            figures["mfu"] = flops.sum() / (seconds.max() * peaks.sum())
        figures["data_wait"] = (waited / seconds).max()
        if memories.max() > 0.0:
            figures["peak_memory_gb"] = memories.max() / 1e9
        return {name: value.item() for name, value in figures.items()}


def peak_memory(device: torch.device) -> int:
    """Peak bytes of the tensors on a GPU, otherwise of this process; 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
