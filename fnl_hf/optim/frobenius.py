"""Frobenius decay of products of two or three parameters: one implementation for every optimizer.

Frobenius decay is the penalty ½λ‖W‖²_F on a product, W = U Vᵀ or W = U M Vᵀ, whose gradients are (Khodak et al., ICLR
2021, section 3.2, and the same derivation for three factors)

    pair:    λ U (VᵀV),          λ V (UᵀU)
    triple:  λ U (M VᵀV Mᵀ),     λ (UᵀU) M (VᵀV),     λ V (Mᵀ UᵀU M)

Decoupled, it is a step of size ηλ along these on the factors, before the optimizer's own. All Gram matrices come from
the values before the step.

A product is known to an optimizer by its position in a parameter group with an entry ``product``, its kind (a key of
``RANK_DIMS``): ``params`` is [left₀, right₀, left₁, right₁, ...] or [left₀, middle₀, right₀, ...]. Attributes on
parameters would not survive FSDP2.

Shapes here are rank first: an outer factor is (H, r, n), Fᵀ of the formulas, as ``torch.nn.Linear`` stores most.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fnl_hf.bert.factorization import RANK_DIMS, validate_product
from fnl_hf.optim.local_factors import ALL, LocalFactor, LocalProduct
from fnl_hf.optim.sharding import gather_pieces, sum_over_processes

# On an accelerator kernel launches dominate: factors of equal shape are stacked, up to this many bytes of copies at a
# time. On a CPU the caches do: one product at a time.
STACK_BYTES = 16 * 2**20
DECAYED_DTYPES = (torch.float32, torch.float64)


def validate_product_group(group: dict[str, Any], where: str = "parameter group") -> None:
    """Check a parameter group's ``product``, ``num_heads``, ``frobenius_decay`` and the shapes of its products.

    Raises:
        ValueError: naming the entry and its value.
    """
    decay = group["frobenius_decay"]
    if not 0.0 <= decay < float("inf"):
        raise ValueError(f"{where}: frobenius_decay ({decay}) must be finite and >= 0")
    kind, params = group["product"], group["params"]
    if kind is None:
        if decay != 0.0:
            raise ValueError(
                f"{where}: frobenius_decay ({decay}) needs products of parameters: set product to one of "
                f"{sorted(RANK_DIMS)} in the parameter group, as frobenius_param_groups does, or use weight_decay"
            )
        return
    if kind not in RANK_DIMS:
        raise ValueError(f"{where}: product must be one of {sorted(RANK_DIMS)} or None, got {kind!r}")
    size = len(RANK_DIMS[kind])
    if len(params) != size * group.get("num_products", len(params) // size):
        raise ValueError(
            f"{where}: products of kind {kind!r} have {size} factors each, so the group must hold a multiple of {size} "
            f"parameters{_expected(group)}, got {len(params)}: a factor is missing, or FSDP1, DeepSpeed ZeRO or "
            "ZeroRedundancyOptimizer flattened the parameters or dealt them out"
        )
    for index, weights in enumerate(products_of(group)):
        validate_product(tuple(weights), kind, group["num_heads"], f"{where}, product {index} ({kind})")
        kinds = [f"{weight.dtype} on {weight.device}" for weight in weights]
        if len(set(kinds)) > 1:
            raise ValueError(f"{where}, product {index} ({kind}): its factors differ, {' and '.join(kinds)}")
        for weight in weights:
            if decay != 0.0 and weight.dtype not in DECAYED_DTYPES:
                raise ValueError(
                    f"{where}, product {index} ({kind}) has dtype {weight.dtype}: Frobenius decay changes a weight by "
                    "about 3e-7 of its value per step, which is lost in half precision. Keep the parameters in float32 "
                    "(or float64) and use autocast"
                )


def _expected(group: dict[str, Any]) -> str:
    return f", here of {group['num_products']} products" if "num_products" in group else ""


def products_of(group: dict[str, Any]) -> list[list[torch.Tensor]]:
    """The factors of each product of a parameter group."""
    size, params = len(RANK_DIMS[group["product"]]), group["params"]
    return [params[i : i + size] for i in range(0, len(params), size)]


@torch.no_grad()
def add_frobenius_gradients_(products: Sequence[LocalProduct]) -> None:
    """Add to each product's targets what :class:`LocalProduct` says, and forget the targets.

    Sharded factors are worked on where they lie: every process of their mesh must call this with the same products, and
    one all-gather and one all-reduce serve them all.
    """
    scratch: dict[Any, torch.Tensor] = {}
    for chunk in _chunks(products):
        if chunk[0].sharded:
            _take_sharded_grams(chunk)
        elif len(chunk) > 1:
            _take_stacked_grams(chunk)
        else:
            chunk[0].grams = [end.gram() for end in chunk[0].ends]
        for product in chunk:
            _add_gradients_(product, scratch)
            product.forget()


def frobenius_operators(
    grams: Sequence[torch.Tensor], middle: torch.Tensor | None = None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """What each rank-first factor is multiplied by, from the left, to give its gradient: (H, r, r) each.

    ``grams`` are UᵀU and VᵀV, ``middle`` is M (H, r, s). For a triple the middle gradient is (UᵀU)(M VᵀV): its
    operator is UᵀU, and the second result is what it acts on.
    """
    left, right = grams
    if middle is None:
        return (right, left), None
    half = middle @ right
    return (half @ middle.mT, left, middle.mT @ left @ middle), half


def _chunks(products: Sequence[LocalProduct]) -> Iterator[list[LocalProduct]]:
    """Products whose Gram matrices are taken together: all sharded ones, the others up to some size."""
    sharded: list[LocalProduct] = []
    stack: list[LocalProduct] = []
    for product in products:
        if product.sharded:  # even if nothing moves: all processes must take part in the collectives
            sharded.append(product)
        elif any(product.moving):
            if product.factors[0].weight.device.type == "cpu":
                yield [product]
                continue
            if stack and sum(p.nbytes for p in [*stack, product]) > STACK_BYTES:
                yield stack
                stack = []
            stack.append(product)
    yield from (chunk for chunk in (stack, sharded) if chunk)


def _take_stacked_grams(chunk: list[LocalProduct]) -> None:
    """Few kernels instead of many: copies of all factors of one shape in one tensor, one batched matmul for it."""
    by_shape: dict[Any, list[LocalFactor]] = {}
    for factor in (end for product in chunk for end in product.ends):
        base = factor.blocks[0].base
        by_shape.setdefault((base.shape[1:], base.dtype, base.device), []).append(factor)
    grams = {}
    for factors in by_shape.values():
        bases = [factor.blocks[0].base for factor in factors]
        stack = torch.cat(bases)
        heads = [base.shape[0] for base in bases]
        for factor, copy, gram in zip(factors, stack.split(heads), (stack @ stack.mT).split(heads)):
            factor.copy, grams[id(factor)] = copy, gram
    for product in chunk:
        product.grams = [grams[id(end)] for end in product.ends]


def _take_sharded_grams(chunk: list[LocalProduct]) -> None:
    """One packed all-gather of the rows that straddle processes, then one packed all-reduce of the Gram matrices."""
    cut = [factor for product in chunk for factor in product.factors if factor.cut_in_rank]
    for factor, straddling in zip(cut, gather_pieces([factor.request() for factor in cut])):
        factor.set_blocks(straddling)
    ends = [(product, end) for product in chunk for end in product.ends]
    grams = [end.gram(partial=not product.grams_stay) for product, end in ends]
    shared = [None if product.grams_stay else end.cut for product, end in ends]
    summed = sum_over_processes(grams, shared)
    for index, product in enumerate(chunk):
        product.grams = summed[2 * index : 2 * index + 2]


def _add_gradients_(product: LocalProduct, scratch: dict[Any, torch.Tensor]) -> None:
    operators, half = frobenius_operators(product.grams, product.middle)
    alpha: Any = product.scale
    if isinstance(alpha, torch.Tensor):
        scale = alpha.to(operators[0].dtype)
        operators, alpha = tuple(operator * scale for operator in operators), 1.0
    for index, (factor, operator) in enumerate(zip(product.factors, operators)):
        if not product.moving[index]:
            continue
        out = None if product.outs is None else product.outs[index]
        middle = half if index == 1 else None
        for block, target in zip(factor.blocks, factor.own_targets() if out is None else factor.targets(out)):
            rows = operator if block.heads is ALL else operator[block.heads, block.rows]
            base = block.base if middle is None else middle[block.heads]
            if target.dim() > 3:  # an outer size spread over several dimensions
                target.add_((rows @ base).view(target.shape), alpha=alpha)
            elif factor.copy is not None:
                target.baddbmm_(rows, factor.copy, alpha=alpha)
            elif out is not None or middle is not None:
                target.baddbmm_(rows, base, alpha=alpha)
            else:  # a matmul must not write what it reads
                target.add_(torch.bmm(rows, base, out=_like(target, scratch)), alpha=alpha)


def _like(tensor: torch.Tensor, scratch: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Memory with the same strides, used again for the next tensor like it: it stays in the caches."""
    key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if key not in scratch:
        scratch[key] = torch.empty_like(tensor)
    return scratch[key]
