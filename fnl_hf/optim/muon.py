"""Muon for hidden matrices and AdamW for everything else, with Frobenius decay.

Both rules are torch's own optimizers, created for each step: Muon on the matrices that represent the parameters, AdamW
on the parameters and the state that is kept here.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from fnl_hf.bert.factorization import RANK_DIMS, without_autocast
from fnl_hf.optim.base import ProductGroups
from fnl_hf.optim.checked import ADAM_STATE, get_lr, group_name, require_group, validate_betas, validate_number
from fnl_hf.optim.sharding import local, sharding_of
from fnl_hf.products.views import VIEWS

ADJUSTMENTS = ("original", "match_rms_adamw")
OF_MUON = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")
OF_ADAMW = ("lr", "weight_decay", "betas", "eps", "fused")
TOO_MANY_STEPS = 100  # of Newton-Schulz iterations, for torch's Muon


class FrobeniusMuon(ProductGroups, torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for all other parameters, and Frobenius decay of products.

    Before the step each product is decayed at the learning rate η of its group (Khodak et al., ICLR 2021)::

        U ← U − ηλ U VᵀV,    V ← V − ηλ V UᵀU        (the same for U, M and V of U M Vᵀ)

    A matrix W (m, n) with gradient G then takes a step of ``torch.optim.Muon``, with five Newton-Schulz iterations that
    bring the singular values of the momentum near 1::

        B ← μB + (1 − μ)G,    O = orthogonalize(μB + (1 − μ)G),    W ← (1 − ηλ)W − η·c(m, n)·O

    where c is 0.2·√max(m, n) ("match_rms_adamw") or √max(1, m/n) ("original"). Everything else takes a step of
    ``torch.optim.AdamW``. Without Frobenius decay both steps are bit-identical to those of torch's optimizers.

    Weights of more than two dimensions count as matrices: the weight of a convolution as (c_out, c_in·k·k), the factors
    of a product as its U (m, r) and Vᵀ (r, n).

    Args:
        params: parameter groups from :func:`fnl_hf.muon_param_groups`. ``use_muon`` says which rule a group
            follows; without it, products follow Muon and vectors follow AdamW. A group may have its own values of all
            arguments except ``adamw_lr``.
        lr: η of Muon's groups.
        weight_decay: λ of the ordinary decay, for groups without their own.
        momentum: μ.
        nesterov: False orthogonalizes B itself.
        ns_coefficients, ns_steps: settings of the iteration.
        adjust_lr_fn: c. With "match_rms_adamw" (Liu et al., 2025) a learning rate and weight decay for AdamW also suit
            Muon, so one η is enough. "original", torch's default, needs two.
        per_head: orthogonalize each head's part of a factor separately, (r, n) or (m, r), instead of the H·r rows or
            columns together. Not for groups "attention", because their factors are parts of parameters.
        adamw_lr: η of AdamW's groups; None for ``lr``. A schedule scales both.
        betas, eps, fused: AdamW's, as in ``torch.optim.AdamW``.
        frobenius_decay: λ of groups of products without their own; >= 0.

    Raises:
        ValueError: a value is outside its bounds, a group of matrices has no ``use_muon``, a group for Muon has
            vectors, or parameters are complex; for products as in :class:`FrobeniusAdamW`. Under FSDP2, a matrix is
            sharded over two mesh dimensions.
        RuntimeError: torch is older than 2.9 and has no Muon, or gradients are sparse; nothing is decayed then.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        per_head: bool = False,
        adamw_lr: float | torch.Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
        frobenius_decay: float = 0.0,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"Muon needs torch.optim.Muon from torch 2.9 or later: this is torch {torch.__version__}"
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "per_head": per_head,
            "adamw_lr": lr if adamw_lr is None else adamw_lr,
            "betas": betas,
            "eps": eps,
            "fused": fused,
        }
        super().__init__(params, defaults, frobenius_decay=frobenius_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its entries and their bounds."""
        require_group(param_group)
        where = group_name(param_group, len(self.param_groups))
        if not isinstance(param_group["params"], set | torch.Tensor):  # torch refuses a set
            param_group["params"] = list(param_group["params"])
        if "use_muon" not in param_group:
            param_group["use_muon"] = _follows_muon(param_group, where)
        if not param_group["use_muon"]:
            param_group.setdefault("lr", self.defaults["adamw_lr"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        del group["adamw_lr"]  # its ``lr`` is
        try:
            _validate(group, where)
        except Exception:
            del self.param_groups[-1]
            raise

    def _state_entries(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ADAM_STATE

    def _take_group(self, own: dict[str, Any], group: dict[str, Any], where: str) -> None:
        if group.setdefault("use_muon", own["use_muon"]) != own["use_muon"]:
            raise ValueError(f"{where} has use_muon {own['use_muon']}, but the state to load has {group['use_muon']}")
        super()._take_group(own, group, where)
        _validate(group, where)

    @torch.compiler.disable
    def _groups_to_decay(self) -> list[dict[str, Any]]:
        for index, group in enumerate(self.param_groups):  # before anything is decayed
            if group["use_muon"]:
                _validate_matrices(group["params"], group_name(group, index))
        return super()._groups_to_decay()

    @torch.compiler.disable
    @torch.no_grad()
    def _base_step(self) -> None:
        with without_autocast(p for group in self.param_groups for p in group["params"]):
            for group in self.param_groups:
                if group["use_muon"]:
                    self._step_muon(group)
            groups = [
                {name: group[name] for name in ("params", *OF_ADAMW)}
                for group in self.param_groups
                if not group["use_muon"]
            ]
            if groups:
                adamw = torch.optim.AdamW(groups)
                adamw.state = self.state
                _take_step(adamw)

    def _step_muon(self, group: dict[str, Any]) -> None:
        options = {name: group[name] for name in OF_MUON}
        lr, weight_decay = float(get_lr(group)), float(group["weight_decay"])
        blocks: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        buffers: list[torch.Tensor] = []
        for parameter, layout in zip(group["params"], _layouts_of(group)):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad, memory_format=torch.preserve_format)
            if parameter.dim() > 2 or isinstance(parameter, DTensor):
                change = _change(parameter.grad, state["momentum_buffer"], layout, lr, options)
                local(parameter).mul_(1 - lr * weight_decay).add_(_part(change, parameter))
                continue
            blocks += layout.split(parameter.detach())
            gradients += layout.split(parameter.grad)
            buffers += layout.split(state["momentum_buffer"])
        _step_blocks(blocks, gradients, buffers, lr=lr, weight_decay=weight_decay, **options)


class _Layout(NamedTuple):
    """How a parameter is seen as matrices: its ``rank_dim`` is split into ``num_heads`` parts.

    Matrices are as they are stored. In a weight of more dimensions the other ones are taken together, and come first in
    a left factor, as U (m, r), where that is an output's.
    """

    rank_dim: int = 0
    num_heads: int = 1
    is_left: bool = False

    def split(self, matrix: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of the parts of a matrix of two dimensions."""
        return matrix.chunk(self.num_heads, self.rank_dim)

    def fold(self, tensor: torch.Tensor) -> tuple[torch.Tensor, "_Layout"]:
        """A weight as a matrix, and how that is split."""
        if tensor.dim() == 2:
            return tensor, self
        rows = tensor.movedim(self.rank_dim, 0).flatten(1)
        return (rows.T if self.is_left else rows), self._replace(rank_dim=int(self.is_left))

    def unfold(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Back to the weight's own shape."""
        if len(shape) == 2:
            return matrix
        rows = matrix.T if self.is_left else matrix
        others = (size for dim, size in enumerate(shape) if dim != self.rank_dim)
        return rows.reshape(shape[self.rank_dim], *others).movedim(0, self.rank_dim)


def _layouts_of(group: dict[str, Any]) -> list[_Layout]:
    if group["product"] in (None, VIEWS):  # fused weights are one matrix, as torch's Muon would see them
        return [_Layout()] * len(group["params"])
    dims = RANK_DIMS[group["product"]]
    heads = group["num_heads"] if group["per_head"] else 1
    layouts = [_Layout(dim, heads, is_left=index == 0) for index, dim in enumerate(dims)]
    return layouts * (len(group["params"]) // len(dims))


def _change(
    gradient: torch.Tensor, buffer: torch.Tensor, layout: _Layout, lr: float, options: dict[str, Any]
) -> torch.Tensor:
    """−η·c·O, unsharded and in the weight's shape, for a sharded weight or one with more than two dimensions.

    Updates ``buffer``. Momentum is elementwise, so each process updates its own part; O needs the whole direction.
    """
    buffer.lerp_(gradient, 1 - options["momentum"])
    direction = gradient.lerp(buffer, options["momentum"]) if options["nesterov"] else buffer
    whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
    matrix, split_as = layout.fold(whole)
    change = torch.zeros_like(matrix)
    blocks = split_as.split(change)
    # With momentum 0, torch's Muon takes the direction as given.
    options = options | {"lr": lr, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    _step_blocks(blocks, split_as.split(matrix), [torch.zeros_like(block) for block in blocks], **options)
    return layout.unfold(change, whole.shape)


def _step_blocks(
    blocks: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], **options: Any
) -> None:
    """A step of ``torch.optim.Muon`` on matrices, in place."""
    if not blocks:
        return
    muon = torch.optim.Muon(blocks, **options)
    for block, gradient, buffer in zip(blocks, gradients, buffers):
        block.grad = gradient
        muon.state[block] = {"momentum_buffer": buffer}
    _take_step(muon)


def _take_step(optimizer: torch.optim.Optimizer) -> None:
    """A step without the hooks that torch adds to the ``step`` of every class: those are called for our own step."""
    step: Any = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def _part(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The local part of a tensor that is sharded like ``parameter``."""
    sharding = sharding_of(parameter)
    return whole if sharding is None else sharding.part_of(whole)


def _follows_muon(group: dict[str, Any], where: str) -> bool:
    """The rule for a group without ``use_muon``."""
    if group.get("product") is not None:
        return True
    params = group["params"]
    entries = [params] if isinstance(params, torch.Tensor) else params
    if any((entry[1] if isinstance(entry, tuple) else entry).dim() >= 2 for entry in entries):
        raise ValueError(
            f"{where} has matrices, but does not say whether to update them with Muon (use_muon: for hidden layers) "
            "or with AdamW (for embeddings and output heads): make the groups with muon_param_groups(model, ...)"
        )
    return False


def _validate_matrices(params: Sequence[torch.Tensor], where: str) -> None:
    for position, parameter in enumerate(params):
        if parameter.dim() < 2:
            raise ValueError(
                f"{where}, parameter {position}, of shape {tuple(parameter.shape)}: Muon is for matrices. Set "
                "use_muon to False for vectors; FSDP1 and DeepSpeed ZeRO flatten matrices: use FSDP2 (fully_shard) "
                "instead"
            )
        sharding_of(parameter)  # refuses what cannot be gathered


def _validate(group: dict[str, Any], where: str) -> None:
    for name in ("lr", "weight_decay", "eps"):
        validate_number(name, group[name], f"{where}: ")
    validate_betas(group["betas"])
    for position, parameter in enumerate(group["params"]):
        if not parameter.is_floating_point():
            raise ValueError(
                f"{where}, parameter {position}, of shape {tuple(parameter.shape)}, has dtype {parameter.dtype}: "
                "Muon and AdamW need real floating-point parameters here"
            )
    if not group["use_muon"]:
        return
    _validate_matrices(group["params"], where)
    if group["per_head"] and group["product"] == VIEWS:
        raise ValueError(
            f"{where}: per_head (True) needs factors that are whole parameters, but here they are parts of "
            "parameters, shared by heads or rotated: set per_head to False in this group"
        )
    momentum, steps, coefficients = group["momentum"], group["ns_steps"], group["ns_coefficients"]
    if not isinstance(momentum, Real) or not 0.0 <= float(momentum) < 1.0:
        raise ValueError(f"{where}: momentum ({momentum}) must be a number, at least 0 and below 1")
    if not isinstance(steps, int) or not 1 <= steps < TOO_MANY_STEPS:
        raise ValueError(f"{where}: ns_steps ({steps}) must be a whole number, at least 1 and below {TOO_MANY_STEPS}")
    numbers = coefficients if isinstance(coefficients, tuple | list) else ()
    if len(numbers) != 3 or not all(isinstance(number, Real) for number in numbers):
        raise ValueError(f"{where}: ns_coefficients ({coefficients}) must be three numbers")
    if group["adjust_lr_fn"] not in (None, *ADJUSTMENTS):
        raise ValueError(f"{where}: adjust_lr_fn must be one of {ADJUSTMENTS} or None, not {group['adjust_lr_fn']!r}")
