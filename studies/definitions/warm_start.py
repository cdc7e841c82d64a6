"""Warm start: dense for a share of the steps, then the encoder's layers become products with half of their
parameters."""

from typing import Any

from studies.study import SMALL_WEIGHTS, WITHOUT_DROPOUT, Comparison, Study, quickstart, recipe

SHARES = (0.1, 0.25, 0.5)  # share of dense steps
MUON = {"optimizer": "muon", "learning_rate": 4e-3}  # the best rate of the dense model in the study of optimizers
# A dense model with as many parameters in all as the one of products; its initializer_range is 0.05 √(128/110).
NARROW = f"{WITHOUT_DROPOUT},initializer_range=0.054,hidden_size=110,intermediate_size=440"


def arms_of(**flags: Any) -> dict[str, dict[str, Any]]:
    arms: dict[str, dict[str, Any]] = {"dense": {}}
    for name in ("spectral", "calibrated"):  # calibrated on an untrained network, too
        arms[f"{name}-0"] = {"factorize_at_step": 0, "factorize_target_ratio": 0.5, "factorize_init": name}
    arms |= {f"switch-{share}": {"factorize_at_step": share, "factorize_target_ratio": 0.5} for share in SHARES}
    return {name: flags | own for name, own in arms.items()}


def arms_under_muon() -> dict[str, dict[str, Any]]:
    arms = {name: arms_of(**MUON)[name] for name in ("dense", "spectral-0", "switch-0.25")}
    return arms | {
        "narrow": MUON | {"attention_embedding_size": 110, "config_overrides": NARROW},
        "adamw-dense": {},
    }


STUDY = Study(
    question="Does a model reach a lower held-out loss if its layers become products after some dense steps instead of "
    "at the start?",
    script="run_pretrain.py",
    # E = d, so that only the products made by the switch are compared
    base=quickstart() | {"attention_embedding_size": 128},
    arms={
        "quickstart-range-0.05": arms_of(),
        "quickstart-muon": arms_under_muon(),
        "quickstart": arms_of(**SMALL_WEIGHTS),
        # BERT's initializer_range for this width, 0.02 √(768/256), as in the quickstart
        "mini": arms_of(
            **recipe("configs/mini.yaml")
            | {"attention_embedding_size": 256, "config_overrides": f"{WITHOUT_DROPOUT},initializer_range=0.035"}
        ),
    },
    reference="dense",
    effect=0.05,  # 5% of the perplexity
    comparisons=(
        Comparison(
            "A warm start after a quarter of the steps reaches a lower loss than products from the start",
            "switch-0.25",
            "spectral-0",
        ),
        Comparison(
            "A warm start after a quarter of the steps is as good as the dense model",
            "switch-0.25",
            "dense",
            expected="same",
        ),
        Comparison(
            "At the start, the SVD of the weights alone is better than one calibrated on the untrained network",
            "spectral-0",
            "calibrated-0",
            groups=("quickstart-range-0.05", "quickstart", "mini"),
        ),
        Comparison(
            "Under Muon, products from the start beat a narrower dense model",
            "spectral-0",
            "narrow",
            groups=("quickstart-muon",),
        ),
        Comparison(
            "Under Muon, a warm start after a quarter of the steps beats a narrower dense model",
            "switch-0.25",
            "narrow",
            groups=("quickstart-muon",),
        ),
        Comparison(
            "Half of the encoder under Muon, from the start, beats the whole one under AdamW",
            "spectral-0",
            "adamw-dense",
            groups=("quickstart-muon",),
        ),
        Comparison(
            "Half of the encoder under Muon, after a dense quarter of the steps, beats the whole one under AdamW",
            "switch-0.25",
            "adamw-dense",
            groups=("quickstart-muon",),
        ),
    ),
    seeds=(1, 2, 3),
    measures={
        "training": {"seconds": "metrics/train_runtime"},
        "throughput": {"tokens per second": "metrics/train_tokens_per_second"},
    },
    spectra=False,
)
