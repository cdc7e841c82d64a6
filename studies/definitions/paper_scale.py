"""At the article's scale, for GPUs: BERT-Base and Large with E full and halved, and each decay of the attention
products."""

from studies.study import Comparison, Study, recipe

SIZES = ("base", "base_half", "large", "large_half")

STUDY = Study(
    question="Does Frobenius decay help at the article's scale, and how much is lost with half of E?",
    script="run_pretrain.py",
    base={},
    arms={
        size: {
            decay: recipe(f"configs/bert_{size}.yaml") | {"decay_mode": decay}
            for decay in ("none", "weight", "frobenius")
        }
        for size in SIZES
    },
    reference="none",
    effect=0.02,
    comparisons=(
        Comparison("Frobenius decay reaches a lower loss than weight decay", "frobenius", "weight", article=True),
        Comparison("Frobenius decay reaches a lower loss than no decay", "frobenius", "none", article=True),
    ),
    seeds=(1, 2, 3),
    costs={
        f"BERT-{size.partition('_')[0].title()}{', E halved' * size.endswith('half')}": (
            f"configs/bert_{size}.yaml",
            f"configs/phase_512{'_large' * size.startswith('large')}.yaml",
        )
        for size in SIZES
    },
)
