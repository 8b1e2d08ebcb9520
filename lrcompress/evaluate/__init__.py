"""The evaluators; the union is the registry."""

from collections.abc import Mapping
from typing import Annotated, get_args

from pydantic import Field

from lrcompress.evaluate.accuracy import Accuracy
from lrcompress.evaluate.base import AbstractEvaluator
from lrcompress.evaluate.divergence import Divergence
from lrcompress.evaluate.embedding import Embedding
from lrcompress.evaluate.entities import Entities
from lrcompress.evaluate.lm_eval import LmEval
from lrcompress.evaluate.perplexity import Perplexity
from lrcompress.evaluate.regression import Regression
from lrcompress.evaluate.word_errors import WordErrors

SequenceEvaluator = Perplexity | Accuracy | Divergence | Entities | Embedding | Regression | WordErrors
"""Those that score a model's predictions of the evaluation split."""

Evaluator = Annotated[SequenceEvaluator | LmEval, Field(discriminator="kind")]
"""Those, and one that takes the whole model and brings its own data."""


def sequence_evaluators() -> Mapping[str, type[AbstractEvaluator]]:
    """Those that score predictions, by kind."""
    return {kind.model_fields["kind"].default: kind for kind in get_args(SequenceEvaluator)}


__all__ = [
    "AbstractEvaluator", "Accuracy", "Divergence", "Embedding", "Entities", "Evaluator", "LmEval", "Perplexity",
    "Regression", "SequenceEvaluator", "WordErrors", "sequence_evaluators",
]  # fmt: skip
