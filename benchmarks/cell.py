"""Measures cells of one bed, variant and seed in a process of its own: `python -m benchmarks.cell JOB.json`.

The job names the bed, the variant, the seed, the sizes, the learning rate and the folder; a line of JSON on stdout for
each size. A process of its own gives each row its own peak memory, and lets a row that is killed be one row.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.beds import commit
from benchmarks.experiments import Bed, beds, overlay, recipe_of
from lrcompress import build, pipeline
from lrcompress import recipe as recipes
from lrcompress.artifacts import read_json
from lrcompress.errors import InputError, NumericalError
from lrcompress.evaluate import harness
from lrcompress.evaluate.scorer import Scorer
from lrcompress.progress import Display
from lrcompress.workspace import RowSpec, Workspace

STATUS = Path("/proc/self/status")

CARRIED = ("model", "processor", "splits", "skeleton", "_made", "_fingerprints")
"""What a workspace has opened, and the next one of the same bed can use."""


def carry(source: Workspace, target: Workspace) -> None:
    """Give a workspace what another one has opened. Changes `target`."""
    target.__dict__.update({name: source.__dict__[name] for name in CARRIED if name in source.__dict__})


class Measuring:
    """One run folder, in which only the size and what follows from it change."""

    def __init__(self, bed: Bed, variant: str, seed: int, folder: Path) -> None:
        self.bed, self.variant, self.seed, self.folder = bed, variant, seed, folder
        self.work: Workspace | None = None
        self.scorers: dict[str, Scorer] = {}

    def measure(
        self, keep: float, rate: float | None, splits: tuple[str, ...], untrained: bool, changes: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """Compress at one size and score it; a refusal or a breakdown is a result too.

        With `untrained` the row holds that of its state before the training, under this name. `changes`: to the
        recipe of the variant.
        """
        reset_peak()
        recipe = overlay(recipe_of(self.bed, self.variant, keep, rate), changes)
        began = time.perf_counter()
        row: dict[str, Any] = {"keep": keep, "seed": self.seed, "commit": commit(), "learning_rate": rate}
        try:
            if self.bed.model == "digits":
                row |= self._compress_module(recipe, splits)
            else:
                work = self._workspace(recipe)
                if untrained:
                    pipeline.execute(work, until="factors" if work.recipe.refit is None else "refit")
                    start = self._measured(work, work.rows[-2], splits)
                    row["untrained"] = row | {"learning_rate": None} | start | cost(began)
                pipeline.execute(work, until="recovery")
                row |= self._measured(work, work.rows[-1], splits)
        except (InputError, NumericalError, torch.OutOfMemoryError) as error:
            row["failed"] = f"{type(error).__name__}: {error}"
        return row | cost(began)

    def _compress_module(self, recipe: dict[str, Any], splits: tuple[str, ...]) -> dict[str, Any]:
        from benchmarks import digits

        began = time.perf_counter()
        found = digits.measure(recipe, self.seed, splits)
        seconds = {"recovery" if "recovery" in found["tokens"] else "factors": time.perf_counter() - began}
        where = build.environment_of(torch.device("cpu"), self.seed).model_dump()
        return found | {"environment": where, "seconds": seconds, "notes": []}

    def _workspace(self, recipe: Mapping[str, Any]) -> Workspace:
        work = pipeline.open_workspace(
            self.bed.model_path(), recipes.resolve(recipe)[1], self.folder, seed=self.seed, display=Display(quiet=True)
        )
        if self.work is not None:
            carry(self.work, work)
        self.work = work
        return work

    def _measured(self, work: Workspace, result: RowSpec, splits: tuple[str, ...]) -> dict[str, Any]:
        plan = work.plan_of(result)
        return {
            "environment": build.environment(work).model_dump(),
            "parameters": plan.kept_parameters,
            "dense_parameters": plan.dense_parameters,
            "seconds": self._seconds(work, trained=result.name == "lora_lrd"),
            "tokens": self._tokens(work, trained=result.name == "lora_lrd"),
            "dense": {split: asdict(self._score(work, {}, split)) for split in splits},
            "scores": {split: asdict(self._score(work, work.modules(result), split)) for split in splits},
            "notes": [note for stage in build.stage_rows(work) for note in stage.notes if "held-out" in note],
            **(self._tasks(work, result) if "test" in splits else {}),
        }

    def _tasks(self, work: Workspace, result: RowSpec) -> dict[str, Any]:
        """Scores in the bed's tasks of lm-eval, where it has any; the dense model's are taken once a folder."""
        entries = work.recipe.task_evaluators
        if not entries:
            return {}
        trained = work.recipe.recovery if result.name == "lora_lrd" else None
        cell = f"{result.key}, {work.share_of(result.ranks)}, {trained and trained.learning_rate}"
        found = harness.measure_tasks(
            work.model, {"dense": {}, cell: work.modules(result)}, work.processor, entries,
            batch_size=work.recipe.evaluation.batch, state=self.folder / f"tasks-{commit()}.json",
        )  # fmt: skip
        values = {row: {m.name: m.value for one in scores for m in one.measurements} for row, scores in found.items()}
        return {"tasks": values[cell], "dense_tasks": values["dense"]}

    def _score(self, work: Workspace, modules: dict[str, nn.Module], split: str) -> Any:
        if split not in self.scorers:
            settings = pipeline.open_workspace(
                self.bed.model_path(), work.recipe, self.folder, settings=[f"evaluation.split={split}"], seed=self.seed
            )
            carry(work, settings)
            examples = settings.evaluation_examples()
            batches = list(examples.batches(work.recipe.evaluation.batch))
            self.scorers[split] = Scorer(work.model, batches, work.task)
        return self.scorers[split].score(modules)

    def _seconds(self, work: Workspace, *, trained: bool) -> dict[str, float]:
        """Of each stage; statistics and spectra are shared by all sizes and by variants of equal statistics."""
        chosen = [name for name in work.order if work.wants(name) and work.finished(name)]
        if not trained and "recovery" in chosen:
            chosen.remove("recovery")  # of an earlier row in the same folder
        return {name: work.record(name)["seconds"] for name in chosen}

    def _tokens(self, work: Workspace, *, trained: bool) -> dict[str, int]:
        """Real tokens that went through the model forward (and back) in the training, and of the calibration set."""
        found = {"calibration": calibration_tokens(work)}
        if trained:
            folder, settings = work.stage("recovery"), work.recipe.recovery
            assert settings is not None
            between = read_json(folder / "check-plan.json")["rounds"] - 1
            found["calibration"] += between * calibration_tokens(work, settings.rounds_calibration)
            curve = read_json(folder / "curve-plan.json")
            found["recovery"] = round(sum(point["seconds"] * point["tokens_per_second"] for point in curve))
        return found


def reset_peak() -> None:
    """Forget the peak memory of earlier rows, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def cost(began: float) -> dict[str, Any]:
    """Seconds since then, and peak memory since the last reset: CUDA's allocator's, or the process's resident size."""
    seconds = time.perf_counter() - began
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    elif STATUS.exists():
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) * 1024  # type: ignore[index]
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall_seconds": seconds, "peak_memory_bytes": peak}


def calibration_tokens(work: Workspace, share: float = 1.0) -> int:
    """Real tokens of the calibration set, or of a share of its sequences."""
    examples = work.training_examples(work.recipe.calibration.length)
    return int(examples.batch(work.calibration_indices(examples, share=share))["attention_mask"].sum())


def main() -> None:
    """Measure the job's sizes."""
    job = json.loads(Path(sys.argv[1]).read_text())
    one = Measuring(beds()[job["bed"]], job["variant"], job["seed"], Path(job["folder"]))
    for keep, rate in job["cells"]:
        row = one.measure(keep, rate, tuple(job["splits"]), keep in job.get("untrained", ()))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
