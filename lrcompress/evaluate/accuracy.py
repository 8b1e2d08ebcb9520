"""Accuracy."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import Tensor

from lrcompress.evaluate.base import PREDICTIONS, AbstractEvaluator, Outputs
from lrcompress.tasks import Scored


@final
class Accuracy(AbstractEvaluator):
    """Share of predictions whose largest logit is the label's."""

    kind: Literal["accuracy"] = "accuracy"
    needs_targets: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = PREDICTIONS
    outputs: ClassVar[Outputs] = "classes"
    definitions: ClassVar[Mapping[str, str]] = {
        "accuracy": "share of predictions whose largest logit is the label's, 0 to 1"
    }

    def values(self, scored: Scored, dense: Scored | None) -> dict[str, Tensor]:
        """1 where right, else 0."""
        return {"accuracy": (scored.logits.argmax(-1) == scored.targets).float()}

    def higher_is_better(self, name: str) -> bool:
        """Higher is better."""
        return True
