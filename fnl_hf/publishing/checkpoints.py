"""A checkpoint of any architecture: its model, of its own class, and the files beside weights and tokenizer."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file, logging

from fnl_hf.bert import modeling_fnl_bert
from fnl_hf.bert.conversion_fnl_bert import needed_kernel
from fnl_hf.errors import UserInputError, reason_of
from fnl_hf.publishing.cards import MODULES_FILE, PIPELINE_TAGS

IN_PYTHON = (
    "load it in Python, call fnl_hf.factorize(model, config) or fnl_hf.merge(model), then model.save_pretrained(folder)"
)
# What a checkpoint has beside weights and tokenizer: for generation, of processors, of sentence-transformers.
COMPANIONS = (
    "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
    "config_sentence_transformers.json", "sentence_bert_config.json", *(
        f"sentence_{kind}_config.json"  # before sentence_bert_config.json was for all
        for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)  # fmt: skip
MODULE_FILES = ("config.json", "cnn_config.json", "lstm_config.json", "model.safetensors", "pytorch_model.bin")
NEEDS_FOLDER = ("Pooling", "Dense")  # modules that cannot be loaded without their configuration
USUAL_MODULES = ("1_Pooling", "2_Dense")
LOCAL = (".", "/", "~")  # how a path begins that is no name on the Hub
NAMED_WEIGHTS = 3  # in a message
logger = logging.get_logger(__name__)


# ---- the model ----


@contextmanager
def reading(source: str) -> Iterator[None]:
    """What is wrong with a checkpoint as UserInputError, whoever finds it: configurations and weights are read without
    checks, and by several packages."""
    if source.startswith(LOCAL) and not Path(source).exists():
        raise UserInputError(f"{source}: no such folder")
    try:
        yield
    except UserInputError:
        raise
    except Exception as error:
        says_what = isinstance(error, OSError | ValueError)  # a KeyError's message is a key
        kind = "" if says_what else f"it cannot be read: {type(error).__name__}: "
        raise UserInputError(f"{source}: {kind}{reason_of(error).removeprefix(f'{source}: ')}") from error


def refuse_misfits(source: str, model: PreTrainedModel, info: Mapping[str, Any], is_guessed: bool = False) -> None:
    """
    Args:
        info: what ``from_pretrained`` tells of the weights, without those that the class says may be ignored.
        is_guessed: the checkpoint does not say which head it has. One that does may have weights that its class drops.

    Raises:
        UserInputError: weights and class do not fit.
    """
    name = type(model).__name__
    changed = [f"{key} {tuple(saved)} instead of {tuple(own)}" for key, saved, own in info["mismatched_keys"]]
    unused = info["unexpected_keys"] if is_guessed else ()
    for weights, problem in (
        (changed, f"weights whose shapes do not fit {name} with this config.json"),
        (unused, f"config.json does not name the model class (architectures), and {name} does not have these weights"),
    ):
        if weights:
            raise UserInputError(f"{source}: {problem}: {_list_names(weights)}")
    if {key for key, _ in model.named_parameters()} <= set(info["missing_keys"]):
        raise UserInputError(f"{source} contains none of the weights of {name}")
    if info["missing_keys"]:  # some checkpoints lack what only pretraining needs
        logger.warning(
            f"{source} lacks weights of {name}, which are initialized at random: {_list_names(info['missing_keys'])}"
        )


def _list_names(weights: Iterable[str]) -> str:
    names = sorted(weights)
    return ", ".join(names[:NAMED_WEIGHTS]) + ", ..." * (len(names) > NAMED_WEIGHTS)


def load_model(source: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint, with its head.

    Args:
        trust_remote_code: run the code that comes with it.
        kwargs: for ``from_pretrained``.

    Raises:
        UserInputError: no such checkpoint, one that cannot be read, or weights and class that do not fit.
    """
    with reading(source):
        entries, _ = PreTrainedConfig.get_config_dict(source)
        model_class = _class_of(entries, trust_remote_code)
        kwargs = needed_kernel(entries) | kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)
    refuse_misfits(source, model, info, model_class is AutoModel)
    return model


def _class_of(entries: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """The class of the model whose configuration has these entries."""
    name = (entries.get("architectures") or ["AutoModel"])[0]
    kind = getattr(modeling_fnl_bert, name, None) or getattr(transformers, name, None)
    is_known = isinstance(kind, type) and issubclass(kind, PreTrainedModel | AutoModel)
    code = entries.get("auto_map")
    if code and (not is_known or entries.get("model_type") not in CONFIG_MAPPING):
        if trust_remote_code:
            autos = (auto for auto, place in code.items() if str(place).endswith(f".{name}"))
            return getattr(transformers, next(autos, "AutoModel"))
        raise ValueError(f"this checkpoint comes with its own model code, which fnl-hf does not run: {IN_PYTHON}")
    if not is_known:
        raise ValueError(f"config.json names the model class {name}, which Transformers does not have: {IN_PYTHON}")
    return kind


def auto_class_of(model: PreTrainedModel) -> str:
    """The Auto class of Transformers that loads a model of this class; one with a task, if there are several."""
    names = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        classes = () if mapping is None else mapping.get(type(model.config), ())
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            names.append(name)
    # Most language models are listed for pretraining beside what they are for.
    return min(
        names,
        key=lambda name: (name == "AutoModelForPreTraining", name not in PIPELINE_TAGS),
        default=model._auto_class or "AutoModel",
    )


# ---- the files beside it ----


def find_files(source: str, names: Iterable[str]) -> dict[str, str]:
    """Those of the files that a checkpoint has -> where they are."""
    try:
        files = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names}
    except OSError as error:
        raise UserInputError(f"{source}: {error}") from error
    return {name: file for name, file in files.items() if file is not None}


def find_companions(source: str) -> dict[str, str]:
    """What a checkpoint has beside weights and tokenizer -> where it is."""
    found = find_files(source, (MODULES_FILE, *COMPANIONS))
    modules = _module_folders(found[MODULES_FILE]) if MODULES_FILE in found else []
    folders = dict.fromkeys((*USUAL_MODULES, *modules))
    return found | find_files(source, [f"{folder}/{file}" for folder in folders for file in MODULE_FILES])


def _module_folders(modules_file: str) -> list[str]:
    try:
        entries = json.loads(Path(modules_file).read_text(encoding="utf-8"))
        paths = [str(entry["path"]) for entry in entries]
        needed = [str(entry["path"]) for entry in entries if str(entry.get("type")).endswith(NEEDS_FOLDER)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning(f"{modules_file} does not list modules of sentence-transformers: {error}")
        return []
    for path in needed:
        if not Path(modules_file).with_name(path).joinpath("config.json").exists():
            logger.warning(f"{modules_file} lists {path}, which has no config.json: sentence-transformers needs it")
    return [path for path in paths if re.fullmatch(r"\w[\w.-]*", path)]  # no other place than a folder beside it


def copy_companions(companions: Mapping[str, str], folder: Path) -> None:
    """Files that :func:`find_companions` found into ``folder``; what lies there under their names is replaced."""
    for name, file in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(file, folder / name)
