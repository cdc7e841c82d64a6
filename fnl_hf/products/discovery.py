"""The products of parameters in a model: those of its attention, and those registered by its modules."""

from collections import Counter
from typing import Any

from torch import nn

from fnl_hf.bert.factorization import RANK_DIMS, Product, validate_product
from fnl_hf.bert.modeling_fnl_bert import factor_pairs
from fnl_hf.products.layouts import (
    AttentionWeights,
    FoundPair,
    find_pairs,
    has_projections,
    matrices_of,
    weight_of,
    without_tied,
)
from fnl_hf.products.views import REGISTRY, ViewProduct

_ATTENTION_REGISTRY = "_registered_attention"


def register_product(module: nn.Module, kind: str, *weight_names: str, num_heads: int = 1, name: str = "") -> None:
    """Declare that parameters of ``module`` are the factors of a product, for decay and diagnostics::

        register_product(adapter, "linear", "up.weight", "down.weight")  # up(down(x)): U Vᵀ
        # up(mid(down(x))): U M Vᵀ
        register_product(block, "deep", "up.weight", "mid.weight", "down.weight")

    Args:
        module: any module; the registration survives copies, pickling, DDP and FSDP2.
        kind: how the factors are stored, a key of :data:`fnl_hf.RANK_DIMS`.
        weight_names: the factors' names in ``module``, from left to right.
        num_heads: the number of products into which the rank splits evenly.
        name: the product's name in ``module``, needed if the module has several; by default the module's name alone.

    Raises:
        ValueError: the kind is unknown, a parameter is missing, shapes do not match, or the name is taken.
    """
    weights = _get_weights(module, weight_names, f"a product of {type(module).__name__}")
    validate_product(weights, kind, num_heads, f"product ({', '.join(weight_names)})")
    registered = module.__dict__.setdefault(REGISTRY, [])
    entry = (kind, tuple(weight_names), num_heads, name)
    if entry in registered:
        return
    if any(name == other for *_, other in registered):
        taken = f"named {name!r}" if name else "without a name"
        raise ValueError(
            f"{type(module).__name__} already has a product {taken}: give product ({', '.join(weight_names)}) another "
            "name"
        )
    registered.append(entry)


def find_products(model: nn.Module) -> list[Product]:
    """Every product of ``model``: those of its attention, then the registered ones.

    BERT attention comes first (:func:`fnl_hf.factor_pairs`). The attention of other modules follows if the names and
    shapes of its weights match a known layout (products/layouts.py).

    Raises:
        ValueError: a registered parameter no longer exists, a parameter is a factor of two products, or a registered
            product has the name of another one.
    """
    return discover(model)[0]


def discover(model: nn.Module) -> tuple[list[Product], list[str]]:
    """:func:`find_products`, and the classes of modules that look like attention and have trainable matrices, but whose
    products are not found."""
    registered, of_bert = registered_products(model), _products_of_bert(model)
    _refuse_two_products([*of_bert, *registered])
    taken = {id(weight) for product in [*of_bert, *registered] for weight in product.weights}
    of_attention, unknown = _attention_products(model, taken)
    _refuse_equal_names(registered, [*of_bert, *of_attention, *registered])
    return [*of_bert, *of_attention, *registered], unknown


def register_attention(
    module: nn.Module,
    query: str,
    key: str,
    value: str,
    output: str,
    *,
    num_heads: int,
    num_key_value_heads: int | None = None,
    by_head: bool = False,
    rotary: str | None = None,
    rotary_size: int | None = None,
    name: str = "",
) -> None:
    """Declare that parameters of ``module`` are the weights of an attention layer that is not found automatically::

        register_attention(block, "wq.weight", "wk.weight", "wv.weight", "wo.weight", num_heads=12)
        # all q, then all k, then all v in the rows of one weight, four heads to a key
        register_attention(block, *["qkv.weight"] * 3, "wo.weight", num_heads=12, num_key_value_heads=3)

    Its products are Q Kᵀ and V Oᵀ of each head; for rotated rows the mean over all phases (``docs/method.md``).

    Args:
        module: any module; the registration survives copies, pickling, DDP and FSDP2.
        query, key, value, output: names of the weights in ``module``, stored as in ``nn.Linear`` or ``Conv1D``. For a
            fused weight, give the same name for several of the first three.
        num_heads: H, the number of query heads.
        num_key_value_heads: heads of keys and values, each for the same number of consecutive queries; by default H.
        by_head: in a fused weight, q, k and v of the first group of heads come first, then those of the next group.
        rotary: how rotary embeddings pair the rows of Q and K: "halves" (row i with i + r/2), "interleaved" (2i with
            2i + 1), or None without rotary embeddings.
        rotary_size: the number of rotated rows of a head, counted from the first; by default all r.
        name: needed if ``module`` has several attention layers.

    Raises:
        ValueError: a parameter is missing, ``rotary_size`` is given without ``rotary``, or sizes do not fit together;
            nothing is registered then.
    """
    shared = num_heads if num_key_value_heads is None else num_key_value_heads
    weights = AttentionWeights((query, key, value, output), num_heads, shared, by_head, rotary, rotary_size)
    weights.pairs(module, f"attention {name or type(module).__name__}")
    registered = module.__dict__.setdefault(_ATTENTION_REGISTRY, {})
    if registered.setdefault(name, weights) != weights:
        raise ValueError(f"{type(module).__name__} already has an attention named {name!r}: give this one another name")


