"""Decay of products whose factors are parts of parameters (products/views.py).

Of a pair of factors with rows Q (G, J, r, n) and K (G, 1, r, m), J heads to a key, ½λ Σ_gj ‖Q_gj K_gᵀ‖²_F has the
gradients (rank first, Fᵀ of the formulas)

    λ (K_g K_gᵀ) Q_gj,    λ (Σ_j Q_gj Q_gjᵀ) K_g

and the mean over rotations ½λ Σ_gj Σ_b ½‖Q_gjb‖² ‖K_gb‖², with the two rows of each pair b,

    ½λ ‖K_gb‖² Q_gjb,    ½λ (Σ_j ‖Q_gjb‖²) K_gb.

Rows that belong to no factor keep their ordinary decay. It is applied here because the base class can only decay
whole parameters.

A group's ``layout`` has one entry for each pair of factors of an attention layer, as :meth:`ViewPair.plain` gives it;
its ``params`` are the parameters of the first layer, of the second one, and so on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fnl_hf.optim.sharding import gather_rows, local, sharding_of
from fnl_hf.products.views import VIEWS, FactorView, ViewPair, pair_rows


class ViewFactor:
    """One factor: its ``rows`` (G, J, r, n) and those of its target, or None."""

    def __init__(self, view: FactorView, weights: Sequence[torch.Tensor], targets: Sequence[torch.Tensor | None]):
        target = targets[view.parameter]
        self.rows = view.rows(weights[view.parameter])
        self.target = None if target is None else view.rows(target)

    def gram(self) -> torch.Tensor:
        """FᵀF (G, r, r), summed over the heads of a group."""
        return (self.rows @ self.rows.mT).sum(1)

    def pair_squares(self, pairing: str) -> torch.Tensor:
        """½‖F_b‖² (G, r), for both rows of each pair b."""
        squares = self.rows.square().sum((1, 3))  # (G, r)
        halves = pair_rows(squares, pairing).sum(-1) / 2  # (G, r/2)
        result = torch.empty_like(squares)
        pair_rows(result, pairing).copy_(halves.unsqueeze(-1))
        return result


class LocalPair:
    """One product for one step: scale · gradient of its penalty is added to the targets of its factors."""

    def __init__(self, pair: ViewPair, unit: "ViewUnit", weights: Sequence[torch.Tensor], targets: Sequence[Any]):
        self.weights, self.scale, self.pairing = unit.weights, unit.scale, pair.pairing
        self.factors = [ViewFactor(view, weights, targets) for view in pair.views]
        self.is_updated = any(factor.target is not None for factor in self.factors)

    def add_gradients_(self, examine: Callable[..., None] | None) -> None:
        left, right = self.factors
        if self.pairing:
            squares = [factor.pair_squares(self.pairing) for factor in (left, right)]
            grams = [each.reshape(-1, 1, 1) for each in squares]
            operators = [each[:, None, :, None] for each in reversed(squares)]  # (G, 1, r, 1)
        else:
            grams = [left.gram(), right.gram()]
            operators = [each[:, None] for each in reversed(grams)]  # (G, 1, r, r)
        if examine is not None:
            examine(self, grams, grams[::-1])
        alpha: Any = self.scale
        if isinstance(alpha, torch.Tensor):  # as ``alpha`` of a kernel, it would have to be copied from its device
            scale = alpha.to(operators[0].dtype)
            operators, alpha = [operator * scale for operator in operators], 1.0
        for factor, operator in zip(self.factors, operators):
            if factor.target is None:
                continue
            if self.pairing:
                factor.target.addcmul_(factor.rows, operator, value=alpha)
            else:
                factor.target.add_(operator @ factor.rows, alpha=alpha)


class ViewUnit:
    """The parameters of one attention layer for one step.

    Args:
        weights, targets: what is decayed, and what the decay is added to: the weight itself, a tensor like it, or None.
        layout: the pairs of factors, as in the group; none for a step without Frobenius decay.
        scale: of the penalty's gradient.
        row_scales: of a factor's own rows and of all others, for ordinary decay; None for none.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor | None],
        layout: Sequence[Any],
        scale: float | torch.Tensor,
        row_scales: tuple[float | torch.Tensor, float | torch.Tensor] | None = None,
        has_products: bool = True,
    ):
        self.weights, self.targets = weights, targets
        self.pairs = [ViewPair.of(pair) for pair in layout]
        self.scale, self.row_scales, self.has_products = scale, row_scales, has_products

    def add_(self, examine: Callable[..., None] | None) -> None:
        """Apply the decay. Sharded parameters are gathered: all processes of their mesh must call this with the same
        units."""
        shardings = [sharding_of(weight) for weight in self.weights]
        if any(shardings):
            self._add_gathered_(shardings, examine)
        elif any(target is not None for target in self.targets):
            targets = [None if target is None else local(target) for target in self.targets]
            self._add_whole_([local(weight) for weight in self.weights], targets, examine)

    def _add_gathered_(self, shardings: Sequence[Any], examine: Callable[..., None] | None) -> None:
        weights = [local(weight) for weight in self.weights]
        cut = [i for i, sharding in enumerate(shardings) if sharding is not None]
        parts = [weights[i].movedim(shardings[i].dim, 0) for i in cut]
        gathered = gather_rows([part.flatten(1) for part in parts], [shardings[i] for i in cut])
        for i, part, rows in zip(cut, parts, gathered):
            weights[i] = rows.view(-1, *part.shape[1:]).movedim(0, shardings[i].dim)
        sums = [None if target is None else torch.zeros_like(w) for target, w in zip(self.targets, weights)]
        self._add_whole_(weights, sums, examine)
        for target, added, sharding in zip(self.targets, sums, shardings):
            if target is None or added is None:
                continue
            if sharding is not None:
                added = sharding.part_of(added)
            local(target).add_(added)

    def _add_whole_(
        self,
        weights: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor | None],
        examine: Callable[..., None] | None,
    ) -> None:
        for pair in self.pairs if self.has_products else ():
            product = LocalPair(pair, self, weights, targets)
            if product.is_updated:
                product.add_gradients_(examine)
        if self.row_scales is not None:
            for index, (weight, target) in enumerate(zip(weights, targets)):
                if target is not None:
                    target.addcmul_(weight, self._row_scales_of(index, weight))

    def _row_scales_of(self, index: int, weight: torch.Tensor) -> torch.Tensor:
        """A number for each row of a parameter, as a column or row that scales it."""
        assert self.row_scales is not None
        of_factors, of_others = self.row_scales
        views = [view for pair in self.pairs for view in pair.views if view.parameter == index]
        scales = weight.new_zeros(weight.shape[views[0].dim])
        scales += of_others
        for view in views:
            view.rows(scales).fill_(of_factors)
        return scales.unsqueeze(1 - views[0].dim)


