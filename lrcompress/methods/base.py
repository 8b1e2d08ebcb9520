"""What a closed-form method is: two roots around the weight."""

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from lrcompress.artifacts import LayerStatistics
from lrcompress.errors import NumericalError
from lrcompress.linalg import Roots
from lrcompress.part import Part

Statistic = Literal[
    "input_moment", "input_abs_sum", "weighted_input_moment", "grad_moment", "fisher_by_output", "fisher_by_input"
]  # fmt: skip
"""Names of the sums in LayerStatistics that a method can ask for."""

BACKWARD: frozenset[Statistic] = frozenset(
    {"weighted_input_moment", "grad_moment", "fisher_by_output", "fisher_by_input"}
)
"""Statistics that need gradients."""


class AbstractMethod(Part):
    """Base of the methods; each is final, frozen, and its own recipe section (told apart by `kind`)."""

    needs: ClassVar[frozenset[Statistic]]
    estimates_loss: ClassVar[bool] = False
    """Whether squared values estimate the loss, and so compare between layers."""

    @abstractmethod
    def roots(self, statistics: LayerStatistics) -> Roots:
        """The roots L `[O, O]` and R `[I, I]` for one layer, in float64."""


def required(value: Tensor | None, name: Statistic) -> Tensor:
    """`value`, or NumericalError when the statistics were collected without it."""
    if value is None:
        raise NumericalError(f"the statistics hold no {name}; collect them again with this method")
    return value
