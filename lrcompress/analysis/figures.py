"""The pictures of an analysis: dimensions by depth and role, rank loss, φ of two runs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from lrcompress.analysis.findings import need
from lrcompress.analysis.schema import Analysis, LayerAnalysis
from lrcompress.report import svg
from lrcompress.report.curves import Curve, Frame, Series, curves_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BLOCKS = 12
"""Rows of a picture by depth; of more blocks every second, third … is drawn."""


def plots(value: Analysis) -> list[svg.Plot]:
    """All pictures, in reading order."""
    found = [
        _by_role(
            value.layers,
            "dimensions",
            f"Dimensions needed, by {value.method}",
            "Share of each layer's dimensions, in %, that hold 95 % of the squares of the weighted matrix.",
            lambda layer: need(layer, value.method),
        ),
        _by_role(
            value.layers,
            "weight",
            "Dimensions of the weights alone",
            "The same for the weight's own spectrum.",
            lambda layer: layer.weight.share_95 / layer.weight.full,
        ),
    ]
    kept = next((name for name in ("budget", "energy", "uniform") if all(name in one.kept for one in value.layers)), "")
    if kept:
        found.append(
            _by_role(
                value.layers,
                "kept",
                f"Rank kept by {kept}",
                f"In % of the break-even rank, at {100 * value.keep_parameters:g} % of the parameters; 100: dense.",
                lambda layer: min((layer.kept[kept] or layer.max_rank + 1) / (layer.max_rank + 1), 1.0),
            )
        )
    found += [_spectra_plot(value), _rank_loss_plot(value), _diagonal_plot(value)]
    found += [_map_plot(value, factor) for factor in ("A", "B")]
    return found


def _by_role(
    layers: Sequence[LayerAnalysis], name: str, title: str, caption: str, share: Callable[[LayerAnalysis], float]
) -> svg.Plot:
    """A number for each role (column) and block (row), on a ground as strong as it is large."""
    roles = list(dict.fromkeys(layer.role for layer in layers))
    blocks = _shown_blocks(layers)

    def draw(figure: "Figure") -> None:
        from matplotlib.patches import Rectangle

        axes = figure.add_subplot()
        for layer in layers:
            if layer.block in blocks:
                x, y, part = roles.index(layer.role), blocks.index(layer.block), share(layer)
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=svg.ACCENT, alpha=0.05 + 0.6 * part, lw=0))
                axes.text(x, y, f"{100 * part:.0f}", ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(roles) - 0.5)
        axes.set_ylim(len(blocks) - 0.5, -0.5)
        axes.set_xticks(range(len(roles)), _short_roles(roles), rotation=25, ha="right")
        axes.set_yticks(range(len(blocks)), ["–" if block is None else str(block) for block in blocks])
        axes.set_ylabel("block")
        axes.grid(visible=False)

    height = 1.1 + 0.26 * len(blocks)
    return svg.Plot(title, caption + _left_out(layers, blocks), svg.render(f"role-{name}", title, draw, height=height))


def _spectra_plot(value: Analysis) -> svg.Plot:
    def curves(key: str) -> list[Curve]:
        found = [layer.spectra[key] for layer in value.layers]
        return [
            ([100 * rank / one.ranks[-1] for rank in one.ranks], [100 * max(y, 1e-5) for y in one.values])
            for one in found
        ]

    series = [
        Series("W", svg.MUTED, curves("weight")),
        *([Series("svd_llm", svg.SECOND, curves("svd_llm"))] if value.method != "svd_llm" else []),
        Series(value.method, svg.ACCENT, curves(value.method)),
    ]
    frame = Frame("rank, % of full", "share beyond the rank, %", x_range=(0, 100), y_range=(1e-2, 130), log=True)
    caption = "Share of the squares beyond a rank, a line a layer; all methods' spectra are in analysis.json."
    return curves_plot("spectra", "Spectra", caption, series, frame)


def _rank_loss_plot(value: Analysis) -> svg.Plot:
    def curves(key: str) -> list[Curve]:
        return [
            ([100 * rank / (layer.max_rank + 1) for rank in layer.rank_loss[key].ranks], layer.rank_loss[key].values)
            for layer in value.layers
        ]

    learned = curves("learned")
    series = [
        Series("optimum", svg.MUTED, curves("optimum")),
        Series(f"{value.method}, closed form", svg.SECOND, curves(value.method)),
        Series("learned", svg.ACCENT, learned, marker="o"),
    ]
    caption = "A line a layer: what LoRA-LRD reached at each rank, and the closed-form optimum of that rank."
    top = max(1.05, *(y for _, ys in learned for y in ys))
    frame = Frame("rank, % of break-even", "‖W − BA‖² / ‖W‖²", x_range=(0, 105), y_range=(0, min(top, 2.5)))
    return curves_plot("rank-loss", "Rank loss", caption, series, frame)


def _diagonal_plot(value: Analysis) -> svg.Plot:
    def curves(factor: Literal["A", "B"], level: bool) -> list[Curve]:
        found = [layer.similarity[factor] for layer in value.layers]
        return [
            ([100 * rank / one.ranks[-1] for rank in one.ranks], one.level if level else one.diagonal) for one in found
        ]

    series = [
        Series("A of two runs", svg.ACCENT, curves("A", False)),
        Series("B of two runs", svg.SECOND, curves("B", False)),
        Series("random subspaces", svg.MUTED, curves("A", True) + curves("B", True), dashed=True),
    ]
    frame = Frame("i, % of half the full rank", "φ(i, i)", x_range=(0, 100), y_range=(0, 1.02))
    caption = "A line a layer; dashed: the mean of random subspaces of the same size."
    return curves_plot("phi", "Subspaces that two runs share", caption, series, frame)


def _map_plot(value: Analysis, factor: Literal["A", "B"]) -> svg.Plot:
    """A small map for each role and block."""
    roles = list(dict.fromkeys(layer.role for layer in value.layers))
    blocks = _shown_blocks(value.layers)

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(blocks), len(roles), squeeze=False)
        for row in grid:
            for axes in row:
                axes.set_axis_off()
        for layer in value.layers:
            if layer.block in blocks:
                axes = grid[blocks.index(layer.block)][roles.index(layer.role)]
                _draw_map(axes, layer.similarity[factor].map)
        for axes, role in zip(grid[0], _short_roles(roles), strict=True):
            axes.set_title(role, fontsize=6.5)
        for row, block in zip(grid, blocks, strict=True):
            row[0].text(
                -0.12,
                0.5,
                "" if block is None else str(block),
                transform=row[0].transAxes,
                ha="right",
                va="center",
                fontsize=7,
            )

    title = f"φ(i, j) of {'A, right' if factor == 'A' else 'B, left'} singular vectors"
    caption = (
        "Two seeds; i from left to right, j from top to bottom, up to half the full rank; the stronger, the more they "
        "share (0 to 1). A row a block, a column a role." + _left_out(value.layers, blocks)
    )
    height = 0.5 + 4.4 / max(len(roles), 3) * len(blocks)
    return svg.Plot(title, caption, svg.render(f"map-{factor}", title, draw, height=min(height, 9.0)))


def _draw_map(axes: "Axes", phi: Sequence[Sequence[float]]) -> None:
    """One colour, as opaque as φ is large: readable on light and dark pages."""
    image = [[(0.16, 0.47, 0.75, value) for value in row] for row in phi]
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.imshow(image, interpolation="nearest", aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(True)


def _shown_blocks(layers: Sequence[LayerAnalysis]) -> list[int | None]:
    blocks = sorted({layer.block for layer in layers}, key=lambda block: -1 if block is None else block)
    return blocks[:: -(-len(blocks) // MAX_BLOCKS)]


def _left_out(layers: Sequence[LayerAnalysis], shown: Sequence[int | None]) -> str:
    count = len({layer.block for layer in layers})
    return "" if count == len(shown) else f" {len(shown)} of {count} blocks are drawn."


def _short_roles(roles: Sequence[str]) -> list[str]:
    """The last parts of the names, as many as tell them apart."""
    for parts in range(1, 6):
        short = [".".join(role.split(".")[-parts:]) for role in roles]
        if len(set(short)) == len(roles):
            return [text if len(text) <= 18 else f"…{text[-17:]}" for text in short]
    return list(roles)
