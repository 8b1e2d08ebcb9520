"""The same kept fraction in each layer."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import AbstractSelector, check_reachable, make_plan, project
from lrcompress.ranks.bounds import Bounds
from lrcompress.ranks.context import NOTHING, AbstractContext


@final
class Uniform(AbstractSelector):
    """r = keep · I·O / (I + O) in each layer (of layout plain), rounded so that the sum stays within the budget.

    All are rounded down first; what that leaves goes to the layers that lost the most, a step each: baselines
    of equal size must not be smaller.
    """

    kind: Literal["uniform"] = "uniform"
    keep_parameters: float = Field(gt=0, le=1)
    """share of the target layers' parameters that remains"""
    needs_spectra: ClassVar[bool] = False

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """Never above the budget; RecipeError when the smallest ranks already exceed it."""
        bounds = self.bounds(layers)
        budget = check_reachable(layers, self.keep_parameters, bounds)
        return make_plan(layers, uniform_ranks(layers, self.keep_parameters, budget, bounds))


def uniform_ranks(layers: Mapping[str, Layer], share: float, budget: int, bounds: Bounds) -> dict[str, int]:
    """The same share of its break-even rank for each layer, within a budget of parameters."""
    wanted = {name: layer.rank_of(share) for name, layer in layers.items()}
    return project(layers, wanted, budget, bounds, stretch=1.0)
