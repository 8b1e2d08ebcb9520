"""As much rank as a share of the spectrum needs."""

from collections.abc import Mapping
from typing import Literal, final

from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.linalg import tail_shares
from lrcompress.ranks.base import AbstractSelector, ErrorCurve, make_plan, within_budget
from lrcompress.ranks.context import NOTHING, AbstractContext

DEFAULT_SHARE = 0.95


@final
class Energy(AbstractSelector):
    """Per layer the least r whose squared values reach a share of all of them, on the method's own spectrum."""

    kind: Literal["energy"] = "energy"
    share: float | None = Field(default=None, gt=0, lt=1)
    """share of the squared singular values to keep in each layer; 0.95 if no budget is given"""
    keep_parameters: float | None = Field(default=None, gt=0, le=1)
    """in place of `share`: the largest share whose ranks keep within this share of the target layers' parameters"""

    @model_validator(mode="after")
    def _one_of_them(self) -> "Energy":
        if self.share is not None and self.keep_parameters is not None:
            raise ValueError("give `share` or `keep_parameters`, not both: one follows from the other")
        return self

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """Ranks rounded up to a multiple of `round_to`, so that the share is reached; down within a budget."""
        bounds = self.bounds(layers)
        budget = self.budget(layers, bounds)
        if budget is not None:
            ranks, tail = within_budget(
                layers, {name: ErrorCurve(tail_shares(values[name])) for name in layers}, budget, bounds
            )
            context.note(f"The budget is met by keeping {1 - tail:.4f} of each layer's squared spectrum.")
            return make_plan(layers, ranks)
        share = self.share or DEFAULT_SHARE
        ranks: dict[str, int] = {}
        for name in layers:
            shares = values[name].double().square().cumsum(0)
            least = int((shares < share * shares[-1]).sum()) + 1
            ranks[name] = bounds.clip(name, -(-least // self.round_to) * self.round_to)
        return make_plan(layers, ranks)
