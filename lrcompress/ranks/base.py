"""What a rank selector is, and the plan it makes."""

from abc import abstractmethod
from collections.abc import Mapping
from math import ceil
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.errors import RecipeError
from lrcompress.part import Part


class AbstractSelector(Part):
    """Base of the selectors; each is final, frozen, and its own recipe section (told apart by `kind`)."""

    round_to: int = Field(default=1, ge=1, le=1024)
    """ranks that the selector chooses are multiples of this (8 or 16 suit tensor cores)"""
    needs_spectra: ClassVar[bool] = True
    """Whether `select` reads singular values, or only shapes."""
    needs_loss_estimates: ClassVar[bool] = False
    """Whether singular values must compare between layers."""

    @abstractmethod
    def select(self, layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> RankPlan:
        """Ranks for the layers, from the method's singular values `[min(O, I)]` of each (empty if not needed)."""


def make_plan(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> RankPlan:
    """A plan from one rank per layer; a layer whose factors would not be smaller stays dense, with a note."""
    factorised = {name: rank for name, rank in ranks.items() if rank <= layers[name].max_rank}
    notes = {
        name: f"stays dense: factors of rank {ranks[name]} would not be smaller" if name in ranks else "stays dense"
        for name in layers
        if name not in factorised
    }
    if not factorised:
        raise RecipeError(
            "no layer would become smaller",
            got=f"{len(layers)} target layers, all at or above their break-even rank",
            allowed="a rank below in_features · out_features / (in_features + out_features) in at least one layer",
            do="lower ranks.keep_parameters (or the rank)",
        )
    kept = sum(layer.cost(ranks.get(name, layer.dense_parameters)) for name, layer in layers.items())
    return RankPlan(factorised, kept, sum(layer.dense_parameters for layer in layers.values()), notes)


def total_cost(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> int:
    """Numbers in all layers at these ranks, dense ones where factors would not be smaller."""
    return sum(layer.cost(ranks[name]) for name, layer in layers.items())


def round_down(rank: int, layer: Layer, step: int) -> int:
    """A multiple of `step`, at least `least_rank`; ranks that leave the layer dense stay as they are."""
    if rank > layer.max_rank:
        return rank
    return max(rank // step * step, least_rank(layer, step))


def least_rank(layer: Layer, step: int) -> int:
    """The smallest rank a layer can get: one step, or 1 where a step would not shrink it."""
    return step if step <= layer.max_rank else 1


def check_reachable(layers: Mapping[str, Layer], keep_parameters: float, step: int) -> int:
    """The budget in parameters; RecipeError when even the smallest ranks exceed it."""
    dense = sum(layer.dense_parameters for layer in layers.values())
    least = sum(layer.cost(least_rank(layer, step)) for layer in layers.values())
    budget = int(round(keep_parameters * dense, 3))  # a share n/dense must give n, whatever its float is
    if least > budget:
        raise RecipeError(
            "ranks.keep_parameters is below what the smallest ranks need",
            got=f"{keep_parameters} of {dense:,} parameters = {budget:,}",
            allowed=f"at least {ceil(least / dense * 1e4) / 1e4:.4f} "
            f"({least:,} parameters, every layer at rank {step} or less)",
            do="raise ranks.keep_parameters, lower ranks.round_to, or exclude small layers",
        )
    return budget
