"""How attention modules store their four weights: one table by attribute names for all classes of models.

A layout describes which parameters contain the rows of Q, K and V, in which order, and where O is. Sizes follow from
shapes and the size of a head; products/rotation.py finds rotated rows.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from fnl_hf.products.rotation import number_of, rotation_of
from fnl_hf.products.views import PAIRINGS, REGISTRY, FactorView, ViewPair


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
    Layout({"qkv": "qkv"}, ("proj",), by_head=True, condition=("head_first", True)),  # some of timm
    Layout({"qkv": "qkv"}, ("proj", "projection", "../output.dense")),  # BLIP, Qwen-VL, SAM, TimeSformer
)
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
# Attention over channels, or not of the form softmax(Q Kᵀ), with the same names.
OTHER_KINDS = (
    *("Channel", "CrossCovariance", "Delta", "DiffLlama", "Lightning", "Linear", "Lsh", "LSH", "XCA", "XCiT"),
    *("mLSTM", "xLSTM", "Yoso"),
)
OTHER_SIZES = ("key_dim", "val_dim")  # of modules whose fused rows are not three equal parts
BETWEEN = (nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)  # children that change q, k or v before the attention scores
# Normalization of values (Gemma 3n, Gemma 4, EmbeddingGemma 2) or of what attention returns (BitNet, Kosmos-2, Muse
# Spark, some of timm), before O: outputs do not depend on the size of V.
NORMS = ("attn_sub_norm", "inner_attn_ln", "o_norm", "norm", "v_norm")


class Located(NamedTuple):
    """A weight: its name in the module that has it, whether that module is the parent of the searched one, and the
    dimension of its outputs."""

    name: str
    in_parent: bool
    weight: nn.Parameter
    out_dim: int


class Heads(NamedTuple):
    """Q and K: ``size`` rows each for ``queries`` and ``keys`` heads."""

    size: int
    queries: int
    keys: int


class FoundPair(NamedTuple):
    """A product: "qk", "vo" or "rotary", its weights, and the places of its factors in them."""

    kind: str
    num_heads: int
    left: Located
    right: Located
    pair: ViewPair

    @property
    def is_plain(self) -> bool:
        """Whether the factors are whole weights of ``nn.Linear`` with equally many heads: a kind of ``RANK_DIMS``."""
        views, weights = self.pair.views, (self.left, self.right)
        dims = (0, 0 if self.kind == "qk" else 1)
        return all(
            (view.dim, view.groups, view.num_rows) == (dim, self.num_heads, each.weight.shape[dim])
            for view, each, dim in zip(views, weights, dims)
        )


class AttentionWeights(NamedTuple):
    """The arguments of :func:`fnl_hf.register_attention`; ``names`` are those of query, key, value and output."""

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
                f"{where}: rows {rows} must split into queries for num_heads ({heads}) and keys and values for "
                f"num_key_value_heads ({shared}), which must divide num_heads"
            )
        sizes = {letter: rows[each] // counts[each] for each in rows for letter in each}
        size = sizes["q"] if self.rotary_size is None else self.rotary_size
        is_rotated = self.rotary is not None
        if self.rotary_size is not None and not is_rotated:
            raise ValueError(f"{where}: rotary_size ({size}) needs rotary, one of {PAIRINGS[1:]}")
        is_wrong = is_rotated and (self.rotary not in PAIRINGS[1:] or size % 2 or not 0 < size <= sizes["q"])
        if sizes["q"] != sizes["k"] or is_wrong:
            raise ValueError(
                f"{where}: queries ({sizes['q']} rows per head) and keys ({sizes['k']}) must have the same number "
                f"of rows; rotary ({self.rotary!r}) must be one of {PAIRINGS[1:]} or None; rotary_size ({size}) "
                "must be even, at least 2, and at most that number of rows"
            )
        found = arrange(parts, Heads(size=sizes["q"], queries=heads, keys=shared), self.by_head)
        value = value_pair(found["v"], located[self.names[3]], Heads(sizes["v"], heads, shared))
        if value is None:
            shape = tuple(located[self.names[3]].weight.shape)
            raise ValueError(
                f"{where}: {self.names[3]} of shape {shape} must have num_heads ({heads}) times {sizes['v']} inputs"
            )
        return [*score_pairs(found["q"], found["k"], self.rotary or "", size if is_rotated else 0), value]


def weight_of(module: nn.Module, name: str, where: str) -> nn.Parameter:
    """A parameter by its name in ``module``; ValueError, beginning with ``where``, if there is none."""
    try:
        return module.get_parameter(name)
    except AttributeError as error:
        raise ValueError(f"{where}: {type(module).__name__} has no parameter {name!r}") from error


def _locate_weight(module: nn.Module, name: str, where: str) -> Located:
    weight = weight_of(module, name, where)
    if weight.dim() != 2:
        raise ValueError(f"{where}: {name} must be a matrix, but has shape {tuple(weight.shape)}")
    owner = module.get_submodule(name.rpartition(".")[0])
    return Located(name, False, weight, int(isinstance(owner, Conv1D)))


def find_pairs(module: nn.Module, parent: nn.Module | None, path: str = "") -> tuple[list[FoundPair], bool]:
    """The products of one attention module, and whether there may be others that were not understood."""
    if _is_of_another_kind(module):
        return [], True
    for layout in LAYOUTS:
        if not _meets_condition(module, layout):
            continue
        parts = {found: letters for name, letters in layout.parts.items() if (found := _locate(module, name))}
        # In place of a weight there may be a product, a layer with adapters, or anything else.
        others = [_get(module, name) for name in layout.parts if _locate(module, name) is None]
        if not all(isinstance(layer, nn.Module) for layer in others):
            continue
        output = next(filter(None, (_locate(module, name, parent) for name in layout.outputs)), None)
        if output is None:
            layers = (_get(module, name, parent) for name in layout.outputs)
            others.append(next((layer for layer in layers if layer is not None), None))
            # The name of a fused weight alone does not determine the order of its rows.
            if others[-1] is None and len(layout.parts) < 3:
                continue
        is_open = not all(_is_accounted_for(layer) for layer in others)
        letters = "".join(parts.values())
        if not {"q", "k"} <= set(letters) and (output is None or "v" not in letters):
            return [], is_open
        heads = _count_heads(module, parts, output)
        if heads is None:
            return [], True
        pairs, is_partly_open = _pairs(module, arrange(parts, heads, layout.by_head), output, heads, _is_cross(path))
        return pairs, is_open or is_partly_open
    return [], True


def has_projections(module: nn.Module) -> bool:
    """Whether it has layers or parameters with a layout's names for q, k and v."""
    return any(all(_get(module, name) is not None for name in layout.parts) for layout in LAYOUTS)


