"""Bad inputs of run_pretrain.py, and how they are refused: in one clear line that names the thing, the bound and the
value. No output folder is made, and what is there is as it was, to the byte.

The tables are in the folders of their subjects: test_bad_*.py.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast

import run_pretrain
from fnl_hf import UserInputError
from tests.conftest import SENTENCES, STREAM, Workspace, launch

TEXT = "\n".join(SENTENCES * 4)
SPECIALS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}

BadInput = Callable[[Workspace], list[str]]  # makes one in a workspace, and gives the command line that meets it
FolderChange = Callable[[Path], object]


def assert_refused(workspace: Workspace, make: BadInput, message: str) -> None:
    command = make(workspace)
    before = contents(workspace.here)
    with pytest.raises(UserInputError) as refusal:
        run_pretrain.run(command)
    said = str(refusal.value)
    assert re.search(message, said) and len(said.splitlines()) == 1, said
    assert contents(workspace.here) == before


def assert_launch_refused(workspace: Workspace, make: BadInput, message: str) -> None:
    """The same for the script as a user starts it."""
    command = make(workspace)
    before = contents(workspace.here)
    result = launch("run_pretrain.py", *command, check=False)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("run_pretrain.py: error: ")]
    assert len(said) == 1 and re.search(message, said[0].removeprefix("run_pretrain.py: error: "))
    assert 'run_pretrain.py", line' not in result.stderr, "the launcher's own traceback is all there is"
    assert contents(workspace.here) == before


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder: the bytes of files, the targets of links."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }  # fmt: skip


# ---- command lines ----


def flags(**given) -> BadInput:
    return lambda workspace: workspace.command(**given)


def words(*more) -> BadInput:
    return lambda workspace: [*workspace.command(), *more]


def prepared(change_folder: FolderChange, **given) -> BadInput:
    """Flags, after something was put into the workspace's folder."""

    def make(workspace):
        change_folder(workspace.here)
        return workspace.command(**given)

    return make


def corpus(name, content, **given) -> BadInput:
    """A file to train on."""
    return prepared(write(name, content), **{"train_file": f"<here>/{name}"} | given)


def config(content, name="c.yaml", **given) -> BadInput:
    """A config file before the flags."""
    return lambda workspace: [str(workspace.here / name), *prepared(write(name, content), **given)(workspace)]


def bert(model_type="bert", **entries) -> BadInput:
    """The configuration of a small BERT with some other entries."""
    sizes = {"vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 9}
    values = BertConfig(**sizes, num_attention_heads=2).to_dict() | {"model_type": model_type} | entries
    return prepared(write("config.json", json.dumps(values)), config_name="<here>", config_overrides=None)


def pretrained(change_model: FolderChange = lambda folder: None, **given) -> BadInput:
    """A copy of the run's model to go on from, changed."""

    def make(workspace):
        shutil.copytree(workspace.run, workspace.here / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
        change_model(workspace.here / "model")
        return workspace.command(**{"model_name_or_path": "<here>/model", "config_overrides": None} | given)

    return make


def tokenizer(change_tokenizer: FolderChange, **given) -> BadInput:
    """A copy of the run's tokenizer, changed."""

    def make(workspace):
        for path in workspace.run.glob("tokenizer*"):
            shutil.copy(path, workspace.here)
        change_tokenizer(workspace.here)
        return workspace.command(tokenizer_name="<here>", **given)

    return make


def resumed(change_run: FolderChange = lambda out: None, stream=False, **given) -> BadInput:
    """A run that was stopped after the first of its two checkpoints, changed; then the same command with "auto"."""

    def make(workspace):
        out = workspace.here / "out"
        shutil.copytree(workspace.stream if stream else workspace.run, out)
        for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
            (out / name).unlink()
        shutil.rmtree(out / "checkpoint-4")
        change_run(out)
        return workspace.command(**(STREAM if stream else {}) | {"resume_from_checkpoint": "auto"} | given)

    return make


def from_checkpoint(change_run: FolderChange) -> BadInput:
    """The same, with the checkpoint named."""
    return resumed(change_run, resume_from_checkpoint="<here>/out/checkpoint-2")


def overwriting(change_run: FolderChange = lambda out: None, **given) -> BadInput:
    """The same, to be started anew."""
    return resumed(change_run, **{"resume_from_checkpoint": None, "overwrite_output_dir": "true"} | given)


def moved(**given) -> BadInput:
    """The run's first checkpoint without its run, to go on from."""

    def make(workspace):
        shutil.copytree(workspace.run / "checkpoint-2", workspace.here / "checkpoint-2")
        return workspace.command(resume_from_checkpoint="<here>/checkpoint-2", **given)

    return make


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


def replaced_by(make_folder: FolderChange) -> FolderChange:
    def change(folder):
        shutil.rmtree(folder)
        make_folder(folder)

    return change


def somebody_elses(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def holding(*names: str) -> FolderChange:
    """A folder of somebody's own files, and no run."""

    def make(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("mine")

    return make


def linked(name: str, target: str) -> FolderChange:
    return lambda folder: (folder / name).symlink_to(target)


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
