"""The plots of the HTML report; each is made only where its data exist."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from . import content, svg
from .schema import FRACTIONS, HIGHER_IS_BETTER, LayerRow, MetricName, Phase, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = {"attention": svg.ACCENT, "mlp": svg.SECOND, "other": svg.THIRD}
_Point = tuple[float, float]
LEAST_SHARE = 1e-4
"""where the logarithmic axis of the spectra ends"""
LOG_FROM = 20
"""largest over smallest value above which an axis is logarithmic"""


def plots(report: Report) -> list[svg.Plot]:
    """All figures that the report has data for, in reading order."""
    found = [*_quality_plots(report), _rank_plot(report), _spectra_plot(report), _training_plot(report)]
    found += [_latency_plot(report, phase) for phase in ("prefill", "decode", "forward")]
    return [plot for plot in found if plot]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions in their order, moved within the bounds to be `gap` apart, or less without room."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(gap, (high - low) / max(len(order) - 1, 1))
    moved = [min(max(positions[index], low), high) for index in order]
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    # What was pushed over the upper bound goes back down, and takes its neighbours along.
    ceiling = high
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    placed = [0.0] * len(moved)
    for index, value in zip(order, moved, strict=True):
        placed[index] = value
    return placed


def _quality_plots(report: Report) -> list[svg.Plot]:
    """Quality against size."""
    if not any(row.name != "dense" for row in report.rows):
        return []
    return [_quality_plot(report, name) for name in content.plotted_metrics(report)]


def _quality_plot(report: Report, name: MetricName) -> svg.Plot:
    better = "up" if name in HIGHER_IS_BETTER else "down"
    caption = f"Further left is smaller, further {better} is better. Whiskers: standard error."
    metric = content.METRICS[name]
    title = f"{metric[0].upper()}{metric[1:]} against size"
    draw = partial(_draw_quality, report=report, name=name)
    return svg.Plot(title, caption, svg.render(f"quality-{name}", title, draw, height=3.2))


def _draw_quality(figure: "Figure", report: Report, name: MetricName) -> None:
    from matplotlib.ticker import LogLocator

    axes, scale = figure.add_subplot(), 100 if name in FRACTIONS else 1
    rows = [row for row in report.rows if name in row.metrics]
    values = [scale * row.metrics[name].value for row in rows]
    sizes = [row.parameters / 1e6 for row in rows]
    for row, x, y in zip(rows, sizes, values, strict=True):
        error = scale * (row.metrics[name].stderr or 0) or None
        axes.errorbar(x, y, yerr=error, fmt="o", ms=5.5, color=_row_colour(report, row), elinewidth=0.9)
    # Every model of the report sets the scale, so that rows of nearly one size are not torn apart.
    span = [row.parameters / 1e6 for row in report.rows] + [report.model.parameters / 1e6]
    pad = 0.12 * (max(span) - min(span)) or 0.12 * max(span)
    axes.set_xlim(min(span) - pad, max(span) + pad)
    axes.margins(y=0.1)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel(content.metric_title(name))
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    _label_points(figure, axes, sizes, values, [content.label(report, row) for row in rows])


def _label_points(
    figure: "Figure", axes: "Axes", xs: Sequence[float], ys: Sequence[float], labels: Sequence[str]
) -> None:
    """Labels in a column beside the points, at least a line apart, towards the emptier side of the plot."""
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    pixels = axes.transData.transform(list(zip(xs, ys, strict=True)))
    line = 11  # points between labels
    for right in (False, True):
        # Points in the left half have their labels to the right, the others to the left.
        mine = [index for index, (x, _) in enumerate(pixels) if (x < box.x0 + box.width / 2) == right]
        if not mine:
            continue
        edge = (max if right else min)(pixels[index][0] for index in mine) + (14 if right else -14) * figure.dpi / 72
        heights = spread([pixels[index][1] for index in mine], line, box.y0 + line / 2, box.y1 - line / 2)
        for index, height in zip(mine, heights, strict=True):
            _label(axes, labels[index], (xs[index], ys[index]), (edge, height), right)


def _label(axes: "Axes", text: str, point: tuple[float, float], place: tuple[float, float], right: bool) -> None:
    line = {"arrowstyle": "-", "color": svg.MUTED, "lw": 0.5, "shrinkA": 1, "shrinkB": 4}
    note = axes.annotate(
        text,
        point,
        xytext=place,
        textcoords="figure pixels",
        va="center",
        ha="left" if right else "right",
        fontsize=8,
        arrowprops=line | {"relpos": (0 if right else 1, 0.5)},
    )
    note.set_in_layout(False)


def _rank_plot(report: Report) -> svg.Plot | None:
    layers = report.layers
    if not any(layer.rank is not None for layer in layers):
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for group, colour in GROUPS.items():
            ranked = [i for i, layer in enumerate(layers) if layer.group == group and layer.rank is not None]
            if ranked:
                axes.bar(ranked, [layers[i].rank or 0 for i in ranked], width=0.82, color=colour, label=group)
        dense = [i for i, layer in enumerate(layers) if layer.rank is None]
        if dense:
            full = [min(layers[i].in_features, layers[i].out_features) for i in dense]
            axes.bar(dense, full, width=0.82, fill=False, ec=svg.MUTED, lw=0.7, ls=(0, (2, 2)), label="stays dense")
        # A dense layer counts as full rank, which would flatten the bars that matter: it may leave the plot.
        axes.set_ylim(0, 1.25 * max(layer.rank or 1 for layer in layers))
        _block_ticks(axes, layers)
        axes.set_ylabel("rank")
        axes.grid(axis="x", visible=False)
        _legend(figure, axes)

    stays = any(layer.rank is None for layer in layers)
    caption = "From the first layer to the last." + (" Dashed: stays dense." if stays else "")
    title = "Rank of each layer"
    return svg.Plot(title, caption, svg.render("ranks", title, draw))


def _block_ticks(axes: "Axes", layers: Sequence[LayerRow]) -> None:
    """A tick where a block begins, at most a dozen of them."""
    starts = {layer.block: i for i, layer in reversed(list(enumerate(layers))) if layer.block is not None}
    if not starts:
        axes.set_xlabel("layer")
        axes.set_xticks([])
        return
    blocks = sorted(starts)
    shown = blocks[:: -(-len(blocks) // 12)]
    axes.set_xticks([starts[block] for block in shown], [str(block) for block in shown])
    axes.set_xlabel("block")


def _spectra_plot(report: Report) -> svg.Plot | None:
    layers = [layer for layer in report.layers if layer.spectrum and layer.spectrum_ranks]
    if not layers:
        return None

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import FuncFormatter

        axes = figure.add_subplot()
        seen: set[str] = set()
        for layer in layers:
            ranks, shares = layer.spectrum_ranks or [], layer.spectrum or []
            shown = [100 * max(value, LEAST_SHARE / 10) for value in shares]
            colour, name = GROUPS[layer.group], layer.group if layer.group not in seen else None
            seen.add(layer.group)
            axes.plot(ranks, shown, color=colour, lw=0.8, alpha=0.45, label=name)
            _mark_rank(axes, layer, ranks, shown, colour)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("rank")
        axes.set_ylabel("share beyond the rank, %")
        axes.set_ylim(100 * LEAST_SHARE, 130)
        axes.margins(x=0.02)
        _legend(figure, axes)

    title = "Spectra"
    caption = "Share of each layer's squared spectrum beyond a rank, in the method's own norm. Dots: the plan."
    return svg.Plot(title, caption, svg.render("spectra", title, draw))


def _mark_rank(axes: "Axes", layer: LayerRow, ranks: Sequence[int], shown: Sequence[float], colour: str) -> None:
    """A dot at the layer's rank, if the curve reaches it."""
    if layer.rank is None or not ranks or not ranks[0] <= layer.rank <= ranks[-1]:
        return
    nearest = min(range(len(ranks)), key=lambda i: abs(ranks[i] - (layer.rank or 0)))
    axes.plot(ranks[nearest], shown[nearest], "o", ms=2.6, color=colour, alpha=0.9)


