"""The rounds of a recovery: from size to size, each trained, and cut anew by what the compressed model says.

The statistics of the dense model say what a layer's directions are worth while all others are there. At a small size
they are not, and a model that has been trained for a while at a larger one knows better: its own statistics
allocate the ranks again and give the coordinates of the next training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lrcompress.artifacts import Factors, RankPlan, Spectrum
from lrcompress.layers import bias_of, read_weight
from lrcompress.linalg import truncate
from lrcompress.recovery.loop import Recovered
from lrcompress.recovery.settings import Recovery
from lrcompress.recovery.whitening import Coordinates

Learned = Mapping[str, Factors]
"""Layer → its factors."""


@dataclass(frozen=True)
class Spectra:
    """The spectra of a model's layers under its own statistics."""

    values: Mapping[str, Tensor]
    """singular values `[K]` of each layer"""
    cut: Callable[[str, int], Factors]
    """a layer's factors at a rank"""
    coordinates: Callable[[str], Coordinates]
    """those that a layer is trained in"""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        pairs: Learned,
        values: Mapping[str, Tensor],
        read: Callable[[str, int], Spectrum],
        coordinates: Callable[[str], Coordinates],
    ) -> "Spectra":
        """Those of a dense model with these pairs in it; `read` gives a layer's spectrum up to a rank."""

        def cut(name: str, rank: int) -> Factors:
            bias = pairs[name].bias if name in pairs else bias_of(model.get_submodule(name))
            return truncate(read(name, rank), rank, bias)

        return cls(values, cut, coordinates)


class Train(Protocol):
    """Trains one round."""

    def __call__(
        self, number: int, start: Learned, steps: range, coordinates: Callable[[str], Coordinates], /
    ) -> Recovered:
        """`number` counts from 0."""
        ...


@dataclass(frozen=True)
class Result:
    """What the last round learned, and the ranks that it has."""

    recovered: Recovered
    plan: RankPlan


def through_rounds(
    settings: Recovery,
    keep: float,
    spectra: Spectra,
    *,
    select: Callable[[float, Mapping[str, Tensor]], RankPlan],
    train: Train,
    again: Callable[[int, Learned], Spectra],
) -> Result:
    """Cut and train at each size down to the share `keep`; `spectra` are those of the dense model.

    `select` makes the rank plan of a share; `again` takes the spectra of the model with a round's factors, of which
    the next one is cut. A layer that the budget leaves dense has its dense weight, also after a round in which it was
    factorised.
    """
    curve: list[dict[str, Any]] = []
    spans = settings.spans(keep)
    for number, (share, steps) in enumerate(spans):
        plan = select(share, spectra.values)
        start = {name: spectra.cut(name, rank) for name, rank in plan.ranks.items()}
        found = train(number, start, steps, spectra.coordinates)
        curve += found.curve
        if number < len(spans) - 1:
            spectra = again(number, found.factors)
    return Result(Recovered(found.factors, found.others, curve), plan)


def product(dense: nn.Module, pair: Factors | None) -> Tensor:
    """A layer's weight `[O, I]` in the compressed model: B·A in float64, or the dense one where it was left alone."""
    return read_weight(dense).detach() if pair is None else pair.B.double() @ pair.A.double()
