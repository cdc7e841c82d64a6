"""The article's second figure, for BERT's attention: nuclear norm and its bound during training, at ranks from 3⁻³ to
3² times the full rank."""

from typing import Any

from studies.study import Comparison, Study, quickstart

# E of two heads of full rank 64, times 3⁰, 3⁻¹, ..., and above it.
SIZES = (128, 42, 14, 4, 384, 1152)
# Of the products; at 0.1, that of the other matrices, it would have hardly any effect in a run as short as the
# quickstart.
LAMBDA = 0.3
DECAYS: dict[str, dict[str, Any]] = {
    "none": {"decay_mode": "none"},
    "weight": {"decay_mode": "weight", "frobenius_decay": LAMBDA},
    "frobenius": {"decay_mode": "frobenius", "frobenius_decay": LAMBDA},
}


def arms_at(size: int) -> dict[str, dict[str, Any]]:
    inits = ("normal", "spectral") if size <= 128 else ("normal",)
    return {
        f"{decay}-{init}": {"attention_embedding_size": size, "attention_init": init, **flags}
        for init in inits
        for decay, flags in DECAYS.items()
    }


STUDY = Study(
    question="Does weight decay of the factors make the bound that it penalizes, ½(‖U‖² + ‖V‖²), as small as the "
    "nuclear norm, and does Frobenius decay not?",
    script="run_pretrain.py",
    base=quickstart(),
    arms={f"E{size}": arms_at(size) for size in SIZES},
    reference="none-normal",
    effect=0.02,
    comparisons=(
        Comparison(
            "With weight decay, the nuclear norm is closer to its bound than with Frobenius decay",
            "weight-normal",
            "frobenius-normal",
            article=True,
        ),
        Comparison(
            "With Frobenius decay, it is closer to its bound than without decay", "frobenius-normal", "none-normal"
        ),
    ),
    metric="norms/qk/tightness",
    label="nuclear norm of QKᵀ / its bound",
    better="higher",
    seeds=(1, 2, 3),
    measures={
        "nuclear norm of VOᵀ / its bound": {"": "norms/vo/tightness"},
        "held-out loss": {"nats": "metrics/eval_loss"},
    },
    courses={
        "QKᵀ in training": {"nuclear norm": "curves/norms/qk/nuclear", "its bound": "curves/norms/qk/bound"},
        "Frobenius norm": {"QKᵀ": "curves/norms/qk/frobenius", "VOᵀ": "curves/norms/vo/frobenius"},
        "effective step": {"QKᵀ": "curves/norms/qk/effective_step", "VOᵀ": "curves/norms/vo/effective_step"},
    },
    spectra=False,
)
