"""A share of the parameters divided among the layers, for the selectors that try several sizes."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.ranks.base import check_reachable, make_plan, total_cost
from lrcompress.ranks.bounds import Bounds
from lrcompress.ranks.budget import spend
from lrcompress.ranks.uniform import uniform_ranks

Allocation = Literal["budget", "uniform"]
"""budget: where it saves the most loss, on kron's spectra; uniform: the same share in each layer"""


def allocate(
    how: Allocation, layers: Mapping[str, Layer], values: Mapping[str, Tensor], share: float, bounds: Bounds
) -> RankPlan:
    """A plan that keeps at most `share` of the parameters. RecipeError where that is below the least ranks."""
    return make_plan(layers, allocated_ranks(how, layers, values, share, bounds))


def allocated_ranks(
    how: Allocation, layers: Mapping[str, Layer], values: Mapping[str, Tensor], share: float, bounds: Bounds
) -> dict[str, int]:
    """The ranks of `allocate`'s plan, a dense layer's among them."""
    budget = check_reachable(layers, share, bounds)
    if how == "budget":
        return spend(layers, values, budget, bounds)
    return uniform_ranks(layers, share, budget, bounds)


def least_share(layers: Mapping[str, Layer], bounds: Bounds) -> float:
    """The least share of the parameters that the bounds allow."""
    return total_cost(layers, bounds.least) / sum(layer.dense_parameters for layer in layers.values())


def largest_share(layers: Mapping[str, Layer], bounds: Bounds) -> float:
    """The largest share at which some layer is still factorised: all others dense, it at its largest rank."""
    dense = sum(layer.dense_parameters for layer in layers.values())
    top = [
        (name, min(bounds.most[name], layer.max_rank) // bounds.step * bounds.step) for name, layer in layers.items()
    ]
    saved = [layers[name].dense_parameters - layers[name].cost(rank) for name, rank in top if rank]
    return (dense - min(saved, default=0)) / dense
