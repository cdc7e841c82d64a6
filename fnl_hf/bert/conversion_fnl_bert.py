# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""``from_bert`` and ``to_bert``: every FNL-BERT class from its stock counterpart or from RoBERTa and others, optionally
with a smaller E, and back.

This file travels with checkpoints: it imports only torch, transformers, and its neighbors by relative name.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.bert import modeling_bert
from transformers.utils import logging

from .configuration_fnl_bert import FnlBertConfig
from .head_mixing import (
    HeadMoments,
    Truncation,
    activation_moments,
    balance_heads,
    find_truncation,
    make_padding,
    mix_heads,
    regularize_moments,
    truncate_product,
    weight_moments,
)
from .other_names import bert_entries, bert_weights, class_to_load, head_to_take
from .tying import untie_like, untie_products

logger = logging.get_logger(__name__)
# Entries of a configuration that a conversion does not copy: its attention and its origin.
OWN_ENTRIES = (
    "attention_embedding_size", "attention_init", "sparse_prediction", "sparse_last_layer",
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path",
)  # fmt: skip
NAMED_WEIGHTS = 3  # maximum number in a message


class BertConversion(modeling_bert.BertPreTrainedModel):
    """The two conversions, for the classes that have a counterpart in transformers."""

    config: FnlBertConfig

    @classmethod
    def bert_class(cls) -> type[PreTrainedModel]:
        """The stock counterpart of this class: ``BertForMaskedLM`` for ``FnlBertForMaskedLM``.

        Raises:
            ValueError: there is none, because this class has its own head.
        """
        found = cls._stock_base()
        if found is modeling_bert.BertPreTrainedModel:  # of which all are
            raise ValueError(
                f"{cls.__name__} cannot be converted: it must inherit from a class of transformers, as "
                "FnlBertForMaskedLM does from BertForMaskedLM"
            )
        return found

    @classmethod
    def _stock_base(cls) -> type[PreTrainedModel]:
        """The stock class from which this class inherits its head; ``BertPreTrainedModel`` if the head is its own."""
        return next(base for base in cls.__mro__ if base.__module__ == modeling_bert.__name__)

    @classmethod
    def from_bert(
        cls,
        bert: PreTrainedModel | str | PathLike,
        attention_embedding_size: int | None = None,
        calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
        output_truncations: bool = False,
        **kwargs: Any,
    ):
        """An FNL-BERT that computes the same as a BERT (or FNL-BERT), optionally with heads of a smaller rank.

        Also converts RoBERTa, XLM-R, CamemBERT, DistilBERT and ELECTRA (with embeddings as wide as its layers). These
        compute the same as a BERT for inputs that are padded on the right: see ``fnl_hf/bert/other_names.py``.

        At the same E the result is bit-identical. At a smaller E, the closest products of rank r = E/H replace
        Q_h K_hᵀ, with its biases, and V_h O_hᵀ of each head.

        Args:
            bert: a model, or its name or folder. From a model with another head, the weights that fit are loaded.
            attention_embedding_size: E, a multiple of the number of heads, at most that of ``bert``. Default: the same.
            calibration: batches of inputs. With them, "closest" is measured on what the heads compute for these inputs
                and on its effect on the model's outputs, not on the weights alone. With N tokens the weights get a
                share of r/(N + r), r the rank of a head in ``bert``, so that no direction is lost because the text does
                not contain it. A warning says when N < r.
            output_truncations: also return what each product lost, a list of
                :class:`~fnl_hf.bert.head_mixing.Truncation`.
            kwargs: for ``from_pretrained`` if ``bert`` is a name.

        Returns:
            The model in evaluation mode, or a pair of the model and the list.

        Raises:
            ValueError: ``bert`` is no BERT, its head computes something different from BERT's, it has adapters or
                weights that its class and configuration do not describe, E does not fit, attention that must be
                truncated is not finite, or ``kwargs`` are given with a model.
        """
        source: Any = cls.load_bert(bert, **kwargs) if isinstance(bert, str | PathLike) else bert
        if kwargs and source is bert:
            raise ValueError(f"{', '.join(sorted(kwargs))}: only for a model's name or folder, not for a model")
        _refuse_changed(source)
        stock: Any = cls._stock_base()
        if not isinstance(source, modeling_bert.BertPreTrainedModel):
            source = read_as_bert(source, stock.__name__.removeprefix("Bert"))
        available = embedding_size_of(source.config)
        embedding_size = available if attention_embedding_size is None else attention_embedding_size
        _validate_embedding_size(embedding_size, source.config)
        config = FnlBertConfig(**_config_entries(source.config), attention_embedding_size=embedding_size)
        target: Any = cls(config)
        target = target.to(device=source.device, dtype=source.dtype).eval()
        _copy_products(source, target)
        untie_products(target)
        untie_like(source, target)
        same_head = isinstance(source, cls if stock is modeling_bert.BertPreTrainedModel else stock)
        _copy_weights(source.state_dict(), source, target, same_head)
        if embedding_size == available:
            return (target, []) if output_truncations else target
        measured = {} if calibration is None else activation_moments(source, calibration)
        _warn_of_few_tokens(measured)
        truncations = []
        for name, old, new in _pair_attentions(source, target):
            weights = weight_moments(old)
            moments = regularize_moments(measured[name], weights) if measured else weights
            truncations += _truncate_attention(name, old, new, moments, weights)
        return (target, truncations) if output_truncations else target

    @classmethod
    def load_bert(cls, name: str | PathLike, **kwargs: Any) -> PreTrainedModel:
        """Load a checkpoint of a BERT, a BERT by another name or an FNL-BERT with this class's head.

        Raises:
            ValueError: the architecture is another, or the head computes something different from BERT's.
        """
        config = AutoConfig.from_pretrained(name, **{k: v for k, v in kwargs.items() if k in ("revision", "token")})
        loader: Any = cls if isinstance(config, FnlBertConfig) else cls.bert_class()
        if not isinstance(config, BertConfig):
            with _naming(name):
                loader = class_to_load(config, loader.__name__.removeprefix("Bert"))
        return loader.from_pretrained(name, **kwargs)

    def to_bert(self) -> PreTrainedModel:
        """The stock BERT that computes the same, in evaluation mode, for tools that only support BERT. Layers that are
        products of matrices (``fnl_hf.factorize``) are multiplied out.

        Heads of rank r below d/H are padded with zeros, and the scale moves into query and key. This is exact, for
        serving and ordinary fine-tuning; a padded dimension has no gradient. For heads larger than d/H, the rank of
        each product must be at most d/H.

        Raises:
            ValueError: E is larger than d and a product has a rank above d/H; no stock class has this head; or the
                model has adapters or weights that its class and configuration do not describe.
        """
        _refuse_changed(self)
        config = BertConfig(**_config_entries(self.config))
        vars(config).pop("quantization_config", None)  # it lists the layers that are products
        target: Any = self.bert_class()(config)
        target = target.to(device=self.device, dtype=self.dtype).eval()
        untie_like(self, target)
        _copy_weights(_dense_weights(self), self, target, same_head=True)
        padded = config.hidden_size // config.num_attention_heads
        for name, source_layer, target_layer in _pair_attentions(self, target):
            moments = weight_moments(source_layer)
            heads, rank, _ = moments.query.shape
            if rank == padded:
                continue
            if rank < padded:
                mixing = make_padding(heads, rank, padded, moments.query.device)
            else:
                _validate_rank(name, moments, padded)
                mixing, *_ = find_truncation(moments, padded)
            mix_heads(source_layer, target_layer, mixing, moments.context_mean)
        return target


