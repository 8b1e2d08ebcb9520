"""One global budget, spent where it saves the most loss."""

import heapq
from collections.abc import Mapping
from typing import Literal, final

from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import AbstractSelector, check_reachable, make_plan, total_cost
from lrcompress.ranks.bounds import Bounds, Dense
from lrcompress.ranks.context import NOTHING, AbstractContext


@final
class Budget(AbstractSelector):
    """Keep direction i of a layer while σᵢ² / (I + O) > λ, with λ such that the parameter budget is spent.

    Only for methods whose squared singular values estimate the loss (`kron`), and so compare between layers;
    for one-sided methods this allocation measured worse than uniform ranks.
    """

    kind: Literal["budget"] = "budget"
    keep_parameters: float = Field(gt=0, le=1)
    """share of the target layers' parameters that remains"""
    floor: dict[str, int] = Field(default_factory=dict)
    """glob pattern on layer names → the least rank there"""
    ceiling: dict[str, int] = Field(default_factory=dict)
    """glob pattern → the largest rank there"""
    pinned: dict[str, int | Dense] = Field(default_factory=dict)
    """glob pattern → the rank there, or `dense`; it counts in the budget"""

    @model_validator(mode="after")
    def _positive(self) -> "Budget":
        for key in ("floor", "ceiling", "pinned"):
            low = {pattern: rank for pattern, rank in getattr(self, key).items() if rank != "dense" and rank < 1}
            if low:
                raise ValueError(f"{key}: ranks must be at least 1, got {low}")
        return self

    @property
    def needs_loss_estimates(self) -> bool:
        """Always."""
        return True

    def bounds(self, layers: Mapping[str, Layer]) -> Bounds:
        """With floors, ceilings and pinned layers."""
        return Bounds.of(
            layers, self.round_to, self.min_rank, floor=self.floor, ceiling=self.ceiling, pinned=self.pinned
        )

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """Never above the budget; a number of parameters goes where it saves the most (`spend`)."""
        return self.at(self.keep_parameters, layers, values)

    def at(self, share: float, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """The plan of another budget."""
        bounds = self.bounds(layers)
        return make_plan(layers, spend(layers, values, check_reachable(layers, share, bounds), bounds))


def spend(layers: Mapping[str, Layer], values: Mapping[str, Tensor], budget: int, bounds: Bounds) -> dict[str, int]:
    """Ranks that spend a budget of parameters where a number saves the most of the loss.

    Each layer's saving as a function of its cost is made concave (its upper hull), and the pieces of all layers are
    taken in falling order of saving per number. So a piece can be one direction, many (in the pivoted layout the
    numbers of a direction grow fewer with the rank), or the whole way to the dense weight, which saves all that is
    left. A layer whose next piece is larger than what is left goes on in single steps.
    """
    curves = {name: _Curve(layer, values[name], bounds) for name, layer in layers.items()}
    left = budget - total_cost(layers, bounds.least)
    queue = [(-curve.slope, name) for name, curve in curves.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        curve = curves[name]
        extra = curve.extra
        if extra <= left:
            left -= extra
            curve.advance()
        elif curve.pieces:
            curve.pieces.clear()
        else:
            continue
        if curve.extra > 0:
            heapq.heappush(queue, (-curve.slope, name))
    return {name: curve.rank for name, curve in curves.items()}


class _Curve:
    """What a layer saves at its ranks, and how far it has come: by the pieces of its hull, or by single steps."""

    def __init__(self, layer: Layer, values: Tensor, bounds: Bounds) -> None:
        self.layer, self.bounds = layer, bounds
        self.rank, self.most = bounds.least[layer.name], bounds.most[layer.name]
        self.saved: list[float] = [0.0, *values.double().square().cumsum(0).tolist()]  # pyright: ignore[reportUnknownMemberType]
        self.pieces = self._hull()

    @property
    def extra(self) -> int:
        """Numbers that what comes next costs, 0 at the end."""
        return self.layer.cost(self._next()) - self.layer.cost(self.rank)

    @property
    def slope(self) -> float:
        """What it saves, per number."""
        return self._slope(self.rank, self._next())

    def advance(self) -> None:
        """Take it."""
        self.rank = self.pieces.pop(0) if self.pieces else self._next()

    def _next(self) -> int:
        if self.pieces:
            return self.pieces[0]
        rank = self.bounds.next(self.layer.name, self.rank)
        return self.most if rank > self.layer.max_rank else rank

    def _hull(self) -> list[int]:
        """The ranks above the present one at which the concave hull of the savings has its corners."""
        first = (self.rank // self.bounds.step + 1) * self.bounds.step
        ranks = [*range(first, min(self.most, self.layer.max_rank) + 1, self.bounds.step)]
        if self.most > max([self.rank, self.layer.max_rank, *ranks[-1:]]):
            ranks.append(self.most)
        hull = [self.rank]
        for rank in ranks:
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-1], rank):
                hull.pop()
            hull.append(rank)
        return hull[1:]

    def _slope(self, low: int, high: int) -> float:
        cost = self.layer.cost(high) - self.layer.cost(low)
        return (self._at(high) - self._at(low)) / max(cost, 1)

    def _at(self, rank: int) -> float:
        return self.saved[min(rank, len(self.saved) - 1)]
