"""Pretrain and fine-tune a small BERT with one decay and one E, which takes minutes on a GPU and days on a CPU."""

import json
import tempfile
from pathlib import Path

from gpu.records import Recorder

STEPS = {"max_steps": 8000, "per_device_train_batch_size": 256, "max_seq_length": 128, "learning_rate": 1e-3,
         "warmup_steps": 800, "bf16": "true", "dataloader_num_workers": 8, "vocab_size": 30522}  # fmt: skip
TINY = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=37"
TINY_STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "max_seq_length": 16, "use_cpu": "true",
              "max_train_samples": 40, "max_eval_samples": 4, "vocab_size": 600, "config_overrides": TINY}  # fmt: skip
SQUAD = {"num_train_epochs": 2, "per_device_train_batch_size": 32, "learning_rate": 1e-4, "max_seq_length": 128,
         "doc_stride": 64, "bf16": "true"}  # fmt: skip
TINY_SQUAD = {"max_steps": 2, "per_device_train_batch_size": 2, "max_seq_length": 64, "doc_stride": 16,
              "use_cpu": "true", "max_train_samples": 4, "max_eval_samples": 4}  # fmt: skip


def train(run: Recorder, decay_mode: str, embedding_size: int) -> None:
    """Pretraining by run_pretrain.py, fine-tuning by run_squad.py, both with their own records."""
    if not run.needs("datasets", "evaluate"):
        return
    import run_pretrain
    import run_squad

    with tempfile.TemporaryDirectory() as folder:
        pretrained, squad = Path(folder, "pretrained"), Path(folder, "squad")
        flags = {"decay_mode": decay_mode, "frobenius_decay": 0.1, "seed": 1, "report_to": "none",
                 "save_strategy": "no", "cache_dir": Path(folder, "cache")}  # fmt: skip
        own = TINY_STEPS | {"attention_embedding_size": 32 if embedding_size == 512 else 16}
        own = own if run.tiny else STEPS | {"preset": "small", "attention_embedding_size": embedding_size}
        words = _words(flags | own | {"output_dir": pretrained})
        run_pretrain.run(words + (["--train_file", *run.options.text] if run.options.text else []))
        results = json.loads((pretrained / "all_results.json").read_text())
        for name in ("eval_loss", "unigram_entropy", "train_tokens_per_second", "train_mfu", "train_data_wait"):
            if name in results:
                run.record(name, results[name], goal="<= 0.01" if name == "train_data_wait" else "")
        flags = flags | (TINY_SQUAD if run.tiny else SQUAD)
        flags |= {"output_dir": squad, "model_name_or_path": pretrained}
        if run.options.squad:
            flags |= dict(zip(("train_file", "validation_file"), run.options.squad))
        run_squad.run(_words(flags))
        results = json.loads((squad / "all_results.json").read_text())
        for name in ("eval_f1", "eval_exact_match"):
            run.record(name, results[name])


def _words(flags) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
