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
    """Keep direction i of a layer while σᵢ² / (I + O) > λ; λ by bisection on the parameter budget.

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
        """Never above the budget; what bisection leaves of it goes to the next best directions that fit."""
        bounds = self.bounds(layers)
        return make_plan(layers, spend(layers, values, check_reachable(layers, self.keep_parameters, bounds), bounds))


def spend(layers: Mapping[str, Layer], values: Mapping[str, Tensor], budget: int, bounds: Bounds) -> dict[str, int]:
    """Ranks that spend a budget of parameters on the directions of the largest σ² / (I + O)."""
    gains = {
        name: values[name].double().square() / (layer.in_features + layer.out_features)
        for name, layer in layers.items()
    }
    low, high = 0.0, max(gain[0].item() for gain in gains.values())
    for _ in range(200):
        middle = (low + high) / 2
        if total_cost(layers, _ranks(gains, middle, bounds)) > budget:
            low = middle
        else:
            high = middle
    return _fill(layers, gains, _ranks(gains, high, bounds), budget, bounds)


def _ranks(gains: Mapping[str, Tensor], threshold: float, bounds: Bounds) -> dict[str, int]:
    return {name: bounds.clip(name, int((gain > threshold).sum())) for name, gain in gains.items()}


def _fill(
    layers: Mapping[str, Layer], gains: Mapping[str, Tensor], ranks: dict[str, int], budget: int, bounds: Bounds
) -> dict[str, int]:
    left = budget - total_cost(layers, ranks)
    queue = [(-_next_gain(gains[name], rank, bounds.step), name) for name, rank in ranks.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        layer, rank = layers[name], ranks[name]
        if rank > layer.max_rank:
            continue
        raised = bounds.next(name, rank)
        extra = layer.cost(raised) - layer.cost(rank)
        if 0 < extra <= left:
            ranks[name] = raised
            left -= extra
            heapq.heappush(queue, (-_next_gain(gains[name], raised, bounds.step), name))
    return ranks


def _next_gain(gain: Tensor, rank: int, step: int) -> float:
    return gain[rank : rank + step].mean().item() if rank < len(gain) else 0.0
