# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""Measure on calibration data which inputs a model's layers get, and how much their outputs matter.

If the weight of a layer y = W x + b changes by Δ, the outputs of the model change by J Δ x to first order, where J is
their derivative with respect to y. With C = E[x xᵀ] and G = Σ Jᵀ J the squared change is ⟨G, Δ C Δᵀ⟩ if x and J are
independent: the Gauss-Newton approximation with Kronecker factors (Martens and Grosse 2015, arXiv 1503.05671). It has
the unit of the model's outputs for all layers, so they can share a budget. No labels are needed: Jᵀ J is the second
moment of Jᵀ v for random directions v of the outputs with E[v vᵀ] = I.

This file travels with checkpoints: it imports only torch, and its neighbors by relative name.

Shapes: B batch, S sequence, N rows that a layer is applied to, K groups of a convolution, else 1, n inputs and c
outputs of a group.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .evaluation import evaluation_mode

SEED = 0  # of the directions v
KERNEL = "_attn_implementation"  # entry of a configuration, which sets those within it, too
POSITION_LOGITS = ("start_logits", "end_logits")  # (B, S), over the tokens of a sequence
# Keys and values of a decoder's attention to the encoder, by the names of BART, T5 and BERT.
CROSS_KEYS = re.compile(r"(?:encoder_attn|EncDecAttention|crossattention)\.(?:\w+\.)*(?:k|v|key|value)(?:_proj)?$")


