"""Replaces layers of any model by products, and back."""

import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils import logging

from fnl_hf.bert.attention_fnl_bert import factor_pairs
from fnl_hf.bert.tying import is_untied, untie_output, untie_products
from fnl_hf.layers import FactorizedLayer
from fnl_hf.products.discovery import registered_products
from fnl_hf.products.heads import find_heads
from fnl_hf.surgery.checkpoints import (
    METHOD,
    configured_parts,
    factorizations,
    quantization_method,
    record_layers,
    replace_modules,
)
from fnl_hf.surgery.config import FactorizationConfig, name_matches
from fnl_hf.surgery.ranks import FACTORIZED, TYPE_NAMES, LayerSize, choose_ranks, matches_layer
from fnl_hf.surgery.truncation import CalibratedLayer, calibrate

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
WRAPPERS = (DataParallel, DistributedDataParallel, FullyShardedDataParallel)


def factorize(
    model: nn.Module, config: FactorizationConfig | None = None, calibration: Iterable[Any] | None = None
) -> nn.Module:
    """Replace layers of ``model`` by products of two or three matrices, in place::

        model = fnl_hf.factorize(model, fnl_hf.FactorizationConfig(target_ratio=0.5), calibration=batches)
        optimizer = fnl_hf.FrobeniusAdamW(fnl_hf.frobenius_param_groups(model, weight_decay=0.01), lr=1e-4)

    Call it before you make an optimizer and before you wrap, shard or compile the model. A model on the meta device
    only gets its new structure; load its weights, or draw them with each layer's ``reset_parameters``. Transformers
    models, including those within ``model``, record the change: ``save_pretrained`` and ``from_pretrained`` work as
    usual. If ``model`` is part of a larger one, as in ``factorize(model.bert)``, call :func:`record_layers` on the
    larger one. For other models use :func:`save_factorized` and :func:`load_factorized`.

    Args:
        model: any module; its layers of exactly the types ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding`` and GPT-2's
            ``Conv1D`` can be replaced.
        config: which layers, and how; by default each Linear, Conv1D and Conv2d at a quarter of its rank, except heads
            and tied weights.
        calibration: inputs of ``model`` from a few hundred texts or images, as mappings (a tokenizer's batches), tuples
            or tensors. With it a trained model keeps most of what it has learned. A weight is truncated where this
            changes the model's outputs least for such inputs, not where its singular values are small. The mean loss
            of an output moves into its bias. With ``target_ratio`` more important layers get higher ranks, or stay
            dense if a product would be no smaller. The types of ``config`` then also select attention weights, which
            are already factors of products.

    Returns:
        ``model``, or its replacement if ``model`` itself is such a layer.

    Raises:
        ValueError: the model is wrapped, sharded, offloaded or quantized or has adapters; a pattern or selection
            matches no layer; a rank is out of range; a layer has hooks or values that are not finite, or is named
            although its weight is a factor of a registered product; the calibration has no batch, or mode and init are
            not low-rank and spectral. The model is unchanged then.
    """
    config = FactorizationConfig() if config is None else config
    if not isinstance(config, FactorizationConfig):
        raise ValueError(f"config must be a FactorizationConfig, not a {type(config).__name__}")
    if calibration is not None and (config.mode, config.init) != ("low_rank", "spectral"):
        raise ValueError(
            f"calibration needs mode 'low_rank' and init 'spectral', not {config.mode!r} and {config.init!r}"
        )
    _refuse_unsupported(model)
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("the model has adapters of PEFT: factorize it first and add the adapters afterwards")
    layers = selected_layers(model, config, is_calibrated=calibration is not None)
    for name, layer in layers.items():
        _refuse_hooks(name, layer)
    calibrated = {} if calibration is None else calibrate(model, layers, calibration)
    losses = {name: each.losses for name, each in calibrated.items() if each.losses.any()}
    total = sum(parameter.numel() for parameter in model.parameters())
    ranks = choose_ranks(layers, config, (total, _kept_parameters(model, layers)), losses)
    factorized = {
        id(layers[name]): _factorize_layer(name, layers[name], rank, config, calibrated.get(name))
        for name, rank in logging.tqdm(ranks.items(), desc="Factorizing", unit="layer")
    }
    if config.mode == "low_rank":
        _warn_of_growth(model, {name: layers[name] for name in ranks}, ranks)
    history = [*factorizations(model), config.settings() | ({} if calibration is None else {"calibrated": True})]
    for name in ranks:
        _keep_bias(layers, name, factorized[id(layers[name])])
    model = replace_modules(model, factorized)
    untie_products(model)
    record_layers(model, history)
    return model


