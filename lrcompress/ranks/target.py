"""The smallest model whose validation loss rises by no more than the user allows."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, MetricKey, RankPlan, Score
from lrcompress.errors import RecipeError
from lrcompress.ranks.allocate import Allocation, allocate, largest_share, least_share
from lrcompress.ranks.base import AbstractSelector
from lrcompress.ranks.context import NOTHING, AbstractContext, scores_table


@final
class Target(AbstractSelector):
    """Bisection on the budget: each trial cuts the same spectra elsewhere and is scored by its closed form.

    The search takes the metric to get worse as the model gets smaller; where it does not, the answer is a size
    that keeps the bound, and not surely the smallest one that does. A recovery afterwards only improves on it.
    """

    kind: Literal["target"] = "target"
    rise: float = Field(gt=0)
    """how much worse the validation metric may get: in its own units, or as a share of the dense model's with
    `relative`"""
    relative: bool = False
    """whether `rise` is a share of the dense model's value: 0.01 is 1 %"""
    metric: MetricKey = "loss"
    """loss (the task's own), kl (to the dense model), or accuracy (which may fall by `rise`)"""
    allocation: Allocation = "budget"
    """how a budget is divided among the layers"""
    precision: float = Field(default=0.005, gt=0, lt=0.5)
    """where the bisection ends, as a share of the target layers' parameters"""
    examples: int = Field(default=500, ge=1)
    """validation sequences that score a size, drawn by seed"""
    needs_scores: ClassVar[bool] = True
    without_loss_estimates: ClassVar[str] = "ranks.allocation: uniform"

    @model_validator(mode="after")
    def _meaningful(self) -> "Target":
        if self.relative and self.metric == "kl":
            raise ValueError("a relative rise of kl has no meaning: the dense model's is 0; set relative: false")
        return self

    @property
    def needs_loss_estimates(self) -> bool:
        """For allocation `budget`."""
        return self.allocation == "budget"

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """RecipeError that names the least rise that can be reached, where no size reaches the one asked for."""
        bounds = self.bounds(layers)
        dense = context.dense_score().cost(self.metric)
        trials: list[tuple[RankPlan, Score]] = []

        def rise(plan: RankPlan) -> float:
            score = context.score(plan)
            trials.append((plan, score))
            context.progress("sizes", len(trials), 12, f"{plan.kept_parameters / plan.dense_parameters:.1%} kept")
            change = score.cost(self.metric) - dense
            return change / max(dense, 1e-12) if self.relative else change

        low, high = least_share(layers, bounds), largest_share(layers, bounds)
        best = allocate(self.allocation, layers, values, high, bounds)
        least = rise(best)
        if least > self.rise:
            raise RecipeError(
                f"no size keeps the rise of the validation {self.metric} within ranks.rise",
                got=f"{self.rise}{' of the dense value' if self.relative else ''}",
                allowed=f"at least {least:.4g}, the rise at {best.kept_parameters / best.dense_parameters:.1%} of the "
                "parameters",
                do="raise ranks.rise, target fewer layers, or set ranks.metric to another one",
            )
        smallest = allocate(self.allocation, layers, values, low, bounds)
        if rise(smallest) <= self.rise:
            best, high = smallest, low
            context.note("Even the smallest model keeps within the rise.")
        while high - low > self.precision:
            middle = (low + high) / 2
            plan = allocate(self.allocation, layers, values, middle, bounds)
            if rise(plan) <= self.rise:
                best, high = plan, middle
            else:
                low = middle
        order = sorted(range(len(trials)), key=lambda number: trials[number][0].kept_parameters)
        table = scores_table([trials[number] for number in order])
        chosen = next(number for number, place in enumerate(order) if trials[place][0] == best)
        context.record("sizes", {"metric": self.metric, "chosen": chosen, "dense": dense, "table": table})
        share = best.kept_parameters / best.dense_parameters
        context.note(
            f"{share:.1%} of the target layers' parameters keep the validation {self.metric} within "
            f"{self.rise}{' of the dense value' if self.relative else ''} above the dense model's, by closed form; "
            f"{len(trials)} sizes were scored from one set of spectra."
        )
        return best
