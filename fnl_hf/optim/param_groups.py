"""Decides which weight gets which decay."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.utils import logging

from fnl_hf.bert.factorization import Product
from fnl_hf.products.discovery import discover
from fnl_hf.products.views import VIEWS, ViewPair, ViewProduct

logger = logging.get_logger(__name__)

REMEDY = "register its products with fnl_hf.register_attention or fnl_hf.register_product"
DECAY_MODES = ("frobenius", "weight", "none")


def frobenius_param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    frobenius_decay: float | None = None,
    decay_mode: str = "frobenius",
    decay_rotary: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for optimizers with Frobenius decay; every trainable parameter is in exactly one.

    ============= =========================================================== ===================================
    ``name``      parameters                                                  decay
    ============= =========================================================== ===================================
    ``qk``        query and key weights, [q₀, k₀, q₁, k₁, ...]                ``decay_mode`` at ``frobenius_decay``
    ``vo``        value and attention output weights, [v₀, o₀, v₁, o₁, ...]   ``decay_mode`` at ``frobenius_decay``
    another kind  the factors of registered products of this kind             ``decay_mode`` at ``frobenius_decay``
    ``attention`` fused weights with several factors, keys and values that    ``decay_mode`` at ``frobenius_decay``,
                  heads share, queries and keys under rotary embeddings       other rows at ``weight_decay``
    ``decay``     all other matrices, including embeddings                    weight decay at ``weight_decay``
    ``plain``     biases, LayerNorm and every other vector                    none
    ============= =========================================================== ===================================

    Products of one kind with different numbers of heads get one group per number of heads. The later groups are named
    ``qk_8`` and so on, those of "attention" ``attention_2`` and so on. A frozen factor stays beside its trainable
    partner, because the partner's decay needs it. A warning names unknown attention classes, or says that there are no
    products.

    Args:
        model: any model. Its products are those that :func:`fnl_hf.find_products` finds: attention in the usual
            layouts, and products declared with :func:`fnl_hf.register_product` and :func:`fnl_hf.register_attention`.
        weight_decay: λ of the ordinary weight decay.
        frobenius_decay: λ of the products; None means ``weight_decay`` (the paper adds no hyperparameter).
        decay_mode: the decay of the products only: "frobenius" (‖U Vᵀ‖²_F), "weight" (‖U‖²_F + ‖V‖²_F, the control
            arm) or "none" (Kobayashi et al. 2024's control arm).
        decay_rotary: if False, queries and keys under rotary embeddings get weight decay, like other matrices.

    Raises:
        ValueError: a decay is negative or not finite, the mode is unknown, the model has no trainable parameters,
            ``frobenius_decay`` is above 0 for a model without products (frozen products are only a warning), a
            parameter is in two products, or FSDP1 or DeepSpeed ZeRO-3 flattened the parameters.
    """
    _refuse_flattened(model)
    given, frobenius_decay = frobenius_decay, weight_decay if frobenius_decay is None else frobenius_decay
    for name, value in (("weight_decay", weight_decay), ("frobenius_decay", frobenius_decay)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} ({value}) must be finite and at least 0")
    if decay_mode not in DECAY_MODES:
        raise ValueError(f"decay_mode must be one of {DECAY_MODES}, not {decay_mode!r}")

    found, unknown = discover(model)
    products = _decayed_products(found, decay_rotary)
    _report_unknown(type(model).__name__, unknown, found, products, given, frobenius_decay, decay_mode)
    groups = _whole_groups([p for p in products if not isinstance(p, ViewProduct)], frobenius_decay, decay_mode)
    views = [p for p in products if isinstance(p, ViewProduct)]
    groups += _view_groups(views, frobenius_decay, weight_decay, decay_mode)
    factors = {id(weight) for product in products for weight in product.weights}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    groups.append(_plain_group("decay", [p for p in others if p.dim() >= 2], weight_decay))
    groups.append(_plain_group("plain", [p for p in others if p.dim() < 2], 0.0))
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    return groups


