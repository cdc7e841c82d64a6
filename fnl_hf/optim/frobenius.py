"""Frobenius decay of products of two or three parameters: one implementation for every optimizer.

Frobenius decay is the penalty ½λ‖W‖²_F on a product, W = U Vᵀ or W = U M Vᵀ, whose gradients are (Khodak et al., ICLR
2021, section 3.2, and the same derivation for three factors)

    pair:    λ U (VᵀV),          λ V (UᵀU)
    triple:  λ U (M VᵀV Mᵀ),     λ (UᵀU) M (VᵀV),     λ V (Mᵀ UᵀU M)

Decoupled, it is a step of size ηλ along these on the factors, before the optimizer's own. All Gram matrices come from
the values before the step.

A product is identified by its position in a parameter group with an entry ``product``, its kind (a key of
``RANK_DIMS``): ``params`` is [left₀, right₀, left₁, right₁, ...] or [left₀, middle₀, right₀, ...]. Attributes of
parameters would not survive FSDP2. Products of parts of parameters, of kind ``VIEWS``, are in optim/view_decay.py.

Shapes here are rank first: an outer factor is (H, r, n), Fᵀ of the formulas, as ``torch.nn.Linear`` stores most. H
heads, r rank, s second rank of the middle factor (H, r, s), n outer size, h heads that have rows in this process: all
unless a factor is sharded along its rank (optim/local_factors.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fnl_hf.bert.factorization import RANK_DIMS, validate_product, without_autocast
from fnl_hf.optim.checked import validate_number
from fnl_hf.optim.local_factors import LocalFactor, LocalProduct
from fnl_hf.optim.sharding import gather_rows, sum_over_processes
from fnl_hf.optim.view_decay import LocalPair, ViewUnit, unit_size, validate_views
from fnl_hf.products.views import VIEWS

# On an accelerator, kernel launches dominate: factors of equal shape are stacked, up to this many bytes of copies at a
# time. On a CPU, caches dominate: one product at a time.
STACK_BYTES = 16 * 2**20
DECAYED_DTYPES = (torch.float32, torch.float64)

Decayed = LocalProduct | ViewUnit
# Gram matrices, operators
Examine = Callable[[LocalProduct | LocalPair, Sequence[torch.Tensor], Sequence[torch.Tensor]], None]


def validate_product_group(group: dict[str, Any], where: str = "parameter group") -> None:
    """Check a parameter group's ``product``, ``num_heads``, both decays and the shapes of its products.

    Raises:
        ValueError: naming the entry and its value.
    """
    decay = group["frobenius_decay"]
    for name in ("frobenius_decay", "weight_decay"):
        validate_number(name, group[name], f"{where}: ")
    kind, params = group["product"], group["params"]
    if kind is None:
        if decay != 0.0:
            raise ValueError(
                f"{where}: frobenius_decay ({decay}) applies to products only: set product to one of "
                f"{sorted(RANK_DIMS)} in the parameter group, as frobenius_param_groups does, or use weight_decay"
            )
        return
    row_decay = group.get("row_decay")
    if group.get("differentiable") and (decay != 0.0 or row_decay):
        needed = f"frobenius_decay 0, not {decay}" if decay != 0.0 else f"row_decay None, not {row_decay}"
        raise ValueError(
            f"{where}: differentiable (True) needs {needed}: the decay is applied in place, outside of autograd, so it "
            "would be missing in the derivative of the step"
        )
    if kind == VIEWS:
        validate_views(group, where)
        _validate_dtypes(group, where)
        return
    if kind not in RANK_DIMS:
        raise ValueError(f"{where}: product must be one of {sorted(RANK_DIMS)} or None, not {kind!r}")
    size = len(RANK_DIMS[kind])
    if len(params) != size * group.get("num_products", len(params) // size):
        raise ValueError(
            f"{where}: products of kind {kind!r} have {size} factors each, so the group must have a multiple of "
            f"{size} parameters{_describe_number(group)}, but has {len(params)}: a factor is missing, or FSDP1, "
            "DeepSpeed ZeRO or ZeroRedundancyOptimizer flattened or distributed the parameters"
        )
    for index, weights in enumerate(products_of(group)):
        validate_product(tuple(weights), kind, group["num_heads"], f"{where}, product {index} ({kind})")
    _validate_dtypes(group, where)


def _validate_dtypes(group: dict[str, Any], where: str) -> None:
    kind = group["product"]
    for index, weights in enumerate(products_of(group)):
        dtypes = [f"{weight.dtype} on {weight.device}" for weight in weights]
        if len(set(dtypes)) > 1:
            raise ValueError(
                f"{where}, product {index} ({kind}): its factors must have the same dtype and device, but are "
                f"{' and '.join(dtypes)}"
            )
        for weight in weights:
            if group["frobenius_decay"] != 0.0 and weight.dtype not in DECAYED_DTYPES:
                raise ValueError(f"{where}, product {index} ({kind}) has dtype {weight.dtype}: {_why_not(weight)}")


def _why_not(weight: torch.Tensor) -> str:
    if not weight.is_floating_point():
        return "Frobenius decay needs real parameters in float32 or float64"
    return (
        "Frobenius decay changes a weight by about 3e-7 of its value per step, which half precision rounds away. "
        "Keep the parameters in float32 (or float64) and use autocast"
    )


def _describe_number(group: dict[str, Any]) -> str:
    if "num_products" not in group:
        return ""
    count = group["num_products"]
    return f" ({count * len(RANK_DIMS[group['product']])}, because its num_products is {count})"


def factors_per_product(group: dict[str, Any]) -> int:
    """The number of parameters of a product of a group, or of an attention layer's products."""
    return unit_size(group) if group["product"] == VIEWS else len(RANK_DIMS[group["product"]])


