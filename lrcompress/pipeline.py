"""The table of stages, what each reads, and running those whose results are missing or out of date."""

import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrcompress import build, preflight, rank_stages, source, stages
from lrcompress import recipe as recipes
from lrcompress.artifacts import read_json, write_json
from lrcompress.errors import OutputError, RecipeError, nearest
from lrcompress.progress import Display
from lrcompress.recipe import Recipe
from lrcompress.report import Report, model_card
from lrcompress.selection import run_key
from lrcompress.workspace import STAGE_ORDER, Workspace

Work = Callable[[Workspace, Path], list[str]]


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


_LAYERS = frozenset({"model", "task", "targets"})
_CALIBRATION = _LAYERS | {"calibration", "data.train", "seed", "device"}
_STATISTICS = _CALIBRATION | {"statistics"}
_RANKS = _CALIBRATION | {"method", "ranks", "selection"}
_FACTORS = _STATISTICS | _RANKS | {"baselines"}
_RESULT = _RANKS | {"recovery"}
_EVALUATION = _FACTORS | _RESULT | {"evaluate", "evaluation", "data.evaluation"}


def _write_model(work: Workspace, folder: Path) -> list[str]:
    """The model folder is made and checked inside the stage's, then moved to its place."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    notes = stages.model(work, folder / "model", model_card(build.report_for_card(work)))
    final = work.folder / "model"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(folder / "model", final)
    return notes


STAGES: tuple[Stage, ...] = (
    Stage("layers", stages.layers, _LAYERS),
    Stage("statistics", stages.statistics, _STATISTICS),
    Stage("spectra", stages.spectra, _STATISTICS | {"method", "baselines"}),
    Stage("learning", rank_stages.learning, _CALIBRATION | {"method", "learning"}),
    Stage("ranks", rank_stages.ranks, _RANKS),
    Stage("factors", stages.factors, _FACTORS),
    Stage("recovery", stages.recovery, _RESULT),
    Stage("evaluation", stages.evaluation, _EVALUATION),
    Stage("model", _write_model, _EVALUATION),
    Stage("timing", stages.timing, _FACTORS | {"recovery", "timing"}),
)
assert tuple(stage.name for stage in STAGES) == STAGE_ORDER


def run(
    model: str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    settings: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    until: str | None = None,
    redo: Collection[str] = (),
    display: Display | None = None,
) -> Report | None:
    """Compress a model by a recipe: everything that `lrcompress run` does.

    `model` is `demo`, a local folder, or a Hub id with an optional `@revision`; `recipe` a Recipe, plain values,
    a file, or the name of a shipped recipe. Writes the run folder `output` (default: runs/<model>-<recipe>), skips
    stages whose result is there and up to date, goes on inside a stage that was killed. Returns the report,
    or None when `until` ended the run before it. Raises an InputError before any work for what cannot be done.
    """
    work = open_workspace(model, recipe, output, settings=settings, device=device, seed=seed, display=display)
    return execute(work, until=until, redo=redo)


def execute(work: Workspace, *, until: str | None = None, redo: Collection[str] = ()) -> Report | None:
    """Check everything, then run the stages that are missing or out of date; see `run`."""
    todo = plan_of_work(work, until, redo)
    if any(todo.values()):
        preflight.check(work)
    elif until is None and (report := build.existing(work)) is not None:
        return report
    _record(work)
    for stage in STAGES:
        if todo.get(stage.name):
            work.display.say(f"{stage.name}: {todo[stage.name]}")
            _run_stage(stage, work)
        if stage.name == until:
            work.display.say(f"stopped after {until}, as asked")
            return None
    report = build.report(work)
    build.write(work.folder, report)
    return report


def plan_of_work(work: Workspace, until: str | None = None, redo: Collection[str] = ()) -> dict[str, str]:
    """Stage → why it will run, "" if it is up to date; refuses unknown stages and a folder that isn't ours."""
    known = [stage.name for stage in STAGES]
    for option, name in [("--until", until), *(("--redo", name) for name in redo)]:
        if name is not None and name not in known:
            raise RecipeError(
                f"{option}: no such stage",
                got=name,
                allowed=", ".join(known),
                do=nearest(name, known) or "choose one",
            )
    claim(work)
    reasons = outdated(work, redo)
    last = known.index(until) if until else len(known)
    return {name: reason for name, reason in reasons.items() if known.index(name) <= last}


