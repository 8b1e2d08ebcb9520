"""What a run prints on stdout besides its last line: the plan of a dry run, the table of results."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrcompress import preflight
from lrcompress.analysis.content import selector_grid
from lrcompress.analysis.schema import Analysis
from lrcompress.report import Report, summary
from lrcompress.workspace import Workspace


def show_report(report: Report) -> None:
    """The table of all rows, and the notes that a reader must see."""
    console = Console(highlight=False)
    console.print(summary(report, console.width))
    for note in report.notes:
        console.print(note, markup=False)


def show_analysis(value: Analysis) -> None:
    """What was found, a paragraph each, and the selectors side by side."""
    console = Console(highlight=False)
    for text in (*value.findings, *value.notes):
        console.print(f"• {text}", markup=False)
    grid = selector_grid(value)
    table = Table(*(column.title for column in grid.columns[:-1]), box=None, pad_edge=False)
    for row in grid.rows:
        table.add_row(*(Text(cell.text, "bold green" if cell.best else "") for cell in row[:-1]))
    console.print(table)


def show_plan(work: Workspace, reasons: dict[str, str]) -> None:
    """Layers, ranks where they need no data, sizes, stages, disk."""
    console = Console(highlight=False)
    facts = preflight.overview(work)
    plan = facts["plan"]
    table = Table("layer", "out × in", "group", "rank", box=None, pad_edge=False)
    for name, layer in facts["layers"].items():
        rank = "from data" if plan is None else str(plan.ranks.get(name, "dense"))
        table.add_row(name, f"{layer.out_features} × {layer.in_features}", layer.group, rank)
    console.print(table)
    target, kept, whole = facts["target_parameters"], facts["kept_parameters"], facts["parameters"]
    console.print(f"\nlayers      {len(facts['layers'])} of {target:,} parameters")
    size = facts["bytes_per_parameter"]
    if kept is None:
        console.print(f"parameters  {whole:,} before; after: from data")
    else:
        after, bound = whole - target + kept, "" if facts["exact"] else "at most "
        console.print(f"parameters  {whole:,} before, {bound}{after:,} after")
        console.print(f"bytes       {whole * size:,} before, {bound}{after * size:,} after")
    console.print(f"disk        about {facts['disk']:,} bytes in {work.folder}", soft_wrap=True)
    for name, reason in reasons.items():
        console.print(f"stage       {name}: {reason or 'up to date'}", markup=False)
