"""Saves and loads models with factorized layers.

A Transformers model has the list of its factorized layers in its configuration, under ``quantization_config``:
``from_pretrained`` looks there for changes of a model's structure before it loads weights, and other packages can
register their own. Any other model has the list in a JSON file next to its weights.
"""

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fnl_hf.bert.tying import untie_products
from fnl_hf.errors import UserInputError
from fnl_hf.layers import FactorizedLayer
from fnl_hf.surgery.ranks import FACTORIZED

METHOD = "fnl_factorized"
LAYERS_FILE = "factorized_layers.json"
WEIGHTS_FILE = "model.safetensors"


@register_quantization_config(METHOD)
@dataclass
class FactorizedLayersConfig(QuantizationConfigMixin):
    """The entry of ``config.json`` about factorized layers.

    Args:
        layers: name -> {"rank": r, "deep": whether it has three factors}; names within the base model are those that
            they have there, so that every head finds them.
        factorizations: the :class:`~fnl_hf.FactorizationConfig` of each call that made them, for the reader.
    """

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    factorizations: list[dict[str, Any]] = field(default_factory=list)
    quant_method: str = METHOD  # type: ignore[assignment]  # Transformers' enumeration lists its own only


@register_quantizer(METHOD)
class FactorizedLayersLoader(HfQuantizer):
    """Rebuilds the structure in ``from_pretrained``, on the meta device; afterwards the model is an ordinary one."""

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config: Any = self.quantization_config
        saved = _names_of_weights(checkpoint_files or ())
        # A dense model that was made from the configuration of a factorized one, or a part that was merged, is saved
        # with the old list.
        config.layers = {name: entry for name, entry in config.layers.items() if not _is_dense(name, model, saved)}
        rebuild_layers(model, config.layers)
        untie_products(model)
        # Loading replaces these parameters by others, of whatever shape the checkpoint has.
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.shape != self._shapes.get(name, parameter.shape):  # Transformers 5.17 does not check
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)} in the checkpoint and {tuple(self._shapes[name])} in "
                    f"{type(model).__name__}: make the checkpoint dense first (fnl_hf.merge)"
                )
        for layer in model.modules():
            if isinstance(layer, FactorizedLayer):
                _initialize_missing(layer)
        # Nothing is quantized: half(), Trainer and save_pretrained work as for every model.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        if not model.config.quantization_config.layers:
            del model.config.quantization_config
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


def _names_of_weights(files: Collection[str]) -> set[str]:
    names: set[str] = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as weights:
                names.update(weights.keys())
    return names


def _is_dense(name: str, model: PreTrainedModel, saved: Collection[str]) -> bool:
    """Whether a checkpoint with these weights has a dense one for the layer of this name."""
    full_names = (name, f"{model.base_model_prefix}.{name}")
    return any(f"{full}.weight" in saved and f"{full}.left" not in saved for full in full_names)


