"""How the ranks were chosen: what the selector says, its trials as a table, its curves as plots."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from . import content, numbers, svg
from .content import Cell, Column, Grid
from .curves import Curve, Frame, Series, curves_plot
from .schema import FRACTIONS, HIGHER_IS_BETTER, MetricName, Report, Row

MOST_TRIALS = 10
METRICS = ("kl", "loss", "accuracy")


def sentences(report: Report) -> list[str]:
    """The selector's own notes."""
    return report.selection.notes if report.selection else []


def grid(report: Report) -> Grid:
    """The best trials of a search, or all sizes of a bisection; all of them are in report.json."""
    found = _scored(report)
    if found is None:
        return Grid((), ())
    table, metric, chosen = found["table"], found["metric"], found["chosen"]
    ordered = sorted(table, key=lambda row: _cost(row, metric)) if "dense" not in found else list(table)
    shown = ordered[:MOST_TRIALS] if "dense" not in found else ordered
    dense = content.dense_row(report)
    targets = dense.target_parameters if dense else 0
    known = [key for key in METRICS if any(row[key] is not None for row in table)]
    later = [key for key in known if any(row.get("after_recovery") for row in table)]
    rows = [
        (
            Cell(str(row["trial"]), row["trial"] == chosen),
            Cell(numbers.share(row["kept_parameters"], targets)),
            *(Cell(_shown(key, row[key])) for key in known),
            *(Cell(_shown(key, (row.get("after_recovery") or {}).get(key))) for key in later),
        )
        for row in shown
    ]
    columns = ("kept %", *known, *(f"{key} after recovery" for key in later))
    return Grid((Column("trial"), *map(Column, columns)), tuple(rows))


def explanation(report: Report) -> str:
    """What the table holds."""
    found = _scored(report)
    if found is None:
        return ""
    if "dense" in found:
        return "Every size that the bisection tried, on validation data, by closed form. Bold: chosen."
    shown, count = min(MOST_TRIALS, len(found["table"])), len(found["table"])
    return f"The best {shown} of {count} plans by validation {found['metric']}, by closed form. Bold: chosen."


def plots(report: Report) -> list[svg.Plot]:
    """What the selector measured, and a frontier's curve."""
    record: Any = report.selection.record if report.selection else {}
    found = [_trials_plot(record["trials"])] if "trials" in record else []
    found += [_sizes_plot(report, record["sizes"])] if "sizes" in record else []
    found += [_rank_loss_plot(record["rank_loss"])] if "rank_loss" in record else []
    found += [_phi_plot(record["subspace"])] if "subspace" in record else []
    names = content.plotted_metrics(report)
    return found + [_frontier_plot(report, name) for name in names if len(_frontier(report)) > 1]


def _scored(report: Report) -> Any:
    record: Any = report.selection.record if report.selection else {}
    return record.get("trials") or record.get("sizes")


def _cost(row: Any, metric: str) -> float:
    return -row[metric] if metric == "accuracy" else row[metric]


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return numbers.MISSING
    return f"{numbers.percent(value)} %" if key == "accuracy" else numbers.significant(value, 4)


def _trials_plot(found: Any) -> svg.Plot:
    metric = found["metric"]
    scale = 100 if metric == "accuracy" else 1
    values = [scale * row[metric] for row in found["table"]]
    best = list(accumulate(values, max if metric == "accuracy" else min))
    trials = list(range(len(values)))
    series = [
        Series("trial", svg.MUTED, [([number], [value]) for number, value in enumerate(values)], marker="o"),
        Series("best so far", svg.ACCENT, [(trials, best)], width=1.4),
    ]
    label = f"validation {metric}" + (" %" if scale == 100 else "")
    return curves_plot("trials", "Search", "Every plan of the search, by closed form.", series, Frame("trial", label))


