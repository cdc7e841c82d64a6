"""The common base of the optimizers with Frobenius decay: groups of products, and the decay before the base class's
step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

from fnl_hf.bert.factorization import RANK_DIMS
from fnl_hf.optim.checked import CheckedOptimizer, get_lr, group_name, require_group, validate_number
from fnl_hf.optim.frobenius import (
    DECAYED_DTYPES,
    Decayed,
    Examine,
    add_frobenius_gradients_,
    factors_per_product,
    products_of,
    validate_product_group,
)
from fnl_hf.optim.local_factors import LocalProduct
from fnl_hf.optim.stability import StabilityCheck
from fnl_hf.optim.view_decay import ViewUnit
from fnl_hf.products.views import VIEWS

logger = logging.get_logger(__name__)

# A group's entries: kind of product (None: ordinary parameters), heads, number of products, the places of factors that
# are parts of parameters, λ, decay of factors and other rows if it is applied here, and an entry of SGD.
PRODUCT_ENTRIES = ("product", "num_heads", "num_products", "layout", "frobenius_decay", "row_decay", "decoupled")
DECAY_ENTRIES = ("name", "weight_decay", "decay")  # entries that determine what is decayed, and how


class ProductGroups(CheckedOptimizer):
    """Mixin before a ``torch.optim`` class: parameter groups whose parameters are factors of products.

    The class after the mixin does the step; ``step`` here evaluates the closure, then calls :meth:`_decay_and_step`.
    """

    def __init__(self, params, *args, frobenius_decay: float = 0.0, **kwargs):
        validate_number("frobenius_decay", frobenius_decay)
        # torch's constructors only fill ``defaults`` with their own entries and then add the groups.
        self._own_defaults = {"frobenius_decay": frobenius_decay}
        self._stability = StabilityCheck()
        super().__init__(params, *args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``product`` makes it a group of products.

        Raises:
            ValueError: a wrong kind, λ or shape, or a parameter that is a factor twice; nothing is added then.
        """
        # torch's constructor calls this before __init__ is done. Only ``defaults``, groups and state survive pickling,
        # so our defaults belong there, too.
        for name, value in self.__dict__.get("_own_defaults", {}).items():
            self.defaults.setdefault(name, value)
        require_group(param_group)
        self._knows_products = vars(self).get("_knows_products", False) or "product" in param_group
        is_product = param_group.setdefault("product", None) is not None
        param_group.setdefault("num_heads", 1)
        decay = param_group.setdefault("frobenius_decay", self.defaults["frobenius_decay"] if is_product else 0.0)
        validate_number("frobenius_decay", decay, f"{group_name(param_group, len(self.param_groups))}: ")
        if decay != 0.0:
            # not the base class's default: factors must not be decayed twice
            param_group.setdefault("weight_decay", 0.0)
        if is_product and not isinstance(param_group["params"], set):  # torch refuses a set: it has no order
            params = param_group["params"]
            param_group["params"] = params = [params] if isinstance(params, torch.Tensor) else list(params)
            self._refuse_repeated_factors(params, group_name(param_group, len(self.param_groups)))
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        try:
            get_lr(group)
            validate_product_group(group, group_name(group, index))
        except Exception:  # even for a malformed group
            del self.param_groups[-1]
            raise
        if is_product:
            group.setdefault("num_products", len(products_of(group)))

    def _refuse_repeated_factors(self, params: list[Any], where: str) -> None:
        owners = {id(p): group_name(group, i) for i, group in enumerate(self.param_groups) for p in group["params"]}
        for index, entry in enumerate(params):
            name, parameter = entry if isinstance(entry, tuple) else (f"parameter {index}", entry)
            if id(parameter) in owners:
                raise ValueError(
                    f"{where}: {name}, of shape {tuple(parameter.shape)}, is already in {owners[id(parameter)]}: a "
                    "parameter can be a factor of only one product"
                )
            owners[id(parameter)] = where

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. A state without products, such as that of ``torch.optim.AdamW``, does not change products and
        decay.

        The ``weight_decay`` of such a state was for parameters that may be factors or biases here. The state brings
        moments, step counts, learning rate and the other options of the base class.

        Raises:
            ValueError: other groups or parameters than here, other kinds of product or numbers of heads, or another
                optimizer's state; nothing is changed then.
        """
        super().load_state_dict(state_dict)
        if not all(group.get("fused") for group in self.param_groups):
            # The state decides which kernels run. torch's constructor told GradScaler that fused kernels unscale and
            # skip.
            vars(self).pop("_step_supports_amp_scaling", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).setdefault("_stability", StabilityCheck())
        super().__setstate__(state)

    def _take_group(self, own: dict[str, Any], group: dict[str, Any], where: str) -> None:
        if "product" not in group:
            group.update({name: own[name] for name in DECAY_ENTRIES if name in own})
        for name in PRODUCT_ENTRIES:
            if name in own:
                group.setdefault(name, own[name])
        for name in ("product", "num_heads", "layout"):
            if own.get(name) != group.get(name):
                raise ValueError(f"{where} has {name} {own.get(name)!r}, but the state to load has {group.get(name)!r}")
        super()._take_group(own, group, where)
        validate_product_group(group, where)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: the closure if given, then the decay and the base class's step."""
        loss = evaluate_closure(closure)
        self._decay_and_step()
        return loss

    def _decay_and_step(self) -> None:
        self._decay(self._groups_to_decay())
        self._base_step()

    @torch.compiler.disable  # otherwise its loops over groups would be compiled separately for each
    def _decay(self, groups: Sequence[dict[str, Any]]) -> None:
        decay_products_(groups, getattr(self, "found_inf", None), self._stability.examine)
        self._stability.end_step(self.param_groups)

    @torch.compiler.disable
    def _groups_to_decay(self) -> list[dict[str, Any]]:
        """The groups to decay here; refuses groups, parameters and gradients that became invalid."""
        self._refuse_sparse_gradients()
        groups = []
        for index, group in enumerate(self.param_groups):
            get_lr(group)
            if _may_be_invalid(group):
                validate_product_group(group, group_name(group, index))
            if is_decayed(group):
                groups.append(group)
        if all(group["product"] is None for group in self.param_groups):
            self._report_no_products()
        return groups

    def _report_no_products(self) -> None:
        remedy = "Make the groups with frobenius_param_groups(model, ...)"
        if vars(self).get("_knows_products", True):  # a model without products was reported with its groups
            return
        if decay := self.defaults["frobenius_decay"]:
            raise ValueError(
                f"frobenius_decay ({decay}) has nothing to decay: no parameter group contains products. {remedy}"
            )
        logger.warning_once(
            f"{type(self).__name__} decays no products: no parameter group says what its products are. {remedy}; "
            "transformers.Trainer makes groups of its own unless it gets the optimizer itself, as "
            "optimizers=(optimizer, None)"
        )

    def _base_step(self) -> None:
        # ``Optimizer`` wraps the ``step`` of every class that it instantiates with the user's hooks; our ``step`` runs
        # them.
        step: Any = super().step
        if getattr(step, "hooked", False):
            step.__wrapped__(self)
        else:
            step()


