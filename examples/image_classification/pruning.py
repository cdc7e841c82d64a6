"""Magnitude pruning at the parameter budget of a low-rank factorization: the baseline."""

import copy

from torch import nn
from torch.nn.utils import prune

import fnl_hf
from fnl_hf import FactorizationConfig
from fnl_hf.layers import FactorizedLayer


def layers_to_prune(model: nn.Module, config: FactorizationConfig) -> tuple[list[nn.Module], int]:
    """The layers of a dense model that ``factorize`` would replace, and how many weights their factors would have."""
    factorized = fnl_hf.factorize(copy.deepcopy(model), config)
    names = [name for name, module in factorized.named_modules() if isinstance(module, FactorizedLayer)]
    products = [product for product in fnl_hf.find_products(factorized) if product.name in names]
    layers = [model.get_submodule(name) for name in names]
    return layers, sum(weight.numel() for product in products for weight in product.weights)


def prune_by_magnitude(layers: list[nn.Module], keep: int) -> None:
    """Keep the ``keep`` weights of all ``layers`` together that are largest in magnitude; masks hold the others at 0,
    also in training, until :func:`make_permanent`."""
    weights = [(layer, "weight") for layer in layers]
    total = sum(layer.get_parameter("weight").numel() for layer in layers)
    prune.global_unstructured(weights, prune.L1Unstructured, amount=max(0, total - keep))


def make_permanent(model: nn.Module) -> None:
    """Multiply the masks into the weights, and leave a plain model."""
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")


def remaining_parameters(model: nn.Module) -> int:
    """Parameters that no mask holds at 0."""
    masked = sum(int((mask == 0).sum()) for name, mask in model.named_buffers() if name.endswith("weight_mask"))
    return sum(parameter.numel() for parameter in model.parameters()) - masked
