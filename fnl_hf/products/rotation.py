"""Whether and how rotary embeddings rotate rows of queries and keys, from the source and behavior of ``forward``."""

import ast
import functools
import inspect
import itertools
import operator
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fnl_hf.products.views import HALVES, INTERLEAVED, pair_rows

ROTARY_SIZES = ("rotary_ndims", "rotary_dim")
OPERATORS = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda left, right: left in right,
}
GIVEN = "given"  # an argument of ``forward`` that is not None


class Use(NamedTuple):
    """A use of ``name`` in ``forward`` under the condition that each of these expressions is true, or false."""

    name: str
    conditions: tuple[tuple[ast.expr, bool], ...]


def rotation_of(module: nn.Module, head_size: int, is_cross: bool = False) -> tuple[str, int] | None:
    """The pairing of rows and how many rows of a head are rotated; ("", 0) without rotation, None if it is unknown.

    ``forward`` names the rotating function and its conditions. Applying the function to unit vectors shows which rows
    it mixes. ``is_cross``: queries and keys come from different sequences.
    """
    cls: Any = type(module)
    if not any(_is_rotary(name) for name in _names_of(cls)):
        return "", 0
    uses, known = _uses_of(cls), _known_of(module, is_cross)
    held = {use: _all_hold(use.conditions, known) for use in uses}
    if uses and not any(value is not False for value in held.values()):
        return "", 0
    config = getattr(module, "config", None)
    parameters = _rope_parameters(module, config) or {}
    factor = float(parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)
    # Proportional angles span the head, and the last of them are 0: the rotated rows are not the first ones.
    if True not in held.values() or parameters.get("rope_type") == "proportional" and factor < 1.0:
        return None
    size = number_of(module, ROTARY_SIZES) or int(head_size * factor)
    for name in (use.name for use, value in held.items() if value is not False):
        function = inspect.unwrap(cls.forward).__globals__.get(name)
        for pairing in (HALVES, INTERLEAVED) if function is not None and size % 2 == 0 and size else ():
            expected = sorted(pair_rows(torch.arange(size, device="cpu"), pairing).tolist())
            if expected in _mixed_rows(function, head_size, size):
                return pairing, size
    return None


def number_of(owner: Any, names: tuple[str, ...]) -> int | None:
    """The first attribute of these names that is a positive number."""
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int) and value > 0), None)


def _is_rotary(name: str) -> bool:
    words = name.lower().split("_")
    return any("rotary" in word or word in {"rope", "rot", "rotate"} for word in words)


@functools.cache
def _names_of(cls: Any) -> set[str]:
    """All names in ``forward`` and the methods that it calls."""
    names = _mentioned(cls.forward)
    return names.union(*(_mentioned(getattr(cls, name, None)) for name in names))


def _mentioned(function: Any) -> set[str]:
    return _names_in(inspect.unwrap(function).__code__) if inspect.isfunction(function) else set()


def _names_in(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))  # of comprehensions
    return set(code.co_names).union(*map(_names_in, inner))


# When it rotates


@functools.cache
def _uses_of(cls: Any) -> tuple[Use, ...]:
    """Where ``forward``, or a method that it calls, rotates; nothing if the source cannot be read."""
    try:
        uses = list(_uses_in(cls.forward))
        for use in tuple(uses):
            method = getattr(cls, use.name, None)
            if inspect.isfunction(method) and method is not cls.forward:
                uses += [Use(each.name, use.conditions + each.conditions) for each in _uses_in(method)]
    except (OSError, SyntaxError, TypeError):
        return ()
    uses = [use for use in uses if _is_rotary(use.name)]
    return tuple([use for use in uses if use.name.removeprefix("_").startswith("apply")] or uses)


def _uses_in(function: Any) -> Iterator[Use]:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    for statement in getattr(ast.parse(source).body[0], "body", ()):
        yield from _uses_below(statement, ())