def products_of(group: dict[str, Any]) -> list[list[torch.Tensor]]:
    """The parameters of each product of a group, or of each attention layer's products."""
    size, params = factors_per_product(group), group["params"]
    return [params[i : i + size] for i in range(0, len(params), size)]


@torch.no_grad()
def add_frobenius_gradients_(decayed: Sequence[Decayed], examine: Examine | None = None) -> None:
    """Add to each factor's target what :class:`LocalProduct` says, in the factors' own dtype, inside autocast too.

    Sharded factors are not gathered unless necessary: all processes of their mesh must call this with the same
    products, and one all-gather and one all-reduce serve all of them. ``examine`` sees each product before its targets
    change.
    """
    with without_autocast(weight for each in decayed for weight in each.weights):
        _add_all_gradients_([each for each in decayed if isinstance(each, LocalProduct)], examine)
        for each in decayed:
            if isinstance(each, ViewUnit):
                each.add_(examine)


def _add_all_gradients_(products: Sequence[LocalProduct], examine: Examine | None) -> None:
    scratch: dict[Any, torch.Tensor] = {}
    for chunk in _chunks(products):
        copies: dict[LocalFactor, torch.Tensor] = {}
        if chunk[0].is_sharded:
            grams = _sharded_grams(chunk)
        elif len(chunk) > 1:
            grams, copies = _stacked_grams(chunk)
        else:
            grams = [[factor.gram() for factor in chunk[0].outer_factors]]
        for product, grams_of_product in zip(chunk, grams):
            _add_gradients_(product, grams_of_product, copies, scratch, examine)


