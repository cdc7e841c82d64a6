"""Moments of all types of layers that can be factorized, by :mod:`fnl_hf.bert.moments`, and of many layers.

Shapes: as there; k_h and k_w kernel, L places of a convolution.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from fnl_hf.bert.moments import LayerMoments, measure_moments

MAX_BYTES = 2 * 2**30  # maximum memory for sums; further layers need another pass over the data


class Conv1DMoments(LayerMoments):
    """Moments of GPT-2's Conv1D, whose weight is stored as (n, c)."""

    def mean_output(self, change: torch.Tensor) -> torch.Tensor:
        return super().mean_output(change.T)


class EmbeddingMoments(LayerMoments):
    """Moments of an embedding: ``inputs`` (entries,) counts how often each entry was looked up."""

    def add_inputs(self, x: torch.Tensor, is_token: torch.Tensor | None) -> None:
        found = x[is_token] if is_token is not None and x.shape == is_token.shape else x.flatten()
        self.inputs = self.inputs + torch.bincount(found, minlength=self.layer.num_embeddings).float()
        self.rows += found.numel()

    def covariance(self, centred: bool) -> torch.Tensor:
        """Frequencies (entries,). Those that the text lacks are estimated as by Good (1953) and Turing: together they
        occur as often as all that occur once, but at least once, and each at most once. Positions are no random draws:
        those beyond the length of the text occur as often as the rarest one within it."""
        counts = self.inputs.double()
        found = counts.nonzero().flatten()
        missing = len(counts) - len(found)
        are_positions = found[-1] - found[0] == len(found) - 1  # without a gap
        once = max(int((counts == 1).sum()), 1)
        guess = counts[found].min() if are_positions else min(once / max(missing, 1), 1.0)
        counts = torch.where(counts == 0, guess, counts)
        return counts / counts.sum()

    @staticmethod
    def bytes_of(layer: Any) -> int:
        return 4 * (layer.num_embeddings + layer.embedding_dim**2)


class ConvMoments(LayerMoments):
    """Moments of a convolution: the rows of ``inputs`` are the 1×k_w patches of its input, which its first factor sees.

    Attributes:
        patch: Σ of the patches that the whole kernel sees, (c_in, k_h, k_w).
        patches: how many these are.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer)
        self.patch: Any = 0.0
        self.patches = 0

    def add_inputs(self, x: torch.Tensor, is_token: torch.Tensor | None) -> None:
        super().add_inputs(x, is_token)
        padded = self._pad(x.float().reshape(-1, *x.shape[-3:]), self.layer._reversed_padding_repeated_twice)
        layer = self.layer
        whole = F.unfold(padded.sum(dim=0, keepdim=True), layer.kernel_size, layer.dilation, 0, layer.stride)
        self.patch = self.patch + whole.sum(dim=(0, 2)).view(layer.in_channels, *layer.kernel_size)
        self.patches += whole.shape[2] * len(padded)

    def mean_output(self, change: torch.Tensor) -> torch.Tensor:
        mean = self.patch.double().unflatten(0, (self.layer.groups, -1)) / self.patches  # (K, n/k_w, k_h, k_w)
        grouped = change.double().unflatten(0, (self.layer.groups, -1))  # (K, c, n/k_w, k_h, k_w)
        return (grouped * mean[:, None]).sum(dim=(2, 3, 4)).flatten()

    def _pad(self, x: torch.Tensor, around: list[int]) -> torch.Tensor:
        mode = "constant" if self.layer.padding_mode == "zeros" else self.layer.padding_mode
        return F.pad(x, around, mode) if any(around) else x

    def _input_rows(self, x: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
        layer = self.layer
        left, right = layer._reversed_padding_repeated_twice[:2]
        padded = self._pad(x.float().reshape(-1, *x.shape[-3:]), [left, right, 0, 0])
        width, dilation, stride = layer.kernel_size[1], layer.dilation[1], layer.stride[1]
        patches = F.unfold(padded, (1, width), (1, dilation), 0, (1, stride))  # (B, c_in·k_w, L)
        return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def _gradient_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        grouped = gradient.flatten(-2).unflatten(-2, (self.layer.groups, -1))  # (B, K, c, L)
        return grouped.reshape(-1, *grouped.shape[-3:]).permute(1, 0, 3, 2).flatten(1, 2)

    @staticmethod
    def bytes_of(layer: Any) -> int:
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        return 4 * layer.groups * ((inputs * layer.kernel_size[1]) ** 2 + outputs**2)


def moments_class(layer: nn.Module) -> type[LayerMoments]:
    """The class for a dense layer's type."""
    if isinstance(layer, nn.Conv2d):
        return ConvMoments
    if isinstance(layer, nn.Embedding):
        return EmbeddingMoments
    return LayerMoments if isinstance(layer, nn.Linear) else Conv1DMoments


def collect_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]
) -> Iterator[tuple[str, LayerMoments]]:
    """(name, moments) of each of ``layers``, by :func:`fnl_hf.bert.moments.measure_moments`: in several passes over the
    data if the sums take more than ``MAX_BYTES``, so that a caller who consumes them needs no more memory.

    Raises:
        ValueError: see there.
    """
    batches = list(batches)
    for part in _parts(layers):
        moments = {name: moments_class(layer)(layer) for name, layer in part.items()}
        measure_moments(model, moments, logging.tqdm(batches, desc="Calibrating", unit="batch"))
        yield from logging.tqdm(moments.items(), desc="Truncating", unit="layer")  # what the caller does with each


def _parts(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The layers, in parts whose sums fit."""
    part: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items():
        added = moments_class(layer).bytes_of(layer)
        if part and size + added > MAX_BYTES:
            yield part
            part, size = {}, 0
        part[name] = layer
        size += added
    yield part
