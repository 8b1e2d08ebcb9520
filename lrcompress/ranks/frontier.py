"""Any size from one run: a list of budgets, one of which is saved."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.allocate import Allocation, allocate
from lrcompress.ranks.base import AbstractSelector
from lrcompress.ranks.context import NOTHING, AbstractContext


@final
class Frontier(AbstractSelector):
    """A plan for each budget, all from one set of statistics and spectra; each is a row of the report.

    The model that is saved is the one of `choose`; another `choose` later costs its factors and its recovery.
    """

    kind: Literal["frontier"] = "frontier"
    keep_parameters: tuple[float, ...] = Field(min_length=2)
    """shares of the target layers' parameters that remain"""
    choose: float
    """the one whose model is saved"""
    recover: tuple[float, ...] = ()
    """further ones that are trained too, as rows of the report; the chosen one is, if the recipe has a recovery"""
    allocation: Allocation = "budget"
    """how a budget is divided among the layers"""
    without_loss_estimates: ClassVar[str] = "ranks.allocation: uniform"

    @model_validator(mode="after")
    def _among_them(self) -> "Frontier":
        shares = self.keep_parameters
        if any(not 0 < share <= 1 for share in shares) or len(set(shares)) < len(shares):
            raise ValueError(f"keep_parameters must be different shares above 0 and at most 1, got {list(shares)}")
        strange = [share for share in (self.choose, *self.recover) if share not in shares]
        if strange:
            raise ValueError(f"choose and recover name shares of keep_parameters ({list(shares)}), got {strange[0]}")
        return self

    @property
    def needs_loss_estimates(self) -> bool:
        """For allocation `budget`."""
        return self.allocation == "budget"

    @property
    def kept_share(self) -> float:
        """The chosen one."""
        return self.choose

    @property
    def least_share(self) -> float:
        """Of all."""
        return min(self.keep_parameters)

    @property
    def others(self) -> tuple[float, ...]:
        """The budgets beside the chosen one, falling."""
        return tuple(sorted(set(self.keep_parameters) - {self.choose}, reverse=True))

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """The plan of the chosen budget."""
        return self.at(self.choose, layers, values)

    def at(self, share: float, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """The plan of one budget."""
        return allocate(self.allocation, layers, values, share, self.bounds(layers))
