"""Decay during distillation: a factorized encoder learns its teacher's hidden states on unlabeled text."""

from studies.study import Comparison, Study, decay_arms

LAMBDAS = (1, 10)  # in 200 steps with cosine decay of the rate, Σηλ is about 0.1 and 1

STUDY = Study(
    question="Does decay of the products help a factorized encoder to learn its teacher's hidden states?",
    script="run_pretrain.py",
    base={
        "objective": "distill",
        "max_seq_length": 96,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "max_steps": 200,
        "weight_decay": 0.01,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "max_eval_samples": 256,
        "save_steps": 100,
        "save_total_limit": 1,
    },
    arms={"MiniLM": decay_arms(LAMBDAS)},
    reference="none",
    effect=0.002,
    comparisons=(
        Comparison("Frobenius decay helps a student more than no decay", "frobenius-1", "none"),
        Comparison("Frobenius decay helps a student more than weight decay", "frobenius-1", "weight-1"),
        Comparison("Strong Frobenius decay harms a student less than strong weight decay", "frobenius-10", "weight-10"),
    ),
    metric="metrics/eval_cosine",
    label="cosine to the teacher's last hidden states",
    digits=4,
    better="higher",
    seeds=(1, 2, 3),
    measures={"held-out loss": {"": "metrics/eval_loss"}},
    spectra=False,
    places={
        "model_name_or_path": "STUDENT",
        "teacher_name_or_path": "TEACHER",
        "train_file": "TEXT",
        "validation_file": "HELD_OUT_TEXT",
    },
)
