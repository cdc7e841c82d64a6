"""LAMB (You et al., ICLR 2020, arXiv 1904.00962), and LAMB with Frobenius decay.

The moments and Adam's direction come from torch's Adam kernels (fused, foreach or neither). optim/buckets.py computes
the decay and the trust ratio of parameters that are updated together.
"""

from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

from fnl_hf.bert.factorization import without_autocast
from fnl_hf.optim.base import ProductGroups, evaluate_closure, is_decayed, local_products
from fnl_hf.optim.buckets import Bucket, Unit, compute_norms, split_by_kind, split_by_size, trust_ratios
from fnl_hf.optim.checked import ADAM_STATE, CheckedOptimizer, get_lr, group_name, validate_betas, validate_number
from fnl_hf.optim.frobenius import Decayed, add_frobenius_gradients_, products_of
from fnl_hf.optim.sharding import local, sharding_of, sum_over_processes

DECAYS = ("decoupled", "in_trust_ratio")
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
TAKEN_FROM_ADAM = ("lr", "initial_lr", "betas", "eps")  # entries of the groups in a state of torch's Adam
MANY_STEPS = 1e8  # β ** MANY_STEPS is 0: Adam's kernels then correct no bias


class Lamb(CheckedOptimizer):
    """LAMB: Adam's direction, rescaled so that each parameter moves by a multiple of its own norm::

        m ← β₁m + (1 − β₁)g,    v ← β₂v + (1 − β₂)g²,    m̂ = m/(1 − β₁ᵗ),    v̂ = v/(1 − β₂ᵗ)
        u = m̂/(√v̂ + ε) + λw
        w ← w − η · φ(‖w‖)/‖u‖ · u

    Parameters with fewer than two dimensions (biases, normalization) get neither decay nor trust ratio. The
    ratio is 1 if either norm is 0. Gradients are first clipped to a global norm, in place.

    Args:
        params: parameters or parameter groups.
        lr: η.
        betas: β₁, β₂.
        eps: ε.
        weight_decay: λ of the parameters with two or more dimensions.
        decay: "in_trust_ratio" as above (You et al.), or "decoupled": w ← (1 − ηλ)w first and no λw in u. The ratio
            scales the first but not the second, so at equal λ "decoupled" is about 1/ratio times as strong.
        bias_correction: False leaves m and v uncorrected, like the first LAMB code.
        weight_norm_clamp: (γ_l, γ_u) of φ(z) = min(max(z, γ_l), γ_u); None for φ(z) = z.
        trust_clamp: bounds of the trust ratio itself; None for no bounds.
        max_grad_norm: bound of the norm of all gradients together; None for no clipping here. Since
            ``transformers.Trainer`` also clips, set only one of the two.
        foreach, fused: the Adam kernels of torch to use, as in ``torch.optim.Adam``; by default fused if available.

    Raises:
        ValueError: a value is outside its bounds, or parameters are complex.
        RuntimeError: gradients are sparse.
    """

    state_entries = ADAM_STATE

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        decay: str = "in_trust_ratio",
        bias_correction: bool = True,
        weight_norm_clamp: tuple[float, float] | None = None,
        trust_clamp: tuple[float, float] | None = None,
        max_grad_norm: float | None = 1.0,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "bias_correction": bias_correction,
            "weight_norm_clamp": weight_norm_clamp,
            "trust_clamp": trust_clamp,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)
        is_bound = isinstance(max_grad_norm, Real) and 0.0 < float(max_grad_norm) < float("inf")
        if max_grad_norm is not None and not is_bound:
            raise ValueError(f"max_grad_norm ({max_grad_norm}) must be positive and finite, or None")
        self.defaults["max_grad_norm"] = max_grad_norm  # for all groups together, so not an entry of each group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its entries and their bounds."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _validate(group, group_name(group, len(self.param_groups) - 1))
        except Exception:  # even for a malformed group
            del self.param_groups[-1]
            raise
        if group["fused"] is None:
            is_supported = all(p.device.type in FUSED_DEVICES for p in group["params"])
            group["fused"] = is_supported and not group["foreach"]
        group["has_matrices"] = any(p.dim() >= 2 for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. A state of torch's Adam or AdamW brings moments, step counts, learning rate, betas and eps.

        Raises:
            ValueError: other groups or parameters than here, another optimizer's state, or one that maximizes; nothing
                is changed then.
        """
        super().load_state_dict(state_dict)

    def _take_group(self, own: dict[str, Any], group: dict[str, Any], where: str) -> None:
        if "trust_clamp" not in group:
            if group.get("maximize"):
                raise ValueError(f"{where}: the state to load has maximize (True), but LAMB only minimizes")
            taken = {name: group[name] for name in TAKEN_FROM_ADAM if name in group}
            group.clear()
            group.update({name: value for name, value in own.items() if name not in TAKEN_FROM_ADAM} | taken)
        super()._take_group(own, group, where)
        _validate(group, where)
        for parameter in group["params"]:
            entries = self.state.get(parameter)
            if entries:
                device = parameter.device if group["fused"] else "cpu"
                step = torch.as_tensor(entries["step"], dtype=torch.float32, device=device)  # in older states, a number
                self.state[parameter] = {name: entries[name] for name in ADAM_STATE} | {"step": step}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: the closure if given, clipping, then LAMB's update."""
        loss = evaluate_closure(closure)
        self._update()
        return loss

    # otherwise its loops over buckets would be compiled separately, and its kernels are torch's own
    @torch.compiler.disable
    def _update(self) -> None:
        self._refuse_unsupported()
        with without_autocast(p for group in self.param_groups for p in group["params"]):
            self._update_buckets()

    def _update_buckets(self) -> None:
        grad_scale = self._clip_scale()
        found_inf = getattr(self, "found_inf", None)  # as in torch's fused kernels: 1 in a step to skip
        for buckets in self._make_buckets():
            # −u grows in each bucket's ``updates``: first the decay's part, then Adam's direction, which torch's
            # kernels subtract. Weights are written last, when the norms of w and u are known.
            for bucket in buckets:
                bucket.decay(bucket.lr(found_inf))
            self._decay_products(buckets)
            for bucket in buckets:
                self._subtract_adam_direction(bucket, grad_scale, found_inf)
            for bucket, ratios in zip(buckets, trust_ratios(buckets)):
                bucket.apply(ratios, bucket.lr(found_inf))

    def _refuse_unsupported(self) -> None:
        """Refuse sparse gradients, and groups and parameters that became invalid."""
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            get_lr(group)
            if group["has_matrices"] and all(p.dim() < 2 for p in group["params"]):
                raise ValueError(
                    "the parameters were reshaped after the optimizer was created, as FSDP1 and DeepSpeed ZeRO do, "
                    "but LAMB needs the norm of each parameter: use FSDP2 (fully_shard) instead"
                )

    def _clip_scale(self) -> torch.Tensor | None:
        """The divisor of all gradients, a 0-d tensor >= 1, or None without clipping."""
        max_norm = self.defaults["max_grad_norm"]
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if max_norm is None or not weights:
            return None
        norms = [norm.to(weights[0].device) for norm in compute_norms([local(p.grad) for p in weights])]
        shardings = [sharding_of(p) for p in weights]
        if any(shardings):
            squares = sum_over_processes(torch.stack(norms).square().unbind(), shardings)
            norm = torch.stack(squares).sum().sqrt()
        else:
            norm = torch.linalg.vector_norm(torch.stack(norms))
        return ((norm + 1e-6) / max_norm).clamp(min=1.0)

    def _split_into_units(self, group: dict[str, Any]) -> list[Unit]:
        return [(p,) for p in group["params"]]

    def _make_buckets(self) -> Iterator[list[Bucket]]:
        """Buckets whose norms are summed over the processes together: all sharded ones; every other bucket alone."""
        sharded_buckets = []
        for group in self.param_groups:
            whole: list[Unit] = []
            sharded: list[Unit] = []
            for unit in self._split_into_units(group):
                (sharded if any(isinstance(p, DTensor) for p in unit) else whole).append(unit)
            for of_kind in split_by_kind(whole):
                for units in split_by_size(of_kind):
                    yield [Bucket(group, units)]
            sharded_buckets += [Bucket(group, of_kind) for of_kind in split_by_kind(sharded)]
        if sharded_buckets:
            yield sharded_buckets

    def _decay_products(self, buckets: list[Bucket]) -> None:
        """Decay of products inside the trust ratio; there are no products here."""

    def _subtract_adam_direction(
        self, bucket: Bucket, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None
    ) -> None:
        """updates ← updates − m̂/(√v̂ + ε): a step of Adam with η = 1 on the updates in place of the parameters."""
        group = bucket.group
        states = [self._state_of(p, group) for p in bucket.parameters]
        grads = [local(p.grad) for p in bucket.parameters if p.grad is not None]
        exp_avgs = [local(state["exp_avg"]) for state in states]
        exp_avg_sqs = [local(state["exp_avg_sq"]) for state in states]
        steps = [state["step"] for state in states]
        is_fused = group["fused"] and _have_equal_strides(bucket.updates, grads, exp_avgs, exp_avg_sqs)
        # A fused kernel only accepts a float32 scale; it is float64 as soon as one gradient is.
        if grad_scale is not None and grads and not (is_fused and grad_scale.dtype == torch.float32):
            for device in {grad.device for grad in grads}:
                torch._foreach_div_([grad for grad in grads if grad.device == device], grad_scale.to(device))
            grad_scale = None
        if found_inf is not None and not is_fused:
            if found_inf.item():  # only fused kernels check it themselves
                return
            found_inf = None
        if not group["bias_correction"] and steps:
            # The kernels divide by 1 − βᵗ: count the steps here, and pass a t at which that is 1.
            # A list, because the kernel would copy the number from the device of a tensor.
            torch._foreach_add_(steps, 1 if found_inf is None else [1 - found_inf] * len(steps))
            steps = [torch.full_like(step, MANY_STEPS) for step in steps]
        beta1, beta2 = group["betas"]
        adam(
            bucket.updates,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            foreach=group["foreach"],
            fused=is_fused,
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            # As in torch.optim.Adam, whose states LAMB can load: on the device for a fused kernel, else on the host.
            device = parameter.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


class FrobeniusLamb(ProductGroups, Lamb):
    """LAMB with Frobenius decay on products of parameters and ordinary decay elsewhere.

    The paper (Khodak et al., ICLR 2021) calls such an optimizer FLAMBé. We could not find its algorithm, so this
    definition is our own.

    ``decay="decoupled"``: before LAMB's update, outside the trust ratio::

        U ← U − ηλ U VᵀV,    V ← V − ηλ V UᵀU,    all other matrices w ← (1 − ηλ)w.

    ``decay="in_trust_ratio"``: as in LAMB itself, u = m̂/(√v̂ + ε) + λ U VᵀV, and + λw for all other matrices.

    The trust ratio φ(‖w‖)/‖u‖ scales the second: the decay adds up to Σ_t η_t λ in the first case and to
    Σ_t η_t λ·ratio_t in the second. An entry of u is about 1 in size and an entry of BERT's attention matrices a few
    hundredths, so the ratio is a few hundredths, too. At equal λ the decoupled form is stronger by the inverse of the
    ratio, so it needs its own λ.

    Args:
        params: parameter groups from :func:`fnl_hf.frobenius_param_groups`.
        lr: η.
        frobenius_decay: λ of groups of products without their own; >= 0.
        decay: where to apply all decay, of products and of other matrices; a group may have its own value.
        kwargs: all other arguments of :class:`Lamb`.

    Raises:
        ValueError: as in :class:`Lamb` and :class:`FrobeniusAdamW`.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        *,
        frobenius_decay: float = 0.0,
        decay: str = "decoupled",
        **kwargs,
    ):
        super().__init__(params, lr, frobenius_decay=frobenius_decay, decay=decay, **kwargs)

    @torch.compiler.disable
    def _groups_to_decay(self) -> list[dict[str, Any]]:
        self._refuse_unsupported()  # before anything is decayed
        return [group for group in super()._groups_to_decay() if group["decay"] == "decoupled"]

    def _split_into_units(self, group: dict[str, Any]) -> list[Unit]:
        if group["product"] is None:
            return super()._split_into_units(group)
        return [tuple(weights) for weights in products_of(group)]

    def _decay_products(self, buckets: list[Bucket]) -> None:
        products: list[Decayed] = []
        for bucket in buckets:
            group = bucket.group
            if not is_decayed(group) or group["decay"] == "decoupled":
                continue
            updates = dict(zip(bucket.parameters, bucket.updates))
            in_bucket = group | {"params": [p for unit in bucket.units for p in unit]}
            products += local_products(in_bucket, -1.0, updates.__getitem__)
        add_frobenius_gradients_(products)


def _have_equal_strides(*lists: list[torch.Tensor]) -> bool:
    """Whether a fused kernel can handle these tensors: it takes elements in memory order, whatever the strides."""
    return all(len({tensor.stride() for tensor in tensors}) == 1 for tensors in zip(*lists))


def _validate(group: dict[str, Any], where: str) -> None:
    for name in ("lr", "eps", "weight_decay"):
        validate_number(name, group[name], f"{where}: ")
    for position, parameter in enumerate(group["params"]):
        if not parameter.is_floating_point():
            raise ValueError(
                f"{where}, parameter {position}, of shape {tuple(parameter.shape)}, has dtype {parameter.dtype}: LAMB "
                "needs real floating-point parameters"
            )
    validate_betas(group["betas"])
    if group["decay"] not in DECAYS:
        raise ValueError(f"{where}: decay must be one of {DECAYS}, not {group['decay']!r}")
    for name in ("weight_norm_clamp", "trust_clamp"):
        clamp = group[name]
        is_pair = isinstance(clamp, tuple | list) and len(clamp) == 2 and all(isinstance(each, Real) for each in clamp)
        if clamp is not None and not (is_pair and 0.0 <= clamp[0] <= clamp[1]):
            raise ValueError(f"{where}: {name} ({clamp}) must be two numbers, 0 <= lower <= upper, or None")
    if group["foreach"] and group["fused"]:
        raise ValueError(f"{where}: foreach and fused cannot both be True")
    if any(getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id") for p in group["params"]):
        raise ValueError(
            f"{where}: the parameters are flattened by FSDP1 or DeepSpeed ZeRO, but LAMB needs the norm of each "
            "parameter: use FSDP2 (fully_shard) instead"
        )
