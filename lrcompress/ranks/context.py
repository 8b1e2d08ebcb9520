"""What a selector may ask of the run that it works for: scores of plans, and layers that LoRA-LRD has learned."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lrcompress.artifacts import Factors, RankPlan, Score
from lrcompress.errors import RecipeError
from lrcompress.recovery.settings import Learning


@dataclass(frozen=True)
class LearningRun:
    """One run of LoRA-LRD on all layers at once, whose pairs a selector looks at."""

    ranks: Mapping[str, int]
    settings: Learning
    seed: int


class AbstractContext(ABC):
    """The run around a selector. Scores and learned pairs are remembered: an interrupted search repeats none."""

    @property
    @abstractmethod
    def seed(self) -> int:
        """Of every random choice."""

    @abstractmethod
    def dense_score(self) -> Score:
        """The dense model on the validation data."""

    @abstractmethod
    def score(self, plan: RankPlan, *, steps: int = 0) -> Score:
        """A plan's closed-form factors on the validation data, or what `steps` steps of recovery make of them."""

    @abstractmethod
    def learned(self, run: LearningRun) -> Mapping[str, Factors]:
        """The pairs of a run by layer, on the CPU and at full scale: `BA` stands for W."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """A layer's dense weight `[O, I]`, on the CPU."""

    @abstractmethod
    def note(self, text: str) -> None:
        """A sentence for the reader of the report."""

    @abstractmethod
    def record(self, key: str, value: Any) -> None:
        """A table or a curve (plain values) for the report."""

    @abstractmethod
    def progress(self, what: str, done: int, total: int, figures: str = "") -> None:
        """How far a long selection is."""

    @abstractmethod
    def close(self) -> None:
        """Take away what progress is still shown: a selection may end before its last step, or fail."""


@final
class NoContext(AbstractContext):
    """For selectors that need nothing but shapes and spectra; notes and records go nowhere."""

    @property
    def seed(self) -> int:
        """The default of a run."""
        return 0

    def dense_score(self) -> Score:
        """Refused."""
        raise self._refusal("scores plans on validation data")

    def score(self, plan: RankPlan, *, steps: int = 0) -> Score:
        """Refused."""
        raise self._refusal("scores plans on validation data")

    def learned(self, run: LearningRun) -> Mapping[str, Factors]:
        """Refused."""
        raise self._refusal("looks at layers that LoRA-LRD has learned")

    def weight(self, name: str) -> Tensor:
        """Refused."""
        raise self._refusal("reads weights")

    def note(self, text: str) -> None:
        """Nobody reads it."""

    def record(self, key: str, value: Any) -> None:
        """Nobody reads it."""

    def progress(self, what: str, done: int, total: int, figures: str = "") -> None:
        """Nobody sees it."""

    def close(self) -> None:
        """Nothing is shown."""

    def _refusal(self, what: str) -> RecipeError:
        return RecipeError(
            f"this rank selector {what}, and there is no run around it", allowed="a context",
            do="use it through lrcompress.run or lrcompress.compress",
        )  # fmt: skip


NOTHING = NoContext()


def scores_table(trials: Sequence[tuple[RankPlan, Score]]) -> list[dict[str, Any]]:
    """One row per scored plan, in the order of the trials."""
    return [
        {"trial": number, "kept_parameters": plan.kept_parameters, "kl": score.kl, "loss": score.loss,
         "accuracy": score.accuracy, "ranks": dict(plan.ranks)}
        for number, (plan, score) in enumerate(trials)
    ]  # fmt: skip
