# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""``from_bert`` and ``to_bert``: every FNL-BERT class from its stock counterpart, with a smaller E if wanted, and back.

This file travels with checkpoints: it imports only torch, transformers, and its neighbours by relative name.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from transformers import AutoConfig, BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.bert import modeling_bert
from transformers.utils import logging

from .configuration_fnl_bert import FnlBertConfig
from .head_mixing import (
    HeadMoments,
    Truncation,
    activation_moments,
    find_truncation,
    make_padding,
    mix_heads,
    truncate_product,
    weight_moments,
)

logger = logging.get_logger(__name__)
# Entries of a configuration that a converted model does not take over: its own attention, and where it came from.
OWN_ENTRIES = (
    "attention_embedding_size", "attention_init", "sparse_prediction", "sparse_last_layer",
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path",
)  # fmt: skip
# Why models that look like BERT cannot be read as one.
OTHER_ARCHITECTURES = {
    "roberta": "its positions start behind the padding index and it has no next sentence head",
    "xlm-roberta": "its positions start behind the padding index and it has no next sentence head",
    "camembert": "its positions start behind the padding index and it has no next sentence head",
    "distilbert": "its layers have other names and it has no token types",
    "electra": "its embeddings may be narrower than its layers and it has other heads",
    "albert": "its layers share one set of weights",
    "modernbert": "it has rotary positions, no biases and one matrix for query, key and value",
}


class BertConversion(modeling_bert.BertPreTrainedModel):
    """The two conversions, for the classes that have a counterpart in transformers."""

    config: FnlBertConfig

    @classmethod
    def bert_class(cls) -> type[PreTrainedModel]:
        """The stock class that this one stands for: ``BertForMaskedLM`` for ``FnlBertForMaskedLM``.

        Raises:
            ValueError: there is none, because this class has a head of its own.
        """
        found = next(base for base in cls.__mro__ if base.__module__ == modeling_bert.__name__)
        if found is modeling_bert.BertPreTrainedModel:  # of which all are
            raise ValueError(
                f"{cls.__name__} stands for no class of transformers: to be converted it must inherit from one, as "
                "FnlBertForMaskedLM does from BertForMaskedLM"
            )
        return found

    @classmethod
    def from_bert(
        cls,
        bert: PreTrainedModel | str | PathLike,
        attention_embedding_size: int | None = None,
        calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
        output_truncations: bool = False,
        **kwargs: Any,
    ):
        """An FNL-BERT that computes what a BERT (or FNL-BERT) does, with heads of a smaller rank if wanted.

        At the same E nothing changes, to the last bit. At a smaller E the product Q_h K_hᵀ of each head, with its
        biases, and V_h O_hᵀ are replaced by the closest ones of rank r = E/H.

        Args:
            bert: a model, or the name or folder of one. Weights of another head are taken as far as they fit.
            attention_embedding_size: E, a multiple of the number of heads, at most that of ``bert``. Default: the same.
            calibration: batches of inputs. With them "closest" is measured on what the heads compute for these, not on
                the weights alone: whitened SVD.
            output_truncations: return also what each product lost, a list of
                :class:`~fnl_hf.bert.head_mixing.Truncation`.
            kwargs: for ``from_pretrained`` where ``bert`` is a name.

        Returns:
            The model in evaluation mode, or it and the list.

        Raises:
            ValueError: no BERT, or an E that does not fit.
        """
        source = bert if isinstance(bert, PreTrainedModel) else cls.load_bert(bert, **kwargs)
        if not isinstance(source, modeling_bert.BertPreTrainedModel):
            raise ValueError(f"{_display_name(source)} is no BERT: {_explain_refusal(source.config)}")
        available = embedding_size_of(source.config)
        embedding_size = available if attention_embedding_size is None else attention_embedding_size
        _validate_embedding_size(embedding_size, source.config)
        config = FnlBertConfig(**_config_entries(source.config), attention_embedding_size=embedding_size)
        target: Any = cls(config)
        target = target.to(device=source.device, dtype=source.dtype).eval()
        _copy_products(source, target)
        _copy_weights(source, target)
        if embedding_size == available:
            return (target, []) if output_truncations else target
        moments = None if calibration is None else activation_moments(source, calibration)
        truncations = []
        for name, old, new in _pair_attentions(source, target):
            its_moments = weight_moments(old) if moments is None else moments[name]
            truncations += _truncate_attention(name, old, new, its_moments)
        return (target, truncations) if output_truncations else target

    @classmethod
    def load_bert(cls, name: str | PathLike, **kwargs: Any) -> PreTrainedModel:
        """The BERT or FNL-BERT with this class's head in a checkpoint.

        Raises:
            ValueError: another architecture; the message says why it cannot be read as a BERT.
        """
        config = AutoConfig.from_pretrained(name, **{k: v for k, v in kwargs.items() if k in ("revision", "token")})
        if not isinstance(config, BertConfig):
            raise ValueError(f"{name} is no BERT: {_explain_refusal(config)}")
        loader: Any = cls if isinstance(config, FnlBertConfig) else cls.bert_class()
        return loader.from_pretrained(name, **kwargs)

    def to_bert(self) -> PreTrainedModel:
        """The stock BERT that computes the same, for tools that know no other; in evaluation mode.

        Heads of rank r below d/H are filled with zeros, and the scale moves into query and key: exact, for serving and
        ordinary fine-tuning; a filled dimension has no gradient. Larger ones must have products whose rank fits.

        Raises:
            ValueError: E is larger than d, and a product has a rank above d/H; or no stock class has this one's head.
        """
        config = BertConfig(**_config_entries(self.config))
        target: Any = self.bert_class()(config)
        target = target.to(device=self.device, dtype=self.dtype).eval()
        _copy_products(self, target)
        _copy_weights(self, target)
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


