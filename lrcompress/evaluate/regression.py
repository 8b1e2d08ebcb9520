"""How near a model's numbers are to those of the data."""

from collections.abc import Mapping
from math import sqrt
from typing import ClassVar, Literal, final

from lrcompress.artifacts import Measurement
from lrcompress.evaluate.base import AbstractEvaluator, Columns, Outputs, Sums, Total
from lrcompress.tasks import Scored


@final
class Regression(AbstractEvaluator):
    """Squared error, and rank correlation with the labels."""

    kind: Literal["regression"] = "regression"
    needs_targets: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = frozenset({"sequence-classification"})
    outputs: ClassVar[Outputs] = "numbers"
    definitions: ClassVar[Mapping[str, str]] = {
        "squared_error": "mean squared difference of the model's number and the label",
        "label_spearman": "rank correlation of the model's numbers with the labels, over all data; 0 where it says the "
        "same of all",
    }

    def sums(self, scored: Scored, dense: Scored | None) -> dict[str, Total]:
        """The error of each text; the number and the label of each text."""
        assert scored.targets is not None
        return {
            "squared_error": Sums.of(scored.losses(scored.targets), scored.sequence),
            "label_spearman": Columns.of(scored.logits[:, 0], scored.targets),
        }

    def measurement(self, name: str, sums: Total) -> Measurement:
        """The standard error of a rank correlation r of n texts is (1 − r²)·√((1 + r²/2)/(n − 3)).

        Bonett and Wright 2000, by Fisher's transformation.
        """
        if not isinstance(sums, Columns):
            return super().measurement(name, sums)
        r, n = sums.spearman, sums.n
        if r is None:
            return Measurement(name, 0.0, None, n, True)
        stderr = max(1 - r * r, 0.0) * sqrt((1 + r * r / 2) / (n - 3)) if n > 3 else None
        return Measurement(name, r, stderr, n, True)

    def higher_is_better(self, name: str) -> bool:
        """The error lower, the correlation higher."""
        return name == "label_spearman"