def _factorize_layer(
    name: str, layer: Any, rank: int, config: FactorizationConfig, calibrated: CalibratedLayer | None
) -> nn.Module:
    # Each layer draws its own numbers, whichever others are selected.
    seed = zlib.crc32(f"{config.seed} {name}".encode())
    try:
        if calibrated is None:
            return FACTORIZED[type(layer)].from_dense(layer, rank, config.mode, config.init, seed)
        new = FACTORIZED[type(layer)].from_dense(calibrated.truncated(rank), rank, seed=seed)
        new.error = calibrated.error(rank)
        return new.to(layer.weight.dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@torch.no_grad()
def _keep_bias(layers: dict[str, Any], name: str, new: Any) -> None:
    """Write a calibrated layer's bias into the parameter of the dense layer, which may be tied and have hooks."""
    bias: Any = getattr(layers[name], "bias", None)
    shared = [layer for layer in layers.values() if bias is not None and getattr(layer, "bias", None) is bias]
    if len(shared) == 1 and new.bias is not bias:  # layers with one bias get two, as each loses a mean of its own
        bias.copy_(new.bias)
        new.bias = bias


def merge(model: nn.Module) -> nn.Module:
    """Replace the factorized layers of ``model`` by dense ones with the same outputs, in place.

    Products are computed in float32. Attention of an FNL-BERT does not change; ``to_bert()`` converts it to a BERT's.

    Returns:
        ``model``, or the dense layer if ``model`` itself is a factorized layer. An optimizer of the factors does not
        work for the result.

    Raises:
        ValueError: the model is wrapped, sharded or offloaded, or a layer has hooks. The model is unchanged then.
    """
    _refuse_unsupported(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLayer)}
    for name, layer in layers.items():
        _refuse_hooks(name, layer)
    model = replace_modules(model, {id(layer): layer.merged() for layer in layers.values()})
    record_layers(model, [])
    for part in configured_parts(model):
        if is_untied(part):
            untie_output(part)
    return model


def factorization_table(model: nn.Module) -> str:
    """One line for each factorized layer: its matrix, its rank, the parameters of the dense and the factorized layer,
    and its initial relative error, ‖W − U Vᵀ‖_F/‖W‖_F, or after calibration the error in the calibration's metric."""
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


def selected_layers(model: nn.Module, config: FactorizationConfig, is_calibrated: bool = False) -> dict[str, nn.Module]:
    """Name -> layer for all layers that ``config`` selects; see :func:`factorize` for the effect of calibration.

    Raises:
        ValueError: none at all, a pattern or type that is of no use, or a pattern that names a factor of a product that
            :func:`fnl_hf.register_product` or :func:`fnl_hf.register_attention` was told of.
    """
    wanted = list(config.include if config.ranks is None else config.ranks)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if type(module) in FACTORIZED and "weight" in module._parameters
    }
    for entry in (*wanted, *config.exclude):
        is_used = any(matches_layer(entry, name, layer) for name, layer in candidates.items())
        if not is_used and entry not in TYPE_NAMES:
            kinds = sorted({type(m).__name__ for name, m in model.named_modules() if name_matches(name, entry)})
            known = ", ".join(list(candidates)[:8]) + (", ..." if len(candidates) > 8 else "")
            raise ValueError(
                f"{entry!r} matches no layer that can be factorized ({', '.join(kinds) or 'no module at all'}); the "
                f"layers that can be are {known}"
            )
    protected = _find_protected(model, with_attention=not is_calibrated)
    layers = {}
    for name, layer in candidates.items():
        matching = [entry for entry in wanted if matches_layer(entry, name, layer)]
        is_named = any(entry not in TYPE_NAMES for entry in matching)  # not only by its type
        is_excluded = any(matches_layer(entry, name, layer) for entry in config.exclude)
        if matching and (is_named or id(layer.weight) not in protected) and not is_excluded:
            layers[name] = layer
    _refuse_factors(model, layers)
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name in [name for name in tables if name in layers]:
        others = [n for n, m in tables.items() if m is not layers[name] and m.weight is layers[name].weight]
        if others:
            raise ValueError(f"{name}: it shares its table with {others[0]}, which would stay dense: exclude it")
    if not layers:
        chosen = f"include={wanted}, exclude={list(config.exclude)}"
        raise ValueError(f"{type(model).__name__} has no layer to factorize with {chosen}")
    return layers


