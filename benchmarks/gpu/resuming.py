"""Train with FnlTrainer on random tokens: in one part, in two parts, and under FSDP2; needs no library for data sets.

As a script, it is the training that ``accelerate launch`` starts: resuming.py FOLDER DEVICE
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM  # noqa: E402
from fnl_hf.training import FnlTrainer, FnlTrainingArguments  # noqa: E402

STEPS, ROWS, LENGTH, VOCABULARY = 8, 64, 33, 211
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
         "intermediate_size": 128, "max_position_embeddings": 64}  # fmt: skip


class RandomRows(torch.utils.data.Dataset):
    """Rows of random tokens, of which each seventh is to be predicted."""

    def __init__(self):
        self.ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        self.positions = torch.arange(LENGTH)[::7]

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids[self.positions], "masked_positions": self.positions}


def train(folder: Path, device: str, checkpoint: Path | None = None) -> None:
    """Dropout, shuffled rows and accumulation; a checkpoint in the middle."""
    args = FnlTrainingArguments(
        str(folder), max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=4, seed=3, report_to="none",
        gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=STEPS, disable_tqdm=True,
        use_cpu=device == "cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = FnlBertForMaskedLM(FnlBertConfig(**SIZES, attention_embedding_size=48, sparse_last_layer=True))
    trainer = FnlTrainer(model, args, train_dataset=RandomRows())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_end()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def try_resuming(run) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matmuls
    with tempfile.TemporaryDirectory() as name:
        alone, resumed, sharded = (Path(name, each) for each in ("alone", "resumed", "sharded"))
        torch.use_deterministic_algorithms(True)
        try:
            train(alone, run.device.type)
            middle = f"checkpoint-{STEPS // 2}"
            shutil.copytree(alone / middle, resumed / middle)
            train(resumed, run.device.type, resumed / middle)
        finally:
            torch.use_deterministic_algorithms(False)
        first, second = weights(alone), weights(resumed)
        equal = sum(torch.equal(first[key], second[key]) for key in first)
        run.record("weights bit-identical after a resume", f"{equal} of {len(first)}", goal=f"{len(first)}")
        if not run.is_gpu:
            run.skip("FSDP2", "on a CPU, Accelerate uses DistributedDataParallel instead")
            return
        config = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
        subprocess.run([*map(str, command), __file__, str(sharded), run.device.type], check=True)
        differ = max(float((first[key] - value).abs().max()) for key, value in weights(sharded).items())
        run.record("FSDP2 on one device, largest difference", differ, goal="<= 1e-5")


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2])
