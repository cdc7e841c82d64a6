"""How attention modules keep their four weights: one table, by the names of attributes, for all classes of models.

A layout says which parameters hold the rows of Q, K and V, in which order, and where O is. Sizes follow from shapes and
the size of a head; whether and how rows are rotated is measured on the function that the module's ``forward`` calls.
"""

import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fnl_hf.products.views import HALVES, INTERLEAVED, PAIRINGS, FactorView, ViewPair, pair_rows


class Layout(NamedTuple):
    """One row of the table.

    ``parts``: attribute -> which of q, k, v it holds, in the order of its rows; a layer, or a parameter itself.
    ``outputs``: where O may be, and with a fused weight has to be; "../" is the module's parent. ``by_head``: the rows
    of a fused weight are q, k, v of the first group of heads, then of the next one, instead of all q, all k, all v.
    ``condition``: an attribute of the module and its value.
    """

    parts: Mapping[str, str]
    outputs: tuple[str, ...]
    by_head: bool = False
    condition: tuple[str, Any] | None = None


OUTPUTS = (
    "o_proj",
    "out_proj",
    "out_lin",
    "o",
    "dense",
    "Wo",
    "linear_out",
    "proj",
    "projection_layer",
    "attention_out",
    "output",
    "to_out",
    "to_out.0",
    "../output.dense",
    "../dense",
)
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),  # BART, CLIP, Gemma, Llama, Mistral, OPT, Phi, Qwen, ViT, Whisper
    ("query", "key", "value"),  # ALBERT, BERT, CamemBERT, ELECTRA, RoBERTa, Swin, XLM-R
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, FlauBERT, XLM
    ("q", "k", "v"),  # MPNet, T5
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2 (of its content), ProphetNet
    ("linear_q", "linear_k", "linear_v"),  # Wav2Vec2-BERT and other Conformers
    ("Wq", "Wk", "Wv"),  # CTRL
    ("to_q", "to_k", "to_v"),  # diffusers
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),  # nn.MultiheadAttention with kdim or vdim
)
LAYOUTS = (
    *(Layout(dict(zip(names, "qkv")), OUTPUTS) for names in SEPARATE),
    Layout({"in_proj_weight": "qkv"}, ("out_proj",)),  # nn.MultiheadAttention
    Layout({"q_attn": "q", "c_attn": "kv"}, ("c_proj",)),  # GPT-2's cross-attention
    Layout({"c_attn": "qkv"}, ("c_proj",), by_head=True, condition=("multi_query", False)),  # GPTBigCode
    Layout({"c_attn": "qkv"}, ("c_proj",)),  # GPT, GPT-2, GPTBigCode with one key
    Layout({"Wqkv": "qkv"}, ("Wo", "out_proj")),  # ModernBERT; DBRX, MPT
    Layout({"qkv_proj": "qkv"}, ("o_proj",)),  # Phi-3
    Layout({"query_key_value": "qkv"}, ("dense",), by_head=True),  # BLOOM, Falcon, GPT-NeoX, Persimmon
    Layout({"in_proj": "qkv"}, ("../output.dense",), by_head=True),  # DeBERTa
    Layout({"qkv": "qkv"}, ("proj", "projection", "../output.dense")),  # BLIP, Qwen-VL, SAM, TimeSformer; timm
)
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
# Attention over channels, or by other means than softmax(Q Kᵀ), under the same names.
OTHER_KINDS = ("Channel", "Delta", "DiffLlama", "Lightning", "Linear", "Lsh", "LSH")
ROTARY_SIZES = ("rotary_ndims", "rotary_dim")


class Located(NamedTuple):
    """A weight: its name in the module that has it, whether that is the searched module's parent, and the dimension of
    its outputs."""

    name: str
    in_parent: bool
    weight: nn.Parameter
    out_dim: int


class Heads(NamedTuple):
    """Q and K: ``size`` rows each of ``queries`` and ``keys`` heads."""

    size: int
    queries: int
    keys: int


class FoundPair(NamedTuple):
    """A product: "qk", "vo" or "rotary", its weights, and where its factors lie in them."""

    kind: str
    num_heads: int
    left: Located
    right: Located
    pair: ViewPair

    @property
    def is_plain(self) -> bool:
        """Whether the factors are whole weights of ``nn.Linear`` with as many heads each: a kind of ``RANK_DIMS``."""
        views, weights = self.pair.views, (self.left, self.right)
        dims = (0, 0 if self.kind == "qk" else 1)
        return all(
            (view.dim, view.groups, view.num_rows) == (dim, self.num_heads, each.weight.shape[dim])
            for view, each, dim in zip(views, weights, dims)
        )