def _is_of_another_kind(module: nn.Module) -> bool:
    if any(name in type(module).__name__ for name in OTHER_KINDS):
        return True
    if any(isinstance(getattr(module, name, None), int) for name in OTHER_SIZES):
        return True
    return any(isinstance(child, BETWEEN) for child in module.children())


def _meets_condition(module: nn.Module, layout: Layout) -> bool:
    if layout.condition is None:
        return True
    name, value = layout.condition
    return getattr(module, name, None) == value


def _is_accounted_for(layer: Any) -> bool:
    """Whether the object in place of a weight is a product itself, has adapters, or has nothing to train."""
    if not isinstance(layer, nn.Module):
        return False
    has_adapters = any(cls.__module__.partition(".")[0] == "peft" for cls in type(layer).__mro__)
    return has_adapters or REGISTRY in layer.__dict__ or not any(p.requires_grad for p in layer.parameters())


def _is_cross(path: str) -> bool:
    """Whether the name of a module or its parent indicates that its keys come from another sequence."""
    return any("cross" in name or name == "encoder_attn" for name in path.lower().split(".")[-2:])


def _get(module: nn.Module, path: str, parent: nn.Module | None = None) -> Any:
    """The layer or parameter at ``path``, or None."""
    owner: Any = parent if path.startswith("../") else module
    for name in path.removeprefix("../").split("."):
        found: dict[str, Any] = {**owner._modules, **owner._parameters} if isinstance(owner, nn.Module) else {}
        owner = found.get(name)
    return owner


