"""LAMB (You et al., ICLR 2020, arXiv 1904.00962), and LAMB with Frobenius decay.

The moments and Adam's direction come from torch's own Adam kernels (fused, foreach or neither); the trust ratio, the
decay and the clipping are here. Parameters are worked on in buckets, so that the directions of all parameters never lie
in memory together, unless they are sharded: then all norms are summed over the processes in one all-reduce.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

from fnl_hf.optim.base import ProductGroups, evaluate_closure, get_lr, local_products
from fnl_hf.optim.frobenius import add_frobenius_gradients_, products_of
from fnl_hf.optim.local_factors import LocalProduct
from fnl_hf.optim.sharding import sharding_of, local, sum_over_processes

DECAYS = ("decoupled", "in_trust_ratio")
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
# Bytes of parameters handled together. On a CPU a bucket that stays in the caches is read once.
BUCKET_BYTES = {"cpu": 4 * 2**20}
DEFAULT_BUCKET_BYTES = 64 * 2**20
MANY_STEPS = 1e8  # β ** MANY_STEPS is 0: Adam's kernels then correct no bias


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam's direction, rescaled so that each parameter moves by a multiple of its own norm::

        m ← β₁m + (1 − β₁)g,    v ← β₂v + (1 − β₂)g²,    m̂ = m/(1 − β₁ᵗ),    v̂ = v/(1 − β₂ᵗ)
        u = m̂/(√v̂ + ε) + λw
        w ← w − η · φ(‖w‖)/‖u‖ · u

    Parameters with fewer than two dimensions (biases, normalisation) take neither decay nor trust ratio. The
    ratio is 1 where either norm is 0. Gradients are first clipped to a global norm, in place.

    Args:
        params: parameters or parameter groups.
        lr: η.
        betas: β₁, β₂.
        eps: ε.
        weight_decay: λ of the parameters with two or more dimensions.
        decay: "in_trust_ratio" as above (You et al.), or "decoupled": w ← (1 − ηλ)w first and no λw in u. The first is
            scaled by the ratio, the second is not: at equal λ it decays about 1/ratio times as strongly.
        bias_correction: False leaves m and v as they are, as the first LAMB code did.
        weight_norm_clamp: (γ_l, γ_u) of φ(z) = min(max(z, γ_l), γ_u); None for φ(z) = z.
        trust_clamp: bounds of the trust ratio itself; None for none.
        max_grad_norm: bound of the norm of all gradients together; None to leave clipping to others. Under
            ``transformers.Trainer``, which clips itself, set one of the two.
        foreach, fused: which of torch's Adam kernels to use, as in ``torch.optim.Adam``; by default fused, where it is.

    Raises:
        ValueError: a value outside its bounds.
        RuntimeError: sparse gradients.
    """

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
        if max_grad_norm is not None and not 0.0 < max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm ({max_grad_norm}) must be positive and finite, or None")
        self.defaults["max_grad_norm"] = max_grad_norm  # of all groups together, so no group's own entry

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its entries and their bounds."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _validate(group)
        except ValueError:
            del self.param_groups[-1]
            raise
        if group["fused"] is None:
            supported = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in group["params"])
            group["fused"] = supported and not group["foreach"]
        group["has_matrices"] = any(p.dim() >= 2 for p in group["params"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # states of torch's Adam have fewer entries
            for name in ("decay", "bias_correction", "weight_norm_clamp", "trust_clamp"):
                group.setdefault(name, self.defaults[name])
            group.setdefault("has_matrices", any(p.dim() >= 2 for p in group["params"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: the closure if given, clipping, then LAMB's update."""
        loss = evaluate_closure(closure)
        self._refuse_unsupported()
        grad_scale = self._clip_scale()
        found_inf = getattr(self, "found_inf", None)  # as torch's fused kernels have it: a step that is not to happen
        for buckets in self._batches():
            for bucket in buckets:
                _decay(bucket, _rate(bucket, found_inf))
            self._decay_products(buckets)
            for bucket in buckets:
                self._adam(bucket, grad_scale, found_inf)
            for bucket, ratios in zip(buckets, _trust_ratios(buckets)):
                _apply(bucket, ratios, _rate(bucket, found_inf))
        return loss

    def _refuse_unsupported(self) -> None:
        """Sparse gradients; parameters that were flattened after the optimizer was made."""
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
                raise RuntimeError("Lamb does not support sparse gradients")
            if group["has_matrices"] and all(p.dim() < 2 for p in group["params"]):
                raise ValueError(
                    "the parameters were reshaped after the optimizer was made, as FSDP1 and DeepSpeed ZeRO do: LAMB "
                    "needs each parameter's norm. Shard with FSDP2 (fully_shard) instead"
                )

    def _clip_scale(self) -> torch.Tensor | None:
        """What all gradients are divided by, a 0-d tensor >= 1, or None without clipping."""
        max_norm = self.defaults["max_grad_norm"]
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if max_norm is None or not weights:
            return None
        norms = [norm.to(weights[0].device) for norm in _norms([local(p.grad) for p in weights])]
        cuts = [sharding_of(p) for p in weights]
        if any(cuts):
            squares = sum_over_processes(torch.stack(norms).square().unbind(), cuts)
            norm = torch.stack(squares).sum().sqrt()
        else:
            norm = torch.linalg.vector_norm(torch.stack(norms))
        return ((norm + 1e-6) / max_norm).clamp(min=1.0)

    def _units(self, group: dict[str, Any]) -> list[tuple[torch.Tensor, ...]]:
        """Parameters that must be in the same bucket."""
        return [(p,) for p in group["params"]]

    def _batches(self) -> Iterator[list["_Bucket"]]:
        """Buckets whose norms are summed over the processes together: all sharded ones, each other one alone."""
        sharded = []
        for group in self.param_groups:
            whole: list[tuple[torch.Tensor, ...]] = []
            cut: list[tuple[torch.Tensor, ...]] = []
            for unit in self._units(group):
                (cut if any(isinstance(p, DTensor) for p in unit) else whole).append(unit)
            for units in _split(whole):
                yield [_Bucket(group, units)]
            if cut:
                sharded.append(_Bucket(group, cut))
        if sharded:
            yield sharded

    def _decay_products(self, buckets: list["_Bucket"]) -> None:
        """Decay of products inside the trust ratio; there are none here."""

    def _adam(self, bucket: "_Bucket", grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        """Subtract Adam's direction from the updates."""
        group = bucket.group
        states = [self._state_of(p, group) for p in bucket.parameters]
        grads = [local(p.grad) for p in bucket.parameters if p.grad is not None]
        exp_avgs = [local(state["exp_avg"]) for state in states]
        exp_avg_sqs = [local(state["exp_avg_sq"]) for state in states]
        fused = group["fused"] and _laid_out_alike(bucket.updates, grads, exp_avgs, exp_avg_sqs)
        # A fused kernel takes a float32 scale only; it is float64 as soon as one gradient is.
        if grad_scale is not None and grads and not (fused and grad_scale.dtype == torch.float32):
            for device in {grad.device for grad in grads}:
                torch._foreach_div_([grad for grad in grads if grad.device == device], grad_scale.to(device))
            grad_scale = None
        steps = [state["step"] for state in states]
        if found_inf is not None and not fused:
            if found_inf.item():  # only fused kernels look for themselves
                return
            found_inf = None
        if not group["bias_correction"] and steps:
            torch._foreach_add_(steps, 1 if found_inf is None else 1 - found_inf)
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
            fused=fused,
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
            # As torch.optim.Adam has it: on the device for a fused kernel, else on the host.
            device = parameter.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


class FrobeniusLamb(ProductGroups, Lamb):
    """LAMB with Frobenius decay on products of parameters and ordinary decay elsewhere.

    The paper (Khodak et al., ICLR 2021) names such an optimizer FLAMBé, but its algorithm could not be found: this
    definition is our own.

    ``decay="decoupled"``: before LAMB's update, outside the trust ratio::

        U ← U − ηλ U VᵀV,    V ← V − ηλ V UᵀU,    all other matrices w ← (1 − ηλ)w.

    ``decay="in_trust_ratio"``: as in LAMB itself, u = m̂/(√v̂ + ε) + λ U VᵀV, and + λw for all other matrices.

    The second is scaled by the trust ratio φ(‖w‖)/‖u‖: the decay adds up to Σ_t η_t λ in the first case and to
    Σ_t η_t λ·ratio_t in the second. An entry of u is about 1 in size, one of BERT's attention matrices a few
    hundredths, and so is the ratio: at equal λ the decoupled form is that much stronger and needs a λ of its own.

    Args:
        params: parameter groups, as :func:`fnl_hf.frobenius_param_groups` makes them.
        lr: η.
        frobenius_decay: λ of groups of products that have none of their own; >= 0.
        decay: where all decay, of products and of other matrices, is applied; a group may have its own.
        kwargs: everything that :class:`Lamb` takes.

    Raises:
        ValueError: as :class:`Lamb` and :class:`FrobeniusAdamW`.
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

    def _decayed_groups(self) -> list[dict[str, Any]]:
        self._refuse_unsupported()  # before anything is decayed
        return [group for group in super()._decayed_groups() if group["decay"] == "decoupled"]

    def _units(self, group: dict[str, Any]) -> list[tuple[torch.Tensor, ...]]:
        return super()._units(group) if group["product"] is None else [tuple(weights) for weights in products_of(group)]

    def _decay_products(self, buckets: list["_Bucket"]) -> None:
        products: list[LocalProduct] = []
        for bucket in buckets:
            group = bucket.group
            if group["product"] is None or group["frobenius_decay"] == 0.0 or group["decay"] == "decoupled":
                continue
            updates = dict(zip(bucket.parameters, bucket.updates))
            part = group | {"params": [p for unit in bucket.units for p in unit]}
            products += local_products(part, -group["frobenius_decay"], updates.__getitem__)
        add_frobenius_gradients_(products)


class _Bucket:
    """Parameters of one group that are updated together.

    ``parameters`` are those with a gradient, ``weights`` their local parts, ``updates`` become −u there.
    """

    def __init__(self, group: dict[str, Any], units: list[tuple[torch.Tensor, ...]]):
        self.group, self.units = group, units
        self.parameters = [p for unit in units for p in unit if p.grad is not None]
        self.weights = [local(p) for p in self.parameters]
        self.matrices = [i for i, p in enumerate(self.parameters) if p.dim() >= 2]
        self.updates: list[torch.Tensor] = []


def _split(units: list[tuple[torch.Tensor, ...]]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Consecutive units of one device in lists of at most as many bytes as suit it, or of one unit."""
    bucket: list[tuple[torch.Tensor, ...]] = []
    size = 0
    for unit in units:
        nbytes, device = sum(p.nbytes for p in unit), unit[0].device
        full = size + nbytes > BUCKET_BYTES.get(device.type, DEFAULT_BUCKET_BYTES)
        if bucket and (full or device != bucket[0][0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += nbytes
    if bucket:
        yield bucket


def _rate(bucket: _Bucket, found_inf: torch.Tensor | None) -> float | torch.Tensor:
    """The group's learning rate, or 0 in a step that is not to happen."""
    lr = get_lr(bucket.group)
    return lr if found_inf is None else (found_inf == 0) * lr


def _decay(bucket: _Bucket, lr: float | torch.Tensor) -> None:
    """Ordinary decay: decoupled at once, or as −λw in the updates, from which Adam's direction is then subtracted."""
    group, decay = bucket.group, bucket.group["weight_decay"]
    matrices = [bucket.weights[i] for i in bucket.matrices]
    inside = decay != 0.0 and group["decay"] == "in_trust_ratio" and bool(matrices)
    if decay != 0.0 and not inside and matrices:
        torch._foreach_mul_(matrices, 1 - lr * decay)
    started = dict(zip(bucket.matrices, torch._foreach_mul(matrices, -decay))) if inside else {}
    zeros = {i: torch.empty_like(weight) for i, weight in enumerate(bucket.weights) if i not in started}
    if zeros:
        torch._foreach_zero_(list(zeros.values()))
    started |= zeros
    bucket.updates = [started[i] for i in range(len(bucket.weights))]


def _laid_out_alike(*lists: list[torch.Tensor]) -> bool:
    """Whether a fused kernel may have them: one takes elements as they lie in memory, whatever the strides."""
    return all(len({tensor.stride() for tensor in tensors}) == 1 for tensors in zip(*lists))


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Euclidean norms as 0-d tensors, in float32 for half precision."""
    half = [t.dtype in (torch.float16, torch.bfloat16) for t in tensors]
    if not any(half):
        return list(torch._foreach_norm(tensors)) if tensors else []
    return [torch.linalg.vector_norm(t, dtype=torch.float32 if h else None) for t, h in zip(tensors, half)]


def _trust_ratios(buckets: list[_Bucket]) -> Iterator[torch.Tensor]:
    """φ(‖w‖)/‖u‖ of each bucket's matrices, one 1-d tensor a bucket; one all-reduce for all that is sharded."""
    filled = [bucket for bucket in buckets if bucket.matrices]
    weights = [bucket.weights[i] for bucket in filled for i in bucket.matrices]
    updates = [bucket.updates[i] for bucket in filled for i in bucket.matrices]
    cuts = [sharding_of(bucket.parameters[i]) for bucket in filled for i in bucket.matrices]
    norms = _norms(weights) + _norms(updates)
    if any(cuts):
        squares = sum_over_processes([norm.square() for norm in norms], cuts * 2)
        norms = [square.sqrt() for square in squares]
    weight_norms, update_norms = iter(norms[: len(weights)]), iter(norms[len(weights) :])
    for bucket in buckets:
        count = len(bucket.matrices)
        if count == 0:
            yield torch.empty(0)
            continue
        stacked = [torch.stack(list(itertools.islice(norms, count))) for norms in (weight_norms, update_norms)]
        yield _trust_ratio(bucket.group, *stacked)


def _trust_ratio(group: dict[str, Any], weight_norm: torch.Tensor, update_norm: torch.Tensor) -> torch.Tensor:
    phi = weight_norm
    if group["weight_norm_clamp"] is not None:
        low, high = group["weight_norm_clamp"]
        phi = phi.clamp(low, high)
    ratio = phi / update_norm
    if group["trust_clamp"] is not None:
        ratio = ratio.clamp(*group["trust_clamp"])
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, 1.0)


def _apply(bucket: _Bucket, ratios: torch.Tensor, lr: float | torch.Tensor) -> None:
    """w ← w − η · ratio · u; ``updates`` hold −u."""
    if bucket.matrices:
        factors = (ratios * lr).to(bucket.weights[bucket.matrices[0]].dtype)
        for i, factor in zip(bucket.matrices, factors.unbind()):
            bucket.weights[i].addcmul_(bucket.updates[i], factor)
    vectors = [i for i, weight in enumerate(bucket.weights) if weight.dim() < 2]
    if vectors:
        updates = [bucket.updates[i] for i in vectors]
        torch._foreach_mul_(updates, lr)
        torch._foreach_add_([bucket.weights[i] for i in vectors], updates)


def _validate(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= group[name] < float("inf"):
            raise ValueError(f"{name} ({group[name]}) must be finite and >= 0")
    if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas ({group['betas']}) must be two numbers, at least 0 and below 1")
    if group["decay"] not in DECAYS:
        raise ValueError(f"decay must be one of {DECAYS}, got {group['decay']!r}")
    for name in ("weight_norm_clamp", "trust_clamp"):
        clamp = group[name]
        bounds = clamp if isinstance(clamp, tuple | list) else ()
        if clamp is not None and not (len(bounds) == 2 and 0.0 <= bounds[0] <= bounds[1]):
            raise ValueError(f"{name} ({clamp}) must be two bounds, 0 <= lower <= upper, or None")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused cannot both be True")
    if any(getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id") for p in group["params"]):
        raise ValueError(
            "the parameters are flattened by FSDP1 or DeepSpeed ZeRO: LAMB needs each parameter's norm. Shard with "
            "FSDP2 (fully_shard) instead"
        )
