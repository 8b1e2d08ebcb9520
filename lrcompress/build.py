"""From a run folder to its report."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

from lrcompress import __version__, stages
from lrcompress.artifacts import Pivoted, RankPlan, read_json, read_values, write_views
from lrcompress.evaluate.harness import TaskScores, read_scores
from lrcompress.latency import RowTiming, read_timings
from lrcompress.layers import read_weight
from lrcompress.linalg import relative_error, sampled_ranks, tail_shares
from lrcompress.pivoting import pivot_condition
from lrcompress.report import Environment, LayerRow, Report, Row, StageRow, to_html, to_markdown
from lrcompress.report.schema import (
    MAX_SPECTRUM_RANKS,
    Latency,
    Metric,
    ModelInfo,
    Selection,
    TaskMetric,
    TrainingPoint,
)
from lrcompress.sizes import Size, model_size
from lrcompress.workspace import RowSpec, Workspace


def report(work: Workspace, *, finished: bool = True) -> Report:
    """The report of a run; before it is `finished`, without what later stages add (latency, written bytes)."""
    metrics = _metrics(work)
    rows = [_dense_row(work, metrics), *(_row(work, row, metrics) for row in work.rows)]
    if finished and work.recipe.timing is not None:
        rows = _with_latency(work, rows)
    return Report(
        model=model_info(work),
        recipe=work.recipe.model_dump(mode="json"),
        environment=environment_of_run(work),
        rows=rows,
        layers=_layer_rows(work),
        selection=_selection(work),
        stages=stage_rows(work) if finished else [],
        training=_training(work),
        definitions=_definitions(work),
        notes=_notes(work, rows),
    )


def report_for_card(work: Workspace) -> Report:
    """The report as far as the model depends on it: the card must not say what another run may change."""
    value = report(work, finished=False)
    recipe = {key: item for key, item in value.recipe.items() if key not in ("timing", "analysis")}
    if isinstance(recovery := recipe["recovery"], dict):
        recipe["recovery"] = {key: item for key, item in recovery.items() if key != "save_every"}
    if isinstance(data := recipe["data"], dict):
        evaluated = work.evaluation_split if work.recipe.sequence_evaluators else None
        read = ("train", evaluated, "validation" if work.checks_training else None)
        recipe["data"] = {split: source for split, source in data.items() if split in read}
    return value.model_copy(update={"recipe": recipe})


def existing(work: Workspace) -> Report | None:
    """The report that is there, if it is of this recipe and of the stages that are there."""
    if not all((work.folder / f"report.{end}").exists() for end in ("json", "md", "html")):
        return None
    try:
        value = Report.model_validate_json((work.folder / "report.json").read_bytes())
    except ValidationError:  # of another version, or damaged
        return None
    # seconds are never the same: they tell a stage from the same one done again
    same = value.recipe == work.recipe.model_dump(mode="json") and value.stages == stage_rows(work)
    return value if same else None


def write(folder: Path, value: Report) -> None:
    """report.json, report.md and report.html."""
    write_views(folder, "report", value.model_dump(mode="json"), to_markdown(value), to_html(value))


def environment_of_run(work: Workspace) -> Environment:
    """Where the last of the finished stages was made, which is the timing where there is one.

    That of this process if no stage says (one of an earlier version).
    """
    done = [name for name in work.order if work.wants(name) and work.finished(name)]
    record = work.record(done[-1]) if done else {}
    try:
        return Environment.model_validate(record.get("environment"))
    except ValidationError:
        return environment(work)


def environment(work: Workspace) -> Environment:
    """Hardware, versions and seed of what this process does for a run."""
    return environment_of(work.device, work.seed)


def environment_of(device: torch.device, seed: int) -> Environment:
    """Hardware, versions and seed of whatever is measured in this process."""
    cuda = device.type == "cuda"
    return Environment(
        device=str(device),
        hardware=torch.cuda.get_device_name(device) if cuda else _processor(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        lrcompress=__version__,
        seed=seed,
        compute_dtype="float32, recovery in bfloat16 autocast" if cuda else "float32",
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def model_info(work: Workspace) -> ModelInfo:
    """The dense model."""
    config = work.source.config
    return ModelInfo(
        id=work.source.id,
        revision=work.source.revision,
        model_type=config.model_type,
        task=work.task_name,
        parameters=_size(work, {}).parameters,
        license=work.stated_license[0],
        dtype=str(work.source.dtype).removeprefix("torch."),
    )


def _size(work: Workspace, ranks: Mapping[str, int]) -> Size:
    return model_size(work.skeleton, work.layers, ranks, work.source.dtype, work.recipe.dtype)


def _metrics(work: Workspace) -> Mapping[str, dict[str, Metric]]:
    if not work.recipe.sequence_evaluators:
        return {}
    measured = read_json(work.stage("evaluation") / stages.MEASUREMENTS)
    return {
        row: {m["name"]: Metric(value=m["value"], stderr=m["stderr"], count=m["count"]) for m in items}
        for row, items in measured.items()
    }


def _task_scores(work: Workspace, row: str) -> list[TaskScores]:
    """What lm-eval gave for a row, in the recipe's order."""
    if not work.recipe.task_evaluators:
        return []
    found = read_json(work.stage("evaluation") / stages.TASK_SCORES)[row]
    return [read_scores(found[name]) for entry in work.recipe.task_evaluators for name in entry.tasks]