def _locate(module: nn.Module, path: str, parent: nn.Module | None = None) -> Located | None:
    """A matrix at ``path``: a parameter, or the weight of a layer that only multiplies by a matrix."""
    owner, in_parent = _get(module, path, parent), path.startswith("../")
    path = path.removeprefix("../")
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
    count = number_of(module, HEAD_COUNTS) or number_of(getattr(module, "config", None), HEAD_COUNTS)
    size = number_of(module, HEAD_SIZES)
    width = rows.get("q") or (output.weight.shape[1 - output.out_dim] if output else None)  # H·r
    if width is None:
        width = size * count if size and count else None
    if size is None:
        size = width // count if width and count else None
    if not size or not width or width % size:
        return None
    queries = width // size
    if number_of(module, HEAD_COUNTS) not in (None, queries):
        return None
    fused = rows["kv"] if "kv" in rows else rows.get("qkv", 0) - width  # K and V
    separate = rows.get("k") or rows.get("v")
    shared = separate or fused // 2
    keys, rest = divmod(shared, size)
    is_whole = keys > 0 and not rest and queries % keys == 0 and rows.get("v", 0) % keys == 0
    return Heads(size, queries, keys) if is_whole and (separate or fused == 2 * shared) else None


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of ``module`` itself, and of each of its layers: the weight or, in a wrapper, the only matrix."""
    found = [weight for weight in module._parameters.values() if weight is not None]
    for layer in module.children():
        if isinstance(layer, nn.Embedding):
            continue
        matrices = [weight for weight in layer.parameters() if weight.dim() > 1]
        weight = layer._parameters.get("weight")
        found += matrices if len(matrices) == 1 else [] if weight is None else [weight]
    return [weight for weight in found if weight.dim() > 1]


def arrange(parts: Mapping[Located, str], heads: Heads, by_head: bool = False) -> dict[str, tuple[Located, FactorView]]:
    """The places of the rows of q, k and v."""
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
    module: nn.Module,
    rows: Mapping[str, tuple[Located, FactorView]],
    output: Located | None,
    heads: Heads,
    is_cross: bool,
) -> tuple[list[FoundPair], bool]:
    pairs: list[FoundPair] = []
    is_open = False
    if {"q", "k"} <= rows.keys():
        rotation = rotation_of(module, heads.size, is_cross)
        is_open = rotation is None
        pairs += () if rotation is None else score_pairs(rows["q"], rows["k"], *rotation)
    if output is not None and "v" in rows:
        value = value_pair(rows["v"], output, heads)
        if value is None:  # more rows than those of q, k and v
            return [], True
        norms = (_get(module, name) for name in NORMS)
        if all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
            pairs.append(value)
        else:
            is_open = True
    return pairs, is_open


def without_tied(pairs: list[FoundPair]) -> tuple[list[FoundPair], list[FoundPair]]:
    """Products whose factors are not rows that they share with themselves or an earlier pair, and the other
    products."""
    kept: list[FoundPair] = []
    tied: list[FoundPair] = []
    taken: list[tuple[nn.Parameter, FactorView]] = []
    for pair in pairs:
        left, right = (pair.left.weight, pair.pair.left), (pair.right.weight, pair.pair.right)
        meetings = [(left, right), *((own, other) for own in (left, right) for other in taken)]
        if any(own[0] is other[0] and own[1].meets(other[1]) for own, other in meetings):
            tied.append(pair)
            continue
        kept.append(pair)
        taken += [left, right]
    return kept, tied


def score_pairs(
    query: tuple[Located, FactorView], key: tuple[Located, FactorView], pairing: str, rotated: int
) -> Iterator[FoundPair]:
    """Q Kᵀ; the first ``rotated`` rows of each head are a product of their own, "rotary"."""
    (left, left_view), (right, right_view) = query, key
    heads, rank = left_view.groups * left_view.heads, left_view.rank
    parts = (("rotary", 0, rotated, pairing), ("qk", rotated, rank - rotated, ""))
    for kind, start, size, of_part in parts:
        if size:
            pair = ViewPair(left_view.part(start, size), right_view.part(start, size), of_part)
            yield FoundPair(kind, heads, left, right, pair)


def value_pair(value: tuple[Located, FactorView], output: Located, heads: Heads) -> FoundPair | None:
    """V Oᵀ, if the inputs of the output are those of the heads."""
    located, view = value
    rank, shared = view.rank, heads.queries // heads.keys
    if output.weight.shape[1 - output.out_dim] != heads.queries * rank:
        return None
    right = FactorView(1, 1 - output.out_dim, 0, heads.keys, shared * rank, shared, rank, rank)
    return FoundPair("vo", heads.queries, located, output, ViewPair(view, right, ""))
