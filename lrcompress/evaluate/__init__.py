"""The evaluators; the union is the registry."""

from typing import Annotated

from pydantic import Field

from lrcompress.evaluate.accuracy import Accuracy
from lrcompress.evaluate.base import AbstractEvaluator
from lrcompress.evaluate.divergence import Divergence
from lrcompress.evaluate.perplexity import Perplexity

Evaluator = Annotated[Perplexity | Accuracy | Divergence, Field(discriminator="kind")]

__all__ = ["AbstractEvaluator", "Accuracy", "Divergence", "Evaluator", "Perplexity"]