def registered_products(model: nn.Module) -> list[Product]:
    """The products registered with :func:`register_product` and :func:`register_attention`. A product whose factors are
    all tied to those of one in an earlier module counts once.

    Raises:
        ValueError: a parameter that is gone.
    """
    products: list[Product] = []
    known: set[Any] = set()
    for path, module in model.named_modules():
        own: list[Product] = []
        prefix = f"{path}." if path else ""
        for kind, weight_names, num_heads, name in module.__dict__.get(REGISTRY, ()):
            full_name = f"{prefix}{name}" if name else path or type(module).__name__
            weights = _get_weights(module, weight_names, f"product {full_name}")
            own.append(Product(full_name, kind, num_heads, weights, tuple(prefix + n for n in weight_names)))
        for name, attention in module.__dict__.get(_ATTENTION_REGISTRY, {}).items():
            stem = f"{prefix}{name}." if name else prefix
            pairs = attention.pairs(module, f"attention {stem.removesuffix('.') or type(module).__name__}")
            own += [_as_product(pair, stem, (prefix, "")) for pair in pairs]
        products += [product for product in own if _identity(product) not in known]
        known.update(map(_identity, own))
    return products


def _identity(product: Product) -> Any:
    return product.kind, product.num_heads, tuple(map(id, product.weights)), getattr(product, "pair", None)


def _products_of_bert(model: nn.Module) -> list[Product]:
    """Products of BERT's attention without tied weights: a parameter is a factor of one product only."""
    products: list[Product] = []
    taken: set[int] = set()
    for product in factor_pairs(model):
        weights = {id(weight) for weight in product.weights}
        if len(weights) == 2 and not weights & taken:
            products.append(product)
            taken |= weights
    return products


def _attention_products(model: nn.Module, taken: set[int]) -> tuple[list[Product], list[str]]:
    """Products of attention without weights that are ``taken``, and the classes of modules that were not understood."""
    modules, taken = dict(model.named_modules()), set(taken)
    products: list[Product] = []
    in_part: set[str] = set()
    unknown: dict[str, str] = {}  # path -> class
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        found, is_open = find_pairs(module, modules.get(parent) if path else None, path)
        # A weight that several modules share is assigned to the first of them.
        untied, tied = without_tied(found)
        pairs = [pair for pair in untied if not {id(pair.left.weight), id(pair.right.weight)} & taken]
        prefix, above = (f"{each}." if each else "" for each in (path, parent))
        stem = above if any(pair.right.in_parent for pair in pairs) else prefix
        products += [_as_product(pair, stem, (prefix, above)) for pair in pairs]
        name = type(module).__name__
        of_tied = [weight for pair in tied for weight in (pair.left.weight, pair.right.weight)]
        if any(weight.requires_grad and id(weight) not in taken for weight in of_tied):
            in_part.add(name)
        elif is_open and (found or "Attention" in name):
            left = _not_understood(module, pairs, taken)
            if found or has_projections(module):
                in_part |= {name} if left else set()
            elif len(left) > 1:
                unknown[prefix] = name
        taken.update(id(each.weight) for pair in pairs for each in (pair.left, pair.right))
    names = [name for product in products for name in product.weight_names]
    unknown = {path: name for path, name in unknown.items() if not any(each.startswith(path) for each in names)}
    return products, sorted({*unknown.values(), *in_part})


def _not_understood(module: nn.Module, pairs: list[FoundPair], taken: set[int]) -> list[nn.Parameter]:
    """Trainable matrices with rows that are neither ``taken`` nor factors of ``pairs``."""
    rows: dict[int, int] = {}  # number of rows left
    for pair in pairs:
        for located, view in zip((pair.left, pair.right), pair.pair.views):
            weight = located.weight
            rows[id(weight)] = rows.get(id(weight), weight.shape[view.dim]) - view.num_rows
    return [w for w in matrices_of(module) if w.requires_grad and id(w) not in taken and rows.get(id(w), 1)]


def _as_product(pair: FoundPair, stem: str, prefixes: tuple[str, str]) -> Product:
    """``stem`` starts the product's name, ``prefixes`` those of weights in the module and in its parent."""
    located = (pair.left, pair.right)
    weights = (pair.left.weight, pair.right.weight)
    names = (f"{prefixes[each.in_parent]}{each.name}" for each in located)
    facts = (f"{stem}{pair.kind}", pair.kind, pair.num_heads, weights, tuple(names))
    return Product(*facts) if pair.is_plain else ViewProduct(*facts, pair.pair)


def _refuse_two_products(products: list[Product]) -> None:
    owners: dict[int, list[tuple[Product, int]]] = {}
    for product in products:
        for index, (weight, weight_name) in enumerate(zip(product.weights, product.weight_names)):
            for other, place in owners.setdefault(id(weight), []):
                if not _are_apart(product, index, other, place):
                    raise ValueError(
                        f"{weight_name} is a factor of product {product.name} and, as {other.weight_names[place]}, "
                        f"of product {other.name}: a parameter can be a factor of only one product"
                    )
            owners[id(weight)].append((product, index))


def _refuse_equal_names(registered: list[Product], products: list[Product]) -> None:
    counts = Counter(product.name for product in products)
    for product in registered:
        if counts[product.name] > 1:
            raise ValueError(
                f"two products are named {product.name}, one of them of {' and '.join(product.weight_names)}: register "
                "it with another name"
            )


def _are_apart(product: Product, index: int, other: Product, place: int) -> bool:
    """Whether two factors are disjoint rows of their parameter."""
    if not isinstance(product, ViewProduct) or not isinstance(other, ViewProduct):
        return False
    view, second = product.pair.views[index], other.pair.views[place]
    return not view.meets(second)


def _get_weights(module, weight_names, where) -> tuple[nn.Parameter, ...]:
    return tuple(weight_of(module, name, where) for name in weight_names)


__all__ = ["RANK_DIMS", "find_products", "register_attention", "register_product"]
