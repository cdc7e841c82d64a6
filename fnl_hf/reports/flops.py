"""Model FLOPs utilization: the operations of a training step, and the peak rate of a device."""

import functools
import re
import time
from typing import NamedTuple

import torch
from transformers import BertConfig

MEASURING_SECONDS = 0.3


class PeakRates(NamedTuple):
    """Dense matrix multiplications, TFLOP/s. None: not on tensor cores, so the data sheet has no useful figure."""

    bfloat16: float | None
    float16: float | None
    tf32: float | None
    float32: float | None


# Without sparsity, accumulated in float32, at the boost clock, from NVIDIA's data sheets (H100, H200, A100, L40S, L4,
# A10, V100, T4) and white papers (GA102, Ada). The first pattern found in the device's name applies.
DATA_SHEETS = {
    r"H[12]00 NVL": PeakRates(835, 835, 417, 60),
    r"H100 PCIe": PeakRates(756, 756, 378, 51),
    r"H[12]00\b": PeakRates(989, 989, 494, 67),
    r"A100\b": PeakRates(312, 312, 156, 19.5),
    r"L40S\b": PeakRates(362, 362, 183, 91.6),
    r"L4\b": PeakRates(121, 121, 60, 30.3),
    r"A10\b": PeakRates(125, 125, 62.5, 31.2),
    r"V100-SXM": PeakRates(None, 125, None, 15.7),
    r"V100-PCIE": PeakRates(None, 112, None, 14),
    r"T4\b": PeakRates(None, 65, None, 8.1),
    r"RTX 4090$": PeakRates(165, 165, 82.6, 82.6),
    r"RTX 3090$": PeakRates(71, 71, 35.6, 35.6),
}


def training_flops(
    config: BertConfig, sequence_length: int, predicted_positions: int, last_layer_positions: int | None = None
) -> int:
    """FLOPs of the matrix multiplications of one sequence's forward and backward pass; the latter is twice the former.

    With S = ``sequence_length``, of layers of hidden size d, attention embedding size E and feed-forward size i:
    query, key, value and output 8·S·d·E, scores and mixing 4·S²·E, feed-forward 4·S·d·i; of the masked language
    modeling head, of a vocabulary of V, 2·d·(d + V) for each of ``predicted_positions``. The same for stock BERT,
    where E = d. A last layer that is run for ``last_layer_positions`` alone (``sparse_last_layer``) has keys and values
    everywhere, all else there. Whole S × S attention is counted, whatever is masked out of it; recomputed activations
    are not.
    """
    hidden_size = config.hidden_size
    embedding_size = getattr(config, "mha_embedding_size", hidden_size)

    def layer(positions: int) -> int:
        keys_and_values = 4 * sequence_length * hidden_size * embedding_size
        queries_and_outputs = 4 * positions * hidden_size * embedding_size
        attention = 4 * positions * sequence_length * embedding_size
        feed_forward = 4 * positions * hidden_size * config.intermediate_size
        return keys_and_values + queries_and_outputs + attention + feed_forward

    last = layer(sequence_length if last_layer_positions is None else last_layer_positions)
    head = 2 * predicted_positions * hidden_size * (hidden_size + config.vocab_size)
    return 3 * ((config.num_hidden_layers - 1) * layer(sequence_length) + last + head)


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak rate of dense matrix multiplications in ``dtype``, in FLOP/s, and the source of this figure.

    For the GPUs in ``DATA_SHEETS`` it is from the data sheet ("data sheet of <device>, <precision>"), for other devices
    the measured rate of large square multiplications on the cores of this process ("measured on <device>, ...").
    float32 means TF32 if it is enabled.
    """
    name, precision = _device_name(device), str(dtype).removeprefix("torch.")
    if device.type == "cuda" and dtype == torch.float32 and _tf32_is_enabled():
        precision = "tf32"
    peak = data_sheet_peak(name, precision) if device.type == "cuda" else None
    if peak is not None:
        return peak, f"data sheet of {name}, {precision}"
    return _measured_peak(device, dtype), f"measured on {name}, {precision}"


def data_sheet_peak(name: str, precision: str) -> float | None:
    """FLOP/s of the GPU that CUDA calls ``name``; None for an unknown GPU, and for a part of one (MIG)."""
    if " MIG " in name:
        return None
    rates = next((rates for pattern, rates in DATA_SHEETS.items() if re.search(pattern, name)), None)
    rate = getattr(rates, precision, None)
    return None if rate is None else 1e12 * rate


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _tf32_is_enabled() -> bool:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32  # before 2.9


@functools.cache
def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best measured rate of square multiplications, FLOP/s: other work on the same cores can only slow them
    down."""
    size = 1024 if device.type == "cpu" else 4096
    generator = torch.Generator(device).manual_seed(0)  # the global generator belongs to the training run
    matrix = torch.rand(size, size, generator=generator, device=device).to(dtype)
    matrix @ matrix  # the first one allocates memory and selects kernels
    rates: list[float] = []
    ends = time.perf_counter() + MEASURING_SECONDS
    while not rates or time.perf_counter() < ends:
        synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        rates.append(2 * size**3 / (time.perf_counter() - began))
    return max(rates)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
