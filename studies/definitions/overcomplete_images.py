"""Overcomplete convolutions: ResNet8 on Fashion-MNIST with wide or deep products that are merged afterwards."""

from typing import Any

from studies.study import Comparison, Study

IMAGES = "examples/image_classification/train.py"
# 6,000 steps: Σηλ/(1 − μ) is 1.6.
RECIPE: dict[str, Any] = {
    "resnet_depth": 8,
    "image_size": 14,
    "validation_samples": 2000,
    "max_train_samples": 24000,
    "num_train_epochs": 16,
    "per_device_train_batch_size": 64,
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "eval_strategy": "epoch",
    "logging_steps": 50,
}
LONGER = {"wide": 23, "deep": 26}  # epochs of a dense run in the time of a run with products

arms: dict[str, dict[str, Any]] = {"dense": {"method": "dense"}}
arms |= {f"dense-as-long-as-{kind}": {"method": "dense", "num_train_epochs": epochs} for kind, epochs in LONGER.items()}
for kind in LONGER:
    arms |= {f"{kind}-{mode}": {"method": kind, "decay_mode": mode} for mode in ("weight", "frobenius")}

STUDY = Study(
    question="Does a small ResNet classify better if its convolutions are wide or deep products in training and are "
    "merged afterwards?",
    script=IMAGES,
    base=RECIPE,
    arms={"ResNet8": arms},
    reference="dense",
    effect=0.005,
    comparisons=(
        Comparison("With Frobenius decay, wide layers beat dense layers", "wide-frobenius", "dense", article=True),
        Comparison("With Frobenius decay, deep layers beat dense layers", "deep-frobenius", "dense", article=True),
        Comparison(
            "With Frobenius decay, wide layers beat dense layers trained for the same time",
            "wide-frobenius",
            "dense-as-long-as-wide",
            article=True,
        ),
        Comparison(
            "With Frobenius decay, deep layers beat dense layers trained for the same time",
            "deep-frobenius",
            "dense-as-long-as-deep",
        ),
        Comparison("With weight decay, wide layers are worse than dense layers", "dense", "wide-weight", article=True),
        Comparison("With weight decay, deep layers are worse than dense layers", "dense", "deep-weight", article=True),
    ),
    metric="metrics/eval_accuracy",
    label="accuracy on test images",
    digits=4,
    better="higher",
    measures={"training": {"seconds": "metrics/train_runtime"}},
    courses={"accuracy on held-out images": {"": "curves/eval_validation_accuracy"}},
    spectra=False,
    places={"idx_dir": "FASHION_MNIST"},
)
