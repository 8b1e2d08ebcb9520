"""What every view says: tables, labels and winners, before any mark-up."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal

from . import numbers
from .schema import (
    BESIDE_DENSE,
    FRACTIONS,
    HIGHER_IS_BETTER,
    Environment,
    Latency,
    Metric,
    MetricName,
    ModelInfo,
    Report,
    Row,
)

METRICS: dict[MetricName, str] = {
    "wer": "word error rate",
    "token_perplexity": "token perplexity",
    "entity_f1": "entity F1",
    "accuracy": "accuracy",
    "squared_error": "squared error",
    "label_spearman": "Spearman to labels",
    "cosine": "cosine to dense",
    "spearman": "Spearman to dense",
    "kl": "KL to dense",
    "agreement": "agreement",
}
PHASES = {"prefill": "prefill", "decode": "decode, per token", "forward": "forward"}


@dataclass(frozen=True)
class Cell:
    """One field of a table; `best` marks the winner among the compressed rows."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A table's column: a `name` is an identifier, a `word` is short, a `text` may be long."""

    title: str
    kind: Literal["name", "number", "word", "text"] = "number"


@dataclass(frozen=True)
class Grid:
    """A table without mark-up."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.rows)


def short_id(model_id: str) -> str:
    """A Hub id as it is, a local folder by its name alone."""
    return last_part(model_id) if is_path(model_id) else model_id


def is_path(text: str) -> bool:
    """Whether a text names a place on this machine: absolute, or relative with a leading dot or tilde."""
    rooted = PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive != "" or "\\" in text
    return rooted or text.startswith(("./", "../", "~"))


def last_part(path: str) -> str:
    """The last name of a POSIX or Windows path."""
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or "model"


def dense_row(report: Report) -> Row | None:
    """The uncompressed model's row."""
    return next((row for row in report.rows if row.name == "dense"), None)


def result_row(report: Report) -> Row | None:
    """The row of the saved model: the learned one, else the recipe's method, at the plan's ranks first."""
    method = report.recipe.get("method")
    kind = method.get("kind") if isinstance(method, dict) else None
    found = [row for name in ("lora_lrd", "refit", kind) for row in report.rows if row.name == name]
    return next(iter(sorted(found, key=lambda row: row.ranks != "plan")), None)  # stable: the learned one first


def label(report: Report, row: Row) -> str:
    """A row's name, with its kind of ranks where the name alone is ambiguous."""
    same = [other for other in report.rows if other.name == row.name]
    return f"{row.name} ({row.ranks})" if len(same) > 1 and row.ranks else row.name


def metric_names(report: Report) -> list[MetricName]:
    """The metrics that some row has, in a fixed order."""
    return [name for name in METRICS if any(name in row.metrics for row in report.rows)]


def plotted_metrics(report: Report) -> list[MetricName]:
    """What is drawn against size: the task's own measure, then the distance from the dense model."""
    names: list[MetricName] = [name for name in metric_names(report) if name != "agreement"]
    own: list[MetricName] = [name for name in names if name not in BESIDE_DENSE]
    beside: list[MetricName] = [name for name in names if name in BESIDE_DENSE]
    return [*own[:1], *beside[:1]] if own and beside else names[:2]


def metric_title(name: MetricName) -> str:
    """A metric's heading: unit, and an arrow towards better."""
    unit = " %" if name in FRACTIONS else ""
    return f"{METRICS[name]}{unit} {'↑' if name in HIGHER_IS_BETTER else '↓'}"


def best_value(report: Report, name: MetricName) -> float | None:
    """The best value among the compressed rows; None where there is nothing to win against."""
    values = [row.metrics[name].value for row in report.rows if row.name != "dense" and name in row.metrics]
    if len(values) < 2:
        return None
    return max(values) if name in HIGHER_IS_BETTER else min(values)


def metric_cell(report: Report, row: Row, name: MetricName) -> Cell:
    """A row's measured quality, marked if no compressed row has a better one."""
    found = row.metrics.get(name)
    best = best_value(report, name)
    won = found is not None and row.name != "dense" and best is not None and found.value == best
    return Cell(numbers.measured(name, found), won)


