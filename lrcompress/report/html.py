"""report.html: the whole report as one self-contained page."""

from functools import cache
from typing import TYPE_CHECKING

from . import content, figures, markdown, numbers, selection
from .content import METRICS
from .schema import BESIDE_DENSE, FRACTIONS, MetricName, Report

if TYPE_CHECKING:
    from jinja2 import Template


def to_html(report: Report) -> str:
    """The page's text: no script, no resource of another place, equal bytes for equal reports."""
    grids = [
        ("Tasks of lm-eval", markdown.TASKS, content.task_grid(report)),
        ("Before and after replacement", markdown.REPLACEMENT, content.replacement_grid(report)),
        ("Latency", markdown.LATENCY, content.latency_grid(report)),
        ("Cost of each row", "", content.cost_grid(report)),
        ("Rank selection", selection.explanation(report), selection.grid(report)),
        ("Layers", "", content.layer_grid(report)),
        ("Stages", "", content.stage_grid(report)),
    ]
    return _template().render(
        title=content.short_id(report.model.id),
        report=report,
        sentence=content.result_sentence(report),
        training=content.training_sentence(report),
        tiles=_tiles(report),
        quality=content.quality_grid(report),
        counts=content.counts_sentence(report),
        winner=markdown.WINNER,
        result_index=_result_index(report),
        grids=[grid for grid in grids if grid[2]],
        plots=[*figures.plots(report), *selection.plots(report)],
        chosen=selection.sentences(report),
        recipe=markdown.recipe_text(report),
        facts=content.facts(report),
        metrics=METRICS,
    )


def _tiles(report: Report) -> list[dict[str, str]]:
    """The saved model's key figures beside the dense model's."""
    row, dense = content.result_row(report), content.dense_row(report)
    if row is None or dense is None:
        return []
    tiles = [
        _tile("parameters", numbers.millions(row.parameters), numbers.millions(dense.parameters)),
        _tile("file", numbers.size(row.file_bytes), numbers.size(dense.file_bytes)),
    ]
    for name, found in row.metrics.items():
        before = dense.metrics.get(name)
        # Dense against itself is zero, or complete agreement: nothing to compare with.
        beside = _metric(name, before.value) if before and name not in BESIDE_DENSE else ""
        tiles.append(_tile(METRICS[name], _metric(name, found.value), beside))
    return tiles


def _tile(name: str, value: str, dense: str) -> dict[str, str]:
    return {"name": name, "value": value, "dense": dense}


def _metric(name: MetricName, value: float) -> str:
    return numbers.metric(name, value) + (" %" if name in FRACTIONS else "")


def _result_index(report: Report) -> int | None:
    return next((index for index, row in enumerate(report.rows) if row is content.result_row(report)), None)


def _template() -> "Template":
    return page("report", "report.html.j2")


@cache
def page(package: str, name: str) -> "Template":
    """A page's template from a subpackage of ours; the style and the tables are those of every page."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(f"lrcompress.{package}", ""), PackageLoader("lrcompress.report", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