def factorized_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The contents of :class:`FactorizedLayersConfig` for ``model``."""
    prefix, modules, layers = _base_prefix(model), dict(model.named_modules()), {}
    for name, layer in modules.items():
        if isinstance(layer, FactorizedLayer):
            short_name = name.removeprefix(prefix)
            is_taken = short_name != name and short_name in modules  # by a layer of the head
            layers[name if is_taken else short_name] = {"rank": layer.rank, "deep": layer.deep}
    return layers


def factorizations(model: nn.Module) -> list[dict[str, Any]]:
    """The settings of each call that factorized layers of ``model``, in order."""
    if not factorized_layers(model):  # from_config makes a dense model, whatever the configuration contains
        return []
    found = list(vars(model).get("_factorizations", []))
    for part in configured_parts(model):
        found += [made for made in _quantization_entry(part).get("factorizations", []) if made not in found]
    return found


def record_layers(model: nn.Module, history: list[dict[str, Any]] | None = None) -> None:
    """Write into the configurations of the Transformers models in ``model`` which of their layers are factorized.

    :func:`factorize` and :func:`merge` do this themselves. Call it before you save a model that contains factorized
    models, or whose modules you replaced by hand. Each model gets a new configuration, because other models may share
    its present one.

    Args:
        history: the settings that made the layers; by default the recorded ones.
    """
    history = factorizations(model) if history is None else history
    vars(model)["_factorizations"] = history
    parts = configured_parts(model)
    copies: dict[int, Any] = {}  # one memo for all, because a model's configuration contains those of its parts
    for part in parts:
        copy.deepcopy(part.config, copies)
    # Layers also refer to their model's configuration.
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) in copies:
            module.config = copies[id(config)]
    for part in parts:
        if quantization_method(part) not in (None, METHOD):
            continue
        layers = factorized_layers(part)
        if layers:
            part.config.quantization_config = FactorizedLayersConfig(layers=layers, factorizations=history)
        elif quantization_method(part) == METHOD:
            del part.config.quantization_config


def configured_parts(model: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models in ``model``, including itself; if several share a configuration, the outermost one."""
    parts: dict[int, PreTrainedModel] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            parts.setdefault(id(module.config), module)
    return list(parts.values())


def quantization_method(model: PreTrainedModel) -> str | None:
    """The quantization method in the configuration of a Transformers model: METHOD if its layers are factorized."""
    return _quantization_entry(model).get("quant_method")


def _quantization_entry(model: PreTrainedModel) -> dict[str, Any]:
    entry = getattr(model.config, "quantization_config", None) or {}
    return entry if isinstance(entry, dict) else vars(entry)


@torch.no_grad()
def _initialize_missing(layer: FactorizedLayer) -> None:
    """Draw the parameters of a layer that were not in the checkpoint, for which Transformers has no initialization."""
    parameters = list(layer.parameters(recurse=False))
    loaded = [p for p in parameters if p.is_meta or getattr(p, "_is_hf_initialized", False)]
    if len(loaded) < len(parameters):
        # A layer draws all its parameters; loaded ones are restored afterwards.
        values = [parameter.clone() for parameter in loaded]
        layer.reset_parameters()
        for parameter, value in zip(loaded, values):
            parameter.copy_(value)


def rebuild_layers(model: nn.Module, layers: dict[str, dict[str, Any]]) -> nn.Module:
    """Replace the dense layers of these names, as far as the model has them, by factorized ones without weights."""
    return replace_modules(model, _layers_to_load(model, layers))


def _layers_to_load(model: nn.Module, layers: dict[str, dict[str, Any]]) -> dict[int, FactorizedLayer]:
    """id of the dense layer -> a factorized one without weights."""
    found = {}
    for name, dense in _dense_layers(model, layers, within_parts=True).items():
        rank, deep = layers[name]["rank"], layers[name]["deep"]
        factory = {"device": "meta", "dtype": dense.weight.dtype}
        found[id(dense)] = FACTORIZED[type(dense)].like(dense, rank, deep, **factory)
    return found


def restore_layers(model: PreTrainedModel, layers: dict[str, dict[str, Any]], history: list[dict[str, Any]]) -> None:
    """Give a dense model the structure of a saved one, in place. The weights of the layers that are replaced are not
    set: they are to be loaded.

    Args:
        layers, history: see :class:`FactorizedLayersConfig`.
    """
    rebuild_layers(model, layers)
    untie_products(model)
    _allocate_meta_tensors(model)
    record_layers(model, history)


def _dense_layers(model: nn.Module, names: Collection[str], within_parts: bool = False) -> dict[str, Any]:
    """The names, in the model or in a part of it, that are dense layers -> that layer."""
    modules = dict(model.named_modules())
    dense = {name: module for name, module in modules.items() if type(module) in FACTORIZED}
    prefix = _base_prefix(model)
    # A name is one within the base model or, if the model itself has such a layer, that one's, which comes last here.
    full_names = {name: full for name in names for full in (f"{prefix}{name}", name) if full in dense}
    if within_parts and names and not full_names:  # the list of a tower in a model that puts a head on it
        part = next((part for part in modules if all(f"{part}.{name}" in dense for name in names)), None)
        full_names = {} if part is None else {name: f"{part}.{name}" for name in names}
    return {name: dense[full] for name, full in full_names.items()}


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Replace the modules with these ids everywhere, even if one has several places; returns the model, or its
    replacement. ``set_submodule`` only replaces one place."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    return replacements.get(id(model), model)


