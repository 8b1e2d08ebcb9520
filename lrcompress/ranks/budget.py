"""One global budget, spent where it saves the most loss."""

import heapq
from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import AbstractSelector, check_reachable, least_rank, make_plan, round_down, total_cost


@final
class Budget(AbstractSelector):
    """Keep direction i of a layer while σᵢ² / (I + O) > λ; λ by bisection on the parameter budget.

    Only for methods whose squared singular values estimate the loss (`kron`), and so compare between layers;
    for one-sided methods this allocation measured worse than uniform ranks.
    """

    kind: Literal["budget"] = "budget"
    keep_parameters: float = Field(gt=0, le=1)
    """share of the target layers' parameters that remains"""
    needs_loss_estimates: ClassVar[bool] = True

    def select(self, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """Never above the budget; what bisection leaves of it goes to the next best directions that fit."""
        budget = check_reachable(layers, self.keep_parameters, self.round_to)
        gains = {
            name: values[name].double().square() / (layer.in_features + layer.out_features)
            for name, layer in layers.items()
        }
        low, high = 0.0, max(gain[0].item() for gain in gains.values())
        for _ in range(200):
            middle = (low + high) / 2
            if total_cost(layers, self._ranks(layers, gains, middle)) > budget:
                low = middle
            else:
                high = middle
        ranks = self._ranks(layers, gains, high)
        return make_plan(layers, self._fill(layers, gains, ranks, budget))

    def _ranks(self, layers: Mapping[str, Layer], gains: Mapping[str, Tensor], threshold: float) -> dict[str, int]:
        return {
            name: round_down(max(int((gains[name] > threshold).sum()), 1), layer, self.round_to)
            for name, layer in layers.items()
        }

    def _fill(
        self, layers: Mapping[str, Layer], gains: Mapping[str, Tensor], ranks: dict[str, int], budget: int
    ) -> dict[str, int]:
        left = budget - total_cost(layers, ranks)
        queue = [(-self._next_gain(gains[name], rank), name) for name, rank in ranks.items()]
        heapq.heapify(queue)
        while queue:
            _, name = heapq.heappop(queue)
            layer, rank = layers[name], ranks[name]
            if rank > layer.max_rank:
                continue
            step = self.round_to if rank >= least_rank(layer, self.round_to) else 1
            extra = layer.cost(rank + step) - layer.cost(rank)
            if extra <= left:
                ranks[name] = rank + step
                left -= extra
                heapq.heappush(queue, (-self._next_gain(gains[name], rank + step), name))
        return ranks

    def _next_gain(self, gain: Tensor, rank: int) -> float:
        return gain[rank : rank + self.round_to].mean().item() if rank < len(gain) else 0.0
