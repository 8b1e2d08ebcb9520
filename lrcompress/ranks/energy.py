"""As much rank as a share of the spectrum needs."""

from collections.abc import Mapping
from typing import Literal, final

from pydantic import Field
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import AbstractSelector, make_plan


@final
class Energy(AbstractSelector):
    """Per layer the least r whose squared values reach a share of all of them, on the method's own spectrum."""

    kind: Literal["energy"] = "energy"
    share: float = Field(default=0.95, gt=0, lt=1)
    """share of the squared singular values to keep"""

    def select(self, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """Ranks rounded up to a multiple of `round_to`, so that the share is reached."""
        ranks: dict[str, int] = {}
        for name in layers:
            shares = values[name].double().square().cumsum(0)
            least = int((shares < self.share * shares[-1]).sum()) + 1
            ranks[name] = -(-least // self.round_to) * self.round_to
        return make_plan(layers, ranks)
