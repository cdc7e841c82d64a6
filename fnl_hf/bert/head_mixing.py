# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""BERT to FNL-BERT with another attention embedding size, and back, by changing the basis of each head.

A head's scores are q kᵀ/√r with q = x Q + b_q and k = x K + b_k. It adds c Oᵀ to the output, where c = A(x V + b_v) is
its context and A its attention. All changes of a head are small matrices on its r dimensions: q T_q, k T_k, c T_v, O
T_o. Truncation to rank r' takes those that minimize ‖L (T_q T_kᵀ - I) Rᵀ‖_F. With the weights alone, LᵀL and RᵀR are
the second moments of their rows, with the biases of query and key as an additional row (truncated SVD of the product).
With a calibration text, T_q T_kᵀ - I changes each q by q (T_q T_kᵀ - I), and the model's outputs by this times J, their
derivative with respect to q: LᵀL = E[q qᵀ] and RᵀR = E[Jᵀ J]. RᵀR reflects how much attention a key gets, and excludes
what all keys of a query share, which does not affect a softmax. For the context, LᵀL is its covariance and RᵀR = E[O Jᵀ
J Oᵀ], with J the derivative with respect to the output. No decomposed matrix is larger than r×r.

This file travels with checkpoints: it imports only torch, transformers, and its neighbors by relative name.

Shapes: H heads, r rank of a head, r' wanted rank, d hidden size, B batch, S sequence.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertAttention

from .factorization import gram, head_rows
from .moments import LayerMoments, measure_moments

NOISE = 1e-6  # relative, for moments about a mean, whose sums are in float32


@dataclass(frozen=True)
class HeadMoments:
    """The metric of a truncation of H heads: (H, r, r) each, float64; ``context_mean`` is (H, r).

    ``query`` and ``key`` are LᵀL and RᵀR of the scores, ``value`` and ``output`` of the context, whose mean moves into
    the output bias. ``tokens`` is the length of the text that they were measured on, None for those of the weights.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    context_mean: torch.Tensor
    tokens: int | None = None

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The second moments."""
        return self.query, self.key, self.value, self.output


@dataclass(frozen=True)
class HeadMixing:
    """The factors by which the dimensions of H heads are multiplied, (H, r, r') each, float64."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Truncation:
    """What a product lost: ``singular_values`` (H, r), descending, of which ``rank`` are kept in each head.

    ``name`` and ``kind`` are those of :func:`fnl_hf.factor_pairs`.
    """

    name: str
    kind: str
    rank: int
    singular_values: torch.Tensor

    @property
    def kept(self) -> float:
        """(Σ kept σ²)^½ over all heads."""
        return float(self.singular_values[:, : self.rank].square().sum().sqrt())

    @property
    def lost(self) -> float:
        """(Σ discarded σ²)^½ over all heads, the Frobenius norm of the error in the metric of the moments."""
        return float(self.singular_values[:, self.rank :].square().sum().sqrt())


@torch.no_grad()
def weight_moments(attention: BertAttention) -> HeadMoments:
    """The moments of the weights, with the biases of query and key as one more row. The value's bias reaches the output
    unchanged, because the attention of a token sums to one: it is the mean of the context."""
    heads = attention.self.num_attention_heads
    layers = attention.self.query, attention.self.key, attention.self.value
    query, key, value = (head_rows(layer.weight.double(), heads, 0) for layer in layers)  # (H, r, d)
    output = head_rows(attention.output.dense.weight.double(), heads, 1)  # (H, r, d)
    query_bias, key_bias, value_bias = (layer.bias.double().view(heads, -1, 1) for layer in layers)  # (H, r, 1)
    query = torch.cat((query, query_bias), dim=-1)  # (H, r, d + 1): q = [x, 1] [Q; b_q]
    key = torch.cat((key, key_bias), dim=-1)

    def moment(rows: torch.Tensor) -> torch.Tensor:  # (H, r, n) -> (H, r, r)
        return gram(rows.transpose(1, 2))

    return HeadMoments(moment(query), moment(key), moment(value), moment(output), value_bias[..., 0])


def activation_moments(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, HeadMoments]:
    """The moments of every attention layer of ``model`` on real text, by the layer's name.

    Args:
        model: a BERT or FNL-BERT; left as it was.
        batches: inputs of ``model``: ``input_ids`` (B, S) and, where they are padded, ``attention_mask`` (B, S).

    Raises:
        ValueError: no batch, or none with a token.
    """
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, BertAttention)}
    queries = {name: LayerMoments(attention.self.query) for name, attention in attentions.items()}
    outputs = {name: LayerMoments(attention.output.dense) for name, attention in attentions.items()}
    both = {f"{name}.{kind}": each for kind, part in (("q", queries), ("o", outputs)) for name, each in part.items()}
    measure_moments(model, both, batches)
    for name, moments in queries.items():
        if not moments.rows:
            raise ValueError(f"calibration of {name}: the text has no tokens")
    return {
        name: _head_moments(queries[name], outputs[name], attention.self.num_attention_heads)
        for name, attention in attentions.items()
    }


@torch.no_grad()
def _head_moments(query: LayerMoments, output: LayerMoments, heads: int) -> HeadMoments:
    """From the inputs of query and output, and the model's derivatives with respect to their outputs."""
    weight = head_rows(query.layer.weight.double(), heads, 0)  # (H, r, d)
    mean = (query.mean_output(query.layer.weight) + query.layer.bias.double()).view(heads, -1, 1)  # (H, r, 1)
    rows = head_rows(output.layer.weight.double(), heads, 1)  # (H, r, d)
    return HeadMoments(
        query=weight @ query.covariance(centred=True) @ weight.mT + mean @ mean.mT,
        key=_head_blocks(query.outputs[0].double() / query.rows, heads),
        value=_head_blocks(output.covariance(centred=True)[0], heads),
        output=rows @ (output.outputs.double() / output.rows) @ rows.mT,
        context_mean=(output.total[0].double() / output.rows).view(heads, -1),
        tokens=query.rows,
    )