class AttentionWeights(NamedTuple):
    """What :func:`fnl_hf.register_attention` is told; ``names`` are those of query, key, value and output."""

    names: tuple[str, str, str, str]
    num_heads: int
    num_key_value_heads: int
    by_head: bool
    rotary: str | None
    rotary_size: int | None

    def pairs(self, module: nn.Module, where: str) -> list[FoundPair]:
        """The products.

        Raises:
            ValueError: naming ``where``, what does not fit and what it would have to be.
        """
        letters: dict[str, str] = {}
        for name, letter in zip(self.names, "qkv"):
            letters[name] = letters.get(name, "") + letter
        located = {name: _locate_weight(module, name, where) for name in (*letters, self.names[3])}
        parts = {located[name]: of_part for name, of_part in letters.items()}
        heads, shared = self.num_heads, self.num_key_value_heads
        rows = {of_part: part.weight.shape[part.out_dim] for part, of_part in parts.items()}
        in_head = {"q": heads, "k": shared, "v": shared}
        counts = {of_part: sum(in_head[letter] for letter in of_part) for of_part in rows}
        if min(heads, shared) < 1 or heads % shared or any(rows[each] % counts[each] for each in rows):
            raise ValueError(
                f"{where}: rows {rows} must split into num_heads ({heads}) queries and num_key_value_heads ({shared}), "
                "a divisor of it, keys and values"
            )
        sizes = {letter: rows[each] // counts[each] for each in rows for letter in each}
        size = self.rotary_size or (sizes["q"] if self.rotary else 0)
        if sizes["q"] != sizes["k"] or size > sizes["q"] or size % 2 or (self.rotary or "") not in PAIRINGS:
            raise ValueError(
                f"{where}: queries of {sizes['q']} and keys of {sizes['k']} rows a head must have the same, rotary "
                f"({self.rotary!r}) be one of {PAIRINGS[1:]} or None, and rotary_size ({size}) even and at most that"
            )
        found = arrange(parts, Heads(size=sizes["q"], queries=heads, keys=shared), self.by_head)
        value = value_pair(found["v"], located[self.names[3]], Heads(sizes["v"], heads, shared))
        if value is None:
            shape = tuple(located[self.names[3]].weight.shape)
            raise ValueError(
                f"{where}: {self.names[3]} of shape {shape} must take num_heads ({heads}) times {sizes['v']} inputs"
            )
        return [*score_pairs(found["q"], found["k"], self.rotary or "", size if self.rotary else 0), value]


def _locate_weight(module: nn.Module, name: str, where: str) -> Located:
    try:
        weight = module.get_parameter(name)
    except AttributeError as error:
        raise ValueError(f"{where}: {type(module).__name__} has no parameter {name!r}") from error
    if weight.dim() != 2:
        raise ValueError(f"{where}: {name} must be a matrix, got shape {tuple(weight.shape)}")
    owner = module.get_submodule(name.rpartition(".")[0])
    return Located(name, False, weight, int(isinstance(owner, Conv1D)))


def find_pairs(module: nn.Module, parent: nn.Module | None) -> tuple[list[FoundPair], bool]:
    """The products of one attention module, and whether there may be others that are not understood."""
    if any(name in type(module).__name__ for name in OTHER_KINDS):
        return [], True
    if any(isinstance(child, nn.Conv1d | nn.Conv2d) for child in module.children()):  # between the weights
        return [], True
    for layout in LAYOUTS:
        if layout.condition is not None:
            name, value = layout.condition
            if getattr(module, name, None) != value:
                continue
        parts = {found: letters for name, letters in layout.parts.items() if (found := _locate(module, name))}
        if len(parts) < len(layout.parts):
            if layout.parts.keys() <= module._modules.keys():  # known, but products of their own, or with adapters
                return [], False
            continue
        output = next(filter(None, (_locate(module, name, parent) for name in layout.outputs)), None)
        if output is None and len(parts) < 3:  # the name of a fused weight alone does not tell the order of its rows
            continue
        heads = _count_heads(module, parts, output)
        if heads is None:
            return [], True
        return _pairs(module, arrange(parts, heads, layout.by_head), output, heads)
    return [], True


def _locate(module: nn.Module, path: str, parent: nn.Module | None = None) -> Located | None:
    """A matrix at ``path``: a parameter, or the weight of a layer that is nothing but a matrix product."""
    in_parent = path.startswith("../")
    owner: Any = parent if in_parent else module
    path = path.removeprefix("../")
    for name in path.split("."):
        if isinstance(owner, nn.Module):
            owner = owner._modules.get(name) or owner._parameters.get(name)
    if isinstance(owner, nn.Parameter):
        found = Located(path, in_parent, owner, 0)
    elif isinstance(owner, nn.Linear | Conv1D) and isinstance(weight := owner._parameters.get("weight"), nn.Parameter):
        found = Located(f"{path}.weight", in_parent, weight, int(isinstance(owner, Conv1D)))
    else:
        return None
    return found if found.weight.dim() == 2 and found.weight.is_floating_point() else None


def _count_heads(module: nn.Module, parts: Mapping[Located, str], output: Located | None) -> Heads | None:
    """From shapes, the size of a head and the number of heads; None if they do not fit together."""
    rows = {letters: part.weight.shape[part.out_dim] for part, letters in parts.items()}
    count = _number(module, HEAD_COUNTS) or _number(getattr(module, "config", None), HEAD_COUNTS)
    size = _number(module, HEAD_SIZES)
    width = rows.get("q") or (output.weight.shape[1 - output.out_dim] if output else None)  # H·r
    if width is None:
        width = size * count if size and count else None
    if size is None:
        size = width // count if width and count else None
    if not size or not width or width % size:
        return None
    queries = width // size
    if _number(module, HEAD_COUNTS) not in (None, queries):
        return None
    fused = rows["kv"] if "kv" in rows else rows.get("qkv", 0) - width  # K and V
    shared = rows["k"] if "k" in rows else fused // 2
    keys, rest = divmod(shared, size)
    is_whole = keys > 0 and not rest and queries % keys == 0 and rows.get("v", 0) % keys == 0
    return Heads(size, queries, keys) if is_whole and ("k" in rows or fused == 2 * shared) else None


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """Those of ``module`` itself and of its layers."""
    own = [weight for weight in module._parameters.values() if weight is not None]
    layers = [child for child in module.children() if not isinstance(child, nn.Embedding)]
    weights = [*own, *(w for layer in layers if (w := layer._parameters.get("weight")) is not None)]
    return [weight for weight in weights if weight.dim() > 1]


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int) and value > 0), None)