def read_as_bert(model: PreTrainedModel, wanted: str) -> PreTrainedModel:
    """The stock BERT that computes what a model by another name does for inputs that are padded on the right; in
    evaluation mode.

    Args:
        wanted: see :func:`~fnl_hf.bert.other_names.head_to_take`.

    Raises:
        ValueError: as that function does; for layers that are products of matrices; for weights that are not those of
            its class and configuration.
    """
    name, config = _display_name(model), model.config
    with _naming(name):
        head = head_to_take(model, wanted)
    source: Any = model.base_model if head == "Model" else model
    for layer_name, layer in source.named_modules():
        if hasattr(layer, "to_dense"):
            raise ValueError(_must_be_dense(name, layer_name))
    weights = bert_weights(source)
    options = {"add_pooling_layer": any("pooler." in part for part in weights)} if head == "Model" else {}
    bert_class: Any = getattr(modeling_bert, f"Bert{head}")
    bert = bert_class(BertConfig(**bert_entries(_config_entries(config), config)), **options)
    bert = bert.to(device=source.device, dtype=source.dtype).eval()
    bert.name_or_path = name
    untie_like(source, bert)
    _copy_weights(weights, source, bert, same_head=True)
    return bert


def embedding_size_of(config: PreTrainedConfig) -> int:
    """E of an FNL-BERT, and the hidden size of a stock BERT."""
    return getattr(config, "mha_embedding_size", config.hidden_size)


