# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""Output embeddings that a configuration ties to the input embeddings, and weights that cannot be tied.

This file travels with checkpoints: it imports only torch and transformers.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def untie_products(model: nn.Module) -> None:
    """Keep Transformers from tying the weights of layers that are products of matrices, which are their own.

    Biases stay tied; ``config.tie_word_embeddings`` would affect both.
    """
    for part in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        tied = getattr(part, "all_tied_weights_keys", None) or {}
        products = {f"{name}.weight" for name, module in part.named_modules() if hasattr(module, "to_dense")}
        still_tied = {target: source for target, source in tied.items() if not {target, source} & products}
        if still_tied != tied:
            part.all_tied_weights_keys = part._tied_weights_keys = still_tied


def is_untied(model: PreTrainedModel) -> bool:
    """Whether output and input embeddings are two weights in ``model`` although its configuration ties them."""
    try:
        layers = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # a model without embeddings
        return False
    if None in layers or not getattr(model.config, "tie_word_embeddings", False):
        return False
    source, output = (layer._parameters.get("weight") for layer in layers)
    return source is None or source is not output  # products have no such parameter


def untie_output(model: PreTrainedModel) -> None:
    """Give ``model`` output embeddings of their own, also in its configuration, so that every loader keeps both.

    Nothing changes if they are products, or if the configuration would untie more than them (T5's encoder).
    """
    output: Any = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is output)
    tied = type(model)._tied_weights_keys or {}
    products = [layer for layer in (model.get_input_embeddings(), output) if hasattr(layer, "to_dense")]
    if products or not all(target.startswith(f"{name}.") for target in tied):
        return
    model.config.tie_word_embeddings = False
    for part, parameter in output.named_parameters(recurse=False):
        setattr(output, part, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    model.all_tied_weights_keys = {}


def untie_like(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Untie the output embeddings of ``target``, if it has any, if those of ``source`` are: before weights are copied,
    or two of them would become one."""
    if is_untied(source) and target.get_output_embeddings() is not None:
        untie_output(target)
