"""A plot of many curves of a few kinds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
DASHED = (0, (2, 2))


@dataclass(frozen=True)
class Series:
    """Curves of one kind, which share a colour and an entry of the legend."""

    label: str
    colour: str
    curves: Sequence[Curve]
    marker: str = ""
    dashed: bool = False
    width: float = 0.8


@dataclass(frozen=True)
class Frame:
    """The axes."""

    x: str
    y: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log: bool = False


def curves_plot(name: str, title: str, caption: str, series: Sequence[Series], frame: Frame) -> svg.Plot:
    """All series in one frame; the more curves a kind has, the paler each is."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for one in series:
            alpha = 1.0 if len(one.curves) == 1 else 0.55
            for number, (xs, ys) in enumerate(one.curves):
                axes.plot(
                    xs, ys, ls=DASHED if one.dashed else "-", marker=one.marker or None, ms=2.6, lw=one.width,
                    alpha=alpha, color=one.colour, label=one.label if number == 0 else None,
                )  # fmt: skip
        axes.set_xlabel(frame.x)
        axes.set_ylabel(frame.y)
        if frame.log:
            axes.set_yscale("log")
        if frame.x_range:
            axes.set_xlim(*frame.x_range)
        if frame.y_range:
            axes.set_ylim(*frame.y_range)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.4, columnspacing=1.0)

    return svg.Plot(title, caption, svg.render(name, title, draw))
