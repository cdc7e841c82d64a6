"""A checkpoint on disk or on the Hub whose layers are factorized or merged, and saved."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file, logging

from fnl_hf.bert import modeling_fnl_bert
from fnl_hf.commands.convert import refuse_used_folder
from fnl_hf.errors import UserInputError
from fnl_hf.publishing.cards import FACTORIZED_LAYERS, PIPELINE_TAGS, describe_source, write_card
from fnl_hf.surgery.checkpoints import factorized_layers
from fnl_hf.surgery.config import FactorizationConfig
from fnl_hf.surgery.factorize import factorization_table, factorize, merge

TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
# What a checkpoint has beside weights and tokenizer: for generation, of processors, of sentence-transformers.
OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
)  # fmt: skip
NAMED_WEIGHTS = 3  # in a message
logger = logging.get_logger(__name__)
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
    refuse_used_folder(folder)
    model = _load_model(source)
    tokenizer, files = _load_tokenizer(source), _find_files(source, OTHER_FILES)
    before = model.num_parameters()
    try:
        model = change(model)
    except ValueError as error:
        raise UserInputError(str(error)) from error
    with _complete_or_removed(folder):
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, file in files.items():
            if not (folder / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(file, folder / name)
        _write_card(folder, source, model, before, what)
    return Compression(before, model)


@contextmanager
def _complete_or_removed(folder: Path) -> Iterator[None]:
    """Whatever ends the block early, a folder that it made is gone; one that was there before is the user's."""
    existed = folder.exists()
    try:
        yield
    except BaseException as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | ValueError | SafetensorError):
            raise UserInputError(f"{folder}: {error}") from error
        raise


def _load_model(source: str) -> PreTrainedModel:
    """The model of a checkpoint, with its head.

    Raises:
        UserInputError: no such checkpoint, one that cannot be read, or weights and class that do not fit.
    """
    try:
        model_class = _class_of(source)
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    except Exception as error:  # configurations and weights are read without checks, and by several packages
        says_what = isinstance(error, OSError | ValueError)  # a KeyError's message is a key
        kind = "" if says_what else f"it cannot be read: {type(error).__name__}: "
        raise UserInputError(f"{source}: {kind}{error}") from error
    _refuse_misfits(source, model, info, model_class is AutoModel)
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


def _refuse_misfits(source: str, model: PreTrainedModel, info: Mapping[str, Any], is_guessed: bool) -> None:
    """
    Args:
        info: what ``from_pretrained`` tells of the weights, without those that the class says may be ignored.
        is_guessed: the checkpoint does not say which head it has. One that does may have weights that its class drops.
    """
    name = type(model).__name__
    changed = [f"{key} {tuple(saved)}, not {tuple(own)}" for key, saved, own in info["mismatched_keys"]]
    unused = info["unexpected_keys"] if is_guessed else ()
    for weights, problem in (
        (changed, f"{name} with this config.json has other shapes"),
        (unused, f"config.json does not name its class (architectures), and {name} has no place for all weights"),
    ):
        if weights:
            raise UserInputError(f"{source}: {problem}: {_list_names(weights)}")
    if info["missing_keys"]:  # some checkpoints lack what only pretraining needs
        logger.warning(f"{source} lacks weights of {name}, which are random now: {_list_names(info['missing_keys'])}")


def _list_names(weights: Iterable[str]) -> str:
    names = sorted(weights)
    return ", ".join(names[:NAMED_WEIGHTS]) + ", ..." * (len(names) > NAMED_WEIGHTS)


def _load_tokenizer(source: str) -> Any:
    """None where the checkpoint has no files of one: Transformers would make one without vocabulary.

    Raises:
        UserInputError: its files do not make a tokenizer.
    """
    if not _find_files(source, TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other
        raise UserInputError(f"{source}: its tokenizer cannot be read: {error}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserInputError(f"{source}: its tokenizer has no vocabulary, only {len(tokenizer)} special tokens")
    return tokenizer


def _find_files(source: str, names: tuple[str, ...]) -> dict[str, str]:
    """Those of the files that a checkpoint has -> where they are."""
    try:
        files = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names}
    except OSError as error:
        raise UserInputError(f"{source}: {error}") from error
    return {name: file for name, file in files.items() if file is not None}


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
