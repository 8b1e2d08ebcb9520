"""A study: rows that a script adds, one by one, to results/SCRIPT_BED.json; what is there is not measured again."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.beds import HERE, check_recipe, commit, write_result
from benchmarks.experiments import beds
from lrcompress import build, pipeline
from lrcompress.artifacts import Factors, LayerStatistics
from lrcompress.evaluate.scorer import Scorer
from lrcompress.layers import bias_of, read_weight
from lrcompress.linalg import Roots, truncate, weighted_svd
from lrcompress.lowrank import LowRankLinear
from lrcompress.progress import Display
from lrcompress.ranks.allocate import allocate
from lrcompress.ranks.bounds import Bounds
from lrcompress.recipe import Recipe
from lrcompress.stages import batches_of
from lrcompress.tasks import Batch
from lrcompress.workspace import Workspace


class Study:
    """The rows of one script on one bed. Refuses, by SystemExit, to go on with those of another recipe.

    `options`: of the command line, which make it another study, with a file of its own.
    """

    def __init__(self, script: str, bed: str, recipe: Recipe, options: str = "", **about: Any) -> None:
        part = "".join(f"-{word}" for word in options.split() if not word.startswith("-"))
        self.file = HERE / "results" / f"{script}_{bed}{part}.json"
        self.bed = beds()[bed]
        self.value: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"rows": []}
        check_recipe(self.value, recipe, self.file)
        command = " ".join(filter(None, [f"python benchmarks/{script}.py {bed}", options]))
        self.value |= {"command": command, "bed": bed, **about,
                       "recipe": recipe.model_dump(mode="json")}  # fmt: skip

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return self.row(**key) is not None

    def row(self, **key: Any) -> dict[str, Any] | None:
        """The first row with these values."""
        return next((row for row in self.value["rows"] if key.items() <= row.items()), None)

    def add(self, work: Workspace, **row: Any) -> None:
        """Write a row, with the commit and the machine."""
        self.value["environment"] = build.environment(work).model_dump()
        self.value["rows"].append({**row, "commit": commit()})
        write_result(self.file, self.value)
        print(self.bed.name, *(f"{key} {_short(value)}" for key, value in row.items()), flush=True)

    @contextmanager
    def opened(
        self, recipe: Recipe, seed: int, until: str, sequences: int | None = None
    ) -> Iterator[tuple[Workspace, Scorer]]:
        """A run that has gone as far as a stage, and what scores on the bed's validation data, or some of them."""
        with tempfile.TemporaryDirectory() as folder:
            work = pipeline.open_workspace(
                self.bed.model_path(), recipe, folder, seed=seed, display=Display(quiet=True)
            )
            pipeline.execute(work, until=until)
            examples = work.scoring_examples()
            among = range(0, len(examples), max(len(examples) // sequences, 1) if sequences else 1)
            held = list(examples.batches(recipe.evaluation.batch, among=among))
            yield work, Scorer(work.model, held, work.task)


def calibration_batches(work: Workspace, size: int | None = None) -> list[Batch]:
    """The calibration sequences, in batches of the recipe's size or of another."""
    settings = work.recipe.calibration
    examples = work.training_examples(settings.length)
    return batches_of(work, examples, work.calibration_indices(examples), size or settings.batch)


def added(one: LayerStatistics, other: LayerStatistics) -> LayerStatistics:
    """The sums of both."""
    sums: dict[str, Any] = {key: x + getattr(other, key) for key, x in vars(one).items() if x is not None}
    return LayerStatistics(**sums)


def closed_form(work: Workspace, roots: Callable[[str], Roots], keep: float) -> dict[str, Factors]:
    """Factors of the dense layers between these roots, at one budget."""
    layers = work.layers
    dense = {name: work.model.get_submodule(name) for name in layers}
    found = {
        name: weighted_svd(read_weight(dense[name]).detach(), roots(name), layer.max_rank)
        for name, layer in layers.items()
    }
    values = {name: spectrum.values for name, spectrum in found.items()}
    ranks = allocate("budget", layers, values, keep, Bounds.of(layers, 1, 1)).ranks
    return {name: truncate(found[name], rank, bias_of(dense[name])) for name, rank in ranks.items()}


def modules(pairs: Mapping[str, Factors]) -> dict[str, nn.Module]:
    """Layers of these factors."""
    return {name: LowRankLinear.of(pair, device=pair.A.device, dtype=torch.float32) for name, pair in pairs.items()}


def arguments(about: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    """A command line that names a bed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=list(names))
    return parser


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
