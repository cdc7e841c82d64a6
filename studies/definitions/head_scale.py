"""The scale of a smaller head: at E < d, the ways to truncate the attention products give different scales."""

from typing import Any

from studies.study import Comparison, Study, quickstart

INITS = ("normal", "spectral", "folded", "rescaled")
SIZES = (64, 32)  # E, of d = 128
# Dense quickstarts differ by up to 0.5 nats under AdamW, in when they leave the plateau, and by a tenth of that under
# Muon.
OPTIMIZERS: dict[str, dict[str, Any]] = {"": {}, "-muon": {"optimizer": "muon", "learning_rate": 4e-3}}

STUDY = Study(
    question="At E < d, is spectral initialization better if the scores are scaled to be closest to those of the dense "
    "layer (folded), or to have their variance (rescaled)?",
    script="run_pretrain.py",
    base=quickstart(),
    arms={
        f"E{size}{name}": {init: flags | {"attention_embedding_size": size, "attention_init": init} for init in INITS}
        for size in SIZES
        for name, flags in OPTIMIZERS.items()
    },
    reference="spectral",
    effect=0.05,  # 5% of the perplexity
    comparisons=(
        Comparison("Spectral initialization reaches a lower loss than normal", "spectral", "normal", article=True),
        Comparison("Folding in the scale reaches a lower loss", "folded", "spectral"),
        Comparison("Rescaling to the dense layer's variance reaches a lower loss", "rescaled", "spectral"),
    ),
    measures={
        "Frobenius norm": {"QKᵀ": "spectra/qk/frobenius", "VOᵀ": "spectra/vo/frobenius"},
        "effective rank": {"QKᵀ": "spectra/qk/effective_rank", "VOᵀ": "spectra/vo/effective_rank"},
    },
)
