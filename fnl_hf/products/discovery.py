"""Which products of parameters a model holds: those of its attention, and those that its modules registered."""

from torch import nn

from fnl_hf.bert.factorization import RANK_DIMS, Product, validate_product
from fnl_hf.bert.modeling_fnl_bert import factor_pairs

_REGISTRY = "_registered_products"  # on the module: attributes of parameters would not survive FSDP2


def register_product(module: nn.Module, kind: str, *weight_names: str, num_heads: int = 1, name: str = "") -> None:
    """Declare that parameters of ``module`` are the factors of a product, for decay and diagnostics::

        register_product(adapter, "linear", "up.weight", "down.weight")  # up(down(x)): U Vᵀ
        # up(mid(down(x))): U M Vᵀ
        register_product(block, "deep", "up.weight", "mid.weight", "down.weight")

    Args:
        module: any module; the registration stays with it through copies, pickling, DDP and FSDP2.
        kind: how the factors are stored, a key of :data:`fnl_hf.RANK_DIMS`.
        weight_names: the factors' names in ``module``, from left to right.
        num_heads: into how many products the rank splits evenly.
        name: the product's own name in ``module``, needed when it has several; by default that of the module alone.

    Raises:
        ValueError: an unknown kind, a missing parameter, shapes that do not match, or a name that is taken.
    """
    weights = _get_weights(module, weight_names, f"a product of {type(module).__name__}")
    validate_product(weights, kind, num_heads, f"product ({', '.join(weight_names)})")
    registered = module.__dict__.setdefault(_REGISTRY, [])
    entry = (kind, tuple(weight_names), num_heads, name)
    if entry in registered:
        return
    if any(name == other for *_, other in registered):
        raise ValueError(
            f"{type(module).__name__} has a product named {name!r} already: give product ({', '.join(weight_names)}) "
            "another name"
        )
    registered.append(entry)


def find_products(model: nn.Module) -> list[Product]:
    """Every product of ``model``: its attention's (:func:`fnl_hf.factor_pairs`), then the registered ones.

    Raises:
        ValueError: a registered parameter that is gone, or a parameter that is a factor of two products.
    """
    products = factor_pairs(model)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for kind, weight_names, num_heads, name in module.__dict__.get(_REGISTRY, ()):
            full_name = f"{prefix}{name}" if name else path or type(module).__name__
            weights = _get_weights(module, weight_names, f"product {full_name}")
            products.append(Product(full_name, kind, num_heads, weights, tuple(prefix + n for n in weight_names)))
    owners: dict[int, tuple[str, str]] = {}
    for product in products:
        for weight, weight_name in zip(product.weights, product.weight_names):
            if id(weight) in owners:
                other, other_name = owners[id(weight)]
                raise ValueError(
                    f"{weight_name} is a factor of product {product.name} and, as {other_name}, of product {other}: "
                    "a parameter can be a factor of one product only"
                )
            owners[id(weight)] = (product.name, weight_name)
    return products


def _get_weights(module, weight_names, where) -> tuple[nn.Parameter, ...]:
    weights = []
    for name in weight_names:
        try:
            weights.append(module.get_parameter(name))
        except AttributeError as error:
            raise ValueError(f"{where}: {type(module).__name__} has no parameter {name!r}") from error
    return tuple(weights)


__all__ = ["RANK_DIMS", "find_products", "register_product"]
