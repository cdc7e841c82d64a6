"""Configuration: which layers are factorized, and how."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf
from numbers import Integral, Real
from typing import Any

from fnl_hf.layers.base import INITS, MODES, STUDIED_INITS

SIZES = ("rank_scale", "target_ratio", "model_ratio", "energy", "ranks")
# Defaults: at a quarter of its rank, a square layer has half of its parameters; an overcomplete layer at full rank has
# twice (deep: three times) as many.
DEFAULT_RANK_SCALES = {"low_rank": 0.25, "wide": 1.0, "deep": 1.0}
TYPES = ("Linear", "Conv1D", "Conv2d")


@dataclass
class FactorizationConfig:
    """What :func:`fnl_hf.factorize` does. Set at most one of ``rank_scale`` to ``ranks``.

    A layer's weight is an m x n matrix; a convolution has a (c_out·k_h) x (c_in·k_w) matrix in each of its groups. The
    full rank is min(m, n).

    Args:
        mode: "low_rank" (U Vᵀ, smaller than the dense layer), "wide" (U Vᵀ of at least full rank) or "deep" (U M Vᵀ of
            at least full rank).
        rank_scale: the rank is max(1, round(rank_scale · full rank)). Default: 0.25 for "low_rank", otherwise 1.
        target_ratio: parameters of all factorized layers, divided by those of the dense layers; ranks are proportional
            to the full ranks. At most 1 with mode ``low_rank``.
        model_ratio: parameters of the whole model, divided by those before; the factorized layers compensate for
            everything that stays dense. At most 1 with mode ``low_rank``.
        energy: the minimum share of Σσ² that each layer keeps, above 0 and at most 1; if calibrated, of the loss.
        ranks: {type or pattern: rank}; only matching layers are factorized, and the first match counts.
        init: "spectral" (the paper's) or "default" (its baseline); see
            :meth:`fnl_hf.layers.FactorizedLayer.from_dense`.
        include: types ("Linear", "Conv1D", "Conv2d", "Embedding") or shell-style patterns of names. A pattern may omit
            the beginning of a name, up to a dot: "query" matches every ``….query``.
        exclude: types or patterns of layers to keep dense.
        seed: seed of the random draws.

    Layers that ``include`` selects by type stay dense if they are a head, share their weight with another layer, or are
    already a factor of a product (:func:`fnl_hf.find_products`). A pattern of ``include`` or ``ranks`` selects these
    layers, too, except factors of a registered product.

    Raises:
        ValueError: a value is out of its range, or two sizes are given.
    """

    mode: str = "low_rank"
    rank_scale: float | None = None
    target_ratio: float | None = None
    model_ratio: float | None = None
    energy: float | None = None
    ranks: Mapping[str, int] | None = None
    init: str = "spectral"
    include: Sequence[str] = TYPES
    exclude: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self):
        for name, known, studied in (("mode", MODES, ()), ("init", INITS, STUDIED_INITS)):
            if getattr(self, name) not in (*known, *studied):
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        for name in ("include", "exclude"):
            entries = getattr(self, name)
            is_list = isinstance(entries, Iterable) and not isinstance(entries, str)
            if not is_list or not all(isinstance(entry, str) for entry in entries):
                raise ValueError(f"{name} ({entries!r}) must be a list of layer types and name patterns")
        self._validate_sizes()

    def _validate_sizes(self):
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give only one of them")
        of_parameters = 1.0 if self.mode == "low_rank" else inf
        bounds = {"rank_scale": inf, "target_ratio": of_parameters, "model_ratio": of_parameters, "energy": 1.0}
        for name, largest in bounds.items():
            value = getattr(self, name)
            if value is not None and not (is_number(value, Real) and 0.0 < value <= largest and value < inf):
                raise ValueError(
                    f"{name} ({value!r}) must be above 0 and {'finite' if largest == inf else 'at most 1'}"
                )
        if self.energy is not None and self.mode != "low_rank":
            raise ValueError(f"energy ({self.energy}) needs mode 'low_rank', not {self.mode!r}")
        if not isinstance(self.ranks, Mapping | None):
            raise ValueError(f"ranks ({self.ranks!r}) must be a mapping of layer types or name patterns to ranks")
        for pattern, rank in (self.ranks or {}).items():
            if not isinstance(pattern, str):
                raise ValueError(f"ranks: {pattern!r} must be a layer type or name pattern")
            if not is_number(rank, Integral) or rank < 1:
                raise ValueError(f"the rank of {pattern!r} ({rank!r}) must be a whole number of at least 1")

    def settings(self) -> dict[str, Any]:
        """All given and derived settings, as JSON."""
        given: dict[str, Any] = {name: float(size) for name in SIZES[:4] if (size := getattr(self, name)) is not None}
        if self.ranks is not None:
            given["ranks"] = {pattern: int(rank) for pattern, rank in self.ranks.items()}
        lists = {"include": list(self.include), "exclude": list(self.exclude)}
        default = {"rank_scale": DEFAULT_RANK_SCALES[self.mode]}
        return {"mode": self.mode, **(given or default), "init": self.init, **lists, "seed": int(self.seed)}


def is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def name_matches(name: str, pattern: str) -> bool:
    """Whether a layer's name, or the end of it after a dot, matches a pattern."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
