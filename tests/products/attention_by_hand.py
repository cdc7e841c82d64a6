"""What attention layers compute, and their penalty, by hand: dense products of each head.

Shapes: H heads, G of keys and values, r and s rows of a head of Q Kᵀ and V Oᵀ, n the width of what comes in.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class Attention(NamedTuple):
    """q (H, r, n), k (G, r, n), v (G, s, n), o (H, s, m); ``pairs`` of rows of a head that rotate together."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    pairs: Sequence[tuple[int, int]] = ()

    def penalty(self):
        """½ Σ_h E‖Q_hᵀ R K_g‖² + ½ Σ_h ‖V_gᵀ O_h‖², of dense products, each phase at three equal distances: a sum of
        products of two sines or cosines has its mean there."""
        shared = len(self.q) // len(self.k)
        total = torch.zeros((), dtype=self.q.dtype)
        for head, (q, o) in enumerate(zip(self.q, self.o)):
            k, v = self.k[head // shared], self.v[head // shared]
            rotations = list(self.rotations(q.shape[0]))
            total = total + sum((q.T @ turn @ k).square().sum() for turn in rotations) / len(rotations) / 2
            total = total + (v.T @ o).square().sum() / 2
        return total

    def rotations(self, rank):
        for phases in itertools.product((0.3, 0.3 + 2 * torch.pi / 3, 0.3 + 4 * torch.pi / 3), repeat=len(self.pairs)):
            turn = torch.eye(rank, dtype=torch.float64)
            for (i, j), phase in zip(self.pairs, torch.tensor(phases, dtype=torch.float64)):
                turn[i, i] = turn[j, j] = phase.cos()
                turn[i, j], turn[j, i] = -phase.sin(), phase.sin()
            yield turn


def split(rows, heads):
    return rows.reshape(heads, -1, rows.shape[-1])


def separate(module, names, heads, keys=None, pairs=(), output=None):
    """Four ``nn.Linear``."""
    q, k, v = (module.get_parameter(f"{name}.weight") for name in names[:3])
    o = (module if output is None else output).get_parameter(f"{names[3]}.weight")
    return Attention(split(q, heads), split(k, keys or heads), split(v, keys or heads), split(o.T, heads), pairs)


def blocks(weight, output, heads, keys=None, pairs=()):
    """All q, all k, all v in the rows of one weight; ``output`` (H·s, m)."""
    keys = keys or heads
    size = weight.shape[0] // (heads + 2 * keys)
    q, k, v = weight.split([heads * size, keys * size, keys * size])
    return Attention(split(q, heads), split(k, keys), split(v, keys), split(output, heads), pairs)


def interleaved(weight, output, heads, keys=None, pairs=()):
    """q, k, v of the first group of heads, then of the next one."""
    keys = keys or heads
    groups = weight.reshape(keys, heads // keys + 2, -1, weight.shape[1])
    return Attention(groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1], split(output, heads), pairs)


def halves(size):
    return [(i, i + size // 2) for i in range(size // 2)]


def neighbors(size):
    return [(i, i + 1) for i in range(0, size, 2)]


class MultiheadAttention(nn.Module):
    """torch's own, with one weight for q, k and v, or with three where their inputs differ in width."""

    def __init__(self, **widths):
        super().__init__()
        self.attention = nn.MultiheadAttention(15, 3, batch_first=True, **widths)
        self.widths = widths or {"kdim": 15, "vdim": 15}

    def forward(self, x):
        others = (x.new_ones(2, 7, width).cumsum(1).sin() for width in self.widths.values())
        return self.attention(x, *others, need_weights=False)[0]


def multihead(model):
    attention, output = model.attention, model.attention.out_proj.weight.T
    if attention.in_proj_weight is not None:
        return [blocks(attention.in_proj_weight, output, 3)]
    weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight, output)
    return [Attention(*(split(weight, 3) for weight in weights))]


def vectors(model):
    states = torch.randn(2, 7, 15, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    return model(states)


def encoder_layers(model):
    return [blocks(m.in_proj_weight, m.out_proj.weight.T, 3) for m in (layer.self_attn for layer in model.layers)]


def torch_encoder():
    layer = nn.TransformerEncoderLayer(15, 3, 7, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def cross_attended_bert(model):
    layers = model.encoder.layer
    names = ("query", "key", "value", "output.dense")
    parts = [part for layer in layers for part in (layer.attention, layer.crossattention)]
    return [separate(part.self, names, 3, output=part) for part in parts]


def t5(model):
    parts = [layer for stack in (model.encoder, model.decoder) for block in stack.block for layer in block.layer[:-1]]
    modules = [getattr(layer, "SelfAttention", None) or layer.EncDecAttention for layer in parts]
    return [separate(module, ("q", "k", "v", "o"), 2) for module in modules]


def filled(model):
    """In float64, with weights of a size at which attention is no mean, and without biases."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for each, parameter in model.named_parameters():
        if each.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model