def _uses_below(node: ast.AST, conditions: tuple[tuple[ast.expr, bool], ...]) -> Iterator[Use]:
    if isinstance(node, ast.If | ast.IfExp):
        for part, wanted in ((node.body, True), (node.orelse, False)):
            for each in part if isinstance(part, list) else [part]:
                yield from _uses_below(each, (*conditions, (node.test, wanted)))
        return
    if isinstance(node, ast.Name | ast.Attribute):
        yield Use(node.id if isinstance(node, ast.Name) else node.attr, conditions)
    for child in ast.iter_child_nodes(node):
        yield from _uses_below(child, conditions)


def _known_of(module: nn.Module, is_cross: bool) -> dict[str, Any]:
    """Values of names in ``forward``, as far as module, configuration and place in the model determine them."""
    config = getattr(module, "config", None)
    is_cross = is_cross or getattr(module, "is_cross_attention", False) is True
    states = GIVEN if is_cross else None
    known = {"self": module, "is_cross_attention": is_cross, "key_value_states": states}
    known |= {"encoder_hidden_states": states, "alibi": GIVEN if getattr(config, "alibi", False) else None}
    are_given = False if is_cross else _gives_positions(module, config)
    return known if are_given is None else known | {"position_embeddings": GIVEN if are_given else None}


def _gives_positions(module: nn.Module, config: Any) -> bool | None:
    """Whether the model passes angles to this layer, according to its configuration."""
    if hasattr(config, "position_embedding_type"):
        return config.position_embedding_type in ("rope", "rotary")
    index, thetas = getattr(module, "layer_idx", None), getattr(config, "layer_rope_theta", None)
    if isinstance(thetas, list | tuple) and isinstance(index, int) and index < len(thetas):
        return bool(thetas[index])
    if not hasattr(config, "rope_parameters"):
        return None
    parameters = _rope_parameters(module, config) or {"rope_theta": None}
    return parameters.get("rope_theta", GIVEN) is not None


def _rope_parameters(module: nn.Module, config: Any) -> dict[str, Any] | None:
    """Those of the layer's type, where each type has its own."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return None
    index, kinds = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
    of_index = kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else None
    layer_type = getattr(module, "layer_type", None) or of_index
    return parameters.get(layer_type, parameters)


def _all_hold(conditions: tuple[tuple[ast.expr, bool], ...], known: Mapping[str, Any]) -> bool | None:
    return _decide([None if (value := _holds(test, known)) is None else value is wanted for test, wanted in conditions])


def _decide(values: list[bool | None], decisive: bool = False) -> bool | None:
    """Of "and"; with True decisive, of "or"."""
    if decisive in values:
        return decisive
    return None if None in values else not decisive


def _holds(test: ast.expr, known: Mapping[str, Any]) -> bool | None:
    """Whether an expression is true; None if that depends on unknown values."""
    if isinstance(test, ast.BoolOp):
        return _decide([_holds(value, known) for value in test.values], isinstance(test.op, ast.Or))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _holds(test.operand, known)
        return None if value is None else not value
    try:
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left, right = _value_of(test.left, known), _value_of(test.comparators[0], known)
            return bool(OPERATORS[type(test.ops[0])](left, right))
        return bool(_value_of(test, known))
    except (AttributeError, KeyError, TypeError):
        return None


def _value_of(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        return getattr(_value_of(node.value, known), node.attr)
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return [_value_of(each, known) for each in node.elts]
    return known[node.id if isinstance(node, ast.Name) else ""]


# What it mixes


@functools.cache
def _mixed_rows(function: Any, head_size: int, rotated: int) -> list[list[list[int]]]:
    """Pairs of inputs that reach the same output, for each way of calling ``function`` that works: with whole heads or
    only the rotated rows, in four dimensions or three, with angles for each row or each pair."""
    found = []
    for size, width, between in itertools.product((head_size, rotated), (rotated, rotated // 2), (2, 1)):
        unit = torch.eye(size, device="cpu").view(size, *[1] * between, size)
        angles = torch.ones(*[1] * between, width, device="cpu")
        try:
            result = _call(function, unit, angles)
        except Exception:  # it needs other shapes or arguments
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