def arrange(parts: Mapping[Located, str], heads: Heads, by_head: bool = False) -> dict[str, tuple[Located, FactorView]]:
    """Where the rows of q, k and v lie."""
    size, shared = heads.size, heads.queries // heads.keys
    found: dict[str, tuple[Located, FactorView]] = {}
    for part, letters in parts.items():
        value_size = part.weight.shape[part.out_dim] // heads.keys if letters == "v" else size
        in_group = {"q": shared * size, "k": size, "v": value_size}
        group = sum(in_group[letter] for letter in letters)
        start = 0
        for letter in letters:
            stride = group if by_head else in_group[letter]
            count, rank = (shared, size) if letter == "q" else (1, in_group[letter])
            view = FactorView(0, part.out_dim, start, heads.keys, stride, count, rank, rank)
            found[letter] = (part, view)
            start += in_group[letter] if by_head else in_group[letter] * heads.keys
    return found


def _pairs(
    module: nn.Module, rows: Mapping[str, tuple[Located, FactorView]], output: Located | None, heads: Heads
) -> tuple[list[FoundPair], bool]:
    value = None if output is None else value_pair(rows["v"], output, heads)
    if output is not None and value is None:  # more rows than those of q, k and v
        return [], True
    rotation = rotation_of(module, heads.size)
    pairs = [] if rotation is None else list(score_pairs(rows["q"], rows["k"], *rotation))
    return pairs + ([value] if value else []), rotation is None


def score_pairs(
    query: tuple[Located, FactorView], key: tuple[Located, FactorView], pairing: str, rotated: int
) -> Iterator[FoundPair]:
    """Q Kᵀ, of which the first ``rotated`` rows of each head are a product of its own, "rotary"."""
    (left, left_view), (right, right_view) = query, key
    heads, rank = left_view.groups * left_view.heads, left_view.rank
    parts = (("rotary", 0, rotated, pairing), ("qk", rotated, rank - rotated, ""))
    for kind, start, size, of_part in parts:
        if size:
            pair = ViewPair(left_view.part(start, size), right_view.part(start, size), of_part)
            yield FoundPair(kind, heads, left, right, pair)


