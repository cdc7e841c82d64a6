"""Layers of any model replaced by products, and back."""

import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from fnl_hf.attention_fnl_bert import factor_pairs
from fnl_hf.factorization_config import FactorizationConfig, matches
from fnl_hf.factorized_checkpoints import METHOD, quantization_method, record_layers, replace_modules
from fnl_hf.layer_ranks import FACTORIZED, LayerSize, choose_ranks
from fnl_hf.layers import FactorizedLayer

TYPE_NAMES = {kind.__name__: kind for kind in FACTORIZED}
WRAPPERS = (DataParallel, DistributedDataParallel, FullyShardedDataParallel)


def factorize(model: nn.Module, config: FactorizationConfig | None = None) -> nn.Module:
    """Replace layers of ``model`` by products of two or three matrices, in place::

        model = fnl_hf.factorize(model, fnl_hf.FactorizationConfig(target_ratio=0.1))
        optimizer = fnl_hf.FrobeniusAdamW(fnl_hf.frobenius_param_groups(model, weight_decay=0.01), lr=1e-4)

    Call it before an optimizer is made and before the model is wrapped, sharded or compiled. A model on the meta device
    gets its new structure only. Models of Transformers remember it: ``save_pretrained`` and ``from_pretrained`` work as
    ever; for others there are :func:`save_factorized` and :func:`load_factorized`.

    Args:
        model: any module; its layers of exactly the types ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding`` can be
            replaced.
        config: which, and how; by default each Linear and Conv2d at a quarter of its rank, but heads and tied weights.

    Returns:
        ``model``.

    Raises:
        ValueError: a model that is wrapped, a pattern or a selection without a layer, or a rank that is out of range;
            the model is unchanged then.
    """
    config = config or FactorizationConfig()
    _refuse_unfit(model)
    layers = selected_layers(model, config)
    ranks = choose_ranks(layers, config)
    factorized: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        try:
            # Each layer draws its own, whichever others are selected.
            seed = zlib.crc32(f"{config.seed} {name}".encode())
            factorized[id(layer)] = FACTORIZED[type(layer)].from_dense(
                layer, ranks[name], config.mode, config.init, seed
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if config.mode == "low_rank":
        _warn_of_growth(layers, ranks)
    replace_modules(model, factorized)
    _untie(model, layers)
    record_layers(model)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replace the factorized layers of ``model`` by dense ones with the same outputs, in place.

    Products are taken in float32. Attention of an FNL-BERT stays what it is; its ``to_bert()`` makes it a BERT's.

    Returns:
        ``model``; an optimizer of the factors is of no use to it.
    """
    _refuse_unfit(model)
    layers = {id(m): m.to_dense().layer for m in model.modules() if isinstance(m, FactorizedLayer)}
    replace_modules(model, layers)
    record_layers(model)
    return model


def factorization_table(model: nn.Module) -> str:
    """One line for each factorized layer: its matrix, rank, parameters of the dense and of this layer, and the share of
    the weight's norm that it began without, ‖W − U Vᵀ‖_F/‖W‖_F."""
    lines, dense_total, total = [], 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLayer):
            size = LayerSize(layer.new_dense(device="meta"))
            dense, own = size.parameters(None), size.parameters(layer.rank, layer.deep)
            shape = f"{size.groups}x " * (size.groups > 1) + f"{size.m} x {size.n}"
            error = "" if layer.error is None else f"{layer.error:.3f}"
            lines.append(f"{name:<48}{shape:>18}{layer.rank:>6}{dense:>12,}{own:>12,}{own / dense:>8.3f}{error:>8}")
            dense_total, total = dense_total + dense, total + own
    header = f"{'layer':<48}{'matrix':>18}{'rank':>6}{'dense':>12}{'factorized':>12}{'ratio':>8}{'error':>8}"
    ratio = f"{total / dense_total:.3f}" if dense_total else ""
    return "\n".join([header, *lines, f"{f'{len(lines)} layers':<72}{dense_total:>12,}{total:>12,}{ratio:>8}"])


