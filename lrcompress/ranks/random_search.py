"""The source's search for ranks: random plans of one size, the best by validation data."""

from collections.abc import Mapping
from math import exp, log
from typing import ClassVar, Literal, final

from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Layer, MetricKey, RankPlan, Score
from lrcompress.ranks.allocate import Allocation, allocated_ranks
from lrcompress.ranks.base import AbstractSelector, check_reachable, make_plan, project
from lrcompress.ranks.bounds import Bounds
from lrcompress.ranks.context import NOTHING, AbstractContext, scores_table
from lrcompress.seeds import uniform


@final
class RandomSearch(AbstractSelector):
    """Plans around a start, each layer's rank times a log-uniform factor, all of the same size.

    Trial 0 is the start itself. Each is scored on the validation data by its closed-form factors; the best few
    can be scored again after a short recovery. Source: the LoRA-LRD plan ("random search").
    """

    kind: Literal["random_search"] = "random_search"
    keep_parameters: float = Field(gt=0, le=1)
    """share of the target layers' parameters that remains"""
    trials: int = Field(default=100, ge=1)
    """plans that are scored, the start among them"""
    start: Allocation = "uniform"
    """the plan around which the others lie"""
    spread: float = Field(default=2.0, gt=1)
    """ranks are multiplied by factors between 1/spread and spread"""
    per: Literal["layer", "role", "group", "block"] = "layer"
    """layers that share a factor: none, all of one role (as attn.c_proj of each block), of one group (attention, mlp),
    or of one block"""
    metric: MetricKey = "kl"
    """what is compared, on validation data: kl to the dense model, the task's loss, or accuracy"""
    examples: int = Field(default=500, ge=1)
    """validation sequences that score a plan, drawn by seed"""
    finalists: int = Field(default=0, ge=0)
    """how many of the best are scored again after a recovery"""
    recovery_steps: int = Field(default=0, ge=0)
    """steps of that recovery, with the settings of the recipe's own"""
    needs_scores: ClassVar[bool] = True
    without_loss_estimates: ClassVar[str] = "ranks.start: uniform"

    @model_validator(mode="after")
    def _both_or_none(self) -> "RandomSearch":
        if (self.finalists > 0) != (self.recovery_steps > 0):
            raise ValueError(
                f"finalists ({self.finalists}) and recovery_steps ({self.recovery_steps}) belong together: give both "
                "or none"
            )
        if self.finalists > self.trials:
            raise ValueError(f"finalists is {self.finalists}, and there are only {self.trials} trials")
        return self

    @property
    def needs_loss_estimates(self) -> bool:
        """Only to start from."""
        return self.start == "budget"

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """The best plan; equal plans are scored once. All trials are recorded."""
        bounds = self.bounds(layers)
        budget = check_reachable(layers, self.keep_parameters, bounds)
        start = allocated_ranks(self.start, layers, values, self.keep_parameters, bounds)
        found: list[tuple[RankPlan, Score]] = []
        best = float("inf")
        for number in range(self.trials):
            ranks = start if number == 0 else self._drawn(layers, start, budget, bounds, context.seed, number)
            plan = make_plan(layers, ranks)
            found.append((plan, context.score(plan)))
            best = min(best, found[-1][1].cost(self.metric))
            context.progress("trials", number + 1, self.trials, f"best {self.metric} {self._shown(best)}")
        order = sorted(range(len(found)), key=lambda number: found[number][1].cost(self.metric))
        table = scores_table(found)
        chosen = order[0]
        if self.finalists:
            after: dict[int, Score] = {}
            for place, number in enumerate(order[: self.finalists]):
                after[number] = context.score(found[number][0], steps=self.recovery_steps)
                table[number]["after_recovery"] = vars(after[number])
                context.progress("finalists", place + 1, self.finalists)
            chosen = min(after, key=lambda number: after[number].cost(self.metric))
            context.note(
                f"Of {self.finalists} finalists, trial {chosen} is the best after {self.recovery_steps} steps; by "
                f"closed form it was number {order.index(chosen) + 1}."
            )
        context.record("trials", {"metric": self.metric, "chosen": chosen, "table": table})
        first, last = (self._shown(found[number][1].cost(self.metric)) for number in (0, chosen))
        context.note(
            f"Trial {chosen} of {self.trials} was chosen: validation {self.metric} {last} by closed form, the "
            f"{self.start} start's is {first}."
        )
        return found[chosen][0]

    def _drawn(
        self, layers: Mapping[str, Layer], start: Mapping[str, int], budget: int, bounds: Bounds, seed: int, trial: int
    ) -> dict[str, int]:
        keys = {name: self._key(name, layer) for name, layer in layers.items()}
        names = list(dict.fromkeys(keys.values()))
        draws, width = uniform(len(names), seed, "random_search", trial), log(self.spread)
        factors = {key: exp((2 * draw - 1) * width) for key, draw in zip(names, draws, strict=True)}
        # a layer that the start leaves dense takes part from its break-even rank on
        wanted = {name: factors[keys[name]] * min(start[name], layer.break_even + 1) for name, layer in layers.items()}
        stretch = max((layer.break_even + 1) / wanted[name] for name, layer in layers.items())
        return project(layers, wanted, budget, bounds, stretch=stretch)

    def _key(self, name: str, layer: Layer) -> str:
        if self.per == "role":
            return layer.role
        if self.per == "group":
            return layer.group
        if self.per == "block":
            return str(layer.block)
        return name

    def _shown(self, cost: float) -> str:
        return f"{100 * (1 - cost):.2f} %" if self.metric == "accuracy" else f"{cost:.4f}"
