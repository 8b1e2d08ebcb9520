"""Other ways to refit than the tool's: `python benchmarks/refits.py BED`.

Each starts from kron's closed form at the bed's size, pivoted, and solves all layers again; it is taken as it is,
better or not, and scored by KL to the dense model on validation data. Writes results/refits_BED.json as it goes on;
what is there is not measured again.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.experiments import beds, recipe_of
from benchmarks.study import Study, added, arguments, calibration_batches, closed_form, modules
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors, LayerStatistics
from lrcompress.calibrate import collect
from lrcompress.lowrank import swapped
from lrcompress.ranks import Budget
from lrcompress.refit import refit
from lrcompress.refit.settings import Refit
from lrcompress.stages import REFIT_BATCHES, read_statistics
from lrcompress.workspace import RowSpec, Workspace

KEEPS = {"demo": 0.4, "minilm-sst2": 0.15}
SEEDS = (0,)
Pairs = Mapping[str, Factors]
Statistics = Mapping[str, LayerStatistics]


@dataclass
class Lab:
    """A bed with one seed's statistics of the dense model, and kron's closed form by them."""

    work: Workspace

    def __post_init__(self) -> None:
        recipe = self.work.recipe
        assert recipe.refit is not None
        self.settings: Refit = recipe.refit
        self.dense = {name: read_statistics(self.work, name) for name in self.work.layers}
        closed = self.work.factors(RowSpec(recipe.method.kind, "plan"))
        self.small = calibration_batches(self.work)
        self.waves = calibration_batches(self.work, -(-sum(map(self.work.task.size, self.small)) // REFIT_BATCHES))
        self.start = {name: pair.factors() for name, pair in closed.items()}

    def refitted(self, start: Pairs, statistics: Statistics, damping: float = 1.0) -> dict[str, Factors]:
        """The refit from these factors, output sides weighted by these statistics; `damping`: of the tool's."""
        method = self.work.recipe.method
        settings = Refit(damping=self.settings.damping * damping)
        return refit(
            self.work.model, start, lambda name: method.roots(statistics[name]).left,
            self.waves, settings, self.work.task,
        )  # fmt: skip

    @cached_property
    def compressed(self) -> Statistics:
        """Statistics of the model that the tool's refit gives."""
        with swapped(self.work.model, modules(self.refitted(self.start, self.dense))):
            found, _ = collect(
                self.work.model, self.work.layers, self.small, self.work.recipe.method.needs, self.work.task,
                seed=self.work.seed + 1,
            )  # fmt: skip
        return found

    @cached_property
    def both(self) -> Statistics:
        """Sums over both models."""
        return {name: added(one, self.dense[name]) for name, one in self.compressed.items()}

    def cut(self, statistics: Statistics) -> dict[str, Factors]:
        """The closed form by these statistics, its ranks too."""
        method, ranks = self.work.recipe.method, self.work.recipe.ranks
        assert isinstance(ranks, Budget)
        return closed_form(self.work, lambda name: method.roots(statistics[name]), ranks.keep_parameters)


CANDIDATES: dict[str, Callable[[Lab], Pairs]] = {
    "none": lambda lab: lab.start,
    "the tool": lambda lab: lab.refitted(lab.start, lab.dense),
    "damping × 0.1": lambda lab: lab.refitted(lab.start, lab.dense, 0.1),
    "damping × 3": lambda lab: lab.refitted(lab.start, lab.dense, 3.0),
    "damping × 10": lambda lab: lab.refitted(lab.start, lab.dense, 10.0),
    "again, with the gradients of the refitted model": lambda lab: lab.refitted(lab.start, lab.compressed),
    "again, with ranks by the refitted model too": lambda lab: lab.refitted(lab.cut(lab.compressed), lab.compressed),
    "again, with ranks and gradients of both models": lambda lab: lab.refitted(lab.cut(lab.both), lab.both),
}


def measure(name: str) -> None:
    """Every candidate with every seed that has no row yet."""
    recipe = recipes.resolve(recipe_of(beds()[name], "closed-refit-pivoted", KEEPS[name]))[1]
    study = Study("refits", name, recipe, keep=KEEPS[name])
    for seed in SEEDS:
        todo = [key for key in CANDIDATES if not study.has(candidate=key, seed=seed)]
        if not todo:
            continue
        with study.opened(recipe, seed, "factors") as (work, scorer):
            lab = Lab(work)
            for key in todo:
                began = time.perf_counter()
                pairs = CANDIDATES[key](lab)
                seconds = time.perf_counter() - began
                score = scorer.score(modules(pairs))
                study.add(work, candidate=key, seed=seed, seconds=seconds, **vars(score))


if __name__ == "__main__":
    measure(arguments(__doc__, list(KEEPS)).parse_args().bed)
