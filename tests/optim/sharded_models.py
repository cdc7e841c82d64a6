"""Small models with products of every kind, FSDP2 around them, and how far apart two of them are."""

from collections import OrderedDict
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, FnlBertModel, register_attention, register_product
from tests.conftest import DIMENSIONS


def product(kind, *shapes, num_heads=1):
    """Linear layers with weights of these shapes, the factors of one product."""
    return registered(kind, *(nn.Linear(*reversed(shape), bias=False) for shape in shapes), num_heads=num_heads)


def registered(kind, *modules, num_heads=1):
    layers = nn.Sequential(*modules)
    register_product(layers, kind, *(f"{i}.weight" for i in range(len(modules))), num_heads=num_heads)
    return layers


def bert(hidden=20, embedding=15):
    config = FnlBertConfig(
        vocab_size=31,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=5,
        intermediate_size=11,
        max_position_embeddings=7,
        attention_embedding_size=embedding,
    )
    return FnlBertModel(config, add_pooling_layer=False)


def language_model(**entries):
    """As it is initialized, the same on all processes; its embeddings are tied."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return FnlBertForMaskedLM(FnlBertConfig(**DIMENSIONS, **dropout, attention_embedding_size=21, **entries))


def all_kinds(**modules):
    """A product of each kind, beside ``modules``.

    The five heads of "qk" and "vo" straddle 2 and 3 processes, those of "grouped" too, and the one head of "wide"
    straddles all of them. Rank 2 of "linear" and "deep" leaves nothing to a third process.
    """
    return assembled(
        qk=product("qk", (15, 8), (15, 6), num_heads=5),
        vo=product("vo", (15, 6), (8, 15), num_heads=5),
        uv=product("uv", (7, 4), (5, 4), num_heads=2),
        linear=product("linear", (7, 2), (2, 5)),
        wide=product("linear", (7, 5), (5, 4)),
        deep=product("deep", (7, 2), (2, 3), (3, 5)),
        grouped=product("deep", (7, 15), (15, 2), (10, 4), num_heads=5),
        **modules,
    )


def attention(query, key, value, output, num_heads, **kwargs):
    """Linear layers with weights of these shapes, those of an attention; None for rows of the weight before."""
    shapes = [shape for shape in (query, key, value, output) if shape]
    layers = nn.Sequential(*(nn.Linear(*reversed(shape), bias=False) for shape in shapes))
    places = [0, int(key is not None), int(key is not None) + int(value is not None), len(shapes) - 1]
    register_attention(layers, *(f"{place}.weight" for place in places), num_heads=num_heads, **kwargs)
    return layers


def attention_kinds():
    """Fused, of shared keys, rotated, beside a pair of another kind; heads straddle 2 and 3 processes.

    With ``decay_rotary=False`` queries and keys of "fused" are left to weight decay.
    """
    return assembled(
        fused=attention((45, 8), None, None, (6, 15), 5, rotary="halves", rotary_size=2),
        by_head=attention((24, 7), None, None, (5, 12), 4, num_key_value_heads=2, by_head=True),
        shared=attention((24, 8), (12, 7), (10, 7), (8, 20), 4, num_key_value_heads=2, rotary="interleaved"),
        one_key=attention((15, 8), (3, 8), (2, 8), (8, 10), 5, num_key_value_heads=1),
        pair=product("qk", (15, 8), (15, 6), num_heads=5),
    )


def assembled(**modules):
    return seeded(nn.Sequential(OrderedDict(modules)))  # FSDP2 takes no ModuleDict


def convolutions():
    """(6, 6, 6, 1) after (6, 4, 1, 6): a product with outer sizes spread over two dimensions."""
    return seeded(registered("linear", nn.Conv2d(6, 6, (6, 1)), nn.Conv2d(4, 6, (1, 6))))


def seeded(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def shard(model, mesh=None, along=MappingProxyType({}), ignored=()):
    """``model`` cut by FSDP2: parameters named in ``along`` {name's ending: dimension}, the others along dimension 0.

    Those whose name ends with one of ``ignored`` stay whole.
    """
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {p for name, p in model.named_parameters() if name.endswith(tuple(ignored))}
    dims = {id(p): dim for name, p in model.named_parameters() for end, dim in along.items() if name.endswith(end)}
    options = {"shard_placement_fn": lambda p: Shard(dims.get(id(p), 0)), "ignored_params": whole, "mesh": mesh}
    layers = [layer for module in list(model.modules()) for layer in getattr(module, "layer", ())]
    for module in [*layers, model]:
        fully_shard(module, **options)
    assert all(isinstance(p, DTensor) for name, p in model.named_parameters() if not name.endswith(tuple(ignored)))
    return model


def full(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def differences(model, other):
    """{parameter: norm of the difference over norm}."""
    pairs = zip(model.named_parameters(), other.parameters())
    pairs = ((name, full(first), full(second)) for (name, first), second in pairs)
    return {name: ((first - second).norm() / first.norm()).item() for name, first, second in pairs}


def difference(model, other):
    return torch.tensor(list(differences(model, other).values())).max().item()  # NaN if any is