def _training_plot(report: Report) -> svg.Plot | None:
    points = report.training
    if len(points) < 2:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        steps = [point.step for point in points]
        axes.plot(steps, [point.loss for point in points], color=svg.ACCENT, lw=1.2, label="loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        fade = axes.twinx()
        fade.plot(steps, [point.tau for point in points], color=svg.SECOND, lw=1.4, ls=(0, (4, 2)), label="τ")
        fade.set_ylim(0, 1.05)
        fade.set_ylabel("τ", rotation=0, labelpad=8)
        fade.grid(visible=False)
        fade.spines["right"].set_visible(True)
        _plain_ticks(axes.yaxis)
        _legend(figure, axes, fade)

    title = "Recovery"
    caption = "Loss of each logged step, and τ, the part that the factors have beside the dense weight."
    return svg.Plot(title, caption, svg.render("training", title, draw))


def _latency_plot(report: Report, phase: Phase) -> svg.Plot | None:
    rows = [row for row in report.rows if any(one.phase == phase for one in row.latency)]
    batches = sorted({one.batch for row in rows for one in row.latency if one.phase == phase})
    if not rows:
        return None

    def draw(figure: "Figure") -> None:
        for position, batch in enumerate(batches):
            axes = figure.add_subplot(len(batches), 1, position + 1)
            _latency_bars(axes, report, rows, phase, batch)
            axes.set_title(f"batch {batch}", loc="left", fontsize=8.5, color=svg.MUTED)
            if batch == batches[-1]:
                axes.set_xlabel("ms per token" if phase == "decode" else "ms")

    title = f"Latency, {phase}"
    devices = " and ".join(sorted({row.device for row in rows if row.device}))
    caption = f"Median{f' on {devices}' if devices else ''}; whiskers: p10 to p90."
    height = 0.5 + len(batches) * (0.45 + 0.19 * len(rows))
    return svg.Plot(title, caption, svg.render(f"latency-{phase}", title, draw, height=height))


def _latency_bars(axes: "Axes", report: Report, rows: Sequence[Row], phase: Phase, batch: int) -> None:
    for place, row in enumerate(rows):
        for one in row.latency:
            if (one.phase, one.batch) == (phase, batch):
                whiskers = [[max(one.median_ms - one.p10_ms, 0)], [max(one.p90_ms - one.median_ms, 0)]]
                axes.barh(
                    place, one.median_ms, height=0.62, color=_row_colour(report, row), xerr=whiskers,
                    error_kw={"ecolor": svg.INK, "elinewidth": 0.9, "capsize": 2},
                )  # fmt: skip
    axes.set_yticks(range(len(rows)), [content.label(report, row) for row in rows])
    axes.tick_params(axis="y", labelcolor=svg.INK, length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _row_colour(report: Report, row: Row) -> str:
    """The result stands out, the dense model recedes."""
    if row is content.result_row(report):
        return svg.ACCENT
    return svg.MUTED if row.name == "dense" else svg.SECOND


def _plain_ticks(axis: Any) -> None:
    """Few ticks, as decimals also on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", *parts: "Axes") -> None:
    """One legend above the plot, over no data."""
    handles, labels = [], []
    for axes in parts:
        found = axes.get_legend_handles_labels()
        handles += found[0]
        labels += found[1]
    figure.legend(handles, labels, loc="outside upper left", ncols=4, handlelength=1.4, columnspacing=1.2)
