"""Fixtures shared by the tests. Sizes are distinct, so that a swapped axis fails."""

import atexit
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here as in launched runs: sums depend on it in their last bit
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_DATASETS_CACHE" not in os.environ:  # what an older version of the code has cached must not be served here
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file

import run_pretrain
from fnl_hf.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
RESUMES_ON_CPUS = pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.23"),
    reason="an older Trainer cannot load the optimizer state in several CPU processes (map_location 'cpu:0')",
)
DIMENSIONS = {
    "vocab_size": 53,
    "hidden_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 35,
    "max_position_embeddings": 19,
}

# The beginning of a program in which fnl_hf cannot be imported.
WITHOUT_FNL_HF = """
import sys

class NoFnlHf:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "fnl_hf":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoFnlHf)
"""


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def dimensions():
    """BERT dimensions: head size 14 at E = d."""
    return dict(DIMENSIONS)


@pytest.fixture
def batch():
    """Token ids and a padding mask, (5, 11)."""
    ids = torch.randint(5, DIMENSIONS["vocab_size"], (5, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def launch(script, *arguments, processes=1, check=True, timeout=600, options=(), **environment):
    """Run a script as a user does. ``accelerate launch --cpu`` starts one process whatever it is told, so several
    CPU processes take torchrun."""
    if processes == 1:
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", *launcher, *options, str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    if check:
        assert result.returncode == 0, result.stderr[-4000:]
    return result


SENTENCES = [f"the {a} {b} {c} over the {d} dog" for a in ("quick", "slow", "red") for b in ("brown", "blue", "old")
             for c in ("fox jumps", "cat runs", "bird flies") for d in ("lazy", "big")]  # fmt: skip
TINY = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=37"


TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "größer, weiter: 東京!"] * 7


@pytest.fixture(scope="session")
def documents():
    return Dataset.from_dict({"text": TEXTS})


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer(documents, 120, model_max_length=64)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(SENTENCES * 4), encoding="utf-8")
    return path


def pretraining(corpus, folder, **flags):
    """A command line for a tiny run of twelve steps with a checkpoint every five."""
    values = {
        "train_file": corpus, "output_dir": folder, "vocab_size": 60, "max_seq_length": 16, "config_overrides": TINY,
        "max_steps": 12, "save_steps": 5, "logging_steps": 3, "per_device_train_batch_size": 8, "report_to": "none",
        "learning_rate": 1e-2, "seed": 7, "cache_dir": Path(corpus).parent / "cache", "use_cpu": "true",
    } | flags  # fmt: skip
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]


# A streaming run, with the tokenizer of the run in "<run>".
STREAM = {
    "streaming": "true", "tokenizer_name": "<run>", "vocab_size": None, "shuffle_buffer_size": 21,
    "streaming_validation_documents": 9,
}  # fmt: skip


@dataclass
class Workspace:
    """An empty folder for one bad input; a corpus, a finished run on it and a streaming one lie elsewhere."""

    here: Path
    corpus: Path
    run: Path
    stream: Path

    def command(self, **flags) -> list[str]:
        """A command line whose output folder is ``here/out``; "<run>" in a value stands for that folder."""
        words = pretraining(self.corpus, self.here / "out", **{"max_steps": 4, "save_steps": 2} | flags)
        return [re.sub("<(here|run|corpus)>", lambda found: str(getattr(self, found[1])), word) for word in words]


@pytest.fixture(scope="session")
def finished_runs(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    workspace = Workspace(folder, corpus, folder / "run", folder / "stream")
    run_pretrain.run(workspace.command(output_dir=workspace.run))
    run_pretrain.run(workspace.command(output_dir=workspace.stream, **STREAM))
    return workspace


@pytest.fixture
def workspace(finished_runs, tmp_path):
    return replace(finished_runs, here=tmp_path)


@pytest.fixture(scope="session")
def pretrained(corpus, tmp_path_factory):
    """The output folder of one launched run, E halved, spectral initialization."""
    folder = tmp_path_factory.mktemp("pretrained") / "out"
    launch("run_pretrain.py", *pretraining(corpus, folder, attention_embedding_size=16, attention_init="spectral"))
    return folder


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first, second, **tolerance):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], **tolerance)
        else:
            assert torch.equal(first[name], second[name]), name


IMAGE_CLASSES, IMAGE_HEIGHT, IMAGE_WIDTH = 7, 11, 13  # of idx_dir


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def picture(generator, label):
    """A tile of its class's, repeated, and noise."""
    tile = 180 * np.random.default_rng(label).integers(0, 2, (3, 3), dtype=np.uint8)
    tiled = np.tile(tile, (4, 5))[:IMAGE_HEIGHT, :IMAGE_WIDTH]
    return tiled + generator.integers(0, 60, (IMAGE_HEIGHT, IMAGE_WIDTH), dtype=np.uint8)


@pytest.fixture(scope="session")
def idx_dir(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for prefix, count, suffix in (("train", 84, ".gz"), ("t10k", 35, "")):
        labels = (np.arange(count) % IMAGE_CLASSES).astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", np.stack([picture(generator, y) for y in labels]))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Pictures of several sizes, some of them gray: train/red/0.png, ..."""
    root, generator = tmp_path_factory.mktemp("folders"), np.random.default_rng(2)
    for split, count in (("train", 12), ("test", 5)):
        for label, color in enumerate(("blue", "green", "red")):
            (root / split / color).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 90, (16 + index, 19, 3), dtype=np.uint8)
                pixels[..., 2 - label] = 240
                image = Image.fromarray(pixels)
                (image.convert("L") if index == 1 else image).save(root / split / color / f"{index}.png")
    return root
