# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of FNL-BERT. This file travels with checkpoints, so it imports nothing of ``fnl_hf``."""

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

ATTENTION_INITS = ("normal", "spectral")
# Under study (studies/definitions/head_scale.py): the best becomes "spectral", the others are removed.
STUDIED_INITS = ("folded", "rescaled")
# Entries of a saved configuration that describe its origin, not the model.
ORIGIN_ENTRIES = ("model_type", "architectures", "auto_map", "transformers_version", "dtype")


@strict
class FnlBertConfig(BertConfig):
    """A :class:`~transformers.BertConfig` whose attention is 2H factorized layers (Khodak et al., ICLR 2021).

    Args:
        attention_embedding_size: E = H·r, the output width of query, key and value and the input width of the
            attention's output projection. ``None`` means ``hidden_size``, the shapes of a stock BERT.
        attention_init: how the products Q_h K_hᵀ and V_h O_hᵀ are initialized. ``"normal"``: each factor is drawn like
            BERT's weights. ``"spectral"`` (spectral initialization): the factors are drawn at full head size d/H, and
            an SVD truncates the product to rank r and splits it evenly; needs E <= d. Two options are experimental and
            will be removed once measured. ``"folded"`` is spectral with Q_h K_hᵀ times √(r·H/d), so that scores are the
            closest to those at full head size. ``"rescaled"`` is folded and also scales both products to their
            Frobenius norm before truncation, so that scores and outputs have their variance at full head size.
        sparse_prediction: with labels, run the masked language modeling head on the labeled positions only.
            The loss is the same; ``logits`` then has shape (labeled positions, vocabulary).
        sparse_last_layer: if the masked positions are given, run the last layer for these positions only. The
            predictions are the same, but dropout draws other numbers. The last layer's hidden state and attentions
            then cover only these positions (with next sentence prediction also the first token).

    Raises:
        StrictDataclassError: E is not a positive multiple of ``num_attention_heads``, ``attention_init`` is unknown or
            other than ``"normal"`` with E > ``hidden_size``, or the model is used as a decoder.
    """

    model_type = "fnl_bert"

    attention_embedding_size: int | None = None
    attention_init: str = "normal"
    sparse_prediction: bool = False
    sparse_last_layer: bool = False

    @property
    def mha_embedding_size(self) -> int:
        """E, with the default resolved."""
        return self.hidden_size if self.attention_embedding_size is None else self.attention_embedding_size

    @property
    def attention_rank(self) -> int:
        """r = E / H, the rank of each product and the size of each head."""
        return self.mha_embedding_size // self.num_attention_heads

    def validate_attention(self):
        """Part of ``@strict``'s validation."""
        embedding_size, heads = self.mha_embedding_size, self.num_attention_heads
        if heads < 1:
            raise ValueError(f"num_attention_heads ({heads}) must be at least 1")
        if embedding_size < 1 or embedding_size % heads != 0:
            raise ValueError(
                f"attention_embedding_size ({embedding_size}) must be a positive multiple of "
                f"num_attention_heads ({heads})"
            )
        if self.attention_init not in ATTENTION_INITS + STUDIED_INITS:
            raise ValueError(f"attention_init must be one of {ATTENTION_INITS}, not {self.attention_init!r}")
        if self.attention_init != "normal" and embedding_size > self.hidden_size:
            raise ValueError(
                f"attention_init={self.attention_init!r} truncates products of rank hidden_size / "
                f"num_attention_heads, so attention_embedding_size ({embedding_size}) must be at most hidden_size "
                f"({self.hidden_size}): reduce it, or use attention_init='normal'"
            )

    def validate_encoder_only(self):
        """Part of ``@strict``'s validation."""
        if self.is_decoder or self.add_cross_attention:
            raise ValueError(
                f"FNL-BERT is an encoder: is_decoder ({self.is_decoder}) and add_cross_attention "
                f"({self.add_cross_attention}) must be False, because the key/value cache and cross-attention "
                f"are not factorized"
            )


__all__ = ["FnlBertConfig"]