def frobenius_operators(
    grams: Sequence[torch.Tensor], middle: torch.Tensor | None = None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """The operators that, multiplied from the left with each rank-first factor, give its gradient: (H, r, r) each.

    ``grams`` are UᵀU and VᵀV, ``middle`` is M (H, r, s). For a triple, the middle gradient is (UᵀU)(M VᵀV): its
    operator is UᵀU, and the second result is what it is applied to.
    """
    left, right = grams  # (H, r, r) and (H, s, s), of a pair s = r
    if middle is None:
        return (right, left), None
    middle_right = middle @ right  # M VᵀV (H, r, s)
    return (middle_right @ middle.mT, left, middle.mT @ left @ middle), middle_right


def _chunks(products: Sequence[LocalProduct]) -> Iterator[list[LocalProduct]]:
    """Products whose Gram matrices are computed together: all sharded ones, the others up to some size."""
    sharded: list[LocalProduct] = []
    stack: list[LocalProduct] = []
    for product in products:
        if product.is_sharded:  # even if nothing is updated: all processes must take part in the collectives
            sharded.append(product)
        elif product.is_updated:
            if product.factors[0].weight.device.type == "cpu":
                yield [product]
                continue
            if stack and sum(p.nbytes for p in [*stack, product]) > STACK_BYTES:
                yield stack
                stack = []
            stack.append(product)
    yield from (chunk for chunk in (stack, sharded) if chunk)


def _stacked_grams(chunk: list[LocalProduct]) -> tuple[list[list[torch.Tensor]], dict[LocalFactor, torch.Tensor]]:
    """Few kernels instead of many: copies of all factors of one shape in one tensor, and one batched matmul.

    Returns:
        The Gram matrices of each product, and the copy (H, r, n) of each factor.
    """
    by_shape: dict[Any, list[LocalFactor]] = {}
    for factor in (factor for product in chunk for factor in product.outer_factors):
        rows = factor.rows
        by_shape.setdefault((rows.shape[1:], rows.dtype, rows.device), []).append(factor)
    grams: dict[LocalFactor, torch.Tensor] = {}
    copies: dict[LocalFactor, torch.Tensor] = {}
    for factors in by_shape.values():
        stack = torch.cat([factor.rows for factor in factors])  # (ΣH, r, n)
        heads = [factor.num_heads for factor in factors]
        grams |= zip(factors, (stack @ stack.mT).split(heads))
        copies |= zip(factors, stack.split(heads))
    return [[grams[factor] for factor in product.outer_factors] for product in chunk], copies


def _sharded_grams(chunk: list[LocalProduct]) -> list[list[torch.Tensor]]:
    """One packed all-gather of the factors whose heads are split, then one packed all-reduce of the Gram matrices."""
    factors = [factor for product in chunk for factor in product.factors]
    split = {factor: factor.sharding for factor in factors if factor.is_gathered and factor.sharding}
    gathered = gather_rows([factor.weight.flatten(1) for factor in split], list(split.values()))
    for factor, rows in zip(split, gathered):
        factor.set_gathered(rows)
    outer = [(product, factor) for product in chunk for factor in product.outer_factors]
    # None: this process has all that it needs of them.
    shardings = [None if p.has_local_grams or factor.is_gathered else factor.sharding for p, factor in outer]
    grams = sum_over_processes([factor.gram() for _, factor in outer], shardings)
    return [grams[i : i + 2] for i in range(0, len(grams), 2)]


def _add_gradients_(
    product: LocalProduct,
    grams: Sequence[torch.Tensor],
    copies: Mapping[LocalFactor, torch.Tensor],
    scratch: dict[Any, torch.Tensor],
    examine: Examine | None,
) -> None:
    operators, middle_right = frobenius_operators(grams, product.middle)
    if examine is not None and product.is_updated:
        examine(product, grams, operators)
    alpha: Any = product.scale
    if isinstance(alpha, torch.Tensor):  # as ``alpha`` of a kernel, it would have to be copied from its device
        scale = alpha.to(operators[0].dtype)
        operators, alpha = tuple(operator * scale for operator in operators), 1.0
    for index, (factor, operator) in enumerate(zip(product.factors, operators)):
        target = factor.target
        if target is None:
            continue
        operator = operator[factor.heads]  # (h, r, r)
        rows, is_in_place = factor.rows, factor.is_in_place  # (h, r, n)
        if index == 1 and middle_right is not None:
            rows, is_in_place = middle_right[factor.heads], False
        if factor.is_gathered or target.dim() > 3:  # parts of heads; an outer size spread over several dimensions
            gradient = (operator @ rows).flatten(0, 1)[factor.local_rows]  # (rows here, n)
            target.add_(gradient.view(target.shape), alpha=alpha)
        elif factor in copies or not is_in_place:
            target.baddbmm_(operator, copies.get(factor, rows), alpha=alpha)
        else:  # a matmul must not write to its inputs
            target.add_(torch.bmm(operator, rows, out=_like(target, scratch)), alpha=alpha)


def _like(tensor: torch.Tensor, scratch: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Memory with the same strides, reused for the next tensor of the same shape, so that it stays in the caches."""
    key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if key not in scratch:
        scratch[key] = torch.empty_like(tensor)
    return scratch[key]
