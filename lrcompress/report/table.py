"""The terminal's table at the end of a run."""

import shutil
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from . import content, numbers
from .content import Cell
from .schema import MetricName, Report, Row


@dataclass(frozen=True)
class _Field:
    """A column that may be left out; the lowest `order` is kept longest."""

    title: str
    cells: list[Cell]
    order: int

    @property
    def width(self) -> int:
        lines = [*self.title.split("\n"), *(cell.text for cell in self.cells)]
        return max(cell_len(line) for line in lines)


def summary(report: Report, width: int | None = None) -> Table:
    """All rows, with as many columns as `width` (the terminal's, unless given) has room for."""
    room = width or shutil.get_terminal_size().columns
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    names = [content.label(report, row) for row in report.rows]
    fields = _fitting(_fields(report), room - max(map(cell_len, names), default=0))
    for field in fields:
        table.add_column(Text(field.title), justify="right", no_wrap=True, vertical="bottom")
    for index, row in enumerate(report.rows):
        cells = [Text(field.cells[index].text, "bold green" if field.cells[index].best else "") for field in fields]
        table.add_row(Text(names[index], "bold" if row is content.result_row(report) else ""), *cells)
    return table


def _fields(report: Report) -> list[_Field]:
    """All columns in the order in which they stand, each with its order of importance."""
    rows, whole = report.rows, report.model.parameters
    metrics = [
        _Field(_heading(name), [_short(report, row, name) for row in rows], order)
        for name, order in zip(content.metric_names(report), (0, 1, 4, 5), strict=False)
    ]
    tasks = [
        _Field(content.task_title(report, name).replace(".", "\n", 1), _short_task(report, name), 5)
        for name in content.task_names(report)
    ]
    size = [
        _Field("parameters", [Cell(numbers.millions(row.parameters)) for row in rows], 6),
        _Field("% of\ndense", [Cell(numbers.share(row.parameters, whole)) for row in rows], 2),
        _Field("file", [Cell(numbers.size(row.file_bytes)) for row in rows], 3),
    ]
    steps = _Field("trained\nsteps", [Cell(numbers.integer(row.trained_steps)) for row in rows], 9)
    return [*metrics, *tasks, *size, *_latency_fields(report), steps]


def _latency_fields(report: Report) -> list[_Field]:
    """Each phase at its smallest batch; ratios are left to the report, which has their intervals."""
    batches: dict[str, int] = {}
    for one in (one for row in report.rows for one in row.latency):
        batches[one.phase] = min(one.batch, batches.get(one.phase, one.batch))
    return [
        _Field(f"{phase} ms\nbatch {batch}", [Cell(_median(row, phase, batch)) for row in report.rows], 7)
        for phase, batch in batches.items()
    ]


def _median(row: Row, phase: str, batch: int) -> str:
    found = [one.median_ms for one in row.latency if (one.phase, one.batch) == (phase, batch)]
    return numbers.significant(found[0]) if found else numbers.MISSING


def _short(report: Report, row: Row, name: MetricName) -> Cell:
    """A metric without its standard error, which the report has."""
    found = row.metrics.get(name)
    text = numbers.metric(name, found.value) if found else numbers.MISSING
    return Cell(text, content.metric_cell(report, row, name).best)


def _short_task(report: Report, name: str) -> list[Cell]:
    found = [row.tasks.get(name) for row in report.rows]
    texts = [numbers.significant(one.value, 4) if one else numbers.MISSING for one in found]
    return [Cell(text, cell.best) for text, cell in zip(texts, content.task_cells(report, name), strict=True)]


def _heading(name: MetricName) -> str:
    head, _, tail = content.metric_title(name).partition(" ")
    return f"{head}\n{tail}"


def _fitting(fields: list[_Field], room: int) -> list[_Field]:
    """The most important fields that fit side by side, two spaces apart, in their own order."""
    kept: set[int] = set()
    for index in sorted(range(len(fields)), key=lambda index: fields[index].order):
        needed = fields[index].width + 2
        if needed > room:
            break
        kept.add(index)
        room -= needed
    return [field for index, field in enumerate(fields) if index in kept]
