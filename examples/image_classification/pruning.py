"""Sparse layers at the parameter budget of a low-rank factorization: the baselines."""

import copy
import math

import torch
from torch import nn
from torch.nn.utils import prune
from transformers import TrainerCallback

import fnl_hf
from fnl_hf import FactorizationConfig
from fnl_hf.layers import FactorizedLayer

SPARSITIES = ("fixed", "dynamic", "magnitude", "lottery")
DENSE_SHARE, EARLY_SHARE = (
    0.5,
    0.05,
)  # of the steps: before pruning, and to those weights of which a lottery ticket returns
REGROW_STEPS, REGROW_SHARE, REGROW_UNTIL = 100, 0.3, 0.75  # of dynamic sparsity: interval, of the weights, of the steps


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
        if hasattr(module, "weight_early"):
            del module.weight_early


def remaining_parameters(model: nn.Module) -> int:
    """Parameters that no mask holds at 0."""
    masked = sum(int((mask == 0).sum()) for name, mask in model.named_buffers() if name.endswith("weight_mask"))
    return sum(parameter.numel() for parameter in model.parameters()) - masked


class SparseTraining(TrainerCallback):
    """A model becomes sparse while it is trained: ``keep`` weights of all ``layers`` together, as ``kind`` says.

    "fixed": a random pattern from the beginning. "dynamic": likewise, but every 100 steps, in the first three quarters
    of a run, the smallest weights of each layer give way to as many random ones at 0, 30% of them at first, fewer by a
    cosine (Mocanu et al. 2018, arXiv 1707.04780). "magnitude": dense for half of the steps, then the largest weights.
    "lottery": the same, and these go back to what they were after 5% of the steps (Frankle et al. 2019, arXiv
    1903.01611).

    Masks and weights to go back to are buffers: a run that goes on finds them in its checkpoint.
    """

    def __init__(self, layers: list[nn.Module], keep: int, kind: str, seed: int):
        self.layers, self.keep, self.kind, self.seed = layers, keep, kind, seed
        weights = [layer.get_parameter("weight") for layer in layers]
        chosen = torch.ones(sum(weight.numel() for weight in weights))
        if kind in ("fixed", "dynamic"):
            chosen = torch.zeros_like(chosen)
            order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
            chosen[order[:keep]] = 1.0
        for layer, weight, mask in zip(layers, weights, chosen.split([weight.numel() for weight in weights])):
            if kind == "lottery":
                layer.register_buffer("weight_early", weight.detach().clone())
            prune.custom_from_mask(layer, "weight", mask.view_as(weight))

    @torch.no_grad()
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        step, last = state.global_step, state.max_steps
        if self.kind == "lottery" and step == int(EARLY_SHARE * last):
            for layer in self.layers:
                layer.get_buffer("weight_early").copy_(layer.get_parameter("weight_orig"))
        if self.kind in ("lottery", "magnitude") and step == int(DENSE_SHARE * last):
            self._prune(optimizer)
        if self.kind == "dynamic" and step % REGROW_STEPS == 0 and step <= REGROW_UNTIL * last:
            share = REGROW_SHARE * (1 + math.cos(math.pi * step / (REGROW_UNTIL * last))) / 2
            for index, layer in enumerate(self.layers):
                generator = torch.Generator().manual_seed(hash((self.seed, step, index)))
                self._regrow(layer, share, generator, optimizer)

    def _prune(self, optimizer) -> None:
        weights = [layer.get_parameter("weight_orig") for layer in self.layers]
        order = torch.cat([weight.abs().flatten() for weight in weights]).argsort(descending=True)
        chosen = torch.zeros(len(order), device=order.device)
        chosen[order[: self.keep]] = 1.0
        for layer, weight, mask in zip(self.layers, weights, chosen.split([weight.numel() for weight in weights])):
            layer.get_buffer("weight_mask").copy_(mask.view_as(weight))
            if self.kind == "lottery":
                weight.copy_(layer.get_buffer("weight_early"))
                for moment in moments_of(weight, optimizer):
                    moment.zero_()

    def _regrow(self, layer: nn.Module, share: float, generator: torch.Generator, optimizer) -> None:
        weight, mask = layer.get_parameter("weight_orig"), layer.get_buffer("weight_mask")
        flat, used = weight.flatten(), mask.flatten()  # copies, if the weight is stored channels last
        free = (used == 0).nonzero().flatten()
        count = min(int(share * used.sum().item()), len(free))
        smallest = torch.where(used > 0, flat.abs(), torch.inf).argsort()[:count]
        grown = free[torch.randperm(len(free), generator=generator)[:count].to(free.device)]
        used[smallest], used[grown], flat[grown] = 0.0, 1.0, 0.0
        weight.copy_(flat.view_as(weight))
        mask.copy_(used.view_as(mask))
        kept = torch.ones_like(used)
        kept[grown] = 0.0
        for moment in moments_of(weight, optimizer):
            moment.mul_(kept.view_as(moment))


def moments_of(weight: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What an optimizer keeps for each entry of a weight."""
    kept = optimizer.state.get(weight, {}).values()
    return [moment for moment in kept if isinstance(moment, torch.Tensor) and moment.shape == weight.shape]