def _head_blocks(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """(H·r, H·r) -> the blocks on its diagonal (H, r, r)."""
    return matrix.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def regularize_moments(measured: HeadMoments, weights: HeadMoments) -> HeadMoments:
    """``measured`` on N tokens, with a share r/(N + r) of the moments of the ``weights``.

    A text of fewer than r tokens does not cover all directions of a head. Truncation would set both factors to zero in
    them, and zero rows have no gradient and never change. With the shares, no direction of the weights is lost, and a
    long text still dominates.
    """
    rank = measured.query.shape[-1]
    share = rank / (int(measured.tokens or 0) + rank)

    def mix(seen: torch.Tensor, known: torch.Tensor, noise: float = NOISE**2) -> torch.Tensor:  # (H, r, r) both
        sizes, known_sizes = (moment.diagonal(dim1=1, dim2=2).sum(dim=1) for moment in (seen, known))  # traces (H,)
        # If nothing varies in the text, as for the context of a single token, there is no scale to match.
        scale = torch.where(sizes > noise * known_sizes, sizes / known_sizes, 1.0)
        return (1 - share) * seen + share * scale[:, None, None] * known

    return replace(
        measured,
        query=mix(measured.query, weights.query),
        key=mix(measured.key, weights.key),
        value=mix(measured.value, weights.value, NOISE),
        output=mix(measured.output, weights.output),
    )


def truncate_product(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """The matrices T, S (H, r, r') with the smallest ‖L (T Sᵀ - I) Rᵀ‖_F for LᵀL = ``left``, RᵀR = ``right``.

    With L Rᵀ = P Σ Qᵀ they are T = Rᵀ Q_r' Σ_r'^-½ and S = Lᵀ P_r' Σ_r'^-½, which split Σ evenly.

    Returns:
        T, S and the singular values (H, r), descending.
    """
    left_root, right_root = _root(left), _root(right)  # L and R (H, r, r)
    p, sigma, qh = torch.linalg.svd(left_root @ right_root.transpose(-2, -1))
    # Directions that the head does not use have σ = 0 up to rounding and are left out, as in a pseudoinverse.
    smallest = torch.finfo(sigma.dtype).eps * sigma.shape[-1] * sigma[..., :1]  # (H, 1)
    inverse_root = torch.where(sigma > smallest, sigma.rsqrt(), 0.0)[..., None, :rank]  # (H, 1, r')
    mixed_left = right_root.transpose(-2, -1) @ qh.transpose(-2, -1)[..., :rank] * inverse_root  # T (H, r, r')
    mixed_right = left_root.transpose(-2, -1) @ p[..., :rank] * inverse_root  # S (H, r, r')
    return mixed_left, mixed_right, sigma


def _root(moment: torch.Tensor) -> torch.Tensor:
    """A matrix whose Gram matrix is ``moment`` (H, r, r), which may be singular, so that Cholesky would fail."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0).sqrt()[..., None] * vectors.transpose(-2, -1)


def find_truncation(moments: HeadMoments, rank: int) -> tuple[HeadMixing, torch.Tensor, torch.Tensor]:
    """The best mixing to a smaller ``rank``, and the singular values of Q Kᵀ and V Oᵀ (H, r) in the moments' metric.

    Scores are divided by √r' afterwards instead of √r: the product is scaled by √(r'/r).
    """
    query, key, qk_sigma = truncate_product(moments.query, moments.key, rank)
    value, output, vo_sigma = truncate_product(moments.value, moments.output, rank)
    scale = (rank / qk_sigma.shape[-1]) ** 0.25  # for each factor, half of the product's exponent
    return HeadMixing(scale * query, scale * key, value, output), qk_sigma, vo_sigma


def balance_heads(mixing: HeadMixing, weights: HeadMoments) -> HeadMixing:
    """The same products, from factors whose rows have equal norms: moments of a text make one large and one small.

    Args:
        weights: the moments of the weights that are mixed.
    """

    def even(left: torch.Tensor, right: torch.Tensor, seen_by_left: torch.Tensor, seen_by_right: torch.Tensor):
        squares = [(mix * (moment @ mix)).sum(dim=1) for mix, moment in ((left, seen_by_left), (right, seen_by_right))]
        scale = torch.where(squares[0] * squares[1] > 0, squares[1] / squares[0], 1.0)[:, None] ** 0.25  # (H, 1, r')
        return left * scale, right / scale

    query, key = even(mixing.query, mixing.key, weights.query, weights.key)
    value, output = even(mixing.value, mixing.output, weights.value, weights.output)
    return HeadMixing(query, key, value, output)


def make_padding(heads: int, rank: int, padded: int, device: torch.device) -> HeadMixing:
    """Mixing to a larger rank with zero dimensions; exact, but these have no gradient."""
    eye = torch.eye(rank, padded, dtype=torch.float64, device=device).expand(heads, -1, -1)  # (H, r, r')
    scale = (padded / rank) ** 0.25
    return HeadMixing(scale * eye, scale * eye, eye, eye)


@torch.no_grad()
def mix_heads(source: BertAttention, target: BertAttention, mixing: HeadMixing, context_mean: torch.Tensor) -> None:
    """Write the heads of ``source`` into ``target`` in their new basis. The mean loss of the context, c̄ (H, r) times I
    - T_v T_oᵀ, moves into the output bias."""
    heads = source.self.num_attention_heads
    for name in ("query", "key", "value"):
        mix = getattr(mixing, name).transpose(1, 2)  # (H, r', r)
        old, new = getattr(source.self, name), getattr(target.self, name)
        new.weight.copy_((mix @ head_rows(old.weight.double(), heads, 0)).flatten(0, 1))  # (H·r', d)
        new.bias.copy_((mix @ old.bias.double().view(heads, -1, 1)).flatten())  # (H·r',)
    old, new = source.output.dense, target.output.dense
    rows = head_rows(old.weight.double(), heads, 1)  # Oᵀ (H, r, d)
    mixed = mixing.output.transpose(1, 2) @ rows  # (H, r', d)
    new.weight.copy_(mixed.flatten(0, 1).T)  # (d, H·r')
    mean = context_mean[:, None]  # (H, 1, r)
    new.bias.copy_(old.bias.double() + (mean @ rows - mean @ mixing.value @ mixed).sum(dim=(0, 1)))