def embedding_size_of(config: PreTrainedConfig) -> int:
    """E of an FNL-BERT, and the hidden size of a stock BERT."""
    return getattr(config, "mha_embedding_size", config.hidden_size)


def _config_entries(config: BertConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in OWN_ENTRIES}


def _display_name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _explain_refusal(config) -> str:
    reason = OTHER_ARCHITECTURES.get(config.model_type, "only BERT and FNL-BERT can be converted")
    return f"model type {config.model_type!r}; {reason}"


def _validate_embedding_size(embedding_size: int, config: BertConfig) -> None:
    largest, heads = embedding_size_of(config), config.num_attention_heads
    if not 1 <= embedding_size <= largest or embedding_size % heads:
        raise ValueError(
            f"attention_embedding_size ({embedding_size}) must be a multiple of num_attention_heads ({heads}) and at "
            f"most {largest}, that of the model to convert"
        )


def _copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Every weight that both have, by its full name; warns of those that stay as they were initialized."""
    prefix = target.base_model_prefix + "."
    source_weights = {_full_name(name, source, prefix): value for name, value in source.state_dict().items()}
    weights = {_full_name(name, target, prefix): value for name, value in target.state_dict().items()}
    common = weights.keys() & source_weights.keys()
    fitting = {name for name in common if weights[name].shape == source_weights[name].shape}
    with torch.no_grad():
        for name in fitting:
            weights[name].copy_(source_weights[name])
    missing = sorted(name for name in set(weights) - fitting if ".attention." not in name)
    if missing:
        logger.warning(f"newly initialized, because {_display_name(source)} does not have them: {', '.join(missing)}")


def _copy_products(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Layers that are products of matrices themselves (``fnl_hf.factorize``) stay so.

    Raises:
        ValueError: they are attention's; only dense ones have heads of another rank.
    """
    prefix = target.base_model_prefix + "."
    target_names = {_full_name(name, target, prefix): name for name, _ in target.named_modules()}
    for name, layer in source.named_modules():
        if not hasattr(layer, "to_dense"):
            continue
        if ".attention." in name:
            raise ValueError(
                f"{_display_name(source)}: {name} is a product of matrices: make it dense first, fnl_hf.merge(model)"
            )
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


def _truncate_attention(name: str, source, target, moments: HeadMoments) -> list[Truncation]:
    rank = target.self.attention_head_size
    mixing, qk_sigma, vo_sigma = find_truncation(moments, rank)
    mix_heads(source, target, mixing, moments.context_mean)
    return [Truncation(f"{name}.{kind}", kind, rank, sigma) for kind, sigma in (("qk", qk_sigma), ("vo", vo_sigma))]


def _validate_rank(name: str, moments: HeadMoments, largest: int) -> None:
    for kind, left, right in (("qk", moments.query, moments.key), ("vo", moments.value, moments.output)):
        *_, sigma = truncate_product(left, right, largest)
        smallest = torch.finfo(torch.float32).eps * sigma.shape[-1] * sigma[:, :1]
        rank = int((sigma > smallest).sum(dim=1).max())
        if rank > largest:
            raise ValueError(
                f"{name}.{kind} has products of rank {rank}; a BERT of this hidden size holds at most {largest}, "
                "hidden_size / num_attention_heads. Truncate it first: from_bert(model, attention_embedding_size=...)"
            )


__all__ = ["BertConversion"]
