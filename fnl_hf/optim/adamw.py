"""AdamW with decoupled Frobenius decay."""

from typing import Any

import torch

from fnl_hf.optim.base import ProductGroups
from fnl_hf.optim.checked import ADAM_STATE, group_name


class FrobeniusAdamW(ProductGroups, torch.optim.AdamW):
    """``torch.optim.AdamW`` with decoupled Frobenius decay on products of parameters.

    Before AdamW's own step with learning rate η, each product is decayed (Khodak et al., ICLR 2021)::

        U ← U − ηλ U VᵀV,    V ← V − ηλ V UᵀU        (the same for U, M and V of U M Vᵀ)

    Everything else is ``torch.optim.AdamW``, including its kernels; with λ = 0 the two are bit-identical.

    Args:
        params: parameter groups from :func:`fnl_hf.frobenius_param_groups`. A group of products has
            ``product`` (a key of :data:`fnl_hf.RANK_DIMS`), ``num_heads`` and its parameters as
            [left₀, right₀, left₁, right₁, ...].
        lr: η.
        frobenius_decay: λ of groups of products without their own; >= 0. Groups from ``frobenius_param_groups`` have
            their own.
        args, kwargs: all other arguments of ``torch.optim.AdamW``.

    Raises:
        ValueError: λ < 0, λ on a group without products, factors that do not match, factors in half precision, or
            ``differentiable`` with λ > 0.
        RuntimeError: gradients are sparse; nothing is decayed then.
    """

    state_entries = ADAM_STATE

    def __init__(self, params, lr: float | torch.Tensor = 1e-3, *args, frobenius_decay: float = 0.0, **kwargs):
        super().__init__(params, lr, *args, frobenius_decay=frobenius_decay, **kwargs)

    @torch.compiler.disable
    def _groups_to_decay(self) -> list[dict[str, Any]]:
        for index, group in enumerate(self.param_groups):  # torch checks this too late, except for its default
            if group["foreach"] and isinstance(group["lr"], torch.Tensor) and not group["capturable"]:
                raise ValueError(f"{group_name(group, index)}: lr ({group['lr']}) must be a float for foreach=True")
        return super()._groups_to_decay()
