"""Which weight gets which decay."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fnl_hf.bert.factorization import Product
from fnl_hf.products.discovery import find_products

DECAY_MODES = ("frobenius", "weight", "none")


def frobenius_param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    frobenius_decay: float | None = None,
    decay_mode: str = "frobenius",
) -> list[dict[str, Any]]:
    """Parameter groups for optimizers with Frobenius decay; every trainable parameter is in exactly one.

    ============= =========================================================== ===================================
    ``name``      parameters                                                  decay
    ============= =========================================================== ===================================
    ``qk``        query and key weights, [q₀, k₀, q₁, k₁, ...]                ``decay_mode`` at ``frobenius_decay``
    ``vo``        value and attention output weights, [v₀, o₀, v₁, o₁, ...]   ``decay_mode`` at ``frobenius_decay``
    another kind  the factors of registered products of this kind             ``decay_mode`` at ``frobenius_decay``
    ``decay``     all other matrices, embeddings included                     weight decay at ``weight_decay``
    ``plain``     biases, LayerNorm and every other vector                    none
    ============= =========================================================== ===================================

    Products of one kind with different numbers of heads get a group each, the later ones named ``qk_8`` and so on. A
    frozen factor stays beside its trainable partner, whose decay it takes part in.

    Args:
        model: any model. Products are those of its BERT attention, FNL-BERT or stock, and those declared with
            :func:`fnl_hf.register_product`.
        weight_decay: λ of the ordinary weight decay.
        frobenius_decay: λ of the products; None means ``weight_decay`` (the paper adds no hyperparameter).
        decay_mode: how the products, and only they, are decayed: "frobenius" (‖U Vᵀ‖²_F), "weight"
            (‖U‖²_F + ‖V‖²_F, the control arm) or "none" (Kobayashi et al. 2024's control arm).

    Raises:
        ValueError: a decay that is negative or not finite, an unknown mode, a model without trainable parameters, a
            parameter in two products, or parameters flattened by FSDP1 or DeepSpeed ZeRO-3.
    """
    _refuse_flattened(model)
    frobenius_decay = weight_decay if frobenius_decay is None else frobenius_decay
    for name, value in (("weight_decay", weight_decay), ("frobenius_decay", frobenius_decay)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} ({value}) must be finite and >= 0")
    if decay_mode not in DECAY_MODES:
        raise ValueError(f"decay_mode must be one of {DECAY_MODES}, got {decay_mode!r}")

    products = [p for p in find_products(model) if any(weight.requires_grad for weight in p.weights)]
    by_layout: dict[tuple[str, int], list[Product]] = {}
    for product in products:
        by_layout.setdefault((product.kind, product.num_heads), []).append(product)
    groups: list[dict[str, Any]] = []
    for (kind, heads), of_layout in by_layout.items():
        name = f"{kind}_{heads}" if any(group["name"] == kind for group in groups) else kind
        groups.append(_product_group(name, of_layout, frobenius_decay, decay_mode))
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
            f"{name} is sharded by {kind}, which flattens parameters, so that products cannot be told from them: "
            "shard with FSDP2 (fully_shard) instead"
        )


def _product_group(name: str, products: list[Product], decay: float, decay_mode: str) -> dict[str, Any]:
    """Positions, not attributes, say what belongs together: FSDP2 and Accelerate replace parameters in order."""
    return {
        "name": name,
        "params": [weight for product in products for weight in product.weights],
        "product": products[0].kind,
        "num_heads": products[0].num_heads,
        "num_products": len(products),
        "frobenius_decay": decay if decay_mode == "frobenius" else 0.0,
        "weight_decay": decay if decay_mode == "weight" else 0.0,
    }


def _plain_group(name, params, weight_decay):
    return {
        "name": name,
        "params": params,
        "product": None,
        "num_heads": 1,
        "frobenius_decay": 0.0,
        "weight_decay": weight_decay,
    }
