"""What an evaluator is, and the sums from which every metric and its standard error are taken."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrcompress.artifacts import Measurement
from lrcompress.part import Part
from lrcompress.tasks import TASKS, AbstractModelTask, Scored


@dataclass(frozen=True)
class Sums:
    """Sums over sequences of a metric's total s and count n: enough for Σs/Σn and its standard error."""

    s: float = 0.0
    n: float = 0.0
    ss: float = 0.0
    sn: float = 0.0
    nn: float = 0.0

    @classmethod
    def of(cls, values: Tensor, sequence: Tensor) -> "Sums":
        """From a value `[N]` per prediction and the sequence `[N]` it belongs to."""
        size = int(sequence.max()) + 1 if len(sequence) else 0
        s = torch.zeros(size, dtype=torch.float64).index_add_(0, sequence.cpu(), values.double().cpu())
        n = torch.zeros(size, dtype=torch.float64).index_add_(0, sequence.cpu(), torch.ones(len(sequence)).double())
        return cls.over(s, n)

    @classmethod
    def over(cls, s: Tensor, n: Tensor) -> "Sums":
        """From the totals `[sequences]` and counts `[sequences]` of each sequence, float64."""
        return cls(*(x.sum().item() for x in (s, n, s * s, s * n, n * n)))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean(self) -> float:
        """Σs / Σn."""
        return self.s / self.n

    @property
    def stderr(self) -> float:
        """Standard error of the mean with sequences as the independent units (ratio estimator)."""
        v = self.mean
        return sqrt(max(self.ss - 2 * v * self.sn + v * v * self.nn, 0.0)) / self.n


@dataclass(frozen=True)
class Columns:
    """Two numbers of each sequence, those of all batches, for a metric that is no mean over sequences."""

    one: tuple[float, ...]
    other: tuple[float, ...]

    @classmethod
    def of(cls, one: Tensor, other: Tensor) -> "Columns":
        """From both `[sequences]`."""
        return cls(tuple(one.double().tolist()), tuple(other.double().tolist()))

    def __add__(self, after: "Columns") -> "Columns":
        return Columns(self.one + after.one, self.other + after.other)

    @property
    def n(self) -> int:
        """How many sequences."""
        return len(self.one)

    @property
    def spearman(self) -> float | None:
        """Rank correlation; None of fewer than three, or where a column has no order."""
        return spearman(*(torch.tensor(column, dtype=torch.float64) for column in (self.one, self.other)))


Total = Sums | Columns
"""What a metric is taken from, once the batches are added up."""


PREDICTIONS = frozenset(TASKS) - {"feature-extraction"}
"""Tasks with a distribution over classes or tokens."""


Outputs = Literal["classes", "numbers", "any"]


class AbstractEvaluator(Part):
    """Base of the evaluators; each is final, frozen, and its own recipe entry (told apart by `kind`)."""

    needs_dense: ClassVar[bool] = False
    """Whether `values` reads the dense model's predictions."""
    needs_targets: ClassVar[bool] = False
    """Whether `values` reads labels."""
    needs_texts: ClassVar[bool] = False
    """Whether `sums` reads what the model writes."""
    tasks: ClassVar[frozenset[str]]
    """Names of the tasks that it fits."""
    outputs: ClassVar[Outputs] = "any"
    """What the model's outputs must be."""
    kind: str
    definitions: ClassVar[Mapping[str, str]]
    """Metric → the sentence that the report defines it with."""

    @classmethod
    def fits(cls, task: AbstractModelTask) -> bool:
        """Whether it measures something of a task."""
        return task.name in cls.tasks and cls.outputs in ("any", "classes" if task.has_classes else "numbers")

    def values(self, scored: Scored, dense: Scored | None) -> dict[str, Tensor]:
        """A number `[N]` for each prediction, by metric."""
        raise NotImplementedError(f"{self.kind} has sums of its own")

    def sums(self, scored: Scored, dense: Scored | None) -> Mapping[str, Total]:
        """What a batch adds, by metric; means over predictions unless a metric is another ratio, or none."""
        return {name: Sums.of(values, scored.sequence) for name, values in self.values(scored, dense).items()}

    def measurement(self, name: str, sums: Total) -> Measurement:
        """The metric from its sums."""
        assert isinstance(sums, Sums), f"{self.kind} has to measure {name} itself"
        return Measurement(name, sums.mean, sums.stderr, round(sums.n), self.higher_is_better(name))

    @abstractmethod
    def higher_is_better(self, name: str) -> bool:
        """Direction of a metric."""


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Spearman's rank correlation of the values `[N]`; None of fewer than three, or where equal ones have no order."""
    both = torch.stack([_ranks(one), _ranks(other)])
    if len(one) < 3 or not (both.var(dim=1) > 0).all():
        return None
    return torch.corrcoef(both)[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    """Equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse].cpu()
