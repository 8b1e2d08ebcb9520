"""How near a model's numbers are to those of the data."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch

from lrcompress.evaluate.base import AbstractEvaluator, Outputs, Sums, ranks
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
        if len(scored.logits) > 2:
            both = torch.stack([ranks(scored.logits[:, 0]), ranks(scored.targets)])
            if (both.var(dim=1) > 0).all():  # equal numbers have no order
                found["label_spearman"] = Sums.over(torch.corrcoef(both)[0, 1:], torch.ones(1, dtype=torch.float64))
        return found

    def higher_is_better(self, name: str) -> bool:
        """The error lower, the correlation higher."""
        return name == "label_spearman"
