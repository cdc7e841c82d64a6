"""How training changes the products: norms, effective step size, orthogonality of the factors.

All computations use r×r cores; no m×n product is formed. Products of one shape are decomposed in one call, so the host
waits for an accelerator once and not once per layer.
"""

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from fnl_hf.bert.factorization import Product, bound, core, gram, singular_values, without_autocast

DIAGNOSTICS = ("frobenius", "nuclear", "bound", "effective_step", "non_orthogonality")


@torch.no_grad()
def diagnose_products(products: Sequence[Product], lr: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    """Diagnostics of each product by its name, as 0-d float32 tensors on the weights' device.

    The H products of an attention layer count as one block-diagonal matrix W.

    ===================== =============================================================================
    ``frobenius``         ‖W‖_F = (Σ_h ‖U_h V_hᵀ‖²_F)^½
    ``nuclear``           ‖W‖_* = Σ_h ‖U_h V_hᵀ‖_*
    ``bound``             ½(‖U‖²_F + ‖V‖²_F) >= ‖W‖_*, the penalty of weight decay on the factors; for three factors
                          ½(‖U M‖²_F + ‖V‖²_F)
    ``effective_step``    η/‖W‖²_F, the step size relative to a scale-invariant layer's squared norm
    ``non_orthogonality`` root mean square cosine between two columns of a factor of one head: 0 orthogonal (the state
                          after spectral initialization), 1 parallel
    ===================== =============================================================================

    Sharded weights are gathered one at a time, so all processes must call this. Weights that are not finite raise no
    error: the diagnostics of their product are NaN (or infinite), and other products are not affected.

    Args:
        products: the products that :func:`fnl_hf.find_products` returns.
        lr: η.
    """
    with without_autocast(weight for product in products for weight in product.weights):
        return _diagnose(products, lr)


def _diagnose(products: Sequence[Product], lr: float) -> dict[str, dict[str, torch.Tensor]]:
    cores: dict[tuple[torch.Size, torch.device], list[tuple[str, torch.Tensor]]] = {}
    result: dict[str, dict[str, torch.Tensor]] = {}
    for product in products:
        weights = tuple(_gather(weight).float() for weight in product.weights)
        factors = product.split(weights)  # U (H, m, r), V (H, n, r)
        small = core(*factors)  # (H, min(m, r), min(n, r))
        cores.setdefault((small.shape, small.device), []).append((product.name, small))
        result[product.name] = {"bound": bound(*factors), "non_orthogonality": non_orthogonality(factors)}
    for of_shape in cores.values():
        values = singular_values(torch.stack([small for _, small in of_shape])).flatten(1)  # (products, H·r)
        squares, sums = values.square().sum(1), values.sum(1)
        for (name, _), square, nuclear in zip(of_shape, squares, sums):
            result[name] |= {"frobenius": square.sqrt(), "nuclear": nuclear, "effective_step": lr / square}
    return {name: {key: values[key] for key in DIAGNOSTICS} for name, values in result.items()}


def non_orthogonality(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Root mean square cosine between two different columns of a factor (H, n, r), over heads and outer factors.

    Zero columns are orthogonal to all; with r = 1 there are no pairs, and the result is 0.
    """
    total, pairs = factors[0].new_zeros(()), 0
    for factor in (factors[0], factors[-1]):
        rank = factor.shape[-1]
        cosines = gram(torch.nn.functional.normalize(factor, dim=-2, eps=1e-30))  # (H, r, r)
        off_diagonal = cosines - torch.diag_embed(torch.diagonal(cosines, dim1=-2, dim2=-1))
        total += off_diagonal.square().sum()
        pairs += factor.shape[0] * rank * (rank - 1)
    return (total / max(pairs, 1)).sqrt()


def _gather(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
