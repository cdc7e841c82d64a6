"""Which weight gets which decay."""

from typing import Any

from torch import nn

from fnl_hf.modeling_fnl_bert import factor_pairs

DECAY_MODES = ("frobenius", "weight", "none")


def frobenius_param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    frobenius_decay: float | None = None,
    decay_mode: str = "frobenius",
) -> list[dict[str, Any]]:
    """Parameter groups for optimizers with Frobenius decay; every trainable parameter is in exactly one.

    ========== ============================================================== ===================================
    ``name``   parameters                                                     decay
    ========== ============================================================== ===================================
    ``qk``     query and key weights, [q₀, k₀, q₁, k₁, ...]                   ``decay_mode`` at ``frobenius_decay``
    ``vo``     value and attention output weights, [v₀, o₀, v₁, o₁, ...]      ``decay_mode`` at ``frobenius_decay``
    ``decay``  all other matrices, embeddings included                        weight decay at ``weight_decay``
    ``plain``  biases, LayerNorm and every other vector                       none
    ========== ============================================================== ===================================

    Args:
        model: a model with BERT attention, FNL-BERT or stock; other models have no pairs.
        weight_decay: λ of the ordinary decoupled weight decay.
        frobenius_decay: λ of the attention pairs; None means ``weight_decay`` (the paper adds no hyperparameter).
        decay_mode: how the pairs, and only the pairs, are decayed: "frobenius" (‖U Vᵀ‖²_F), "weight"
            (‖U‖²_F + ‖V‖²_F, the control arm) or "none" (Kobayashi et al. 2024's control arm).

    Raises:
        ValueError: a decay that is negative or not finite, an unknown mode, or a model without trainable parameters.
    """
    frobenius_decay = weight_decay if frobenius_decay is None else frobenius_decay
    for name, value in (("weight_decay", weight_decay), ("frobenius_decay", frobenius_decay)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} ({value}) must be finite and >= 0")
    if decay_mode not in DECAY_MODES:
        raise ValueError(f"decay_mode must be one of {DECAY_MODES}, got {decay_mode!r}")

    pairs = [pair for pair in factor_pairs(model) if pair.left.requires_grad or pair.right.requires_grad]
    groups = [
        _pair_group(kind, [pair for pair in pairs if pair.kind == kind], frobenius_decay, decay_mode)
        for kind in ("qk", "vo")
    ]
    paired = {id(weight) for pair in pairs for weight in (pair.left, pair.right)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
    groups.append(_plain_group("decay", [p for p in others if p.dim() >= 2], weight_decay))
    groups.append(_plain_group("plain", [p for p in others if p.dim() < 2], 0.0))
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    return groups


def _pair_group(kind, pairs, decay, decay_mode):
    """Positions, not attributes, say what belongs together: FSDP2 and Accelerate replace parameters in order."""
    return {
        "name": kind,
        "params": [weight for pair in pairs for weight in (pair.left, pair.right)],
        "product": kind,
        "num_heads": pairs[0].num_heads if pairs else 1,
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
