"""Decay during fine-tuning: a pretrained MiniLM on questions of SQuAD v1.1, from the same weights with each decay."""

from studies.study import Comparison, Study, decay_arms

# 147 batches per epoch: with linear decay of the rate, Σηλ is about 0.2 and 1.
LAMBDAS = (4, 20)

STUDY = Study(
    question="Does decay of the attention products during fine-tuning raise F1?",
    script="run_squad.py",
    base={
        "model_type": "fnl_bert",
        "max_seq_length": 192,
        "doc_stride": 64,
        "pad_to_max_length": False,
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 32,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "num_train_epochs": 3,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "save_steps": 150,
        "save_total_limit": 1,
    },
    arms={"MiniLM": decay_arms(LAMBDAS)},
    reference="none",
    effect=0.5,
    comparisons=(
        Comparison(
            "Fine-tuning with Frobenius decay gives a higher F1 than without decay", "frobenius-4", "none", article=True
        ),
        Comparison("Fine-tuning with weight decay gives a higher F1 than without decay", "weight-4", "none"),
        Comparison("Strong Frobenius decay lowers F1 less than strong weight decay", "frobenius-20", "weight-20"),
    ),
    metric="metrics/eval_f1",
    label="F1 (%)",
    digits=2,
    better="higher",
    seeds=(1, 2, 3),
    measures={
        "exact match": {"%": "metrics/eval_exact_match"},
        "effective rank": {"QKᵀ": "spectra/qk/effective_rank", "VOᵀ": "spectra/vo/effective_rank"},
    },
    courses={"nuclear norm in training": {"QKᵀ": "curves/norms/qk/nuclear", "VOᵀ": "curves/norms/vo/nuclear"}},
    places={"model_name_or_path": "MINILM", "train_file": "SQUAD_TRAIN", "validation_file": "SQUAD_VALIDATION"},
)
