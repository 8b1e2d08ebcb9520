"""Token perplexity."""

from collections.abc import Mapping
from math import exp
from typing import ClassVar, Literal, final

from torch import Tensor

from lrcompress.artifacts import Measurement
from lrcompress.evaluate.base import AbstractEvaluator, Sums, Total
from lrcompress.tasks import Scored


@final
class Perplexity(AbstractEvaluator):
    """exp of the mean negative log-likelihood per token."""

    kind: Literal["perplexity"] = "perplexity"
    needs_targets: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "masked-lm", "seq2seq-lm", "speech-seq2seq"})
    definitions: ClassVar[Mapping[str, str]] = {
        "token_perplexity": "exp of the mean negative log-likelihood per token of the model's own vocabulary; "
        "each token of the text but the first is scored once, in windows (see evaluation.length and stride); "
        "of a masked LM the masked tokens, of an encoder-decoder those of the answer, given the ones before"
    }

    def values(self, scored: Scored, dense: Scored | None) -> dict[str, Tensor]:
        """Negative log-likelihood of each token, nats."""
        assert scored.targets is not None
        return {"token_perplexity": scored.losses(scored.targets)}

    def measurement(self, name: str, sums: Total) -> Measurement:
        """Standard error by the delta method."""
        assert isinstance(sums, Sums)
        value = exp(min(sums.mean, 700.0))
        return Measurement(name, value, value * sums.stderr, round(sums.n), False)

    def higher_is_better(self, name: str) -> bool:
        """Lower is better."""
        return False