def _config_entries(config: PreTrainedConfig) -> dict[str, Any]:
    entries = {name: value for name, value in config.to_dict().items() if name not in OWN_ENTRIES}
    return entries | needed_kernel(entries)


def needed_kernel(entries: Mapping[str, Any]) -> dict[str, str]:
    """``attn_implementation`` for a configuration whose entries ask for attention weights: only eager attention has
    them, and with another kernel Transformers would not save the model."""
    return {"attn_implementation": "eager"} if entries.get("output_attentions") else {}


def _display_name(model: Any) -> str:
    return getattr(model, "name_or_path", None) or type(model).__name__


@contextmanager
def _naming(name: str | PathLike) -> Iterator[None]:
    """Add the model's name to an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _must_be_dense(name: str, layer: str) -> str:
    return f"{name}: {layer} is a product of matrices: make it dense first with fnl_hf.merge(model)"


def _validate_embedding_size(embedding_size: int, config: BertConfig) -> None:
    largest, heads = embedding_size_of(config), config.num_attention_heads
    is_whole = isinstance(embedding_size, int)
    if not is_whole or not 1 <= embedding_size <= largest or embedding_size % heads:
        raise ValueError(
            f"attention_embedding_size ({embedding_size!r}) must be a multiple of num_attention_heads ({heads}) and "
            f"at most {largest}, the size in the model to convert"
        )


def _refuse_changed(model: Any) -> None:
    """
    Raises:
        ValueError: no model of Transformers, or one whose layers are not the ones that its class makes.
    """
    if isinstance(model, nn.Module):
        if any(type(module).__module__.startswith("peft.") for module in model.modules()):
            raise ValueError(
                f"{_display_name(model)} has adapters of PEFT, which a conversion would lose: merge "
                "(merge_and_unload) or remove them first"
            )
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(f"{_display_name(model)} is quantized: convert the original model and quantize the result")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a {type(model).__name__} is neither a model of Transformers nor the name or folder of one")
    positions = getattr(model.config, "position_embedding_type", "absolute")
    if positions != "absolute":  # which this Transformers would read as absolute ones
        raise ValueError(f"{_display_name(model)}: position_embedding_type ({positions!r}) must be 'absolute'")


def _dense_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its weights, those of layers that are products of matrices multiplied out."""
    weights = model.state_dict()
    modules: Any = model.named_modules(remove_duplicate=False)
    for name, layer in modules:
        if hasattr(layer, "to_dense"):
            for factor in layer.state_dict():
                del weights[f"{name}.{factor}"]
            weights |= {f"{name}.{part}": value for part, value in layer.merged().state_dict().items()}
    return weights


def _copy_weights(
    given: dict[str, torch.Tensor], source: PreTrainedModel, target: PreTrainedModel, same_head: bool
) -> None:
    """Write the weights of ``source`` into ``target`` by their full names, except those of attention with another E.

    The encoders, and the heads if both are the same class, must have the same weights. A warning names weights that
    only ``target`` has; they keep their initialization.

    Raises:
        ValueError: they are not the same ones: a layer was wrapped, replaced, pruned or added.
    """
    prefix = target.base_model_prefix + "."
    given = {_full_name(name, source, prefix): value for name, value in given.items()}
    wanted = {_full_name(name, target, prefix): value for name, value in target.state_dict().items()}
    sizes = embedding_size_of(source.config), embedding_size_of(target.config)
    common = given.keys() & wanted.keys()
    fitting = {name for name in common if given[name].shape == wanted[name].shape}
    with torch.no_grad():
        for name in fitting:
            wanted[name].copy_(given[name])
    resized = {name for name in common if ".attention." in name and _same_but_e(given[name], wanted[name], sizes)}
    found = fitting | resized

    def is_shared(name: str) -> bool:
        if name.startswith(f"{prefix}pooler."):  # some encoders have none
            return same_head and target.base_model is not target
        return same_head or name.startswith(prefix)

    lacking, unknown = (sorted(filter(is_shared, weights.keys() - found)) for weights in (wanted, given))
    if lacking or unknown:
        parts = [f"{what} {_list_names(names)}" for what, names in (("lacks", lacking), ("has", unknown)) if names]
        raise ValueError(
            f"{_display_name(source)} is not the {type(source).__name__} that its configuration describes: by names "
            f"and shapes, it {' and '.join(parts)}. Undo the changes to these layers first"
        )
    if missing := sorted(wanted.keys() - found):
        logger.warning(f"newly initialized, because {_display_name(source)} does not have them: {', '.join(missing)}")


