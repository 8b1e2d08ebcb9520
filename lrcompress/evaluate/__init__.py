"""The evaluators; the union is the registry."""

from collections.abc import Mapping
from typing import Annotated, get_args

from pydantic import Field

from lrcompress.evaluate.accuracy import Accuracy
from lrcompress.evaluate.base import AbstractEvaluator
from lrcompress.evaluate.divergence import Divergence
from lrcompress.evaluate.embedding import Embedding
from lrcompress.evaluate.entities import Entities
from lrcompress.evaluate.perplexity import Perplexity
from lrcompress.evaluate.word_errors import WordErrors

_Any = Perplexity | Accuracy | Divergence | Entities | Embedding | WordErrors
Evaluator = Annotated[_Any, Field(discriminator="kind")]


def evaluators() -> Mapping[str, type[AbstractEvaluator]]:
    """By kind."""
    return {kind.model_fields["kind"].default: kind for kind in get_args(_Any)}


__all__ = [
    "AbstractEvaluator", "Accuracy", "Divergence", "Embedding", "Entities", "Evaluator", "Perplexity", "WordErrors",
    "evaluators",
]  # fmt: skip
