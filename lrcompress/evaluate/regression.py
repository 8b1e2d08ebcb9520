"""How near a model's numbers are to those of the data."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from lrcompress.evaluate.base import AbstractEvaluator, Outputs, Sums, rank_correlation
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
        "label_spearman": "rank correlation of the model's numbers with the labels in a batch, mean over batches (see "
        "evaluation.batch)",
    }

    def sums(self, scored: Scored, dense: Scored | None) -> dict[str, Sums]:
        """Of each text, and of each batch of at least three."""
        assert scored.targets is not None
        found = {"squared_error": Sums.of(scored.losses(scored.targets), scored.sequence)}
        order = rank_correlation(scored.logits[:, 0], scored.targets)
        return found if order is None else found | {"label_spearman": order}

    def higher_is_better(self, name: str) -> bool:
        """The error lower, the correlation higher."""
        return name == "label_spearman"