def _tasks(work: Workspace, row: str) -> dict[str, TaskMetric]:
    return {
        one.name: TaskMetric(value=one.value, stderr=one.stderr, count=one.count, higher_is_better=one.higher_is_better)
        for scores in _task_scores(work, row)
        for one in scores.measurements
    }


def _dense_row(work: Workspace, metrics: Mapping[str, Any]) -> Row:
    size = _size(work, {})
    return Row(
        name="dense",
        ranks=None,
        parameters=size.parameters,
        target_parameters=sum(layer.dense_parameters for layer in work.layers.values()),
        file_bytes=size.file_bytes,
        metrics=metrics.get("dense", {}),
        tasks=_tasks(work, "dense"),
    )


def _row(work: Workspace, row: RowSpec, metrics: Mapping[str, Any]) -> Row:
    plan, layers = work.plan_of(row), work.layers_of(row)
    size = model_size(work.skeleton, layers, plan.ranks, work.source.dtype, work.recipe.dtype)
    trained = row.name == "lora_lrd" and work.recipe.recovery is not None
    kept = trained and not work.was_dropped(row)
    before = work.start_of(row.ranks) if kept else work.untrained(row.ranks)
    steps = work.recipe.recovery.steps if work.recipe.recovery is not None else 0
    return Row(
        name=row.name,  # type: ignore[arg-type]
        ranks=row.ranks,
        trained_steps=steps if kept else 0,
        rounds=work.rounds_of(row) if kept else 1,
        start=before.name if trained else None,  # type: ignore[arg-type]
        parameters=size.parameters,
        target_parameters=plan.kept_parameters,
        file_bytes=size.file_bytes,
        metrics=metrics.get(row.key, {}),
        tasks=_tasks(work, row.key),
        before_replacement=metrics.get(stages.BEFORE) if trained else None,
        seconds=_seconds(work, row) if work.finished("timing") or work.recipe.timing is None else None,
    )


def _seconds(work: Workspace, row: RowSpec) -> float:
    """Statistics, this method's spectra, the refit, and the training with what its rounds measured."""
    method = work.recipe.method.kind if row.name in ("refit", "lora_lrd") else row.name
    seconds = work.record("statistics")["seconds"]
    seconds += read_json(work.stage("spectra") / "seconds.json")[method]
    if method != row.name and work.recipe.refit is not None:
        seconds += work.record("refit")["seconds"]
    if row.name == "lora_lrd":
        seconds += sum(point["seconds"] for point in stages.curve(work, row.ranks))
        seconds += read_json(work.stage("recovery") / f"check-{row.ranks}.json")["seconds"]
    return seconds


def _with_latency(work: Workspace, rows: list[Row]) -> list[Row]:
    folder = work.stage("timing")
    timings, peaks = read_timings(folder / "timing.json")
    measured = {"dense-None": "dense"}
    for names in read_json(folder / "shared.json"):
        measured |= dict.fromkeys(names, names[-1])
    timed = []
    for row in rows:
        key = measured.get(f"{row.name}-{row.ranks}")
        if key is None:  # a frontier's further sizes
            timed.append(row)
            continue
        own = [timing for timing in timings if timing.row == key]
        update = {
            "latency": [_latency(timing) for timing in own],
            "device": own[0].device,
            "peak_memory_bytes": peaks[key],
        }
        timed.append(row.model_copy(update=update))
    return timed


