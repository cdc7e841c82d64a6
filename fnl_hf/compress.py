"""A checkpoint on disk or on the Hub whose layers are factorized or merged, and saved."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from fnl_hf import modeling_fnl_bert
from fnl_hf.convert import refuse_used_folder
from fnl_hf.errors import UserInputError
from fnl_hf.factorization_config import FactorizationConfig
from fnl_hf.factorized_checkpoints import factorized_layers
from fnl_hf.model_card import FACTORIZED_LAYERS, describe_source, write_card
from fnl_hf.surgery import factorization_table, factorize, merge

# What a checkpoint has beside weights and tokenizer.
OTHER_FILES = ("preprocessor_config.json", "generation_config.json")


class Compression(NamedTuple):
    """Parameters of the original, and the model that was made of it."""

    original_parameters: int
    model: PreTrainedModel


def factorize_checkpoint(source: str, folder: str | Path, config: FactorizationConfig) -> Compression:
    """:func:`fnl_hf.factorize` a checkpoint of any architecture, with its head, and save it in ``folder``.

    Raises:
        UserInputError: a folder in use, no such checkpoint, or a configuration that does not fit it.
    """
    return _save_changed(
        source, folder, lambda model: factorize(model, config), "with factorized layers; not trained since"
    )


def merge_checkpoint(source: str, folder: str | Path) -> Compression:
    """:func:`fnl_hf.merge` a checkpoint with factorized layers, and save it in ``folder``.

    Raises:
        UserInputError: a folder in use, no such checkpoint, or one without factorized layers.
    """

    def merged(model):
        if not factorized_layers(model):
            raise ValueError(f"{source} has no factorized layers")
        return merge(model)

    return _save_changed(source, folder, merged, "its factorized layers multiplied out")


def _save_changed(source: str, folder: str | Path, change: Callable[[Any], Any], what: str) -> Compression:
    folder = Path(folder)
    refuse_used_folder(folder)
    try:
        model = _class_of(source).from_pretrained(source)
        before = model.num_parameters()
        change(model).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserInputError(str(error)) from error
    _copy_the_rest(source, folder)
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
    return Compression(before, model)


def _class_of(source: str) -> Any:
    name = (AutoConfig.from_pretrained(source).architectures or ["AutoModel"])[0]
    return getattr(modeling_fnl_bert, name, None) or getattr(transformers, name, transformers.AutoModel)


def _auto_class_of(model: PreTrainedModel) -> str:
    """The first of Transformers' Auto classes that loads a model of this class."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        classes = () if mapping is None else mapping.get(type(model.config), ())
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            return name
    return "AutoModel"


def _copy_the_rest(source: str, folder: Path) -> None:
    with suppress(OSError, ValueError, KeyError):  # images have none
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    for name in OTHER_FILES:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and not (folder / name).exists():
            shutil.copy(file, folder / name)