def value_pair(value: tuple[Located, FactorView], output: Located, heads: Heads) -> FoundPair | None:
    """V Oᵀ, if the output's inputs are those of the heads."""
    located, view = value
    rank, shared = view.rank, heads.queries // heads.keys
    if output.weight.shape[1 - output.out_dim] != heads.queries * rank:
        return None
    right = FactorView(1, 1 - output.out_dim, 0, heads.keys, shared * rank, shared, rank, rank)
    return FoundPair("vo", heads.queries, located, output, ViewPair(view, right, ""))


def rotation_of(module: nn.Module, head_size: int) -> tuple[str, int] | None:
    """The pairing of rows and how many rows of a head are rotated; ("", 0) without rotation, None if it is unknown.

    ``forward`` names the function that rotates. What it does to the unit vectors shows which rows it mixes.
    """
    config = getattr(module, "config", None)
    switches = (getattr(module, "use_rope", None), getattr(module, "rotary_emb", True), not getattr(config, "alibi", 0))
    cls: Any = type(module)
    names = [name for name in _names_of(cls) if "rotary" in name or "rope" in name.split("_")]
    rotating = [name for name in names if name.removeprefix("_").startswith("apply")]
    kind = getattr(module, "position_embedding_type", None)
    if not names or False in switches or None in switches[1:] or kind not in (None, "rotary", "rope"):
        return "", 0
    if getattr(module, "is_cross_attention", False) is True:
        return "", 0
    size = _number(module, ROTARY_SIZES) or int(head_size * _partial_factor(module, config))
    for name in rotating:
        function = inspect.unwrap(cls.forward).__globals__.get(name)
        for pairing in (HALVES, INTERLEAVED) if function is not None and size % 2 == 0 and size else ():
            expected = sorted(pair_rows(torch.arange(size, device="cpu"), pairing).tolist())
            if expected in _mixed_rows(function, head_size, size):
                return pairing, size
    return None


def _partial_factor(module: nn.Module, config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None)
    parameters = parameters if isinstance(parameters, dict) else {}
    nested = parameters.get(getattr(module, "layer_type", None))
    parameters = nested if isinstance(nested, dict) else parameters
    return float(parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)


@functools.cache
def _names_of(cls: Any) -> set[str]:
    """All that ``forward`` and the methods it calls mention."""
    names = _mentioned(cls.forward)
    return names.union(*(_mentioned(getattr(cls, name, None)) for name in names))


def _mentioned(function: Any) -> set[str]:
    return set(inspect.unwrap(function).__code__.co_names) if inspect.isfunction(function) else set()


@functools.cache
def _mixed_rows(function: Any, head_size: int, rotated: int) -> list[list[list[int]]]:
    """Pairs of inputs that reach the same output, for each way of calling ``function`` that it takes: with whole heads
    or the rotated rows alone, of four dimensions or three, with angles for each row or each pair."""
    found = []
    for size, width, between in itertools.product((head_size, rotated), (rotated, rotated // 2), (2, 1)):
        unit = torch.eye(size, device="cpu").view(size, *[1] * between, size)
        angles = torch.ones(*[1] * between, width, device="cpu")
        try:
            result = _call(function, unit, angles)
        except Exception:  # its own business: other shapes, or other arguments
            continue
        if result.shape == unit.shape:
            columns = result.view(size, size).ne(0).T
            inputs = [column.nonzero().flatten().tolist() for column in columns]
            if all(len(each) in (1, 2) for each in inputs):
                found.append(sorted(map(list, {tuple(each) for each in inputs if len(each) == 2})))
    return found


def _call(function: Any, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    given = {"cos": values, "sin": values, "freqs_cis": torch.complex(values, values)}
    given |= dict.fromkeys(("q", "k", "x", "xq", "xk", "tensor", "query", "key"), rows)
    arguments = {name: given[name] for name in inspect.signature(function).parameters if name in given}
    with torch.device("cpu"), torch.no_grad():
        result = function(**arguments)
    return result[0] if isinstance(result, tuple) else result