class LayerMoments:
    """Sums over the inputs and output gradients of a Linear layer, in float32.

    Attributes:
        rows: N.
        inputs: Σ x xᵀ (K, n, n).
        total: Σ x (K, n).
        outputs: Σ Jᵀ J (K, c, c).
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.rows = 0
        self.inputs: Any = 0.0
        self.total: Any = 0.0
        self.outputs: Any = 0.0

    def add_inputs(self, x: torch.Tensor, is_token: torch.Tensor | None) -> None:
        """Add the layer's input, without rows of padding if ``is_token`` (B, S) marks them."""
        rows = self._input_rows(x, is_token)  # (K, N, n)
        self.inputs = self.inputs + rows.mT @ rows
        self.total = self.total + rows.sum(dim=1)
        self.rows += rows.shape[1]

    def add_gradients(self, gradient: torch.Tensor) -> None:
        """Add Jᵀ v of the layer's output; it is 0 at padding, on which nothing depends."""
        rows = self._gradient_rows(gradient.float())  # (K, N, c)
        self.outputs = self.outputs + rows.mT @ rows

    def covariance(self, centred: bool) -> torch.Tensor:
        """C (K, n, n), float64; about the mean if ``centred``."""
        second = self.inputs.double() / self.rows
        if not centred:
            return second
        mean = self.total.double() / self.rows
        return second - mean[:, :, None] * mean[:, None, :]

    def mean_output(self, change: torch.Tensor) -> torch.Tensor:
        """E[Δ x] (c,) for a change of the weight, as the layer stores it."""
        return change.double() @ (self.total[0].double() / self.rows)

    def _input_rows(self, x: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
        return _tokens(x, is_token).float()[None]

    def _gradient_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flatten(0, -2)[None]

    @staticmethod
    def bytes_of(layer: Any) -> int:
        """Memory for the sums of a layer."""
        rows, columns = layer.weight.shape
        return 4 * (rows**2 + columns**2)


def measure_moments(model: nn.Module, moments: Mapping[str, LayerMoments], batches: Iterable[Any]) -> None:
    """Add calibration data to the moments of layers of ``model``, given by name.

    ``model`` is run in evaluation mode, on its device, forward and backward, and left as it was.

    Args:
        batches: what ``model`` is called with: mappings of its arguments, tuples of them, or a tensor. An
            ``attention_mask`` (B, S), or (B, choices, S), tells padding; for the decoder of a model that has an
            encoder, too, a ``decoder_attention_mask`` does. Labels are of no use.

    Raises:
        ValueError: no batch, one that the model cannot be called with, text that is not tokenized, or outputs without a
            tensor that depends on the layers.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(SEED)
    empty = True
    with evaluation_mode(model), _frozen(model), _with_backward(model, device), _recording(model, moments) as record:
        for batch in batches:
            empty = False
            arguments = _arguments(batch, device)
            record.masks = _masks_of(model, arguments)
            _project(_call(model, arguments), record.masks, generator).backward()
    if empty:
        raise ValueError("the calibration data have no batch")


class _Masks(NamedTuple):
    """Which tokens (B, S) are no padding, of a model's input and of its decoder's; without a decoder the same."""

    source: torch.Tensor | None
    target: torch.Tensor | None


class _Recorder:
    """Hooks that add to the moments of layers."""

    masks = _Masks(None, None)  # of the batch that is being run

    def hook(self, moments: LayerMoments, is_of_source: bool):
        def record(module, args, kwargs, output):
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.no_grad():
                moments.add_inputs(x.detach(), self.masks.source if is_of_source else self.masks.target)
            if not output.requires_grad:  # parameters are frozen: gradients start at the first of the layers
                output = output.detach().requires_grad_()
            if not isinstance(moments.outputs, torch.Tensor):  # zeros, if nothing depends on the layer
                moments.add_gradients(torch.zeros_like(output))
            output.register_hook(moments.add_gradients)
            return output.clone()  # which may be changed in place

        return record


@contextmanager
def _recording(model: nn.Module, moments: Mapping[str, LayerMoments]) -> Iterator[_Recorder]:
    recorder, of_source = _Recorder(), _names_of_source(model, moments)
    handles = [
        each.layer.register_forward_hook(recorder.hook(each, name in of_source), with_kwargs=True)
        for name, each in moments.items()
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _names_of_source(model: Any, moments: Mapping[str, LayerMoments]) -> set[str]:
    """The layers that are applied to the tokens of the model's input, and not to those of its decoder."""
    if not _has_decoder(model):
        return set(moments)
    encoder, decoder = (set(part.modules()) for part in (model.get_encoder(), model.get_decoder()))

    def is_of_source(name: str, layer: nn.Module) -> bool:
        is_table = isinstance(layer, nn.Embedding) and layer not in decoder
        return layer in encoder or is_table or CROSS_KEYS.search(name) is not None

    return {name for name, each in moments.items() if is_of_source(name, each.layer)}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _with_backward(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eager attention in the place of flex_attention, which has no backward pass on a CPU."""
    parts = (getattr(part, "config", None) for part in model.modules())
    configs = {id(config): config for config in parts if hasattr(config, KERNEL)}
    before = [(config, getattr(config, KERNEL)) for config in configs.values()]
    flex = [config for config, kernel in before if kernel == "flex_attention" and device.type == "cpu"]
    for config in flex:
        setattr(config, KERNEL, "eager")
    try:
        yield
    finally:
        for config, kernel in before if flex else ():
            setattr(config, KERNEL, kernel)


def _arguments(batch: Any, device: torch.device) -> dict[str | int, Any]:
    """The arguments of a call, by name or position, on the model's device."""
    if isinstance(batch, str):  # the names in a mapping, if the user gave a batch instead of a list of them
        raise ValueError(
            f"calibration: a batch must be a mapping, a tuple or a tensor, not {batch!r}: give a list of such batches"
        )
    values = batch if isinstance(batch, tuple | list | Mapping) else (batch,)
    named = values.items() if isinstance(values, Mapping) else enumerate(values)
    # Lengths of documents are numbers.
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in named}


def _call(model: nn.Module, arguments: Mapping[str | int, Any]) -> Any:
    positional = [value for name, value in arguments.items() if isinstance(name, int)]
    try:
        return model(*positional, **{name: value for name, value in arguments.items() if isinstance(name, str)})
    except TypeError as error:
        raise ValueError(
            f"calibration: {type(model).__name__} cannot be called with a batch: {error}. A tuple has the arguments of "
            "the model; leave labels out"
        ) from error


def _masks_of(model: nn.Module, arguments: Mapping[str | int, Any]) -> _Masks:
    source = _mask_of(arguments, "attention_mask", arguments.get("input_ids"))
    return _Masks(source, _mask_of(arguments, "decoder_attention_mask") if _has_decoder(model) else source)


def _mask_of(arguments: Mapping[str | int, Any], name: str, ids: Any = None) -> torch.Tensor | None:
    mask = arguments.get(name)
    if not isinstance(mask, torch.Tensor | None):
        raise ValueError(
            f"calibration: {name} must be a tensor, not a {type(mask).__name__}: tokenize with return_tensors='pt'"
        )
    if mask is not None and mask.dim() == 3 and ids is not None and mask.shape == ids.shape:
        mask = mask.flatten(0, 1)  # multiple choice: the model sees B · choices sequences
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _project(result: Any, masks: _Masks, generator: torch.Generator) -> torch.Tensor:
    """⟨v, outputs⟩ for a random v of independent entries of variance 1, 0 at padding."""
    named = (
        result.items()
        if isinstance(result, Mapping)
        else enumerate(result if isinstance(result, tuple | list) else [result])
    )
    total = None
    for name, output in named:
        if name == "loss" or not isinstance(output, torch.Tensor) or not output.requires_grad:
            continue
        # On the CPU, so that the same seed draws the same directions on every device.
        v = torch.randn(output.shape, generator=generator).to(output.device)
        is_token = masks.source if str(name).startswith("encoder_") else masks.target
        # a pooled output (B, d) may have the shape of a mask
        is_of_tokens = output.dim() > 2 or name in POSITION_LOGITS
        if is_token is not None and is_of_tokens and output.shape[:2] == is_token.shape:
            v *= is_token.view(*is_token.shape, *[1] * (output.dim() - 2))
        added = (v * output.float()).sum()
        total = added if total is None else total + added
    if total is None:
        raise ValueError("calibration: the model returns no tensor that depends on the layers to factorize")
    return total


def _tokens(x: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """The rows (N, n) of an input (B, S, n), (B·S, n) or any other shape, without padding."""
    if is_token is not None:
        if x.dim() > 2 and x.shape[:2] == is_token.shape:
            return x[is_token].flatten(0, -2)
        if x.dim() == 2 and len(x) == is_token.numel():
            return x[is_token.flatten()]
    return x.flatten(0, -2)
