"""A checkpoint on disk or on the Hub whose layers are factorized or merged, and saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from fnl_hf.bert import modeling_fnl_bert
from fnl_hf.commands.folders import (
    complete_or_removed,
    copy_companions,
    find_companions,
    find_files,
    reading,
    refuse_bad_folder,
    refuse_misfits,
)
from fnl_hf.errors import UserInputError
from fnl_hf.publishing.cards import FACTORIZED_LAYERS, PIPELINE_TAGS, describe_source, write_card
from fnl_hf.surgery.checkpoints import factorized_layers
from fnl_hf.surgery.config import FactorizationConfig
from fnl_hf.surgery.factorize import factorization_table, factorize, merge

TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
IN_PYTHON = (
    "load it in Python, call fnl_hf.factorize(model, config) or fnl_hf.merge(model), then model.save_pretrained(folder)"
)


class Compression(NamedTuple):
    """Parameters of the original, and the model that was made of it."""

    original_parameters: int
    model: PreTrainedModel


def factorize_checkpoint(source: str, folder: str | Path, config: FactorizationConfig) -> Compression:
    """:func:`fnl_hf.factorize` a checkpoint of any architecture, with its head, and save it in ``folder``.

    Raises:
        UserInputError: a folder in use or one that cannot be written, no such checkpoint, one that cannot be read or
            has code of its own, or a configuration that does not fit it.
    """
    return _save_changed(
        source, folder, lambda model: factorize(model, config), "with factorized layers; not trained since"
    )


def merge_checkpoint(source: str, folder: str | Path) -> Compression:
    """:func:`fnl_hf.merge` a checkpoint with factorized layers, and save it in ``folder``.

    Raises:
        UserInputError: as :func:`factorize_checkpoint`; a checkpoint without factorized layers.
    """

    def merged(model):
        if not factorized_layers(model):
            raise ValueError(f"{source} has no factorized layers")
        return merge(model)

    return _save_changed(source, folder, merged, "its factorized layers multiplied out")


def _save_changed(source: str, folder: str | Path, change: Callable[[Any], Any], what: str) -> Compression:
    folder = Path(folder)
    refuse_bad_folder(folder)
    model = _load_model(source)
    tokenizer, companions = _load_tokenizer(source), find_companions(source)
    before = model.num_parameters()
    try:
        model = change(model)
    except ValueError as error:
        raise UserInputError(str(error)) from error
    with complete_or_removed(folder):
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        copy_companions(companions, folder)
        _write_card(folder, source, model, before, what)
    return Compression(before, model)


def _load_model(source: str) -> PreTrainedModel:
    """The model of a checkpoint, with its head.

    Raises:
        UserInputError: no such checkpoint, one that cannot be read, or weights and class that do not fit.
    """
    with reading(source):
        model_class = _class_of(source)
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    refuse_misfits(source, model, info, model_class is AutoModel)
    return model


def _class_of(source: str) -> Any:
    entries, _ = PreTrainedConfig.get_config_dict(source)
    name = (entries.get("architectures") or ["AutoModel"])[0]
    kind = getattr(modeling_fnl_bert, name, None) or getattr(transformers, name, None)
    is_known = isinstance(kind, type) and issubclass(kind, PreTrainedModel | AutoModel)
    if entries.get("auto_map") and (not is_known or entries.get("model_type") not in CONFIG_MAPPING):
        raise ValueError(f"the code of its model comes with it and is not run here: {IN_PYTHON}")
    if not is_known:
        raise ValueError(f"Transformers has no model class {name}, which config.json names: {IN_PYTHON}")
    return kind


def _load_tokenizer(source: str) -> Any:
    """None where the checkpoint has no files of one: Transformers would make one without vocabulary.

    Raises:
        UserInputError: its files do not make a tokenizer.
    """
    if not find_files(source, TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other
        raise UserInputError(f"{source}: its tokenizer cannot be read: {error}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserInputError(f"{source}: its tokenizer has no vocabulary, only {len(tokenizer)} special tokens")
    return tokenizer


def _write_card(folder: Path, source: str, model: PreTrainedModel, before: int, what: str) -> None:
    name, metadata = describe_source(source)
    layers = factorized_layers(model)
    facts = {"architecture": type(model).__name__, "parameters": f"{model.num_parameters():,}, before {before:,}"}
    write_card(
        folder,
        title=folder.resolve().name,
        description=f"{name}, {what}.",
        auto_class=_auto_class_of(model),
        model=model,
        facts=facts | ({FACTORIZED_LAYERS: len(layers)} if layers else {}),
        metadata=metadata,
        section=f"## Layers\n\n```\n{factorization_table(model)}\n```" if layers else "",
        cites=True,
    )


def _auto_class_of(model: PreTrainedModel) -> str:
    """The Auto class of Transformers that loads a model of this class; one with a task, if there are several."""
    names = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        classes = () if mapping is None else mapping.get(type(model.config), ())
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            names.append(name)
    # Most language models are listed for pretraining beside what they are for.
    return min(
        names, key=lambda name: (name == "AutoModelForPreTraining", name not in PIPELINE_TAGS), default="AutoModel"
    )