def validate_views(group: dict[str, Any], where: str) -> None:
    """Check a group's ``layout`` against its parameters.

    Raises:
        ValueError: naming the group, the parameter and the bound.
    """
    params = group["params"]
    if not group.get("layout"):
        raise ValueError(
            f"{where}: product {VIEWS!r} needs a layout, which says where the factors are in their parameters: make "
            "the group with frobenius_param_groups(model, ...), which finds them, or describe them with "
            "fnl_hf.register_attention"
        )
    pairs = [ViewPair.of(pair) for pair in group["layout"]]
    size = unit_size(group)
    if len(params) != size * group.get("num_products", len(params) // size):
        raise ValueError(
            f"{where}: its attention layers have {size} parameters each, but {len(params)} are given for "
            f"{group.get('num_products', 'a whole number')} of them (num_products): FSDP1, DeepSpeed ZeRO or "
            "ZeroRedundancyOptimizer flattened or distributed the parameters"
        )
    for start in range(0, len(params), size):
        for view in (view for pair in pairs for view in pair.views):
            weight = params[start + view.parameter]
            rows = weight.shape[view.dim] if weight.dim() == 2 else 0
            if view.end > rows:
                raise ValueError(
                    f"{where}, parameter {start + view.parameter}, of shape {tuple(weight.shape)}: the rows of a "
                    f"factor end at {view.end} in dimension {view.dim}, which is outside of the parameter. FSDP1 "
                    "and DeepSpeed ZeRO flatten parameters: use FSDP2 (fully_shard) instead"
                )


def unit_size(group: dict[str, Any]) -> int:
    """The number of parameters of an attention layer."""
    return 1 + max(view[0] for left, right, _ in group["layout"] for view in (left, right))