def open_workspace(
    model: str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    settings: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    display: Display | None = None,
) -> Workspace:
    """Read the recipe and the model's config, choose device and folder; nothing is written."""
    name, recipe = recipes.resolve(recipe, settings)
    place = choose_device(device)
    opened = source.open_source(model)
    folder = Path(output) if output is not None else Path("runs") / f"{opened.name}-{name}"
    return Workspace(recipe, opened, folder, place, seed, display or Display(quiet=True))


def choose_device(text: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = text.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise RecipeError("unknown device", got=text, allowed="auto, cpu, cuda, cuda:N", do="correct --device")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise RecipeError(
            "the device is not there", got=text,
            allowed=f"{torch.cuda.device_count()} CUDA devices are visible to torch",
            do="use --device cpu, or install a CUDA build of torch and its driver",
        )  # fmt: skip
    return torch.device(text)


def claim(work: Workspace) -> None:
    """Refuse a folder that holds something else than a run of this model."""
    mark = work.folder / "run.json"
    if work.folder.exists() and not work.folder.is_dir():
        raise OutputError("the output is a file", got=work.folder, do="name another folder with --output")
    former = _former_model(mark)
    if former is None:
        held = {file.name for file in work.folder.iterdir()} if work.folder.exists() else set()
        if held - {f"{mark.name}.partial"}:
            raise OutputError(
                "the output folder holds something else", got=work.folder,
                allowed="a new or empty folder, or one of a former run", do="name another folder with --output",
            )  # fmt: skip
        return
    if Path(former).resolve() != Path(work.source.id).resolve():  # `gpt2/` is `gpt2`
        raise OutputError(
            "the output folder holds a run of another model", got=f"{work.folder}: {former}", allowed=work.source.id,
            do="name another folder with --output",
        )  # fmt: skip


def _former_model(mark: Path) -> str | None:
    try:
        former = read_json(mark)
    except (FileNotFoundError, ValueError):
        return None
    return former.get("model") if isinstance(former, dict) else None


def outdated(work: Workspace, redo: Collection[str] = ()) -> dict[str, str]:
    """Stage → why it will run; "" for a stage whose result is there and up to date."""
    reasons: dict[str, str] = {}
    again = False
    for stage in STAGES:
        if not stage.wanted(work):
            continue
        again = again or stage.name in redo
        record = work.stage(stage.name) / "stage.json"
        if again:
            reasons[stage.name] = "asked for" if stage.name in redo else "after a stage that was asked for"
        elif not record.exists():
            reasons[stage.name] = "goes on" if _partial(work, stage).exists() else "first time"
        elif read_json(record)["fingerprint"] != fingerprint(work, stage):
            changed = _changed(read_json(record).get("reads", {}), _reads(work, stage))
            reasons[stage.name] = f"changed: {', '.join(changed) or 'its code'}"
        elif stage.name == "model" and not (work.folder / "model").is_dir():
            reasons[stage.name] = "its folder is gone"
        else:
            reasons[stage.name] = ""
    return reasons


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
        "data.evaluation": work.data_fingerprint(work.wanted_split),
        "recovery": recovery,
        "learning": [run_key(run) for run in work.learning_runs],
        "selection": _selection(work, recovery),
    }
    return {key: _hash(value) for key, value in values.items()}


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


def _run_stage(stage: Stage, work: Workspace) -> None:
    partial, mark = _partial(work, stage), fingerprint(work, stage)
    begun = partial / "fingerprint.json"
    if partial.exists() and (not begun.exists() or read_json(begun) != mark):
        shutil.rmtree(partial)  # what a killed run left there was made from something else
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
    }
    write_json(partial / "stage.json", record)
    begun.unlink()
    final = work.stage(stage.name)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    for note in notes:
        work.display.detail(f"  {note}")


def _peak_memory(device: torch.device) -> int:
    """Bytes: of CUDA's allocator within the stage, else of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _partial(work: Workspace, stage: Stage) -> Path:
    final = work.stage(stage.name)
    return final.with_name(f"{final.name}.partial")


def _record(work: Workspace) -> None:
    work.folder.mkdir(parents=True, exist_ok=True)
    write_json(  # first: it marks the folder as ours
        work.folder / "run.json",
        {"model": work.source.id, "revision": work.source.revision, "seed": work.seed},
    )
    (work.folder / "recipe.yaml").write_text(recipes.dump(work.recipe), encoding="utf-8")
    write_json(work.folder / "environment.json", build.environment(work).model_dump())
