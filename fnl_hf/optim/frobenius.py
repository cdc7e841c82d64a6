"""Frobenius decay of products of two parameters: one implementation for every optimizer.

For a product U Vᵀ, Frobenius decay is the penalty ½λ‖U Vᵀ‖²_F, whose gradients are λ U VᵀV and λ V UᵀU (Khodak et al.,
ICLR 2021, section 3.2). Decoupled, it is a step on the factors before the optimizer's own:

    U ← U − ηλ U VᵀV,    V ← V − ηλ V UᵀU,    both Gram matrices from the values before the step.

A product is known to an optimizer by its position in a parameter group with an entry ``product``, the kind of product:
``params`` is [left₀, right₀, left₁, right₁, ...]. Attributes on parameters would not survive FSDP2.
"""

from collections.abc import Iterable
from typing import Any

import torch

from fnl_hf.factorization import RANK_DIMS, gram, pair_views


def validate_product_group(group: dict[str, Any]) -> None:
    """Check a parameter group's ``product``, ``num_heads``, ``frobenius_decay`` and the shapes of its pairs.

    Raises:
        ValueError: naming the entry and its value.
    """
    decay = group["frobenius_decay"]
    if not 0.0 <= decay < float("inf"):
        raise ValueError(f"frobenius_decay ({decay}) must be finite and >= 0")
    kind, heads, params = group["product"], group["num_heads"], group["params"]
    if kind is None:
        if decay != 0.0:
            raise ValueError(
                f"frobenius_decay ({decay}) needs pairs of parameters: set product to one of {sorted(RANK_DIMS)} in "
                "the parameter group, as frobenius_param_groups does, or use weight_decay"
            )
        return
    if kind not in RANK_DIMS:
        raise ValueError(f"product must be one of {sorted(RANK_DIMS)} or None, got {kind!r}")
    if len(params) % 2 != 0:
        raise ValueError(f"a group of products holds pairs [left, right, ...], got {len(params)} parameters")
    for index, (left, right) in enumerate(pairs_of(params)):
        _validate_pair(left, right, kind, heads, index)


def _validate_pair(left: torch.Tensor, right: torch.Tensor, kind: str, heads: int, index: int) -> None:
    where = f"pair {index} of the {kind!r} group"
    if left is right:
        raise ValueError(f"{where}: both factors are the same parameter")
    for weight in (left, right):
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{where} has dtype {weight.dtype}: Frobenius decay changes a weight by about 3e-7 of its value per "
                "step, which is lost in half precision. Keep the parameters in float32 (or float64) and use autocast"
            )
    left_dim, right_dim = RANK_DIMS[kind]
    matrices = left.dim() == right.dim() == 2
    if not matrices or heads < 1 or left.shape[left_dim] != right.shape[right_dim] or left.shape[left_dim] % heads:
        raise ValueError(
            f"{where}: shapes {tuple(left.shape)} and {tuple(right.shape)} must share one size E, a multiple of "
            f"num_heads ({heads}), in dimensions {RANK_DIMS[kind]}"
        )


def pairs_of(params: list[torch.Tensor]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """[left₀, right₀, left₁, right₁, ...] as pairs."""
    return zip(params[0::2], params[1::2], strict=True)


@torch.no_grad()
def frobenius_gradients(
    left: torch.Tensor, right: torch.Tensor, kind: str, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients U VᵀV and V UᵀU of ½ Σ_h ‖U_h V_hᵀ‖²_F, as views (H, m, r) and (H, n, r) like the factors' own."""
    u, v = pair_views(left, right, kind, num_heads)
    return u @ gram(v), v @ gram(u)


@torch.no_grad()
def frobenius_decay_(group: dict[str, Any]) -> None:
    """One decoupled step of Frobenius decay, in place, on the pairs of a parameter group.

    A pair is decayed when at least one of its factors has a gradient: as with weight decay, what takes no part in a
    step is not decayed. A frozen factor counts in its partner's Gram matrix and is not moved.
    """
    if group["product"] is None or group["frobenius_decay"] == 0.0:
        return
    step = float(group["lr"]) * group["frobenius_decay"]
    for left, right in pairs_of(group["params"]):
        if left.grad is None and right.grad is None:
            continue
        gradients = frobenius_gradients(left, right, group["product"], group["num_heads"])
        views = pair_views(left, right, group["product"], group["num_heads"])
        for weight, view, gradient in zip((left, right), views, gradients, strict=True):
            if weight.requires_grad:
                view.sub_(gradient, alpha=step)
