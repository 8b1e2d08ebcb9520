"""The same kept fraction in each layer."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import AbstractSelector, check_reachable, make_plan, round_down, total_cost


@final
class Uniform(AbstractSelector):
    """r = keep · I·O / (I + O) in each layer, rounded so that the sum stays within the budget.

    All are rounded down first; what that leaves goes to the layers that lost the most, a step each: baselines
    of equal size must not be smaller.
    """

    kind: Literal["uniform"] = "uniform"
    keep_parameters: float = Field(gt=0, le=1)
    """share of the target layers' parameters that remains"""
    needs_spectra: ClassVar[bool] = False

    def select(self, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """Never above the budget; RecipeError when the smallest ranks already exceed it."""
        budget = check_reachable(layers, self.keep_parameters, self.round_to)
        exact = {
            name: self.keep_parameters * layer.dense_parameters / (layer.in_features + layer.out_features)
            for name, layer in layers.items()
        }
        ranks = self._at(self.keep_parameters, layers)
        if total_cost(layers, ranks) > budget:  # layers at their smallest rank take their excess from the others
            low, high = 0.0, self.keep_parameters
            for _ in range(60):
                middle = (low + high) / 2
                fits = total_cost(layers, self._at(middle, layers)) <= budget
                low, high = (middle, high) if fits else (low, middle)
            ranks = self._at(low, layers)
        left = budget - total_cost(layers, ranks)
        for name in sorted(layers, key=lambda name: ranks[name] - exact[name]):
            layer, raised = layers[name], ranks[name] + self.round_to
            extra = layer.cost(raised) - layer.cost(ranks[name])
            if 0 < extra <= left and raised <= layer.max_rank:
                ranks[name] = raised
                left -= extra
        return make_plan(layers, ranks)

    def _at(self, share: float, layers: Mapping[str, Layer]) -> dict[str, int]:
        return {
            name: round_down(
                int(share * layer.dense_parameters / (layer.in_features + layer.out_features)), layer, self.round_to
            )
            for name, layer in layers.items()
        }