def _find_protected(model: nn.Module, with_attention: bool) -> set[int]:
    """ids of the weights that are left alone unless named."""
    # ``modules()`` contains each module once, so two owners of a parameter are two modules.
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    protected = {parameter for parameter, count in owners.items() if count > 1}
    products = registered_products(model) + (factor_pairs(model) if with_attention else [])
    protected |= {id(weight) for product in products for weight in product.weights}
    return protected | {id(getattr(layer, "weight", None)) for layer in _find_heads(model) if type(layer) in FACTORIZED}


def _refuse_factors(model: nn.Module, layers: dict[str, Any]) -> None:
    """Refuse layers whose weights are registered as factors of a product, which would no longer be found."""
    owners = {id(weight): product.name for product in registered_products(model) for weight in product.weights}
    for name, layer in layers.items():
        if id(layer.weight) in owners:
            raise ValueError(
                f"{name}: its weight is a factor of the registered product {owners[id(layer.weight)]}, which would "
                "no longer be found: exclude the layer"
            )


def _find_heads(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`find_heads`; for a model that is not of Transformers and has several layers, the last of them."""
    yield from find_heads(model)
    if not isinstance(model, PreTrainedModel):
        layers = [m for m in model.modules() if type(m) in FACTORIZED or isinstance(m, FactorizedLayer)]
        yield from layers[-1:] if len(layers) > 1 else ()


def _refuse_hooks(name: str, layer: nn.Module) -> None:
    """Refuse hooks, including those of offloading and of the weights, and a ``forward`` that was set on the layer: they
    belong to the layer that would be replaced. Its bias stays the same parameter."""
    if any(getattr(layer, hooks) for hooks in HOOKS) or {"_hf_hook", "forward"} & set(vars(layer)):
        raise ValueError(
            f"{name}: it has hooks or a forward of its own, which the new layer would not have: remove them, and add "
            "them again afterwards"
        )
    for own, weight in layer.named_parameters(recurse=False):
        if own != "bias" and any(getattr(weight, hooks, None) for hooks in PARAMETER_HOOKS):
            raise ValueError(
                f"{name}: its {own} has hooks, which the new layer's weights would not have: remove them, and add "
                "them again afterwards"
            )


def _refuse_unsupported(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    for part in configured_parts(model):
        if quantization_method(part) not in (None, METHOD):
            raise ValueError(f"the model is quantized ({quantization_method(part)}): its weights cannot be factorized")
    for module in model.modules():
        is_sharded = any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        is_compiled = hasattr(module, "_orig_mod")
        if isinstance(module, WRAPPERS) or is_compiled or is_sharded:
            what = "sharded" if is_sharded else f"wrapped in {type(module).__name__}"
            raise ValueError(f"the model is {what}: factorize or merge it before you wrap, shard or compile it")


def _shared_weights(model: nn.Module, layers: dict[str, Any]) -> set[int]:
    """ids of the weights of ``layers`` that other modules have, too: they stay when the layers are replaced."""
    replaced = {id(layer) for layer in layers.values()}
    others = (module._parameters.values() for module in model.modules() if id(module) not in replaced)
    return {id(layer.weight) for layer in layers.values()} & {id(p) for parameters in others for p in parameters}


def _kept_parameters(model: nn.Module, layers: dict[str, Any]) -> int:
    """How many parameters of ``model`` do not depend on the ranks of ``layers``."""
    own = {id(p) for layer in layers.values() for p in layer._parameters.values()} - _shared_weights(model, layers)
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)


def _warn_of_growth(model: nn.Module, layers: dict[str, Any], ranks: dict[str, int]) -> None:
    shared = _shared_weights(model, layers)
    owners = Counter(id(layer.weight) for layer in layers.values())
    grown = []
    for name, layer in layers.items():
        size = LayerSize(layer)
        limit = size.m * size.n // ((size.m + size.n) * owners[id(layer.weight)])
        if id(layer.weight) in shared:
            grown.append(f"{name} (its weight is also that of a layer that stays dense)")
        elif ranks[name] > limit:
            grown.append(f"{name} (rank {ranks[name]}, smaller up to {limit})")
    if grown:
        listed = ", ".join(grown[:5]) + (f" and {len(grown) - 5} more" if len(grown) > 5 else "")
        warnings.warn(f"{len(grown)} of {len(layers)} layers get more parameters than before: {listed}", stacklevel=3)
