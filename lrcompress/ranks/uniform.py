"""The same kept fraction in each layer."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import AbstractSelector, check_reachable, make_plan, round_down


@final
class Uniform(AbstractSelector):
    """r = ⌊keep · I·O / (I + O)⌋ in each layer."""

    kind: Literal["uniform"] = "uniform"
    keep_parameters: float = Field(gt=0, le=1)
    """share of the target layers' parameters that remains"""
    needs_spectra: ClassVar[bool] = False

    def select(self, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """Never above the budget; RecipeError when the smallest ranks already exceed it."""
        check_reachable(layers, self.keep_parameters, self.round_to)
        ranks = {
            name: round_down(
                int(self.keep_parameters * layer.dense_parameters / (layer.in_features + layer.out_features)),
                layer,
                self.round_to,
            )
            for name, layer in layers.items()
        }
        return make_plan(layers, ranks)
