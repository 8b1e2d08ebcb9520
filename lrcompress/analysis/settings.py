"""The recipe section of `lrcompress analyze`."""

from typing import Any

from pydantic import Field, model_validator

from lrcompress.methods import Asvd, Fwsvd, Kron, Method, Svd, SvdLlm
from lrcompress.part import Part
from lrcompress.ranks import AbstractSelector, Budget, Energy, RandomSearch, RankLoss, Subspace, Target, Uniform
from lrcompress.recovery.settings import Learning


class AnalysisSettings(Part):
    """What `lrcompress analyze` looks at; `lrcompress run` does not read it."""

    learning: Learning = Learning()
    """the LoRA-LRD runs that rank loss, φ and amplification are measured on"""
    shares: tuple[float, ...] = (0.05, 0.15, 0.3, 0.6, 1.0)
    """ranks at which the rank loss is measured, as shares of each layer's break-even rank"""
    seeds: tuple[int, int] = (0, 1)
    """of the two runs whose subspaces are compared, added to the run's own"""
    keep_parameters: float | None = Field(default=None, gt=0, lt=1)
    """the size at which the selectors are compared; null: the recipe's own, or 0.5"""
    trials: int = Field(default=20, ge=1)
    """of the random search"""
    examples: int = Field(default=500, ge=1)
    """validation sequences that score plans"""
    rise: float = Field(default=0.01, gt=0)
    """share of the dense validation loss that may be lost: which parameters are redundant then?"""

    @model_validator(mode="after")
    def _as_the_selectors(self) -> "AnalysisSettings":
        """Their own checks, at once."""
        RankLoss(shares=self.shares, keep_parameters=0.5)
        Subspace(seeds=self.seeds)
        return self

    def selectors(self, method: Method, own: AbstractSelector, *, scored: bool) -> dict[str, AbstractSelector]:
        """Every selector at one size, under the name of its kind; those that score plans only where they can."""
        keep = self.keep_parameters or own.kept_share or 0.5
        grid: dict[str, Any] = {"round_to": own.round_to, "min_rank": own.min_rank}
        found: dict[str, AbstractSelector] = {
            "uniform": Uniform(keep_parameters=keep, **grid),
            "energy": Energy(keep_parameters=keep, **grid),
        }
        if method.estimates_loss:
            found["budget"] = Budget(keep_parameters=keep, **grid)
        found["rank_loss"] = RankLoss(shares=self.shares, keep_parameters=keep, learning=self.learning, **grid)
        # most of A's directions are random ones that were never learned; B's are all learned
        found["subspace"] = Subspace(
            seeds=self.seeds, factor="B", unclear="uniform", keep_parameters=keep, learning=self.learning, **grid
        )
        if scored:
            start = "budget" if method.estimates_loss else "uniform"
            found["random_search"] = RandomSearch(
                keep_parameters=keep, trials=self.trials, start=start, examples=self.examples, **grid
            )
            found["target"] = Target(rise=self.rise, relative=True, allocation=start, examples=self.examples, **grid)
        return found


def all_methods(own: Method) -> tuple[Method, ...]:
    """The recipe's method, and the others with their defaults."""
    others = (Svd(), Fwsvd(), Asvd(), SvdLlm(), Kron())
    return (own, *(method for method in others if method.kind != own.kind))
