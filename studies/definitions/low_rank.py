"""Low rank from scratch: all matrices of the encoder's layers as products with half or a quarter of their parameters,
compared with narrower dense models of the same cost."""

from typing import Any

from studies.study import SMALL_WEIGHTS, WITHOUT_DROPOUT, Comparison, Study, quickstart

LAMBDAS = (0.03, 0.1, 0.3)
# Hidden sizes of dense models with as many parameters, or FLOPs per step, as the products at each ratio.
NARROW = {0.5: {"parameters": 110, "flops": 100}, 0.25: {"parameters": 100, "flops": 82}}
DENSE_LAMBDA = 0.1  # the recipe's
WARM = 0.25  # share of dense steps
# Singular values of 1 are larger than those of a matrix drawn with BERT's 0.02. Is it only the scale? At 0.06 the mean
# square of the latter is 0.5 (128 x 128) to 1.8 (128 x 512).
SCALED = ",initializer_range=0.06"
SCALED_LAMBDAS = (0.03, 0.1)


def dense(value: float, size: int = 128) -> dict[str, Any]:
    """The unchanged BERT: the matrices of its attention decay like all others."""
    sizes = f",hidden_size={size},intermediate_size={4 * size}" * (size != 128)
    return {
        "decay_mode": "weight",
        "weight_decay": value,
        "frobenius_decay": value,
        "config_overrides": WITHOUT_DROPOUT + sizes,
    }


def factorized(ratio: float, init: str) -> dict[str, Any]:
    return {"factorize_at_step": 0, "factorize_target_ratio": ratio, "factorize_init": init}


def products(ratio: float, init: str, mode: str, value: float) -> dict[str, Any]:
    """All other matrices decay as in a dense arm with the same λ."""
    return {"decay_mode": mode, "weight_decay": value, "frobenius_decay": value, **factorized(ratio, init)}


def arms_at(ratio: float) -> dict[str, dict[str, Any]]:
    arms = {f"dense-{value}": dense(value) for value in LAMBDAS}
    for cost, size in NARROW[ratio].items():
        arms |= {f"narrow-{cost}-{value}": dense(value, size) for value in LAMBDAS}
    for init in ("default", "spectral"):
        for mode in ("weight", "frobenius"):
            arms |= {f"{init}-{mode}-{value}": products(ratio, init, mode, value) for value in LAMBDAS}
    arms |= {f"ones-frobenius-{value}": products(ratio, "ones", "frobenius", value) for value in LAMBDAS}
    arms |= {
        f"warm-frobenius-{value}": products(ratio, "spectral", "frobenius", value) | {"factorize_at_step": WARM}
        for value in LAMBDAS
    }
    for value in SCALED_LAMBDAS:
        overrides = {"config_overrides": WITHOUT_DROPOUT + SCALED}
        arms[f"scaled-dense-{value}"] = dense(value) | overrides
        narrow = dense(value, NARROW[ratio]["parameters"])
        arms[f"scaled-narrow-{value}"] = narrow | {"config_overrides": narrow["config_overrides"] + SCALED}
        arms[f"scaled-spectral-{value}"] = products(ratio, "spectral", "frobenius", value) | overrides
        arms[f"scaled-warm-{value}"] = arms[f"scaled-spectral-{value}"] | {"factorize_at_step": WARM}
    return arms


STUDY = Study(
    question="How much does a BERT lose if its encoder consists of small products, for each initialization and decay, "
    "and does it beat a narrower dense BERT of the same cost?",
    script="run_pretrain.py",
    base=quickstart() | SMALL_WEIGHTS,
    arms={"half": arms_at(0.5), "quarter": arms_at(0.25)},
    reference=f"dense-{DENSE_LAMBDA}",
    effect=0.05,  # 5% of the perplexity
    comparisons=(
        Comparison(
            "With larger weights, products after a dense quarter of the steps beat a narrower dense model with as many "
            "parameters",
            "scaled-warm-*",
            "scaled-narrow-*",
        ),
        Comparison(
            "Products beat a narrower dense model with as many parameters",
            "spectral-frobenius-*",
            "narrow-parameters-*",
        ),
        Comparison("Products beat a narrower dense model with as many FLOPs", "spectral-frobenius-*", "narrow-flops-*"),
        Comparison(
            "Spectral initialization with Frobenius decay beats the default initialization with weight decay",
            "spectral-frobenius-*",
            "default-weight-*",
            article=True,
        ),
        Comparison(
            "With Frobenius decay, spectral initialization beats the default",
            "spectral-frobenius-*",
            "default-frobenius-*",
            article=True,
        ),
        Comparison(
            "With spectral initialization, Frobenius decay beats weight decay",
            "spectral-frobenius-*",
            "spectral-weight-*",
            article=True,
        ),
        Comparison(
            "Without spectral initialization, Frobenius decay is worse than weight decay",
            "default-weight-*",
            "default-frobenius-*",
            article=True,
        ),
        Comparison("Singular values of 1 beat those of the dense matrix", "ones-frobenius-*", "spectral-frobenius-*"),
        Comparison(
            "Singular values of 1 beat those of a dense matrix that is as large",
            "ones-frobenius-*",
            "scaled-spectral-*",
        ),
        Comparison(
            "Products with singular values of 1 beat a narrower dense model with as many parameters",
            "ones-frobenius-*",
            "narrow-parameters-*",
        ),
        Comparison(
            "Products with singular values of 1 beat a narrower dense model with as many FLOPs",
            "ones-frobenius-*",
            "narrow-flops-*",
        ),
        Comparison(
            "Products with singular values of 1 beat a narrower dense model with as many parameters and larger weights",
            "ones-frobenius-*",
            "scaled-narrow-*",
        ),
        Comparison(
            "With larger weights, products after a dense quarter of the steps are as good as the dense model",
            "scaled-warm-*",
            "scaled-dense-*",
            expected="same",
        ),
        Comparison("A dense model gains from larger weights", "scaled-dense-*", "dense-*"),
        Comparison(
            "Products after a dense quarter of the steps beat products from the start",
            "warm-frobenius-*",
            "spectral-frobenius-*",
        ),
        Comparison(
            "Products after a dense quarter of the steps beat a narrower dense model with as many parameters",
            "warm-frobenius-*",
            "narrow-parameters-*",
        ),
        Comparison("Products are as good as the dense model", "spectral-frobenius-*", "dense-*", expected="same"),
    ),
    seeds=(1, 2, 3),
    tuning_seeds=(101,),
    measures={"training": {"seconds": "metrics/train_runtime"}},
    axis="frobenius_decay",
    spectra=False,
)
