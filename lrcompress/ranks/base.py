"""What a rank selector is, and the plan it makes."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import ceil
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan, kept_parameters
from lrcompress.errors import RecipeError
from lrcompress.part import Part
from lrcompress.ranks.bounds import Bounds
from lrcompress.ranks.context import NOTHING, AbstractContext, LearningRun


class AbstractSelector(Part):
    """Base of the selectors; each is final, frozen, and its own recipe section (told apart by `kind`)."""

    round_to: int = Field(default=1, ge=1, le=1024)
    """ranks that the selector chooses are multiples of this (8 or 16 suit tensor cores)"""
    min_rank: int = Field(default=1, ge=1)
    """the least rank that the selector chooses; a layer that it would not shrink stays dense"""
    needs_spectra: ClassVar[bool] = True
    """Whether `select` reads singular values, or only shapes."""
    needs_scores: ClassVar[bool] = False
    """Whether plans are scored on the validation data."""

    without_loss_estimates: ClassVar[str] = "ranks.kind uniform, energy, rank_loss, random_search or fixed"
    """What to write in a recipe whose method's values do not compare."""

    @property
    def needs_loss_estimates(self) -> bool:
        """Whether singular values must compare between layers."""
        return False

    @property
    def kept_share(self) -> float | None:
        """Share of the target layers' parameters that the plan keeps within; None where it follows from the data."""
        return getattr(self, "keep_parameters", None)

    @property
    def least_share(self) -> float | None:
        """The smallest budget that must be reachable."""
        return self.kept_share

    def bounds(self, layers: Mapping[str, Layer]) -> Bounds:
        """The ranks that each layer may get."""
        return Bounds.of(layers, self.round_to, self.min_rank)

    def budget(self, layers: Mapping[str, Layer], bounds: Bounds) -> int | None:
        """The parameters that the plan must keep within, or None; RecipeError when the smallest ranks exceed them."""
        return None if self.kept_share is None else check_reachable(layers, self.kept_share, bounds)

    def learning_runs(self, layers: Mapping[str, Layer], seed: int) -> Sequence[LearningRun]:
        """The LoRA-LRD runs whose results `select` asks its context for."""
        return ()

    @abstractmethod
    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
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
    return RankPlan(
        factorised, kept_parameters(layers, factorised), sum(layer.dense_parameters for layer in layers.values()), notes
    )


def total_cost(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> int:
    """Numbers in all layers at these ranks, dense ones where factors would not be smaller."""
    return sum(layer.cost(ranks[name]) for name, layer in layers.items())


def check_reachable(layers: Mapping[str, Layer], keep_parameters: float, bounds: Bounds) -> int:
    """The budget in parameters; RecipeError when even the smallest ranks exceed it."""
    dense = sum(layer.dense_parameters for layer in layers.values())
    least = total_cost(layers, bounds.least)
    budget = int(round(keep_parameters * dense, 3))  # a share n/dense must give n, whatever its float is
    if least > budget:
        raise RecipeError(
            "ranks.keep_parameters is below what the smallest ranks need",
            got=f"{keep_parameters} of {dense:,} parameters = {budget:,}",
            allowed=f"at least {ceil(least / dense * 1e4) / 1e4:.4f} "
            f"({least:,} parameters, every layer at the least rank that it may get)",
            do="raise ranks.keep_parameters, lower ranks.round_to, ranks.min_rank or a floor, or exclude small layers",
        )
    return budget


def project(
    layers: Mapping[str, Layer], wanted: Mapping[str, float], budget: int, bounds: Bounds, *, stretch: float
) -> dict[str, int]:
    """Ranks in the proportions of `wanted` that spend the budget, one common factor (at most `stretch`) on all.

    All are rounded down first; what that leaves goes to the layers that lost the most, a step each. Layers at
    their least rank take their excess from the others.
    """

    def at(factor: float) -> dict[str, int]:
        return {name: bounds.clip(name, int(factor * wanted[name])) for name in layers}

    low, high = 0.0, stretch
    if total_cost(layers, at(high)) <= budget:
        low = high
    else:
        for _ in range(60):
            middle = (low + high) / 2
            fits = total_cost(layers, at(middle)) <= budget
            low, high = (middle, high) if fits else (low, middle)
    ranks = at(low)
    order = sorted(layers, key=lambda name: ranks[name] - low * wanted[name])
    return _with_the_rest(layers, ranks, order, budget, bounds)


def within_budget(
    layers: Mapping[str, Layer], curves: Mapping[str, "ErrorCurve"], budget: int, bounds: Bounds
) -> tuple[dict[str, int], float]:
    """The least common threshold whose ranks stay within the budget, by bisection, and the ranks it gives.

    For the selectors that ask every layer for the same accuracy. What bisection leaves of the budget goes to the
    layers of the largest errors, a step each.
    """

    def at(threshold: float) -> dict[str, int]:
        return {name: bounds.clip(name, curves[name].rank(threshold)) for name in layers}

    low, high = 0.0, max(curve.errors[0].item() for curve in curves.values())
    for _ in range(60):
        middle = (low + high) / 2
        if total_cost(layers, at(middle)) > budget:
            low = middle
        else:
            high = middle
    ranks = at(high)
    order = sorted(layers, key=lambda name: -curves[name].error(ranks[name]))
    return _with_the_rest(layers, ranks, order, budget, bounds), high


def _with_the_rest(
    layers: Mapping[str, Layer], ranks: Mapping[str, int], order: Sequence[str], budget: int, bounds: Bounds
) -> dict[str, int]:
    """The ranks, with what they leave of the budget given to the layers in this order, a step each where it fits."""
    raised = dict(ranks)
    left = budget - total_cost(layers, ranks)
    for name in order:
        layer, rank = layers[name], bounds.next(name, ranks[name])
        extra = layer.cost(rank) - layer.cost(ranks[name])
        if 0 < extra <= left and rank <= layer.max_rank:
            raised[name] = rank
            left -= extra
    return raised


class ErrorCurve:
    """A layer's relative error as a falling function of its rank, `errors[r − 1]`."""

    def __init__(self, errors: Tensor) -> None:
        self.errors = errors.double().cummin(0).values

    def rank(self, threshold: float) -> int:
        """The least rank whose error is at most the threshold; one more than there are where none is."""
        return int((self.errors > threshold).sum()) + 1

    def error(self, rank: int) -> float:
        """The error at a rank, 0 beyond the last."""
        return self.errors[rank - 1].item() if rank <= len(self.errors) else 0.0
