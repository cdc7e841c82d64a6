"""Decides which parameters follow Muon and which AdamW."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from fnl_hf.layers import FactorizedEmbedding
from fnl_hf.optim.frobenius import products_of
from fnl_hf.optim.param_groups import frobenius_param_groups
from fnl_hf.products.heads import find_heads

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag, FactorizedEmbedding)


def muon_param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    frobenius_decay: float | None = None,
    decay_mode: str = "frobenius",
    adamw: str | Sequence[str] = (),
    decay_rotary: bool = True,
) -> list[dict[str, Any]]:
    """The groups of :func:`fnl_hf.frobenius_param_groups` for :class:`fnl_hf.FrobeniusMuon`, with ``use_muon`` in each.

    Muon updates the matrices between the input and the output of a model. AdamW updates

    - vectors (the group ``plain``);
    - embedding tables, including factorized ones;
    - output heads: everything outside the base model of a ``PreTrainedModel``, and its output embeddings, tied or not;
      the layers of a task model without a base model, such as the ``classifier`` of ``CLIPForImageClassification``;
    - every other parameter that is neither a factor nor the weight of ``nn.Linear``, ``Conv1D`` or a convolution, such
      as positions, tokens, tables of biases and the matrices of recurrent layers;
    - parameters that ``adamw`` names.

    A group with parameters of both kinds becomes two. The name of AdamW's group ends in ``_adamw``. A product is never
    divided.

    Args:
        model, weight_decay, frobenius_decay, decay_mode, decay_rotary: as in :func:`fnl_hf.frobenius_param_groups`.
        adamw: a name pattern, or several, of additional parameters for AdamW, such as ``"classifier.*"``: the output
            layers of a model that is not a ``PreTrainedModel``.

    Raises:
        ValueError: as in :func:`fnl_hf.frobenius_param_groups`, or a pattern matches no parameter.
    """
    groups = frobenius_param_groups(model, weight_decay, frobenius_decay, decay_mode, decay_rotary)
    apart = {id(parameter) for parameter in (*_outer_parameters(model), *_named(model, adamw))}
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D | _ConvNd))
    of_layers = {id(module._parameters.get("weight")) for module in layers}
    muon: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        is_product = group["product"] is not None
        units = products_of(group) if is_product else [[parameter] for parameter in group["params"]]
        of_muon: list[list[torch.Tensor]] = []
        of_adamw: list[list[torch.Tensor]] = []
        for unit in units:
            is_hidden = all(id(p) not in apart and (is_product or id(p) in of_layers) for p in unit)
            (of_muon if is_hidden else of_adamw).append(unit)
        suffix = "_adamw" if any(p.dim() >= 2 for unit in of_adamw for p in unit) else ""
        muon += _with_units(group, of_muon, use_muon=True)
        others += _with_units(group, of_adamw, use_muon=False, name=group["name"] + suffix)
    return muon + others


def _with_units(group: dict[str, Any], units: list[list[torch.Tensor]], **entries: Any) -> list[dict[str, Any]]:
    if not units:
        return []
    if group["product"] is not None:
        entries["num_products"] = len(units)
    return [group | entries | {"params": [parameter for unit in units for parameter in unit]}]


def _outer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Embeddings and output heads."""
    tables = (module for module in model.modules() if isinstance(module, EMBEDDINGS))
    for module in (*tables, *find_heads(model)):
        yield from module.parameters(recurse=False)


def _named(model: nn.Module, patterns: str | Sequence[str]) -> Iterator[nn.Parameter]:
    parameters = dict(model.named_parameters())
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [parameter for name, parameter in parameters.items() if fnmatch(name, pattern)]
        if not found:
            known = ", ".join(list(parameters)[-3:])
            raise ValueError(
                f"adamw ({pattern!r}) matches no parameter of {type(model).__name__}, which has for example {known}"
            )
        yield from found