def quality_grid(report: Report) -> Grid:
    """All rows: how good, and how large; quality first, since a phone shows the first columns."""
    names = metric_names(report)
    sizes = ("parameters", "% of dense", "% of targets", "file", "trained steps")
    dense = dense_row(report)
    targets = dense.target_parameters if dense else 0
    columns = [Column("row", "name"), Column("ranks", "word")]
    columns += [Column(title) for title in (*map(metric_title, names), *sizes)]
    rows = [
        (
            *_cells(row.name, row.ranks or numbers.MISSING),
            *(metric_cell(report, row, name) for name in names),
            *_cells(
                numbers.integer(row.parameters),
                numbers.share(row.parameters, report.model.parameters),
                numbers.share(row.target_parameters, targets),
                numbers.size(row.file_bytes),
                numbers.MISSING if row.name == "dense" else numbers.integer(row.trained_steps),
            ),
        )
        for row in report.rows
    ]
    return Grid(tuple(columns), tuple(rows))


def task_names(report: Report) -> list[str]:
    """The metrics of lm-eval's tasks, in the order in which they were measured."""
    return list(dict.fromkeys(name for row in report.rows for name in row.tasks))


def task_grid(report: Report) -> Grid:
    """Each metric of lm-eval's tasks, and what every row has of it."""
    columns = (Column("task", "name"), *(Column(label(report, row)) for row in report.rows))
    rows = [(Cell(task_title(report, name)), *task_cells(report, name)) for name in task_names(report)]
    return Grid(columns, tuple(rows)) if rows else Grid((), ())


def task_title(report: Report, name: str) -> str:
    """A task's metric with an arrow towards better, where that is known."""
    better = next(row.tasks[name].higher_is_better for row in report.rows if name in row.tasks)
    return name + {True: " ↑", False: " ↓", None: ""}[better]


def task_cells(report: Report, name: str) -> list[Cell]:
    """What each row has of a task's metric; marked if no compressed row has better."""
    found = [row.tasks.get(name) for row in report.rows]
    rivals = [one for row, one in zip(report.rows, found, strict=True) if one and row.name != "dense"]
    known = len(rivals) > 1 and rivals[0].higher_is_better is not None
    best = (max if rivals[0].higher_is_better else min)(one.value for one in rivals) if known else None
    return [
        Cell(numbers.task(one), one is not None and row.name != "dense" and one.value == best)
        for row, one in zip(report.rows, found, strict=True)
    ]


def counts_sentence(report: Report) -> str:
    """How many items (tokens or examples) each metric covers, said once where all agree."""
    found = {
        METRICS[name]: " or ".join(map(numbers.integer, sorted(_counts(report, name)))) for name in metric_names(report)
    }
    if len(set(found.values())) == 1:
        return f"Measured on {next(iter(found.values()))} items."
    return f"Measured on: {'; '.join(f'{name}, {count} items' for name, count in found.items())}." if found else ""


def replacement_grid(report: Report) -> Grid:
    """Quality before and after the dense weights are taken away, where they still took part at the end."""
    rows: list[tuple[Cell, ...]] = []
    for row in report.rows:
        for name, before in (row.before_replacement or {}).items():
            texts = (METRICS[name], *_pair(name, before, row.metrics.get(name)))
            rows.append((Cell(label(report, row)), *map(Cell, texts)))
    columns = (Column("row", "name"), Column("metric", "word"), Column("before"), Column("after"))
    return Grid(columns, tuple(rows))


def latency_grid(report: Report) -> Grid:
    """Median and spread of each phase, batch size and row."""
    columns = (
        Column("row", "name"),
        Column("phase", "word"),
        Column("batch"),
        *map(Column, ("median ms", "p10 ms", "p90 ms", "× dense", "per second")),
        Column("device", "word"),
    )
    cases = sorted({(one.phase, one.batch) for row in report.rows for one in row.latency}, key=_case_order)
    rows = [
        _latency_cells(report, row, one)
        for phase, batch in cases
        for row in report.rows
        for one in row.latency
        if (one.phase, one.batch) == (phase, batch)
    ]
    return Grid(columns, tuple(rows))


def cost_grid(report: Report) -> Grid:
    """What each row took to make, and the memory it runs in."""
    rows = [
        (
            Cell(label(report, row)),
            Cell(numbers.seconds(row.seconds)),
            Cell(numbers.size(row.peak_memory_bytes)),
        )
        for row in report.rows
        if row.seconds is not None or row.peak_memory_bytes is not None
    ]
    return Grid((Column("row", "name"), Column("time to make"), Column("peak memory")), tuple(rows))


def layer_grid(report: Report) -> Grid:
    """Each target layer: shape, rank and error, and the pivot block's condition where any layer is pivoted."""
    pivoted = any(layer.pivot_condition is not None for layer in report.layers)
    numbers_shown = ("out", "in", "rank", "kept parameters", "relative error", "rank loss")
    columns = (
        Column("layer", "name"),
        Column("group", "word"),
        *map(Column, numbers_shown + ("pivot condition",) * pivoted),
    )
    rows = [
        _cells(
            layer.name,
            layer.group,
            numbers.integer(layer.out_features),
            numbers.integer(layer.in_features),
            "dense" if layer.rank is None else numbers.integer(layer.rank),
            numbers.integer(layer.kept_parameters),
            numbers.optional(layer.relative_error),
            numbers.optional(layer.rank_loss),
            *(numbers.optional(layer.pivot_condition),) * pivoted,
        )
        for layer in report.layers
    ]
    return Grid(columns, tuple(rows))