def _sizes_plot(report: Report, found: Any) -> svg.Plot:
    dense = content.dense_row(report)
    targets = dense.target_parameters if dense else 1
    metric = found["metric"]
    table = sorted(found["table"], key=lambda row: row["kept_parameters"])
    xs = [100 * row["kept_parameters"] / targets for row in table]
    ys = [row[metric] if metric != "accuracy" else 1 - row[metric] for row in table]
    chosen = next(place for place, row in enumerate(table) if row["trial"] == found["chosen"])
    series = [
        Series("size", svg.SECOND, [(xs, ys)], marker="o"),
        Series("dense", svg.MUTED, [([min(xs), max(xs)], [found["dense"]] * 2)], dashed=True),
        Series("chosen", svg.ACCENT, [([xs[chosen]], [ys[chosen]])], marker="D"),
    ]
    label = f"validation {'error' if metric == 'accuracy' else metric}"
    frame = Frame("parameters kept, % of the targets", label, log=min(ys) > 0 and max(ys) / min(ys) > 20)
    return curves_plot(
        "sizes", "Size against validation", "Sizes of one set of spectra, by closed form.", series, frame
    )


def _rank_loss_plot(record: Any) -> svg.Plot:
    learned: list[Curve] = [(one["ranks"], one["learned"]) for one in record.values() if one["learned"]]
    optimum: list[Curve] = [(one["ranks"], one["optimum"]) for one in record.values()]
    series = [Series("optimum", svg.MUTED, optimum, marker="o")]
    series += [Series("learned", svg.ACCENT, learned, marker="o")] if learned else []
    return curves_plot(
        "rank-loss", "Rank loss", "A line a layer: what LoRA-LRD reached, and the closed-form optimum of each rank.",
        series, Frame("rank", "‖W − BA‖² / ‖W‖²", y_range=(0, min(max([1.05, *_ys(learned)]), 2.5))),
    )  # fmt: skip


def _phi_plot(record: Any) -> svg.Plot:
    phi: list[Curve] = [(_ranks(one["phi"]), one["phi"]) for one in record.values()]
    level: list[Curve] = [(_ranks(one["level"]), one["level"]) for one in record.values()]
    ends = [([one["range"][1]], [one["phi"][one["range"][1] - 1]]) for one in record.values() if one["range"]]
    series = [Series("two runs", svg.ACCENT, phi), Series("random", svg.MUTED, level, dashed=True)]
    series += [Series("end of the range", svg.SECOND, ends, marker="o")] if ends else []
    return curves_plot(
        "phi", "Subspaces that two runs share", "φ(i, i), a line a layer, beside that of random subspaces.",
        series, Frame("i", "φ(i, i)", y_range=(0, 1.02)),
    )  # fmt: skip


def _frontier(report: Report) -> list[Row]:
    return [row for row in report.rows if (row.ranks or "").startswith("keep-")]


def _frontier_plot(report: Report, metric: MetricName) -> svg.Plot:
    """The quality of every size, a line for each way of making them."""
    scale = 100 if metric in FRACTIONS else 1
    chosen = [row for row in report.rows if row.ranks == "plan"]
    series = []
    colours = {"lora_lrd": svg.ACCENT}
    for name in dict.fromkeys(row.name for row in _frontier(report)):
        rows = [row for row in [*_frontier(report), *chosen] if row.name == name and metric in row.metrics]
        rows.sort(key=lambda row: row.parameters)
        points = [row.parameters / 1e6 for row in rows], [scale * row.metrics[metric].value for row in rows]
        series.append(Series(name, colours.get(name, svg.SECOND), [points], marker="o", width=1.2))
    dense = content.dense_row(report)
    if dense is not None and metric in dense.metrics:
        point: Curve = ([dense.parameters / 1e6], [scale * dense.metrics[metric].value])
        series.append(Series("dense", svg.MUTED, [point], marker="o"))
    values = _ys([curve for one in series for curve in one.curves])
    wide = metric not in HIGHER_IS_BETTER and min(values) > 0 and max(values) / min(values) > 20
    frame = Frame("parameters, millions", content.metric_title(metric), log=wide)
    title = f"Frontier, {content.METRICS[metric]}"
    return curves_plot(f"frontier-{metric}", title, "Every size from one set of spectra.", series, frame)


def _ranks(values: Sequence[float]) -> list[int]:
    return list(range(1, len(values) + 1))


def _ys(curves: Sequence[Curve]) -> list[float]:
    return [y for _, ys in curves for y in ys]
