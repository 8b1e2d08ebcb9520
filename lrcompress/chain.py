"""A chain of stages: which are out of date and why, and running one so that a killed run can go on."""

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrcompress import build, redo, stages
from lrcompress.artifacts import put_folder, read_json, settle_folder, write_json
from lrcompress.evaluate.harness import folder_fingerprint
from lrcompress.selection import run_key
from lrcompress.workspace import RECORD, Workspace

Work = Callable[[Workspace, Path], list[str]]

BEGUN = "fingerprint.json"
"""What a stage is made from, in its folder as long as it is at work."""


@dataclass(frozen=True)
class Stage:
    """A step whose result is a folder; it runs again when something that it reads has changed.

    `reads` names everything its result depends on, also by way of earlier stages: so a new baseline runs the
    spectra again and not the recovery.
    """

    name: str
    work: Work
    reads: frozenset[str]
    version: int = 1

    def wanted(self, work: Workspace) -> bool:
        """Whether the recipe asks for it."""
        return work.wants(self.name)


def outdated(work: Workspace, chain: Sequence[Stage], asked: Collection[str] = ()) -> dict[str, str]:
    """Stage → why it will run; "" for a stage whose result is there and up to date."""
    reasons: dict[str, str] = {}
    again = redo.left(work, _wanted(work, chain), asked)
    for stage in (stage for stage in chain if stage.wanted(work)):
        record = work.stage(stage.name) / RECORD
        if stage.name in again:
            reasons[stage.name] = "asked for" if stage.name in asked else "after a stage that was asked for"
        elif not record.exists():
            reasons[stage.name] = "goes on" if _partial(work, stage.name).exists() else "first time"
        elif read_json(record)["fingerprint"] != fingerprint(work, stage):
            changed = _changed(read_json(record).get("reads", {}), _reads(work, stage))
            reasons[stage.name] = f"changed: {', '.join(changed) or 'its code'}"
        elif stage.name == "model" and not (work.folder / "model").is_dir():
            reasons[stage.name] = "its folder is gone"
        else:
            reasons[stage.name] = ""
    return reasons


def begin_redo(work: Workspace, chain: Sequence[Stage], asked: Collection[str]) -> None:
    """Note on disk which stages `--redo` asks for; one that was interrupted goes on."""
    names = _wanted(work, chain)
    for name in redo.stale(work, names, asked):
        _discard(_partial(work, name))
    redo.begin(work, names, asked)


def _wanted(work: Workspace, chain: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in chain if stage.wanted(work)]


def settle(work: Workspace, chain: Sequence[Stage]) -> None:
    """Finish what a kill cut short between the end of a stage and its new folder's name."""
    for stage in chain:
        partial, final = _partial(work, stage.name), work.stage(stage.name)
        if (partial / RECORD).exists() and not (partial / BEGUN).exists():
            put_folder(partial, final)
        settle_folder(final)


def fingerprint(work: Workspace, stage: Stage) -> str:
    """Hash of everything that a stage's result depends on."""
    return _hash([stage.name, stage.version, _reads(work, stage)])


def _reads(work: Workspace, stage: Stage) -> dict[str, str]:
    everything = _readable(work)
    return {key: everything[key] for key in sorted(stage.reads)}


def _readable(work: Workspace) -> dict[str, str]:
    """Key → hash of its value, for all that a stage can read."""
    found = work.recipe.model_dump(mode="json")
    recovery = found["recovery"]
    if recovery is not None:
        recovery.pop("save_every")  # does not change the result
    values: dict[str, Any] = {key: found[key] for key in found if key != "data"}
    values |= {
        "model": work.source_identity,
        "task": work.task_name,
        "seed": work.seed,
        "device": work.device.type,
        "statistics": sorted(stages.needed_statistics(work.recipe.methods)),
        "data.train": work.data_fingerprint("train"),
        "data.validation": work.data_fingerprint("validation"),
        "data.evaluation": work.data_fingerprint(work.wanted_split),
        "evaluate": found["evaluate"] + [folder_fingerprint(entry) for entry in work.recipe.task_evaluators],
        "refit.sizes": [row.ranks for row in work.rows if row.name == "refit"],  # of a frontier, those that are trained
        "recovery": recovery,
        "recovery.check": work.data_fingerprint("validation") if work.checks_training else None,
        "rounds.check": work.data_fingerprint("validation") if _can_change_ranks(work) else None,
        "learning": [run_key(run) for run in work.learning_runs],
        "selection": _selection(work, recovery),
    }
    return {key: _hash(value) for key, value in values.items()}


def _can_change_ranks(work: Workspace) -> bool:
    """Whether validation data decide which ranks the trained row has: those of its rounds, or the plan's."""
    return work.checks_training and work.recipe.recovery is not None and bool(work.recipe.recovery.rounds)


def _selection(work: Workspace, recovery: Any) -> Any:
    """What a selector reads beside spectra and learned pairs: the data and the training that plans are scored by."""
    if not work.recipe.ranks.needs_scores:
        return None
    trained = recovery if getattr(work.recipe.ranks, "recovery_steps", 0) else None
    return [work.data_fingerprint("validation"), work.recipe.evaluation.model_dump(mode="json"), trained]


def _changed(former: dict[str, str], current: dict[str, str]) -> list[str]:
    return [key for key in current if former.get(key) != current[key]]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def run_stage(stage: Stage, work: Workspace) -> None:
    """Run a stage in its partial folder and give it its name once it is whole."""
    partial, mark = _partial(work, stage.name), fingerprint(work, stage)
    begun = partial / BEGUN
    if partial.exists() and (not begun.exists() or read_json(begun) != mark):
        _discard(partial)  # what a killed run left there was made from something else
    partial.mkdir(parents=True, exist_ok=True)
    resumed = begun.exists()
    write_json(begun, mark)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.device)
    began = time.perf_counter()
    notes = stage.work(work, partial)
    if resumed:
        notes = [*notes, "went on after an interruption; the seconds are those of the last part"]
    record = {
        "fingerprint": mark,
        "reads": _reads(work, stage),
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": _peak_memory(work.device),
        "notes": notes,
        "environment": build.environment(work).model_dump(),
    }
    write_json(partial / RECORD, record)
    begun.unlink()
    put_folder(partial, work.stage(stage.name))
    redo.done(work, stage.name)
    for note in notes:
        work.display.detail(f"  {note}")


def _peak_memory(device: torch.device) -> int:
    """Bytes: of CUDA's allocator within the stage, else of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _partial(work: Workspace, name: str) -> Path:
    final = work.stage(name)
    return final.with_name(f"{final.name}.partial")


def _discard(partial: Path) -> None:
    """Remove what a killed run left of a stage; first the files by which half of it would be taken for whole."""
    for name in (RECORD, BEGUN):
        (partial / name).unlink(missing_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