def _refuse_flattened(model: nn.Module) -> None:
    fsdp1 = [name for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)]
    zero3 = [name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id")]
    if fsdp1 or zero3:
        name, kind = (fsdp1[0] or type(model).__name__, "FSDP1") if fsdp1 else (zero3[0], "DeepSpeed ZeRO-3")
        raise ValueError(
            f"{name} is sharded by {kind}, which flattens parameters, so the factors of a product cannot be found: "
            "use FSDP2 (fully_shard) instead"
        )


def _decayed_products(found: list[Product], decay_rotary: bool) -> list[Product]:
    products = [product for product in found if any(weight.requires_grad for weight in product.weights)]
    if decay_rotary:
        return products
    rotated = {id(weight) for product in products if product.kind == "rotary" for weight in product.weights}
    return [p for p in products if p.kind == "vo" or not rotated & {id(weight) for weight in p.weights}]


def _whole_groups(products: list[Product], decay: float, decay_mode: str) -> list[dict[str, Any]]:
    """Groups of products of one kind whose factors are parameters of their own."""
    by_layout: dict[tuple[str, int], list[Product]] = {}
    for product in products:
        by_layout.setdefault((product.kind, product.num_heads), []).append(product)
    groups: list[dict[str, Any]] = []
    for (kind, heads), of_layout in by_layout.items():
        name = f"{kind}_{heads}" if any(group["name"] == kind for group in groups) else kind
        groups.append(_product_group(name, of_layout, decay, decay_mode))
    return groups


def _product_group(name: str, products: list[Product], decay: float, decay_mode: str) -> dict[str, Any]:
    """Positions, not attributes, show what belongs together, because FSDP2 and Accelerate replace parameters in
    order."""
    return {
        "name": name,
        "params": [weight for product in products for weight in product.weights],
        "product": products[0].kind,
        "num_heads": products[0].num_heads,
        "num_products": len(products),
        "frobenius_decay": decay if decay_mode == "frobenius" else 0.0,
        "weight_decay": decay if decay_mode == "weight" else 0.0,
    }


def _view_groups(
    products: list[ViewProduct], decay: float, weight_decay: float, decay_mode: str
) -> list[dict[str, Any]]:
    """Groups of attention layers with one layout each: parameters that contain factors of the same products."""
    layers: list[tuple[list[nn.Parameter], list[ViewPair], int]] = []
    for product in products:
        params, pairs = next(
            (layer[:2] for layer in layers if {id(p) for p in layer[0]} & {id(w) for w in product.weights}), ([], [])
        )
        if not params:
            layers.append((params, pairs, product.num_heads))
        places = []
        for weight in product.weights:
            place = next((i for i, each in enumerate(params) if each is weight), len(params))
            params += [weight] if place == len(params) else []
            places.append(place)
        left, right = (view._replace(parameter=place) for view, place in zip(product.pair.views, places))
        pairs.append(ViewPair(left, right, product.pair.pairing))
    groups: dict[Any, dict[str, Any]] = {}
    for params, pairs, num_heads in layers:
        layout = tuple(pair.plain() for pair in pairs)
        is_whole = _are_whole(params, pairs)
        if (layout, is_whole) not in groups:
            groups[layout, is_whole] = {
                "name": VIEWS + (f"_{len(groups) + 1}" if groups else ""),
                "params": [],
                "product": VIEWS,
                "num_heads": num_heads,
                "num_products": 0,
                "layout": layout,
                "frobenius_decay": decay if decay_mode == "frobenius" else 0.0,
                "weight_decay": decay if decay_mode == "weight" and is_whole else 0.0,
                "row_decay": None if is_whole else (decay if decay_mode == "weight" else 0.0, weight_decay),
            }
        groups[layout, is_whole]["params"] += params
        groups[layout, is_whole]["num_products"] += 1
    return list(groups.values())


def _are_whole(params: list[nn.Parameter], pairs: list[ViewPair]) -> bool:
    """Whether all rows of the parameters are rows of factors."""
    rows = [0] * len(params)
    sizes = list(rows)
    for view in (view for pair in pairs for view in pair.views):
        rows[view.parameter] += view.num_rows
        sizes[view.parameter] = params[view.parameter].shape[view.dim]
    return rows == sizes


def _report_unknown(
    name: str,
    unknown: list[str],
    found: list[Product],
    decayed: list[Product],
    given: float | None,
    decay: float,
    decay_mode: str,
) -> None:
    if not found and given and decay_mode == "frobenius":
        kinds = f"; its attention is of an unknown kind: {', '.join(unknown)}" if unknown else ""
        raise ValueError(
            f"frobenius_decay ({given}) has nothing to decay: {name} has no trainable products{kinds}. For ordinary "
            f"weight decay, leave it out; otherwise {REMEDY}, or factorize layers (fnl_hf.factorize)"
        )
    if decay == 0.0 or decay_mode == "none":
        return
    if unknown:
        logger.warning_once(
            f"{name}: attention of an unknown kind gets ordinary weight decay: {', '.join(unknown)}. For "
            f"{decay_mode} decay, {REMEDY}"
        )
    elif not decayed:
        logger.warning_once(f"{name} has no trainable products: all decay is ordinary weight decay")


def _plain_group(name, params, weight_decay):
    return {
        "name": name,
        "params": params,
        "product": None,
        "num_heads": 1,
        "frobenius_decay": 0.0,
        "weight_decay": weight_decay,
    }
