"""The rank selectors; the union is the registry."""

from typing import Annotated

from pydantic import Field

from lrcompress.ranks.base import AbstractSelector
from lrcompress.ranks.budget import Budget
from lrcompress.ranks.energy import Energy
from lrcompress.ranks.fixed import Fixed
from lrcompress.ranks.frontier import Frontier
from lrcompress.ranks.random_search import RandomSearch
from lrcompress.ranks.rank_loss import RankLoss
from lrcompress.ranks.subspace import Subspace
from lrcompress.ranks.target import Target
from lrcompress.ranks.uniform import Uniform

Selector = Annotated[
    Fixed | Uniform | Energy | Budget | RankLoss | RandomSearch | Subspace | Target | Frontier,
    Field(discriminator="kind"),
]

__all__ = [
    "AbstractSelector", "Budget", "Energy", "Fixed", "Frontier", "RandomSearch", "RankLoss", "Selector", "Subspace",
    "Target", "Uniform",
]  # fmt: skip
