"""SGD with Frobenius decay, coupled through the gradient or decoupled."""

from typing import Any

import torch

from fnl_hf.optim.base import ProductGroups, is_decayed, is_updated, local_products
from fnl_hf.optim.frobenius import Decayed, add_frobenius_gradients_


class FrobeniusSGD(ProductGroups, torch.optim.SGD):
    """``torch.optim.SGD`` with Frobenius decay on products of parameters.

    By default the decay is added to the gradient before momentum, like weight decay in SGD (the ResNet runs of Khodak
    et al., ICLR 2021)::

        g_U ← ∇_U + λ U VᵀV,    g_V ← ∇_V + λ V UᵀU,    then SGD's step with g.

    ``decoupled=True`` instead subtracts ηλ U VᵀV and ηλ V UᵀU from the factors before SGD's step. With momentum μ this
    is (1 − μ) times as strong at equal λ, because momentum accumulates a coupled decay 1/(1 − μ) times.

    Args:
        params: parameter groups from :func:`fnl_hf.frobenius_param_groups`.
        lr: η.
        frobenius_decay: λ of groups of products without their own; >= 0.
        decoupled: decay outside gradient and momentum; a group may have its own value.
        args, kwargs: all other arguments of ``torch.optim.SGD``: momentum, nesterov, weight_decay, ...

    Raises:
        ValueError: λ < 0, λ on a group without products, factors that do not match, factors in half precision, or
            ``differentiable`` with λ > 0.
        RuntimeError: gradients are sparse in a group with weight decay or coupled λ, or for a fused kernel; nothing is
            decayed then.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        *args,
        frobenius_decay: float = 0.0,
        decoupled: bool = False,
        **kwargs,
    ):
        self._decoupled = decoupled
        super().__init__(params, lr, *args, frobenius_decay=frobenius_decay, **kwargs)

    def add_param_group(self, param_group) -> None:
        """As in the base class; ``decoupled`` is one of the group's entries."""
        self.defaults.setdefault("decoupled", getattr(self, "_decoupled", False))
        super().add_param_group(param_group)

    def _decay_and_step(self) -> None:
        groups = self._groups_to_decay()
        self._decay([group for group in groups if group["decoupled"]])
        coupled = [group for group in groups if not group["decoupled"]]
        saved = [(w, w.grad) for group in coupled for w in group["params"] if is_updated(w)]
        try:
            self._add_decay_to_gradients(coupled)
            self._base_step()
        finally:
            for weight, gradient in saved:
                weight.grad = gradient

    def _takes_sparse_gradients(self, group: dict[str, Any]) -> bool:
        is_coupled = is_decayed(group) and not group["decoupled"]
        return not is_coupled and group["weight_decay"] == 0.0 and not group["fused"]

    @torch.compiler.disable  # as ``_decay``
    def _add_decay_to_gradients(self, groups: list[dict[str, Any]]) -> None:
        """Add the decay to the factors' gradients."""
        # A fused kernel divides the gradients by ``grad_scale`` (fp16 loss scaling) and negates them to maximize.
        grad_scale = getattr(self, "grad_scale", None)
        products: list[Decayed] = []
        for group in groups:
            for weight in group["params"]:
                if is_updated(weight):
                    weight.grad = weight.grad.to(weight.dtype, copy=True)
            scale = -1.0 if group["maximize"] else 1.0
            if grad_scale is not None:
                scale = scale * grad_scale.reshape(())
            products += local_products(group, scale, lambda weight: weight.grad)
        add_frobenius_gradients_(products)
