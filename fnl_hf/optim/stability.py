"""Detects a decoupled decay that is too large for its product."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import logging

from fnl_hf.optim.checked import group_name
from fnl_hf.optim.frobenius import products_of
from fnl_hf.optim.local_factors import LocalProduct
from fnl_hf.optim.view_decay import LocalPair

logger = logging.get_logger(__name__)

BOUND = 2.0  # of ηλσ²
STEPS_BETWEEN = 100  # steps between two checks on devices where reading the result makes the host wait


class StabilityCheck:
    """Warns, once, of a product that its decay makes grow.

    Decoupled decay multiplies each direction of a factor by 1 − ηλσ², where σ² is an eigenvalue of the factor's
    operator: VᵀV for U of U Vᵀ. Above ηλσ² = 2 the direction grows, and with it its partner's σ² and the product,
    without limit. The check uses the Gram matrices that the decay needs anyway. Their Frobenius norms bound the
    eigenvalues, which are only computed if the bound is not sufficient. On a CPU each step is checked, elsewhere the
    first and every hundredth.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.has_warned = False
        self.found: tuple[LocalProduct | LocalPair, float] | None = None

    def is_due(self, device: torch.device) -> bool:
        """Whether to check the products on this device in this step. The meta device has no values, and none can be
        read while a CUDA graph is captured."""
        if self.has_warned or device.type == "meta":
            return False
        if device.type == "cpu":
            return True
        if self.steps % STEPS_BETWEEN:
            return False
        return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())

    def examine(
        self,
        product: LocalProduct | LocalPair,
        grams: Sequence[torch.Tensor],
        operators: Sequence[torch.Tensor],
    ) -> None:
        """Check one product before its step; arguments as in ``frobenius_operators``."""
        if self.found is not None or not self.is_due(grams[0].device) or isinstance(grams[0], FakeTensor):
            return
        matrices: list[tuple[torch.Tensor, ...]] = [(operator,) for operator in operators]
        if len(operators) == 3:
            matrices[1] = (grams[0], grams[1])  # M ↦ (UᵀU) M (VᵀV)
        factors: Sequence[Any] = product.factors
        moving = [of_factor for of_factor, factor in zip(matrices, factors) if factor.target is not None]
        rate = abs(float(product.scale))
        bounds = [rate * math.prod(matrix.norm().item() for matrix in of_factor) for of_factor in moving]
        bound = max(bounds)
        if bound <= BOUND or any(map(math.isnan, bounds)):  # NaN: the weights are already lost
            return
        growth = bound if math.isinf(bound) else rate * max(_largest_eigenvalue(of_factor) for of_factor in moving)
        if growth > BOUND:
            self.found = product, growth

    def end_step(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Count the step, and warn of what was found in it."""
        self.steps += 1
        if self.found is None:
            return
        (product, growth), self.found, self.has_warned = self.found, None, True
        for index, group in enumerate(param_groups):
            for position, weights in enumerate(products_of(group) if group["product"] else ()):
                if weights[0] is product.weights[0]:
                    logger.warning(
                        f"{group_name(group, index)}, product {position} ({group['product']}): its Frobenius decay "
                        f"makes it grow. ηλσ² is {growth:.3g}; above {BOUND:g}, a step enlarges a factor instead of "
                        f"shrinking it. Lower lr ({group['lr']}) or frobenius_decay ({group['frobenius_decay']})"
                    )


def _largest_eigenvalue(matrices: Sequence[torch.Tensor]) -> float:
    """Over heads, of X ↦ A X or X ↦ A X B; positive semidefinite (H, r, r) each."""
    largest = [torch.linalg.eigvalsh(matrix.double())[:, -1] for matrix in matrices]
    return math.prod(largest[1:], start=largest[0]).max().item()
