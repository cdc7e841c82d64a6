# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""The layers of FNL-BERT: factorized attention, optionally within documents and for selected positions only.

This file travels with checkpoints: it imports only torch, transformers, and its neighbors by relative name.

Shapes: B batch, S sequence, K output positions, H heads, d hidden size, E attention embedding size, r = E/H.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertLayer,
    BertSelfAttention,
    eager_attention_forward,
)

from .configuration_fnl_bert import FnlBertConfig
from .factorization import Product


class FnlBertSelfAttention(BertSelfAttention):
    """Self-attention of width E: query, key and value map d to E, each head has rank r = E/H and scale 1/√r."""

    def __init__(self, config: FnlBertConfig, layer_idx: int | None = None):
        super().__init__(config, is_causal=False, layer_idx=layer_idx)
        self.attention_head_size = config.attention_rank
        self.all_head_size = config.mha_embedding_size
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)

    def forward(self, hidden_states, attention_mask=None, *args, rows=None, **kwargs):
        """As in transformers. With ``rows`` (B, K, d), only these attend to all ``hidden_states`` (B, S, d). Returns
        contexts (B, K, E) and, if the implementation computes them, weights (B, H, K, S)."""
        if rows is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = (  # (B, H, K, r), (B, H, S, r), (B, H, S, r)
            projection(states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for projection, states in ((self.query, rows), (self.key, hidden_states), (self.value, hidden_states))
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs |= {"dropout": self.dropout.p if self.training else 0.0, "scaling": self.scaling}
        context, weights = attend(self, query, key, value, attention_mask, **kwargs)  # (B, K, H, r), (B, H, K, S)
        return context.flatten(2), weights


class FnlBertLayer(BertLayer):
    """A layer of BERT with factorized attention; the last layer can compute selected positions only."""

    def __init__(self, config: FnlBertConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.attention.self = FnlBertSelfAttention(config, layer_idx=layer_idx)
        self.attention.output.dense = nn.Linear(config.mha_embedding_size, config.hidden_size)
        self.is_last_layer = layer_idx == config.num_hidden_layers - 1

    def forward(self, hidden_states, attention_mask=None, *args, output_positions=None, **kwargs):
        """As in transformers. The last layer returns (B, K, d) for ``output_positions`` (B, K): the same values as its
        (B, S, d) at these positions. Keys and values are still computed for all positions."""
        if output_positions is None or not self.is_last_layer:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        # Only a mask (B, 1, S or 1, S) has rows to select. FlashAttention (lengths, or a mask (B, S)) and
        # flex_attention (blocks) need a query for each key.
        is_dense = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4
        if kwargs.get("cu_seq_lens_q") is not None or not (attention_mask is None or is_dense):
            return take_positions(super().forward(hidden_states, attention_mask, *args, **kwargs), output_positions)
        rows = take_positions(hidden_states, output_positions)  # (B, K, d)
        if attention_mask is not None:
            attention_mask = take_mask_rows(attention_mask, output_positions)  # (B, 1, K or 1, S)
        for name in ("encoder_attention_mask", "past_key_values"):  # an encoder has none
            kwargs.pop(name, None)
        # Called as a module, so that hooks, including transformers' capture of attentions, see every layer.
        context, _ = self.attention.self(hidden_states, attention_mask, rows=rows, **kwargs)  # (B, K, E)
        # From here on, positions are independent: residuals, feed-forward and LayerNorm only need these rows.
        return self.feed_forward_chunk(self.attention.output(context, rows))


def take_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, K, d): the rows of ``states`` (B, S, d) at ``positions`` (B, K). No host synchronization."""
    starts = torch.arange(states.shape[0], device=states.device)[:, None] * states.shape[1]  # (B, 1)
    flat = states.flatten(0, 1).index_select(0, (positions + starts).flatten())  # (B·K, d)
    return flat.unflatten(0, positions.shape)


def take_mask_rows(attention_mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, 1, K, S): the rows for ``positions`` (B, K) of a mask (B, 1, S, S); a mask with one row for all is
    unchanged."""
    if attention_mask.shape[2] == 1:
        return attention_mask
    index = positions[:, None, :, None].expand(-1, -1, -1, attention_mask.shape[3])  # (B, 1, K, S)
    return attention_mask.expand(len(positions), -1, -1, -1).gather(2, index)


def document_mask(
    document_ids: torch.Tensor, attention_mask: torch.Tensor | None, implementation: str, dtype: torch.dtype
) -> torch.Tensor:
    """(B, 1, S, S) mask under which a token attends to the tokens of its own document.

    Args:
        document_ids: (B, S), equal for the tokens of one document.
        attention_mask: (B, S) padding mask, or None.
        implementation: "sdpa" takes a boolean mask, "eager" one of ``dtype`` that is added to the scores.

    Raises:
        ValueError: another implementation. FlashAttention takes documents as ``cu_seq_lens``.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"document_ids needs attention 'sdpa' or 'eager', not {implementation!r}")
    allowed = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # (B, 1, S, S), True: may attend
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
    return _mask_of(allowed, implementation, dtype)


def padding_mask(attention_mask: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """A padding mask (B, S) as (B, 1, 1, S) on an accelerator; unchanged on a CPU and for other implementations.

    With a mask (B, S), Transformers asks the device whether anything is masked, and so waits in each forward pass.
    """
    if attention_mask.dim() != 2 or attention_mask.device.type == "cpu" or implementation not in ("sdpa", "eager"):
        return attention_mask
    return _mask_of(attention_mask[:, None, None, :].bool(), implementation, dtype)


def _mask_of(allowed: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """The mask of "sdpa" or "eager" for ``allowed`` (B, 1, S or 1, S), which is True where a token may attend."""
    if implementation == "sdpa":
        return allowed
    # Not -inf: a row without allowed entries, of a padding token, would be NaN after the softmax.
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def factor_pairs(model: nn.Module) -> list[Product]:
    """Every product of the BERT attention layers in ``model``, in layer order, Q Kᵀ before V Oᵀ.

    Works on FNL-BERT and stock BERT models, and on any module that contains one (DistributedDataParallel, a
    compiled module, your own model).
    """
    pairs = []
    for name, module in model.named_modules():
        if not isinstance(module, BertAttention) or module.is_cross_attention:
            continue
        prefix = f"{name}." if name else ""
        for kind, left, right in (("qk", "self.query", "self.key"), ("vo", "self.value", "output.dense")):
            layers = module.get_submodule(left), module.get_submodule(right)
            if not all("weight" in layer._parameters for layer in layers):
                continue  # a factorized layer has factors instead of a weight, and registers them as its own product
            pairs.append(
                Product(
                    name=f"{prefix}{kind}",
                    kind=kind,
                    num_heads=module.self.num_attention_heads,
                    weights=(layers[0].weight, layers[1].weight),
                    weight_names=(f"{prefix}{left}.weight", f"{prefix}{right}.weight"),
                )
            )
    return pairs
