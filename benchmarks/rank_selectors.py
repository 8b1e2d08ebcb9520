"""Every rank selector at several sizes on one set of spectra: `python benchmarks/rank_selectors.py CASE`.

Writes results/rank_selectors_CASE.json as it goes on. Plans are chosen on the validation split and scored on
the validation and the test split, by closed form; at the case's own size some are also trained, all alike.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beds import HERE, bed, commit, write_result

from lrcompress import build, pipeline
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors, RankPlan, Score, read_json, read_spectrum
from lrcompress.errors import InputError
from lrcompress.evaluate.scorer import Scorer
from lrcompress.layers import bias_of
from lrcompress.linalg import truncate
from lrcompress.lowrank import LowRankLinear
from lrcompress.progress import Display
from lrcompress.ranks.allocate import allocate
from lrcompress.recovery import recover
from lrcompress.workspace import Workspace

KEEPS = (0.15, 0.3, 0.5)
TRAINED_AT = {"minilm_sst2": 0.15, "demo": 0.3}
EXAMPLES = {"minilm_sst2": 500, "demo": 16}
LEARNING: dict[str, dict[str, Any]] = {"minilm_sst2": {}, "demo": {"batch": 8}}
SCORED = {"minilm_sst2": None, "demo": 48}
"""Sequences of each split that every plan is scored on at the end, drawn by seed; None: all."""
TRAINED = ("uniform", "budget", "subspace, B", "random_search, uniform start", "random_search, budget start")
FRONTIER = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


def selectors(keep: float, case: str) -> dict[str, dict[str, Any]]:
    """Label → the recipe's `ranks`."""
    search = {"kind": "random_search", "keep_parameters": keep, "trials": 100, "examples": EXAMPLES[case]}
    learned = {"keep_parameters": keep, "learning": LEARNING[case]}
    found = {
        "uniform": {"kind": "uniform", "keep_parameters": keep},
        "energy": {"kind": "energy", "keep_parameters": keep},
        "budget": {"kind": "budget", "keep_parameters": keep},
        "rank_loss": {"kind": "rank_loss", **learned},
        "rank_loss, optimum": {"kind": "rank_loss", "keep_parameters": keep, "curve": "optimum"},
        "subspace, A": {"kind": "subspace", "unclear": "uniform", **learned},
        "subspace, B": {"kind": "subspace", "factor": "B", "unclear": "uniform", **learned},
        "random_search, uniform start": search,
    }
    if keep == TRAINED_AT[case] and case != "demo":
        found["random_search, budget start"] = {**search, "start": "budget", "spread": 1.5}
    return found


class Measuring:
    """One run folder, in which only ranks change from one selector to the next."""

    def __init__(self, case: str, folder: Path, seed: int) -> None:
        self.model, recipe = bed(case)
        self.recipe = recipes.resolve(recipe, ["baselines=[]", "timing=null", "recovery.rounds=[]"])[1]
        self.folder, self.seed, self.case = folder, seed, case
        self.work = self._open([])
        self.scorers: dict[str, Scorer] = {}

    def _open(self, settings: list[str]) -> Workspace:
        return pipeline.open_workspace(
            self.model, self.recipe, self.folder, settings=settings, seed=self.seed, display=Display()
        )

    def select(self, ranks: dict[str, Any]) -> tuple[RankPlan, dict[str, Any]]:
        """A plan, with the seconds of the stages that ran for it."""
        work = self._open([f"ranks={json.dumps(ranks)}"])
        for name in ("model", "processor", "splits", "skeleton", "_made", "_fingerprints"):  # loaded once
            if name in self.work.__dict__:
                work.__dict__[name] = self.work.__dict__[name]
        began = time.perf_counter()
        before = set(pipeline.plan_of_work(work).items())
        ran = [name for name, reason in before if reason and work.order.index(name) <= work.order.index("ranks")]
        pipeline.execute(work, until="ranks")
        self.work = work
        seconds = {name: work.record(name)["seconds"] for name in ran}
        notes = read_json(work.stage("ranks") / "selection.json")["notes"]
        return work.plan("plan"), {"seconds": time.perf_counter() - began, "stages": seconds, "notes": notes}

    def score(self, factors: dict[str, Factors], split: str) -> Score:
        """On a whole split."""
        if split not in self.scorers:
            settings = self._open([f"evaluation.split={split}"])
            examples = settings.evaluation_examples()
            size = settings.recipe.evaluation.batch
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.seed))
            batches = list(examples.batches(size, among=order[: SCORED[self.case]].tolist()))
            self.scorers[split] = Scorer(self.work.model, batches, self.work.task)
        modules = {
            name: LowRankLinear.of(pair, device=self.work.device, dtype=torch.float32) for name, pair in factors.items()
        }
        return self.scorers[split].score(modules)

    def closed(self, plan: RankPlan) -> dict[str, Factors]:
        """The factors of a plan."""
        place = self.work.stage("spectra") / self.work.recipe.method.kind
        return {
            name: truncate(read_spectrum(place / f"{name}.safetensors", rank), rank, self._bias(name))
            for name, rank in plan.ranks.items()
        }

    def trained(self, plan: RankPlan) -> dict[str, Factors]:
        """The same after the case's recovery."""
        settings = self.work.recipe.recovery
        assert settings is not None
        examples = self.work.training_examples(settings.length)
        return recover(
            self.work.model, self.work.layers, self.closed(plan), examples, settings, self.work.task, seed=self.seed
        ).factors

    def both(self, factors: dict[str, Factors]) -> dict[str, Any]:
        """Scores on validation and test."""
        return {split: asdict(self.score(factors, split)) for split in ("validation", "test")}

    def _bias(self, name: str) -> Any:
        return bias_of(self.work.model.get_submodule(name))


