"""report.md: the whole report as Markdown."""

import yaml

from . import content, gfm, selection
from .content import Grid
from .schema import Report


def to_markdown(report: Report) -> str:
    """The report as one Markdown text; rounded, but without a number that report.json lacks."""
    sections = [
        f"# {gfm.code(content.short_id(report.model.id))}, compressed by low rank",
        gfm.prose(content.result_sentence(report)),
        _list("Notes", report.notes),
        _quality(report),
        _table("Tasks of lm-eval", content.task_grid(report), TASKS),
        _table("Before and after replacement", content.replacement_grid(report), REPLACEMENT),
        _table("Latency", content.latency_grid(report), LATENCY),
        _table("Cost of each row", content.cost_grid(report)),
        _text("Recovery", content.training_sentence(report)),
        _list("How the ranks were chosen", selection.sentences(report)),
        _table("Rank selection", selection.grid(report), selection.explanation(report)),
        _table("Layers", content.layer_grid(report)),
        _table("Stages", content.stage_grid(report)),
        f"## Recipe\n\n{gfm.fence(recipe_text(report), 'yaml')}",
        _definitions(report),
        _list("Environment", [f"{name}: {text}" for name, text in content.facts(report).items()]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


REPLACEMENT = (
    "Before: the dense weights still take part, weighted by one minus τ; this is not the saved model. "
    "After: the factors stand alone; this is the saved model."
)
TASKS = (
    "Measured by lm-eval in its own units. Bold: the best compressed row. ± is lm-eval's standard error, by bootstrap "
    "for metrics without a closed form. The definitions have the version, shots and documents of each."
)
LATENCY = "Dense and compressed models were timed in turn, in one process, on the device named in each row."
WINNER = "Bold: the best compressed row of each measure. ± is the standard error of the mean."


def recipe_text(report: Report) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100)


def _quality(report: Report) -> str:
    grid = content.quality_grid(report)
    if not grid:
        return ""
    covered = gfm.prose(content.counts_sentence(report))
    return f"## Quality and size\n\n{gfm.table(grid)}\n\n{WINNER} {covered}"


def _table(title: str, grid: Grid, explanation: str = "") -> str:
    if not grid:
        return ""
    return "\n\n".join([f"## {title}", *([explanation] if explanation else []), gfm.table(grid)])


def _text(title: str, text: str) -> str:
    return f"## {title}\n\n{gfm.prose(text)}" if text else ""


def _list(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {gfm.prose(line)}" for line in lines)]) if lines else ""


def _definitions(report: Report) -> str:
    return _list("Definitions", [f"{name}: {text}" for name, text in report.definitions.items()])
