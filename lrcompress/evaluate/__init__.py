"""The evaluators; the union is the registry."""

from typing import Annotated

from pydantic import Field

from lrcompress.evaluate.accuracy import Accuracy
from lrcompress.evaluate.base import AbstractEvaluator
from lrcompress.evaluate.divergence import Divergence
from lrcompress.evaluate.lm_eval import LmEval
from lrcompress.evaluate.perplexity import Perplexity

SequenceEvaluator = Perplexity | Accuracy | Divergence
"""Those that score a model's predictions of the evaluation split."""

Evaluator = Annotated[SequenceEvaluator | LmEval, Field(discriminator="kind")]
"""Those, and one that takes the whole model and brings its own data."""

__all__ = ["AbstractEvaluator", "Accuracy", "Divergence", "Evaluator", "LmEval", "Perplexity", "SequenceEvaluator"]