def stage_grid(report: Report) -> Grid:
    """Where the time went."""
    columns = (Column("stage", "name"), Column("time"), Column("peak memory"), Column("notes", "text"))
    rows = [
        _cells(
            stage.name,
            numbers.seconds(stage.seconds),
            numbers.size(stage.peak_memory_bytes),
            "; ".join(stage.notes),
        )
        for stage in report.stages
    ]
    return Grid(columns, tuple(rows))


def facts(report: Report) -> dict[str, str]:
    """Model and environment as pairs of a name and a text."""
    stored = {"factors": "int8, a scale for each output channel"} if report.recipe.get("dtype") == "int8" else {}
    return model_facts(report.model) | stored | environment_facts(report.environment)


def model_facts(model: ModelInfo) -> dict[str, str]:
    """The model as pairs of a name and a text."""
    return {
        "model": short_id(model.id),
        "revision": model.revision or numbers.MISSING,
        "architecture": f"{model.model_type}, {model.task}, {model.dtype}",
        "parameters": numbers.integer(model.parameters),
        "licence": model.license or numbers.MISSING,
    }


def environment_facts(place: Environment) -> dict[str, str]:
    """Hardware, versions and seed as pairs of a name and a text."""
    return {
        "device": f"{place.device}: {place.hardware}, {place.threads} threads",
        "computed in": place.compute_dtype,
        "seed": str(place.seed),
        "python": place.python,
        "torch": place.torch,
        "transformers": place.transformers,
        "lrcompress": place.lrcompress,
    }


def training_sentence(report: Report) -> str:
    """Where the recovery began and ended; empty without a recovery."""
    if not report.training:
        return ""
    first, last = report.training[0], report.training[-1]
    return (
        f"The loss went from {numbers.optional(first.loss)} at step {numbers.integer(first.step)} to "
        f"{numbers.optional(last.loss)} at step {numbers.integer(last.step)}, "
        f"τ from {numbers.optional(first.tau)} to {numbers.optional(last.tau)}, "
        f"in {numbers.seconds(last.seconds)}."
    )


def result_sentence(report: Report) -> str:
    """The saved model in one line."""
    row, dense = result_row(report), dense_row(report)
    if row is None:
        return "No layer was compressed in this run."
    beside = dense.metrics if dense else {}
    quality = [
        f"{METRICS[name]} {_unit(name, found)} (dense {_unit(name, beside[name])})"
        if name in beside and name not in BESIDE_DENSE
        else f"{METRICS[name]} {_unit(name, found)}"
        for name, found in row.metrics.items()
    ]
    kept = f"{numbers.share(row.parameters, report.model.parameters)} % of the parameters"
    return "; ".join([f"{label(report, row)} keeps {kept} in {numbers.size(row.file_bytes)}", *quality]) + "."


def _counts(report: Report, name: MetricName) -> set[int]:
    return {row.metrics[name].count for row in report.rows if name in row.metrics}


def _unit(name: MetricName, found: Metric) -> str:
    return numbers.metric(name, found.value) + (" %" if name in FRACTIONS else "")


def _pair(name: MetricName, *values: Metric | None) -> Iterable[str]:
    unit = " %" if name in FRACTIONS else ""
    return [numbers.measured(name, value) + unit if value else numbers.MISSING for value in values]


def _cells(*texts: str) -> tuple[Cell, ...]:
    return tuple(Cell(text) for text in texts)


def _case_order(case: tuple[str, int]) -> tuple[int, int]:
    return list(PHASES).index(case[0]), case[1]


def _latency_cells(report: Report, row: Row, one: Latency) -> tuple[Cell, ...]:
    times = [numbers.significant(value) for value in (one.median_ms, one.p10_ms, one.p90_ms)]
    ratio = numbers.optional(one.ratio_to_dense)
    if one.ratio_low is not None and one.ratio_high is not None:
        ratio += f" ({numbers.significant(one.ratio_low)} to {numbers.significant(one.ratio_high)})"
    return _cells(
        label(report, row),
        PHASES[one.phase],
        numbers.integer(one.batch),
        *times,
        ratio,
        numbers.optional(one.per_second),
        row.device or numbers.MISSING,
    )