def save_factorized(model: nn.Module, folder: str | Path) -> None:
    """Save a model from outside Transformers: its weights, the list of its factorized layers, and their settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS_FILE))
    text = json.dumps({"layers": factorized_layers(model), "factorizations": factorizations(model)}, indent=2)
    (folder / LAYERS_FILE).write_text(text + "\n", encoding="utf-8")


def load_factorized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a dense model the factorized layers and the weights that :func:`save_factorized` wrote, in place.

    Args:
        model: a dense model of the factorized architecture; its weights are replaced. It may be on the meta device.

    Returns:
        ``model``, or its replacement if ``model`` itself is such a layer.

    Raises:
        UserInputError: a file is missing or broken, or its layers and weights do not fit the model.
    """
    folder = Path(folder)
    try:
        saved = json.loads((folder / LAYERS_FILE).read_text(encoding="utf-8"))
        layers = saved["layers"]
        found = _dense_layers(model, layers)
        missing = [name for name in layers if name not in found]
        if missing:
            raise ValueError(f"{type(model).__name__} has no dense layer {missing[0]!r}")
        replacements = _layers_to_load(model, layers)
        _refuse_misfit(model, replacements, folder / WEIGHTS_FILE)
        model = replace_modules(model, replacements)
        _allocate_meta_tensors(model)
        load_model(model, str(folder / WEIGHTS_FILE))
        record_layers(model, saved["factorizations"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserInputError(f"{folder}: {error}") from error
    return model


def _refuse_misfit(model: nn.Module, replacements: Mapping[int, nn.Module], file: Path) -> None:
    """Refuse weights of other names or shapes before the model changes."""
    wanted: dict[str, Any] = model.state_dict(keep_vars=True)
    modules: Any = model.named_modules(remove_duplicate=False)
    for name, module in modules:
        if id(module) in replacements:
            prefix = f"{name}." if name else ""
            for part in module.state_dict():
                del wanted[prefix + part]
            new = replacements[id(module)].state_dict(keep_vars=True)
            wanted |= {prefix + part: tensor for part, tensor in new.items()}
    with safe_open(file, "pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if name not in wanted:
            raise ValueError(f"{type(model).__name__} has no weight {name!r}")
        if shape != tuple(wanted[name].shape):
            raise ValueError(f"{name} has shape {shape}, in {type(model).__name__} {tuple(wanted[name].shape)}")
    # A tensor with several names is saved under one of them.
    found = {id(wanted[name]) for name in shapes}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in found]
    if missing:
        raise ValueError(f"it lacks the weight {missing[0]!r} of {type(model).__name__}")


def _allocate_meta_tensors(model: nn.Module) -> None:
    """Allocate memory for everything on the meta device, on the device of the other tensors; shared tensors stay
    shared.

    ``nn.Module.to_empty`` would separate shared tensors, and lose the values of buffers that are not saved.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for entries in (module._parameters, module._buffers):
            for name, tensor in entries.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if name in module._non_persistent_buffers_set:
                    raise ValueError(
                        f"{type(module).__name__}.{name} is not in the checkpoint: create the model on a device "
                        "instead of the meta device"
                    )
                if id(tensor) not in made:
                    new = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                entries[name] = made[id(tensor)]  # type: ignore[assignment]


def _base_prefix(model: nn.Module) -> str:
    inner = isinstance(model, PreTrainedModel) and model.base_model is not model
    return f"{model.base_model_prefix}." if inner else ""