def _same_but_e(old: torch.Tensor, new: torch.Tensor, sizes: tuple[int, int]) -> bool:
    """Whether two shapes differ at most in E."""
    return old.dim() == new.dim() and all(a == b or (a, b) == sizes for a, b in zip(old.shape, new.shape))


def _list_names(names: list[str]) -> str:
    return ", ".join(names[:NAMED_WEIGHTS]) + f" and {len(names) - NAMED_WEIGHTS} more" * (len(names) > NAMED_WEIGHTS)


def _copy_products(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy layers that are products of matrices (``fnl_hf.factorize``).

    Raises:
        ValueError: they are attention's; only dense ones have heads of another rank.
    """
    prefix = target.base_model_prefix + "."
    target_names = {_full_name(name, target, prefix): name for name, _ in target.named_modules()}
    for name, layer in source.named_modules():
        if not hasattr(layer, "to_dense"):
            continue
        if ".attention." in name:
            raise ValueError(_must_be_dense(_display_name(source), name))
        full_name = _full_name(name, source, prefix)
        if full_name in target_names:
            target.set_submodule(target_names[full_name], copy.deepcopy(layer))


def _full_name(name: str, model: PreTrainedModel, prefix: str) -> str:
    """The name that a weight or module of the encoder has in a model with a head."""
    return prefix + name if model.base_model is model else name


def _pair_attentions(source: PreTrainedModel, target: PreTrainedModel) -> Iterator[tuple[str, Any, Any]]:
    """(name in ``source``, attention there, attention in ``target``) of each layer."""
    names = {id(module): name for name, module in source.named_modules()}
    encoders: Any = source.base_model.encoder, target.base_model.encoder
    for old, new in zip(*(encoder.layer for encoder in encoders), strict=True):
        yield names[id(old.attention)], old.attention, new.attention


def _warn_of_few_tokens(measured: Mapping[str, HeadMoments]) -> None:
    for moments in list(measured.values())[:1]:  # all heads have seen the same text
        tokens, rank = moments.tokens or 0, moments.query.shape[-1]
        if tokens < rank:
            logger.warning(
                f"the calibration text has {tokens} tokens, fewer than the {rank} dimensions of a head: in the "
                "dimensions that it does not cover, the weights alone determine the truncation. A few thousand "
                "tokens are enough"
            )


def _truncate_attention(name: str, source, target, moments: HeadMoments, weights: HeadMoments) -> list[Truncation]:
    if not all(part.isfinite().all() for part in (*moments.matrices(), moments.context_mean)):
        raise ValueError(f"{name}: its weights or its activations on the calibration text are not finite")
    rank = target.self.attention_head_size
    mixing, qk_sigma, vo_sigma = find_truncation(moments, rank)
    mix_heads(source, target, balance_heads(mixing, weights), moments.context_mean)
    return [Truncation(f"{name}.{kind}", kind, rank, sigma) for kind, sigma in (("qk", qk_sigma), ("vo", vo_sigma))]


def _validate_rank(name: str, moments: HeadMoments, largest: int) -> None:
    for kind, left, right in (("qk", moments.query, moments.key), ("vo", moments.value, moments.output)):
        *_, sigma = truncate_product(left, right, largest)
        smallest = torch.finfo(torch.float32).eps * sigma.shape[-1] * sigma[:, :1]
        rank = int((sigma > smallest).sum(dim=1).max())
        if rank > largest:
            raise ValueError(
                f"{name}.{kind} has products of rank {rank}; a BERT of this hidden size can represent at most "
                f"{largest}, hidden_size / num_attention_heads. Truncate it first: from_bert(model, "
                "attention_embedding_size=...)"
            )


__all__ = ["BertConversion"]
