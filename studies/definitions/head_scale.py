"""The scale of a smaller head: at E < d the ways to truncate the attention's products disagree about their size."""

from studies.study import Comparison, Study, recipe

INITS = ("normal", "spectral", "folded", "rescaled")
SIZES = (64, 32)  # E, of d = 128

STUDY = Study(
    question="At E < d, does spectral initialization do better with the scores' scale folded in, so that they are the "
    "closest to the dense ones, or rescaled to the dense ones' variance?",
    script="run_pretrain.py",
    base=recipe("configs/quickstart.yaml"),
    arms={
        f"E{size}": {init: {"attention_embedding_size": size, "attention_init": init} for init in INITS}
        for size in SIZES
    },
    reference="spectral",
    effect=0.05,  # 5% of the perplexity
    comparisons=(
        Comparison("Spectral initialization leaves a lower loss than normal", "spectral", "normal", article=True),
        Comparison("Folding the scale in leaves a lower loss", "folded", "spectral"),
        Comparison("The dense layer's variance leaves a lower loss", "rescaled", "spectral"),
    ),
    measures={
        "Frobenius norm": {"QKᵀ": "spectra/qk/frobenius", "VOᵀ": "spectra/vo/frobenius"},
        "effective rank": {"QKᵀ": "spectra/qk/effective_rank", "VOᵀ": "spectra/vo/effective_rank"},
    },
)
