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
from typing import Any, NamedTuple

import torch

from fnl_hf.factorization import RANK_DIMS, validate_product
from fnl_hf.optim.local_factors import ALL, LocalFactor, LocalProduct
from fnl_hf.optim.sharding import gather_pieces, sum_over_processes

# On an accelerator kernel launches dominate: factors of equal shape are stacked, up to this many bytes of copies at a
# time. On a CPU the caches do: one product at a time.
STACK_BYTES = 16 * 2**20


class Factors(NamedTuple):
    """The parameters of one product in an optimizer."""

    kind: str
    num_heads: int
    weights: tuple[torch.Tensor, ...]


class Decay(NamedTuple):
    """out += scale · gradient of ½‖W‖²_F of one product, for each of its factors.

    ``outs`` are tensors like the factors' local parts: the local parts themselves (decoupled decay) or others
    (gradients); None for a factor that does not move. ``scale`` is a number or a 0-d tensor.
    """

    factors: Factors
    outs: Sequence[torch.Tensor | None]
    scale: float | torch.Tensor


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
    if len(params) % size != 0:
        raise ValueError(
            f"{where}: products of kind {kind!r} have {size} factors each, so the group must hold a multiple of {size} "
            f"parameters, got {len(params)}: a factor is missing, or FSDP1 or DeepSpeed ZeRO flattened the parameters"
        )
    for index, factors in enumerate(products_of(group)):
        validate_product(factors.weights, kind, factors.num_heads, f"{where}, product {index} ({kind})")
        kinds = [f"{weight.dtype} on {weight.device}" for weight in factors.weights]
        if len(set(kinds)) > 1:
            raise ValueError(f"{where}, product {index} ({kind}): its factors differ, {' and '.join(kinds)}")
        for weight in factors.weights:
            if weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{where}, product {index} ({kind}) has dtype {weight.dtype}: Frobenius decay changes a weight by "
                    "about 3e-7 of its value per step, which is lost in half precision. Keep the parameters in float32 "
                    "(or float64) and use autocast"
                )


def products_of(group: dict[str, Any]) -> list[Factors]:
    """The products of a parameter group."""
    size = len(RANK_DIMS[group["product"]])
    params = group["params"]
    return [
        Factors(group["product"], group["num_heads"], tuple(params[i : i + size])) for i in range(0, len(params), size)
    ]


@torch.no_grad()
def add_frobenius_gradients_(decays: Sequence[Decay]) -> None:
    """Carry out all decays of a step. DTensors are worked on where they lie: every process of their mesh must call this
    with the same products, and one all-gather and one all-reduce serve them all.
    """
    scratch: dict[Any, torch.Tensor] = {}
    for chunk in _chunks(decays):
        if chunk[0].sharded:
            _take_sharded_grams(chunk)
        elif len(chunk) > 1:
            _take_stacked_grams(chunk)
        else:
            chunk[0].grams = [end.gram() for end in chunk[0].ends]
        for product in chunk:
            _add_gradients_(product, scratch)


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


def _chunks(decays: Sequence[Decay]) -> Iterator[list[LocalProduct]]:
    """Products whose Gram matrices are taken together: all sharded ones, the others by device and size."""
    sharded: list[LocalProduct] = []
    stack: list[LocalProduct] = []
    for (kind, num_heads, weights), outs, scale in decays:
        current = LocalProduct(weights, RANK_DIMS[kind], num_heads, outs, scale)
        if current.sharded:  # even if nothing moves: all processes must take part in the collectives
            sharded.append(current)
        elif any(out is not None for out in outs):
            if weights[0].device.type == "cpu":
                yield [current]
                continue
            if stack and sum(p.nbytes for p in [*stack, current]) > STACK_BYTES:
                yield stack
                stack = []
            stack.append(current)
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
    alpha = 1.0
    if isinstance(product.scale, torch.Tensor):
        scale = product.scale.to(operators[0])
        operators = tuple(operator * scale for operator in operators)
    else:
        alpha = product.scale
    for index, (factor, operator, out) in enumerate(zip(product.factors, operators, product.outs)):
        if out is None:
            continue
        in_place = out.data_ptr() == factor.weight.data_ptr()
        for block, target in zip(factor.blocks, factor.targets(out)):
            base = block.base
            rows = operator if block.heads is ALL else operator[block.heads, block.rows]
            if half is not None and index == 1:
                base = half
            elif in_place and block.is_view and target.dim() == 3:  # a matmul must not read what it writes
                base = factor.copy if factor.copy is not None else _copy(base, scratch)
            if target.dim() == 3:
                target.baddbmm_(rows, base, alpha=alpha)
            else:  # an outer size spread over several dimensions
                target.add_((rows @ base).view(target.shape), alpha=alpha)


def _copy(tensor: torch.Tensor, scratch: dict[Any, torch.Tensor]) -> torch.Tensor:
    """A copy with the same strides, in memory used again for the next tensor like it: it stays in the caches."""
    key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if key not in scratch:
        scratch[key] = torch.empty_like(tensor)
    return scratch[key].copy_(tensor)
