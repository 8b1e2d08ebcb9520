"""The source's rank loss: how far LoRA-LRD's pair is from the weight, as a function of the rank."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.errors import RecipeError
from lrcompress.linalg import relative_error, singular_values, tail_shares
from lrcompress.part import Part
from lrcompress.ranks.base import AbstractSelector, ErrorCurve, make_plan, within_budget
from lrcompress.ranks.context import NOTHING, AbstractContext, LearningRun
from lrcompress.recovery.settings import Learning

FLAT = 0.05
"""A curve that falls by less than this share of ‖W‖² from the least to the largest rank shows nothing."""


class Curves(Part):
    """What was measured of one layer."""

    ranks: tuple[int, ...]
    learned: tuple[float, ...]
    """‖W − BA‖² / ‖W‖² of the learned pair at each of the ranks"""
    optimum: tuple[float, ...]
    """the least that any pair of that rank can have (Eckart and Young 1936)"""


@final
class RankLoss(AbstractSelector):
    """Per layer, the rank at which `Σ (W − (1/τ)BA)² / ‖W‖²` of short LoRA-LRD runs stops falling.

    Source: the LoRA-LRD plan, demonstration loss. All layers are learned at once, one run for each of `shares`;
    between the ranks that were tried the curve is linear.
    """

    kind: Literal["rank_loss"] = "rank_loss"
    shares: tuple[float, ...] = (0.05, 0.15, 0.3, 0.6, 1.0)
    """ranks that are tried, as shares of each layer's break-even rank"""
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    """take the least rank whose rank loss is at most this; without it and without a budget: the elbow"""
    keep_parameters: float | None = Field(default=None, gt=0, le=1)
    """in place of `tolerance`: the least one whose ranks keep within this share of the target layers' parameters"""
    curve: Literal["learned", "optimum"] = "learned"
    """which curve decides: what LoRA-LRD reached, or the closed-form optimum, for which nothing is learned"""
    learning: Learning = Learning()
    """the runs"""

    @model_validator(mode="after")
    def _sensible(self) -> "RankLoss":
        if self.tolerance is not None and self.keep_parameters is not None:
            raise ValueError("give `tolerance` or `keep_parameters`, not both: one follows from the other")
        if len(self.shares) < 3 or list(self.shares) != sorted(set(self.shares)):
            raise ValueError(f"shares must be at least three, rising, got {list(self.shares)}")
        if not 0 < self.shares[0] <= self.shares[-1] <= 1:
            raise ValueError(f"shares must be above 0 and at most 1, got {list(self.shares)}")
        return self

    def learning_runs(self, layers: Mapping[str, Layer], seed: int) -> Sequence[LearningRun]:
        """One for each share."""
        if self.curve == "optimum":
            return ()
        return [
            LearningRun({name: tried_rank(layer, share) for name, layer in layers.items()}, self.learning, seed)
            for share in self.shares
        ]

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """RecipeError where no layer's rank loss falls with the rank: then it says nothing about ranks."""
        bounds = self.bounds(layers)
        budget = self.budget(layers, bounds)
        errors: dict[str, Tensor] = {}
        records: dict[str, Any] = {}
        runs = [(run.ranks, context.learned(run)) for run in self.learning_runs(layers, context.seed)]
        for name, layer in layers.items():
            weight = context.weight(name)
            optimum = tail_shares(singular_values(weight))
            tried = [ranks[name] for ranks, _ in runs] or [tried_rank(layer, share) for share in self.shares]
            learned = [relative_error(weight, pairs[name]) for _, pairs in runs]
            best = [optimum[rank - 1].item() for rank in tried]
            records[name] = Curves(ranks=tuple(tried), learned=tuple(learned), optimum=tuple(best)).model_dump()
            errors[name] = optimum if self.curve == "optimum" else _between(tried, learned, layer.max_rank)
        context.record("rank_loss", records)
        if self.curve == "learned":
            self._check_fall(errors, context)
        curves = {name: ErrorCurve(error[: max(layers[name].max_rank, 1)]) for name, error in errors.items()}
        if budget is not None:
            ranks, threshold = within_budget(layers, curves, budget, bounds)
            context.note(f"The budget is met where each layer's rank loss is at most {threshold:.4f}.")
            return make_plan(layers, ranks)
        chosen = {
            name: curve.rank(self.tolerance) if self.tolerance is not None else elbow(curve.errors)
            for name, curve in curves.items()
        }
        return make_plan(layers, {name: bounds.clip(name, rank) for name, rank in chosen.items()})

    def _check_fall(self, errors: Mapping[str, Tensor], context: AbstractContext) -> None:
        falls = {name: (error[0] - error.min()).item() for name, error in errors.items()}
        flat = [name for name, fall in falls.items() if fall < FLAT]
        if len(flat) == len(falls):
            raise RecipeError(
                "the learned rank loss does not fall with the rank in any layer, so it says nothing about ranks",
                got=f"a fall of at most {max(falls.values()):.3f} of ‖W‖² from the least to the largest rank tried",
                allowed=f"a fall of at least {FLAT} in some layer",
                do="use ranks.curve: optimum, ranks.learning.start: method, more ranks.learning.steps, or ranks.kind "
                "budget",
            )
        if flat:
            context.note(f"In {len(flat)} of {len(falls)} layers the learned rank loss does not fall with the rank.")


def tried_rank(layer: Layer, share: float) -> int:
    """A share of the layer's break-even rank, from 1 to the last rank that makes it smaller."""
    return max(min(round(share * layer.break_even), layer.max_rank), 1)


def elbow(errors: Tensor) -> int:
    """The rank at which a falling curve is farthest below its chord ("kneedle", Satopää et al. 2011)."""
    if len(errors) < 3:
        return 1
    x = torch.linspace(0, 1, len(errors), dtype=torch.float64)
    chord = errors[0] + (errors[-1] - errors[0]) * x
    return int((chord - errors).argmax()) + 1


def _between(ranks: Sequence[int], errors: Sequence[float], count: int) -> Tensor:
    """Errors `[count]` at ranks 1 … count, linear between those tried and constant outside of them."""
    points = dict(zip(ranks, errors, strict=True))  # shares of a small layer may round to one rank
    xs = torch.tensor(sorted(points), dtype=torch.float64)
    ys = torch.tensor([points[x] for x in sorted(points)], dtype=torch.float64)
    at = torch.arange(1, max(count, 1) + 1, dtype=torch.float64).clamp(xs[0].item(), xs[-1].item())
    right = torch.searchsorted(xs, at).clamp(1, max(len(xs) - 1, 1)) if len(xs) > 1 else torch.zeros(len(at)).long()
    left = (right - 1).clamp_min(0)
    weight = (at - xs[left]) / (xs[right] - xs[left]).clamp_min(1e-9)
    return ys[left] + weight * (ys[right] - ys[left])
