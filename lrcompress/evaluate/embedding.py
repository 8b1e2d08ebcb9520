"""How near embeddings are to the dense model's."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompress.evaluate.base import AbstractEvaluator, Sums, spearman
from lrcompress.tasks import Scored


@final
class Embedding(AbstractEvaluator):
    """Cosine with the dense model's embedding, and whether both say the same of which texts are alike."""

    kind: Literal["embedding"] = "embedding"
    needs_dense: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = frozenset({"feature-extraction"})
    definitions: ClassVar[Mapping[str, str]] = {
        "cosine": "mean cosine of a text's embeddings by the two models",
        "spearman": "rank correlation, between the two models, of the cosines of all pairs of texts in a batch, mean "
        "over batches (see evaluation.batch)",
    }

    def sums(self, scored: Scored, dense: Scored | None) -> dict[str, Sums]:
        """Of each text, and of each batch of at least three."""
        assert dense is not None
        found = {"cosine": Sums.of(F.cosine_similarity(scored.logits, dense.logits, dim=-1), scored.sequence)}
        order = spearman(_pairs(scored.logits), _pairs(dense.logits))
        if order is None:
            return found
        one = torch.ones(1, dtype=torch.float64)
        return found | {"spearman": Sums.over(order * one, one)}

    def higher_is_better(self, name: str) -> bool:
        """Higher is better."""
        return True


def _pairs(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs, [N·(N − 1)/2] float64."""
    unit = F.normalize(embeddings.double(), dim=-1)
    return (unit @ unit.T)[tuple(torch.triu_indices(len(unit), len(unit), offset=1))]
