"""How far the predictions are from the dense model's."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import Tensor

from lrcompress.evaluate.base import PREDICTIONS, AbstractEvaluator
from lrcompress.tasks import Scored


@final
class Divergence(AbstractEvaluator):
    """Mean Kullback-Leibler divergence KL(dense ‖ compressed), and how often both choose the same."""

    kind: Literal["divergence"] = "divergence"
    needs_dense: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = PREDICTIONS
    definitions: ClassVar[Mapping[str, str]] = {
        "kl": "mean KL(dense ‖ compressed) of the predicted distributions, nats; for a model with one output half the "
        "squared difference",
        "agreement": "share of predictions whose largest logit is at the dense model's class or token, 0 to 1",
    }

    def values(self, scored: Scored, dense: Scored | None) -> dict[str, Tensor]:
        """KL and, of classes, equality of each prediction."""
        assert dense is not None
        found = {"kl": dense.divergence(scored)}
        if not scored.gaussian:
            found["agreement"] = (dense.logits.argmax(-1) == scored.logits.argmax(-1)).float()
        return found

    def higher_is_better(self, name: str) -> bool:
        """KL lower, agreement higher."""
        return name == "agreement"
