"""Ranks as given."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.errors import RecipeError
from lrcompress.patterns import matches
from lrcompress.ranks.base import AbstractSelector, make_plan


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
        return self

    def select(self, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """The given ranks; RecipeError for a rank above a layer's own, or a pattern without a layer."""
        for pattern in self.patterns:
            if not any(matches(name, pattern) for name in layers):
                raise RecipeError(
                    f"ranks.patterns: `{pattern}` matches no target layer",
                    allowed=", ".join(list(layers)[:8]) + (" …" if len(layers) > 8 else ""),
                    do="correct the pattern, or remove it",
                )
        ranks = {name: rank for name in layers if (rank := self._rank_of(name)) is not None}
        for name, rank in ranks.items():
            full = min(layers[name].in_features, layers[name].out_features)
            if rank > full:
                raise RecipeError(
                    f"rank of {name} is above the layer's",
                    got=rank,
                    allowed=f"at most {full}; only up to {layers[name].max_rank} makes the layer smaller",
                    do="lower the rank, or exclude the layer",
                )
        return make_plan(layers, ranks)

    def _rank_of(self, name: str) -> int | None:
        return next((rank for pattern, rank in self.patterns.items() if matches(name, pattern)), self.rank)
