"""The table of stages, what each reads, and running those whose results are missing or out of date."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrcompress import analysis_stage, build, preflight, rank_stages, recovery_stage, source, stages
from lrcompress import recipe as recipes
from lrcompress.analysis.schema import Analysis
from lrcompress.analysis.settings import all_methods
from lrcompress.artifacts import put_folder, read_json, settle_folder, write_json
from lrcompress.chain import Stage, begin_redo, outdated, run_stage, settle
from lrcompress.errors import OutputError, RecipeError, nearest
from lrcompress.layers import Targets
from lrcompress.progress import Display
from lrcompress.recipe import Recipe
from lrcompress.redo import end as end_redo
from lrcompress.report import Report, model_card
from lrcompress.workspace import ANALYSIS_ORDER, STAGE_ORDER, Workspace

_LAYERS = frozenset({"model", "task", "targets"})
_CALIBRATION = _LAYERS | {"calibration", "data.train", "seed", "device"}
_STATISTICS = _CALIBRATION | {"statistics"}
_RANKS = _CALIBRATION | {"method", "ranks", "selection", "layout"}
_FACTORS = _STATISTICS | _RANKS | {"baselines", "dtype"}
_RESULT = _RANKS | {"refit", "recovery", "recovery.check", "dtype"}
_EVALUATION = _FACTORS | _RESULT | {"evaluate", "evaluation", "data.evaluation"}


def _write_model(work: Workspace, folder: Path) -> list[str]:
    """The model folder is made and checked inside the stage's, then moved to its place."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    notes = stages.model(work, folder / "model", model_card(build.report_for_card(work)))
    put_folder(folder / "model", work.folder / "model")
    return notes


STAGES: tuple[Stage, ...] = (
    Stage("layers", stages.layers, _LAYERS),
    Stage("statistics", stages.statistics, _STATISTICS),
    Stage("spectra", stages.spectra, _STATISTICS | {"method", "baselines", "layout"}, version=2),
    Stage("learning", rank_stages.learning, _CALIBRATION | {"method", "learning", "layout"}),
    Stage("ranks", rank_stages.ranks, _RANKS),
    Stage("factors", stages.factors, _FACTORS),
    Stage("refit", stages.refit, _RANKS | {"refit", "refit.sizes", "dtype"}, version=2),
    Stage("recovery", recovery_stage.recovery, _RESULT, version=3),
    Stage("evaluation", stages.evaluation, _EVALUATION),
    Stage("model", _write_model, _EVALUATION),
    Stage("timing", stages.timing, _FACTORS | {"refit", "recovery", "rounds.check", "timing"}),
)
assert tuple(stage.name for stage in STAGES) == STAGE_ORDER

ANALYSIS_STAGES: tuple[Stage, ...] = (
    *(stage for stage in STAGES if stage.name in ANALYSIS_ORDER),
    Stage(
        "analysis",
        analysis_stage.stage,
        _STATISTICS
        | {"method", "baselines", "learning", "ranks", "layout", "analysis", "evaluation", "data.validation"},
    ),
)
assert tuple(stage.name for stage in ANALYSIS_STAGES) == ANALYSIS_ORDER