def measure(case: str, folder: Path, seed: int, write: Any) -> None:
    """All selectors at all sizes, then the frontier."""
    one = Measuring(case, folder, seed)
    rows: list[dict[str, Any]] = []
    value: dict[str, Any] = {
        "command": f"python benchmarks/rank_selectors.py {case} --seed {seed}", "commit": commit(),
        "examples": EXAMPLES[case], "scored": SCORED[case], "trained_at": TRAINED_AT[case],
    }  # fmt: skip
    one.select({"kind": "uniform", "keep_parameters": KEEPS[0]})
    value |= {
        "environment": build.environment(one.work).model_dump(), "recipe": one.work.recipe.model_dump(mode="json"),
        "shared_seconds": {
            name: one.work.record(name)["seconds"]
            for name in ("layers", "statistics", "spectra")
        },
        "dense": one.both({}), "rows": rows,
    }  # fmt: skip
    by_label: dict[str, dict[float, dict[str, Any]]] = {}
    for keep in KEEPS:
        for label, ranks in selectors(keep, case).items():
            by_label.setdefault(label, {})[keep] = ranks
    for label, sizes in by_label.items():  # sizes within: what a selector learns is learned once
        for keep, ranks in sizes.items():
            row: dict[str, Any] = {"selector": label, "keep": keep}
            began = time.perf_counter()
            try:
                plan, facts = one.select(ranks)
            except InputError as error:
                row |= {"refused": error.what, "got": str(error.got), "seconds": time.perf_counter() - began}
            else:
                row |= facts | {"kept_parameters": plan.kept_parameters, "dense_parameters": plan.dense_parameters}
                row |= {"ranks": plan.ranks, "closed_form": one.both(one.closed(plan))}
                if keep == TRAINED_AT[case] and label in TRAINED:
                    row["trained"] = one.both(one.trained(plan))
            rows.append(row)
            write(value)
    values, layers = one.work.spectrum_values(), one.work.layers
    bounds = one.work.recipe.ranks.bounds(layers)
    value["frontier"] = []
    for share in FRONTIER:
        for how in ("budget", "uniform"):
            began = time.perf_counter()
            plan = allocate(how, layers, values, share, bounds)
            seconds = time.perf_counter() - began
            scores = one.both(one.closed(plan))
            value["frontier"].append(
                {"keep": share, "allocation": how, "kept_parameters": plan.kept_parameters, "seconds": seconds} | scores
            )
        write(value)


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(TRAINED_AT))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    file = HERE / "results" / f"rank_selectors_{arguments.case}.json"

    with tempfile.TemporaryDirectory() as runs:
        measure(arguments.case, Path(runs) / arguments.case, arguments.seed, partial(write_result, file))


if __name__ == "__main__":
    main()
