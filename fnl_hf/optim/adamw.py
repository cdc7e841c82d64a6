"""AdamW with decoupled Frobenius decay."""

from typing import Any

import torch

from fnl_hf.optim.frobenius import frobenius_decay_, validate_product_group


class FrobeniusAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with decoupled Frobenius decay on products of two parameters.

    Before AdamW's own step with learning rate η, each product U Vᵀ is decayed (Khodak et al., ICLR 2021):

        U ← U − ηλ U VᵀV,    V ← V − ηλ V UᵀU.

    Everything else is ``torch.optim.AdamW``, kernels included; with λ = 0 the two agree to the last bit.

    Args:
        params: parameter groups, as :func:`fnl_hf.frobenius_param_groups` makes them. A group of products has
            ``product`` ("qk" or "vo"), ``num_heads`` and its parameters as [left₀, right₀, left₁, right₁, ...].
        frobenius_decay: λ, the default of groups of products; >= 0.
        **kwargs: everything that ``torch.optim.AdamW`` takes.

    Raises:
        ValueError: λ < 0, λ on a group without products, factors that do not match, or factors in half precision.
    """

    def __init__(self, params, lr: float | torch.Tensor = 1e-3, *, frobenius_decay: float = 0.0, **kwargs):
        self._frobenius_decay = frobenius_decay
        super().__init__(params, lr, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``product`` makes it a group of products."""
        # torch's constructor fills ``defaults`` with its own entries only and then adds the groups. Only ``defaults``,
        # groups and state survive pickling, so ours belong there too.
        self.defaults.setdefault("frobenius_decay", getattr(self, "_frobenius_decay", 0.0))
        is_product = param_group.setdefault("product", None) is not None
        param_group.setdefault("num_heads", 1)
        param_group.setdefault("frobenius_decay", self.defaults["frobenius_decay"] if is_product else 0.0)
        super().add_param_group(param_group)
        try:
            validate_product_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def step(self, closure=None):
        """One step: the closure if given, Frobenius decay, then AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # With fp16 loss scaling the fused kernel itself skips the step when a gradient overflowed; skip along.
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or found_inf.item() == 0:
            for group in self.param_groups:
                frobenius_decay_(group)
        _unhooked(torch.optim.AdamW.step)(self)
        return loss


def _unhooked(step):
    """``Optimizer`` wraps the ``step`` of every class it is made from with the user's hooks; ours runs them already."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step