def selected_layers(model: nn.Module, config: FactorizationConfig) -> dict[str, nn.Module]:
    """Name -> layer of all that ``config`` names.

    Raises:
        ValueError: none at all, or a pattern or type that is of no use.
    """
    wanted = list(config.include if config.ranks is None else config.ranks)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if type(module) in FACTORIZED and "weight" in module._parameters
    }
    for entry in (*wanted, *config.exclude):
        if not any(_is_named(entry, name, layer) for name, layer in candidates.items()) and entry not in TYPE_NAMES:
            kinds = sorted({type(m).__name__ for name, m in model.named_modules() if matches(name, entry)})
            known = ", ".join(list(candidates)[:8]) + (", ..." if len(candidates) > 8 else "")
            raise ValueError(
                f"{entry!r} names no layer that can be factorized ({', '.join(kinds) or 'nothing at all'}); "
                f"those are {known}"
            )
    protected = _protected(model, candidates)
    layers = {}
    for name, layer in candidates.items():
        found = [entry for entry in wanted if _is_named(entry, name, layer)]
        by_name = any(entry not in TYPE_NAMES for entry in found)
        excluded = any(_is_named(entry, name, layer) for entry in config.exclude)
        if found and (by_name or id(layer.weight) not in protected) and not excluded:
            layers[name] = layer
    if not layers:
        chosen = f"include={wanted}, exclude={list(config.exclude)}"
        raise ValueError(f"{type(model).__name__} has no layer to factorize with {chosen}")
    return layers


def _is_named(entry: str, name: str, layer: nn.Module) -> bool:
    return type(layer) is TYPE_NAMES[entry] if entry in TYPE_NAMES else matches(name, entry)


def _protected(model: nn.Module, candidates: dict[str, nn.Module]) -> set[int]:
    """ids of the weights that are left alone unless they are named."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    protected = {key for key, count in owners.items() if count > 1}
    protected |= {id(weight) for pair in factor_pairs(model) for weight in pair.weights}
    return protected | {id(layer.weight) for layer in _heads(model, candidates)}


def _heads(model: nn.Module, candidates: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Of a Transformers model what is outside its base model; of another one with several layers the last of them."""
    if isinstance(model, PreTrainedModel):
        if model.base_model is not model:
            inside = {id(module) for module in model.base_model.modules()}
            yield from (layer for layer in candidates.values() if id(layer) not in inside)
    elif len(candidates) > 1:
        yield list(candidates.values())[-1]


def _refuse_unfit(model: nn.Module) -> None:
    if quantization_method(model) not in (None, METHOD):
        raise ValueError(f"the model is quantized ({quantization_method(model)}): its weights cannot be factorized")
    for module in model.modules():
        sharded = any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        if isinstance(module, WRAPPERS) or hasattr(module, "_orig_mod") or sharded:
            what = "sharded" if sharded else f"wrapped in {type(module).__name__}"
            raise ValueError(f"the model is {what}: factorize or merge it first, and wrap, shard or compile it then")


def _warn_of_growth(layers: dict[str, nn.Module], ranks: dict[str, int]) -> None:
    grown = []
    for name, layer in layers.items():
        size = LayerSize(layer)
        if size.parameters(ranks[name]) > size.parameters(None):
            limit = size.m * size.n // (size.m + size.n)
            grown.append(f"{name} (rank {ranks[name]}, at most {limit} saves)")
    if grown:
        listed = ", ".join(grown[:5]) + (f" and {len(grown) - 5} more" if len(grown) > 5 else "")
        warnings.warn(f"{len(grown)} of {len(layers)} layers get more parameters than they had: {listed}", stacklevel=3)


def _untie(model: Any, layers: dict[str, nn.Module]) -> None:
    """A layer that was named and shared its weight has its own now: Transformers must not tie it again."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    gone = [
        target for target, source in tied.items() if any(key.rpartition(".")[0] in layers for key in (target, source))
    ]
    if gone:
        model.config.tie_word_embeddings = False
        for key in gone:
            del tied[key]