def chain_of(work: Workspace) -> tuple[Stage, ...]:
    """The stages of a run, or those of an analysis."""
    return ANALYSIS_STAGES if work.order == ANALYSIS_ORDER else STAGES


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
    stages whose result is there and up to date, goes on inside a stage that was killed. `redo` names stages to run
    again, and those after them with them; where that is interrupted the next run goes on, with or without `redo`.
    Returns the report, or None when `until` ended the run before it. Raises an InputError before any work for what
    cannot be done.
    """
    work = open_workspace(model, recipe, output, settings=settings, device=device, seed=seed, display=display)
    return execute(work, until=until, redo=redo)


def execute(work: Workspace, *, until: str | None = None, redo: Collection[str] = ()) -> Report | None:
    """Check everything, then run the stages that are missing or out of date; see `run`."""
    _settle(work)
    todo = plan_of_work(work, until, redo)
    if any(todo.values()):
        preflight.check(work)
    elif until is None and (report := build.existing(work)) is not None:
        end_redo(work)
        return report
    _record(work)
    begin_redo(work, chain_of(work), redo)
    _run_stages(work, todo, until)
    report = None
    if until is not None:
        work.display.say(f"stopped after {until}, as asked")
    else:
        report = build.report(work)
        build.write(work.folder, report)
    end_redo(work)
    return report


def _settle(work: Workspace) -> None:
    claim(work)
    settle(work, chain_of(work))
    settle_folder(work.folder / "model")


def _run_stages(work: Workspace, todo: Mapping[str, str], until: str | None) -> None:
    for stage in chain_of(work):
        if todo.get(stage.name):
            work.display.say(f"{stage.name}: {todo[stage.name]}")
            run_stage(stage, work)
        if stage.name == until:
            return


def analyze(
    model: str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    layers: Sequence[str] = (),
    settings: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    display: Display | None = None,
) -> Analysis:
    """Into how many dimensions does each layer project, and which rank is enough? What `lrcompress analyze` does.

    Reads a recipe's targets, data, calibration, method and `analysis` section; `layers` are glob patterns that
    take the targets' place. Writes `output` (default: runs/<model>-<recipe>-analysis) with analysis.json, .md and
    .html; goes on where it was stopped. Raises an InputError before any work for what cannot be done.
    """
    work = open_analysis(
        model, recipe, output, layers=layers, settings=settings, device=device, seed=seed, display=display
    )
    return execute_analysis(work)


def open_analysis(
    model: str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    layers: Sequence[str] = (),
    settings: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    display: Display | None = None,
) -> Workspace:
    """A workspace whose recipe has every method and whose selectors are those to compare; nothing is written."""
    work = open_workspace(model, recipe, output, settings=settings, device=device, seed=seed, display=display)
    changed: dict[str, Any] = {"recovery": None, "evaluate": (), "timing": None}
    changed["baselines"] = all_methods(work.recipe.method)[1:]
    if layers:
        changed["targets"] = Targets(include=tuple(layers))
    own = work.recipe.model_copy(update=changed)
    folder = work.folder if output is not None else work.folder.with_name(f"{work.folder.name}-analysis")
    scored = own.data is not None and own.data.validation is not None
    selectors = own.analysis.selectors(own.method, own.ranks, scored=scored)
    return replace(work, recipe=own, folder=folder, order=ANALYSIS_ORDER, selectors=selectors)


def execute_analysis(work: Workspace) -> Analysis:
    """Check everything, then run the stages that are missing or out of date; see `analyze`."""
    _settle(work)
    todo = plan_of_work(work)
    if any(todo.values()):
        preflight.check(work)
    _record(work)
    _run_stages(work, todo, None)
    value = analysis_stage.analysis(work)
    analysis_stage.write(work.folder, value)
    return value


def plan_of_work(work: Workspace, until: str | None = None, redo: Collection[str] = ()) -> dict[str, str]:
    """Stage → why it will run, "" if it is up to date; refuses unknown stages and a folder that isn't ours."""
    known = list(work.order)
    for option, name in [("--until", until), *(("--redo", name) for name in redo)]:
        if name is not None and name not in known:
            raise RecipeError(
                f"{option}: no such stage",
                got=name,
                allowed=", ".join(known),
                do=nearest(name, known) or "choose one",
            )
    claim(work)
    reasons = outdated(work, chain_of(work), redo)
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
    """Refuse a folder that holds something else than a run of this model, or an analysis where a run should be."""
    mark = work.folder / "run.json"
    if work.folder.exists() and not work.folder.is_dir():
        raise OutputError("the output is a file", got=work.folder, do="name another folder with --output")
    former = _former(mark)
    if former is None:
        held = {file.name for file in work.folder.iterdir()} if work.folder.exists() else set()
        if held - {f"{mark.name}.partial"}:
            raise OutputError(
                "the output folder holds something else", got=work.folder,
                allowed="a new or empty folder, or one of a former run", do="name another folder with --output",
            )  # fmt: skip
        return
    kind = former.get("kind", "run")
    if kind != _kind(work):
        raise OutputError(
            "the output folder holds another kind of work", got=f"{work.folder}: {kind}", allowed=_kind(work),
            do="name another folder with --output",
        )  # fmt: skip
    if Path(former["model"]).resolve() != Path(work.source.id).resolve():  # `gpt2/` is `gpt2`
        raise OutputError(
            "the output folder holds a run of another model", got=f"{work.folder}: {former['model']}",
            allowed=work.source.id, do="name another folder with --output",
        )  # fmt: skip


def _former(mark: Path) -> dict[str, Any] | None:
    try:
        former = read_json(mark)
    except (FileNotFoundError, ValueError):
        return None
    return former if isinstance(former, dict) and "model" in former else None


def _kind(work: Workspace) -> str:
    return "analysis" if work.order == ANALYSIS_ORDER else "run"


def _record(work: Workspace) -> None:
    work.folder.mkdir(parents=True, exist_ok=True)
    write_json(  # first: it marks the folder as ours
        work.folder / "run.json",
        {"kind": _kind(work), "model": work.source.id, "revision": work.source.revision, "seed": work.seed},
    )
    (work.folder / "recipe.yaml").write_text(recipes.dump(work.recipe), encoding="utf-8")
    write_json(work.folder / "environment.json", build.environment(work).model_dump())