def is_decayed(group: dict[str, Any]) -> bool:
    """Whether a group's decay, or a part of it, is applied here and not by the base class."""
    return group["product"] is not None and (group["frobenius_decay"] != 0.0 or bool(group.get("row_decay")))


def _may_be_invalid(group: dict[str, Any]) -> bool:
    """Whether what was valid in :meth:`ProductGroups.add_param_group` may have changed; cheap enough for each step."""
    decay, count = group["frobenius_decay"], len(group["params"])
    if group["product"] is None:
        return decay != 0.0
    if count != factors_per_product(group) * group.get("num_products", count) or not 0.0 <= decay < float("inf"):
        return True
    return is_decayed(group) and (group.get("differentiable") or any(map(_is_undecayable, group["params"])))


def _is_undecayable(parameter: torch.Tensor) -> bool:
    return parameter.dim() < 2 or parameter.dtype not in DECAYED_DTYPES


def decay_products_(
    groups: Sequence[dict[str, Any]], found_inf: torch.Tensor | None = None, examine: Examine | None = None
) -> None:
    """U ← U − ηλ U VᵀV and so on for all factors with a gradient in groups of products, at each group's ``lr``.

    ``found_inf`` is set under fp16 loss scaling with a fused kernel, which skips the step when it is 1: no decay then,
    and no host synchronization to learn it. ``examine`` sees each product before its step.
    """
    products: list[Decayed] = []
    for group in groups:
        scale = -get_lr(group)
        if found_inf is not None:  # the number of devices with an overflow
            if isinstance(scale, torch.Tensor):
                scale = scale.to(found_inf.device, non_blocking=True)
            scale = (found_inf.reshape(()) == 0) * scale
        products += local_products(group, scale)
    add_frobenius_gradients_(products, examine)


def local_products(
    group: dict[str, Any],
    scale: float | torch.Tensor,
    target_of: Callable[[torch.Tensor], torch.Tensor | None] = lambda weight: weight,
) -> list[Decayed]:
    """A group's products; each factor's decay times ``scale`` is added to its target, by default the factor itself.

    Factors without a gradient do not change, as with weight decay; frozen factors do not change either.
    """
    products: list[Decayed] = []
    decay, row_decay = group["frobenius_decay"], group.get("row_decay")
    for weights in products_of(group):
        if isinstance(scale, torch.Tensor):
            scale = scale.to(weights[0].device, non_blocking=True)
        targets = [target_of(weight) if is_updated(weight) else None for weight in weights]
        if group["product"] == VIEWS:
            row_scales = (scale * row_decay[0], scale * row_decay[1]) if row_decay else None
            products.append(ViewUnit(weights, targets, group["layout"], scale * decay, row_scales, decay != 0.0))
        else:
            products.append(
                LocalProduct(weights, targets, RANK_DIMS[group["product"]], group["num_heads"], scale * decay)
            )
    return products


def evaluate_closure(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def is_updated(weight: torch.Tensor) -> bool:
    """Whether a step changes this factor."""
    return weight.grad is not None and weight.requires_grad
