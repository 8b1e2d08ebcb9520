"""How far the predictions are from the dense model's."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch.nn.functional as F
from torch import Tensor

from lrcompress.evaluate.base import AbstractEvaluator
from lrcompress.tasks import Scored


@final
class Divergence(AbstractEvaluator):
    """Mean Kullback-Leibler divergence KL(dense ‖ compressed), and how often both choose the same."""

    kind: Literal["divergence"] = "divergence"
    needs_dense: ClassVar[bool] = True
    definitions: ClassVar[Mapping[str, str]] = {
        "kl": "mean KL(dense ‖ compressed) of the predicted distributions, nats",
        "agreement": "share of predictions whose largest logit is at the dense model's class or token, 0 to 1",
    }

    def values(self, scored: Scored, dense: Scored | None) -> dict[str, Tensor]:
        """KL and equality of each prediction."""
        assert dense is not None
        log_p, log_q = dense.logits.float().log_softmax(-1), scored.logits.float().log_softmax(-1)
        return {
            "kl": F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
            "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float(),
        }

    def higher_is_better(self, name: str) -> bool:
        """KL lower, agreement higher."""
        return name == "agreement"
