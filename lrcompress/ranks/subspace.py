"""The source's question put to two runs: which directions do both of them find?"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lrcompress.artifacts import Factors, Layer, RankPlan
from lrcompress.errors import RecipeError
from lrcompress.linalg import truncation_errors
from lrcompress.ranks.base import AbstractSelector, make_plan, project
from lrcompress.ranks.context import NOTHING, AbstractContext, LearningRun
from lrcompress.recovery.settings import Learning
from lrcompress.subspaces import Evidence, evidence, right_basis, similarity

NEAR_BEST = 0.01
"""Rank losses within this share of the best one of the range count as equal to it."""


@final
class Subspace(AbstractSelector):
    """Two LoRA-LRD runs at r = n/2, n = min(O, I), with different seeds; φ(A₁, A₂, i, i) says what both found.

    The range of ranks is where φ stands clearly above that of random subspaces of the same size; in it the least
    rank is taken whose rank loss (of the learned product, cut at that rank) is as good as the range's best.
    Source: the LoRA-LRD plan, after LoRA (arXiv 2106.09685, sec. 7.2 and app. G).
    """

    kind: Literal["subspace"] = "subspace"
    seeds: tuple[int, int] = (0, 1)
    """of the two runs, added to the run's own"""
    factor: Literal["A", "B"] = "A"
    """compare A by its right singular vectors, or B by its left ones"""
    sigmas: float = Field(default=4.0, gt=0)
    """how many standard deviations above the random level"""
    excess: float = Field(default=0.1, gt=0, lt=1)
    """and at least this share of the way from the random level to 1"""
    unclear: Literal["stop", "dense", "uniform"] = "stop"
    """for a layer in which φ shows nothing: refuse to select; leave it dense; or give it the same share of its
    break-even rank that the other layers have on average"""
    keep_parameters: float | None = Field(default=None, gt=0, le=1)
    """scale the ranks so that they keep within this share of the target layers' parameters"""
    learning: Learning = Learning()
    """the two runs"""

    @model_validator(mode="after")
    def _two_runs(self) -> "Subspace":
        if self.seeds[0] == self.seeds[1]:
            raise ValueError(
                f"seeds must differ, got {list(self.seeds)}: two equal runs agree everywhere and show nothing"
            )
        return self

    def learning_runs(self, layers: Mapping[str, Layer], seed: int) -> Sequence[LearningRun]:
        """Two. RecipeError for a layer of fewer than four features on a side."""
        return half_rank_runs(layers, self.learning, [seed + one for one in self.seeds])

    def select(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], context: AbstractContext = NOTHING
    ) -> RankPlan:
        """RecipeError where φ shows nothing, instead of a guess."""
        bounds = self.bounds(layers)
        budget = self.budget(layers, bounds)
        first, second = (context.learned(run) for run in self.learning_runs(layers, context.seed))
        ranks: dict[str, int] = {}
        records: dict[str, Any] = {}
        for name in layers:
            found = compare(first[name], second[name], self.factor)
            span = found.range(sigmas=self.sigmas, excess=self.excess)
            records[name] = found.record() | {"range": span}
            if span is not None:
                ranks[name] = _choose(context.weight(name), first[name], span)
        context.record("subspace", records)
        wanted = self._with_unclear(layers, ranks, context)
        if budget is not None:
            largest = max(layer.break_even / max(wanted[name], 1) for name, layer in layers.items())
            return make_plan(layers, project(layers, wanted, budget, bounds, stretch=max(largest, 1.0)))
        return make_plan(layers, {name: bounds.clip(name, round(rank)) for name, rank in wanted.items()})

    def _with_unclear(
        self, layers: Mapping[str, Layer], ranks: Mapping[str, int], context: AbstractContext
    ) -> dict[str, float]:
        unclear = [name for name in layers if name not in ranks]
        if unclear and (self.unclear == "stop" or not ranks):
            raise RecipeError(
                f"φ of {self.factor} shows nothing in {len(unclear)} of {len(layers)} layers: it is not clearly above "
                "that of random subspaces at any rank",
                got=f"first {unclear[0]}; two runs of {self.learning.steps} steps",
                allowed=f"φ above the random level by {self.sigmas} standard deviations and {self.excess} of the way "
                "to 1",
                do="use ranks.kind budget; or more ranks.learning.steps, ranks.factor: B, ranks.unclear: uniform",
            )
        if unclear:
            what = "stay dense" if self.unclear == "dense" else "get the others' mean share"
            context.note(f"φ shows nothing in {len(unclear)} of {len(layers)} layers; these {what}.")
        mean = sum(rank / layers[name].break_even for name, rank in ranks.items()) / max(len(ranks), 1)
        fallback = {
            name: mean * layers[name].break_even if self.unclear == "uniform" else layers[name].break_even + 1
            for name in unclear
        }
        return {name: float(ranks.get(name, 0)) or fallback[name] for name in layers}


def half_rank_runs(layers: Mapping[str, Layer], learning: Learning, seeds: Sequence[int]) -> list[LearningRun]:
    """LoRA-LRD at half of each layer's full rank, once per seed. RecipeError for a layer too small for it."""
    half = {name: min(layer.in_features, layer.out_features) // 2 for name, layer in layers.items()}
    small = [name for name, rank in half.items() if rank < 2]
    if small:
        layer = layers[small[0]]
        raise RecipeError(
            "a layer is too small to compare subspaces of half its rank",
            got=f"{small[0]}, {layer.out_features} × {layer.in_features}",
            allowed="at least 4 features on both sides", do="add it to targets.exclude",
        )  # fmt: skip
    return [LearningRun(half, learning, seed) for seed in seeds]


def compare(first: Factors, second: Factors, factor: Literal["A", "B"]) -> Evidence:
    """φ(i, i) of two learned pairs, A by right or B by left singular vectors, beside its random level."""
    a, b = (pair.A if factor == "A" else pair.B.T for pair in (first, second))
    return evidence(similarity(right_basis(a), right_basis(b)), a.shape[1])


def _choose(weight: Tensor, pair: Factors, span: tuple[int, int]) -> int:
    """The least rank of the range whose rank loss is near the range's best."""
    errors = truncation_errors(weight, pair)[span[0] - 1 : span[1]]
    near = errors <= errors.min() * (1 + NEAR_BEST)
    return span[0] + int(torch.nonzero(near)[0])
