"""What makes the bad inputs of test_bad_inputs.py: each function here gives one that does so in a place and returns the
command line."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast

from tests.conftest import SENTENCES, pretraining

TEXT = "\n".join(SENTENCES * 4)
STREAM = {
    "streaming": "true", "tokenizer_name": "<run>", "vocab_size": None, "shuffle_buffer_size": 21,
    "streaming_validation_documents": 9,
}  # fmt: skip
SPECIALS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


@dataclass
class Place:
    """An empty folder for one bad input; a corpus, a finished run on it and a streaming one lie elsewhere."""

    here: Path
    corpus: Path
    run: Path
    stream: Path

    def command(self, **flags) -> list[str]:
        """A command line whose output folder is ``here/out``; "<run>" in a value stands for that folder."""
        words = pretraining(self.corpus, self.here / "out", **{"max_steps": 4, "save_steps": 2} | flags)
        return [re.sub("<(here|run|corpus)>", lambda found: str(getattr(self, found[1])), word) for word in words]


Change = Callable[[Place], list[str]]
FolderChange = Callable[[Path], object]


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder: the bytes of files, the targets of links."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }  # fmt: skip


# ---- command lines ----


def flags(**given) -> Change:
    return lambda place: place.command(**given)


def words(*more) -> Change:
    return lambda place: [*place.command(), *more]


def prepared(make: FolderChange, **given) -> Change:
    """Flags, after ``make`` has put something into the place's folder."""

    def change(place):
        make(place.here)
        return place.command(**given)

    return change


def corpus(name, content, **given) -> Change:
    """A file to train on."""
    return prepared(write(name, content), **{"train_file": f"<here>/{name}"} | given)


def config(content, name="c.yaml", **given) -> Change:
    """A config file before the flags."""
    return lambda place: [str(place.here / name), *prepared(write(name, content), **given)(place)]


def bert(model_type="bert", **entries) -> Change:
    """The configuration of a small BERT with some other entries."""
    sizes = {"vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 9}
    values = BertConfig(**sizes, num_attention_heads=2).to_dict() | {"model_type": model_type} | entries
    return prepared(write("config.json", json.dumps(values)), config_name="<here>", config_overrides=None)


def pretrained(change_model: FolderChange = lambda folder: None, **given) -> Change:
    """A copy of the run's model to go on from, changed."""

    def change(place):
        shutil.copytree(place.run, place.here / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
        change_model(place.here / "model")
        return place.command(**{"model_name_or_path": "<here>/model", "config_overrides": None} | given)

    return change


def tokenizer(change_tokenizer: FolderChange, **given) -> Change:
    """A copy of the run's tokenizer, changed."""

    def change(place):
        for path in place.run.glob("tokenizer*"):
            shutil.copy(path, place.here)
        change_tokenizer(place.here)
        return place.command(tokenizer_name="<here>", **given)

    return change


def resumed(change_run: FolderChange = lambda out: None, stream=False, **given) -> Change:
    """A run that was stopped after the first of its two checkpoints, changed; then the same command with "auto"."""

    def change(place):
        out = place.here / "out"
        shutil.copytree(place.stream if stream else place.run, out)
        for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
            (out / name).unlink()
        shutil.rmtree(out / "checkpoint-4")
        change_run(out)
        return place.command(**(STREAM if stream else {}) | {"resume_from_checkpoint": "auto"} | given)

    return change


def moved(**given) -> Change:
    """The run's first checkpoint without its run, to go on from."""

    def change(place):
        shutil.copytree(place.run / "checkpoint-2", place.here / "checkpoint-2")
        return place.command(resume_from_checkpoint="<here>/checkpoint-2", **given)

    return change


def from_checkpoint(change_run: FolderChange) -> Change:
    """The same, with the checkpoint named."""
    return resumed(change_run, resume_from_checkpoint="<here>/out/checkpoint-2")


def overwriting(**given) -> Change:
    """The same, to be started anew."""
    return resumed(**{"resume_from_checkpoint": None, "overwrite_output_dir": "true"} | given)


# ---- changes of a folder ----


def write(name: str, content: bytes | str | pa.Table | FolderChange) -> FolderChange:
    """A file of this content, or what a function makes of its path. What is written into a checkpoint has no checksum,
    as if stock Trainer had made it."""

    def change(folder):
        path = folder / name
        (path.parent / "checksums.json").unlink(missing_ok=True)
        if callable(content):
            content(path)
        elif isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def without(name: str) -> FolderChange:
    return write(name, Path.unlink)


def edit(name: str, **entries) -> FolderChange:
    """Change entries of a JSON file."""
    return write(name, lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | entries)))


def itself(path: Path) -> None:
    """A link that leads to itself."""
    path.symlink_to(path)


def replaced_by(make: FolderChange) -> FolderChange:
    def change(folder):
        shutil.rmtree(folder)
        make(folder)

    return change


def somebody_elses(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def not_finite(folder: Path) -> None:
    weights = {name: weight * float("nan") for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def word_level(**specials) -> FolderChange:
    """A tokenizer that is not WordPiece."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "dog"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **specials)
    return replaced_by(made.save_pretrained)


def other_text_under_the_same_name(out: Path) -> None:
    other = out.parent / "corpus.txt"
    other.write_text(TEXT.replace("fox", "cow"))
    edit("run_arguments.json", train_file=[str(other)])(out)


def unrecorded(out: Path) -> None:
    for name in ("run_arguments.json", "provenance.json"):
        (out / name).unlink()


def flip_a_bit(out: Path) -> None:
    path = out / "checkpoint-2" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
