"""Checks before an optimizer changes anything: of saved states, gradients and numbers."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

# Tensors of a parameter's state that have its shape, as torch's optimizers name them.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class CheckedOptimizer(torch.optim.Optimizer):
    """Mixin before a ``torch.optim`` class: checks of loaded states, and of gradients."""

    state_entries: tuple[str, ...] = ()  # without these, a parameter's state belongs to another optimizer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. The state may be another class's: the subclasses define what is used of it.

        Raises:
            ValueError: it does not fit this optimizer, which is as it was then.
        """
        if not self._optimizer_load_state_dict_pre_hooks:  # hooks may rearrange groups
            self._refuse_other_groups(state_dict["param_groups"])
        super().load_state_dict(state_dict)

    def _refuse_other_groups(self, saved: Sequence[dict[str, Any]]) -> None:
        own = self.param_groups
        if len(saved) != len(own):
            names = ", ".join(str(group.get("name", index)) for index, group in enumerate(own))
            raise ValueError(
                f"the state to load has {len(saved)} parameter group(s), this optimizer {len(own)} ({names}). "
                "States are matched with parameters by position: create both optimizers with the same groups"
            )
        for index, (group, other) in enumerate(zip(own, saved)):
            if len(group["params"]) != len(other["params"]):
                raise ValueError(
                    f"{group_name(group, index)} has {len(group['params'])} parameters, but {len(other['params'])} "
                    "in the state to load. States are matched with parameters by position: create both optimizers "
                    "with the same groups"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's load_state_dict ends here; so does unpickling, which has no groups to lose.
        own_groups = vars(self).get("param_groups", ())
        for index, (own, group) in enumerate(zip(own_groups, state["param_groups"])):
            self._refuse_other_states(own, group["params"], state["state"], group_name(own, index))
        before = {name: vars(self)[name] for name in state if name in vars(self)}
        try:
            super().__setstate__(state)
            for index, (own, group) in enumerate(zip(own_groups, self.param_groups)):
                self._take_group(own, group, group_name(own, index))
        except Exception:  # including torch's own errors, if a state lacks something
            vars(self).update(before)
            raise

    def _take_group(self, own: dict[str, Any], group: dict[str, Any], where: str) -> None:
        """Check and complete a loaded group that replaces ``own``."""
        missing = sorted(name for name in self.defaults if name in own and name not in group)
        if missing:
            raise ValueError(
                f"{where}: the state to load has no {', '.join(missing)}: it belongs to another kind of optimizer"
            )
        get_lr(group)

    def _state_entries(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_entries

    def _refuse_other_states(
        self, own: dict[str, Any], parameters: list[torch.Tensor], states: dict[Any, Any], where: str
    ) -> None:
        """Check the states to load for the parameters of one group, which replace those of ``own``."""
        for position, parameter in enumerate(parameters):
            entries = states.get(parameter, {})
            problem = f"{where}, parameter {position}, of shape {tuple(parameter.shape)}: the state to load has"
            missing = [name for name in self._state_entries(own) if name not in entries]
            if entries and missing:
                raise ValueError(f"{problem} no {', '.join(missing)}: it belongs to another kind of optimizer")
            for name in MOMENTS:
                moment = entries.get(name)
                if moment is not None and moment.shape != parameter.shape:
                    raise ValueError(
                        f"{problem} {name} of shape {tuple(moment.shape)}: its parameters are in another order"
                    )

    def _takes_sparse_gradients(self, group: dict[str, Any]) -> bool:
        return False

    def _refuse_sparse_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
            if self._takes_sparse_gradients(group):
                continue
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients: {group_name(group, index)}, "
                        f"parameter {position}, of shape {tuple(parameter.shape)}"
                    )


def validate_number(name: str, value: Any, where: str = "") -> None:
    """Check a number of a group, or a tensor of one number.

    Raises:
        ValueError: it is something else, negative or not finite.
    """
    if not isinstance(value, Real) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise ValueError(f"{where}{name} ({value}) must be one number, finite and at least 0")
    if not 0.0 <= value < float("inf"):  # type: ignore[operator]  # a Real is compared as a float is
        raise ValueError(f"{where}{name} ({value}) must be finite and at least 0")


def require_group(param_group: Any) -> None:
    """
    Raises:
        TypeError: it is no dict.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")


def validate_betas(betas: Any) -> None:
    """Check Adam's β₁ and β₂.

    Raises:
        ValueError: they are something else than two numbers in [0, 1).
    """
    numbers = betas if isinstance(betas, tuple | list) else ()
    if len(numbers) != 2 or not all(isinstance(beta, Real) and 0.0 <= float(beta) < 1.0 for beta in numbers):
        raise ValueError(f"betas ({betas}) must be two numbers, at least 0 and below 1")


def get_lr(group: dict[str, Any]) -> float | torch.Tensor:
    """A group's learning rate, a number or a 0-d tensor.

    Raises:
        ValueError: a tensor of several numbers.
    """
    lr = group["lr"]
    if not isinstance(lr, torch.Tensor):
        return lr
    if lr.numel() != 1:
        raise ValueError(f"lr ({lr}) must be one number")
    return lr.reshape(())


def group_name(group: dict[str, Any], index: int) -> str:
    """The name of a parameter group in errors."""
    return f"parameter group {group['name']!r}" if "name" in group else f"parameter group {index}"