def _latency(timing: RowTiming) -> Latency:
    return Latency(**{key: value for key, value in timing.summary().items() if key in Latency.model_fields})


def _layer_rows(work: Workspace) -> list[LayerRow]:
    result = work.rows[-1]
    plan, pairs, layouts = work.plan_of(result), work.factors(result), work.layers_of(result)
    place = work.stage("spectra") / work.recipe.method.kind
    rows = []
    for name, layer in layouts.items():
        pair = pairs.get(name)
        error = loss = None
        if pair is not None:
            weight = read_weight(work.model.get_submodule(name)).detach().cpu()
            relative = relative_error(weight, pair.factors())
            error, loss = relative**0.5, relative * weight.double().square().sum().item()
        tail = tail_shares(read_values(place / f"{name}.safetensors"))
        chosen = sampled_ranks(len(tail), MAX_SPECTRUM_RANKS)
        rows.append(
            LayerRow(
                name=name, out_features=layer.out_features, in_features=layer.in_features,
                rank=plan.ranks.get(name), relative_error=error, rank_loss=loss, group=layer.group, block=layer.block,
                kept_parameters=layer.kept(plan.ranks.get(name)),
                pivot_condition=pivot_condition(pair.rest) if isinstance(pair, Pivoted) else None,
                spectrum=[tail[r - 1].item() for r in chosen], spectrum_ranks=chosen,
            )
        )  # fmt: skip
    return rows


def stage_rows(work: Workspace) -> list[StageRow]:
    """Time, memory and notes of the finished stages."""
    rows = []
    for name in work.order:
        if work.wants(name) and work.finished(name):
            record = work.record(name)
            rows.append(
                StageRow(
                    name=name, seconds=record["seconds"], peak_memory_bytes=record["peak_memory_bytes"],
                    notes=record["notes"],
                )
            )  # fmt: skip
    return rows


def _selection(work: Workspace) -> Selection:
    return Selection.model_validate(read_json(work.stage("ranks") / "selection.json"))


def _training(work: Workspace) -> list[TrainingPoint]:
    points, seconds = [], 0.0
    for point in stages.curve(work):
        seconds += point["seconds"]
        points.append(TrainingPoint(**{**point, "seconds": seconds}))  # type: ignore[arg-type]
    return points


def _definitions(work: Workspace) -> dict[str, str]:
    found: dict[str, str] = {}
    for evaluator in work.recipe.sequence_evaluators:
        found |= evaluator.definitions
    for scores in _task_scores(work, "dense"):
        found |= scores.definitions
    return found


def _notes(work: Workspace, rows: list[Row]) -> list[str]:
    notes = []
    if unreadable := work.stated_license[1]:
        notes.append(f"The card of the base model cannot be read ({unreadable}): its licence is not known.")
    plan: RankPlan = work.plan_of(work.rows[-1])
    if plan.notes:
        notes.append(f"Dense weights stay in these target layers: {', '.join(plan.notes)}.")
    notes += [f"{note[0].upper()}{note[1:]}." for note in stages.unpivoted(work, work.rows[-1:])]
    if work.recipe.sequence_evaluators and work.evaluation_split != "test":
        notes.append("The metrics were measured on validation data, which choices may have been made on.")
    cut = {task: entry.limit for entry in work.recipe.task_evaluators for task in entry.tasks if entry.limit}
    if cut:
        first = ", ".join(f"{task} ({limit:,})" for task, limit in cut.items())
        notes.append(f"Tasks of lm-eval were cut to the first documents, so published scores do not compare: {first}.")
    if rows[-1].name == "lora_lrd" and not rows[-1].trained_steps:
        notes.append(
            "The training brought the factors no nearer to the dense model on validation data, and was dropped: the "
            "row lora_lrd is what it started from. A lower learning rate may help, or none at all: recovery: null."
        )
    if rows[-1].before_replacement is not None:
        notes.append(
            "The schedule of τ does not end at 1: before replacement the dense weights still take part in the "
            "model, afterwards only the factors do. The saved model is the one after replacement."
        )
    return notes
