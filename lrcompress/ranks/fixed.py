"""Ranks as given."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import AbstractSelector, make_plan
from lrcompress.ranks.bounds import check_patterns, check_rank, first_match
from lrcompress.ranks.context import NOTHING, AbstractContext


@final
class Fixed(AbstractSelector):
    """One rank for all layers, or pattern → rank (the first pattern that matches a layer counts)."""

    kind: Literal["fixed"] = "fixed"
    rank: int | None = Field(default=None, ge=1)
    """rank of every layer that no pattern names; without it those stay dense"""
    patterns: dict[str, int] = Field(default_factory=dict)
    """glob pattern on layer names → rank"""
    needs_spectra: ClassVar[bool] = False

    @model_validator(mode="after")
    def _something(self) -> "Fixed":
        if self.rank is None and not self.patterns:
            raise ValueError("give `rank` or `patterns`")
        low = {pattern: rank for pattern, rank in self.patterns.items() if rank < 1}
        if low:
            raise ValueError(f"ranks must be at least 1, got {low}")
        given = [*self.patterns.values(), *([self.rank] if self.rank is not None else [])]
        if self.min_rank > min(given):
            raise ValueError(f"min_rank is {self.min_rank}, and a rank that is given is {min(given)}")
        return self

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """The given ranks; RecipeError for a rank above a layer's own, or a pattern without a layer."""
        check_patterns(layers, self.patterns, "ranks.patterns")
        chosen = {name: first_match(name, self.patterns) or self.rank for name in layers}
        ranks = {name: check_rank(layers[name], rank) for name, rank in chosen.items() if rank is not None}
        return make_plan(layers, ranks)
