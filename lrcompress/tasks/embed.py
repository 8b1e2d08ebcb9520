"""The task of embedding models: a text as a vector of length 1."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.data import Examples, Rows
from lrcompress.data.examples import sentences
from lrcompress.errors import ModelError
from lrcompress.tasks.base import Batch, Scored
from lrcompress.tasks.model import AbstractModelTask, Cut

_POOLING = "1_Pooling/config.json"


@final
class FeatureExtraction(AbstractModelTask):
    """A text's embedding, pooled over its tokens and normalised, which the compressed model is to keep.

    It is taken as the mean of a Gaussian of variance 1: then the curvature is that of the embedding itself (v with
    E[v vᵀ] = 1 in place of a label's gradient), and the divergence half the squared distance, 1 − cos.
    """

    name = "feature-extraction"
    auto_class = "AutoModel"
    has_loss: ClassVar[bool] = False
    endings = ("Model",)
    companions: ClassVar[tuple[str, ...]] = (
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", _POOLING,
        "2_Normalize/config.json",
    )  # fmt: skip

    def __init__(self, pooling: Literal["mean", "cls"] = "mean") -> None:
        """mean: over real tokens; cls: the first token."""
        self.pooling = pooling

    def of(self, config: Any, files: Mapping[str, Any]) -> "FeatureExtraction":
        """With the pooling that a sentence-transformers model states. Raises ModelError for one that is not known."""
        stated = {key for key, value in files.get(_POOLING, {}).items() if key.startswith("pooling_mode_") and value}
        known: dict[str, Literal["mean", "cls"]] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        if not stated:
            return self
        if len(stated) > 1 or not stated <= known.keys():
            raise ModelError(
                f"the model's pooling is not known ({_POOLING})",
                got=", ".join(sorted(stated)),
                allowed=", ".join(known),
            )
        return FeatureExtraction(known[stated.pop()])

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Single texts; labels are not read."""
        return sentences(Rows(rows.inputs, None, rows.origin), processor, cut.length, {}, by_length=cut.by_length)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Embeddings [B, D] of length 1."""
        mask = batch["attention_mask"]
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        weights = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9), dim=-1)

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Each text is one prediction."""
        return Scored(logits, None, torch.arange(len(logits), device=logits.device), gaussian=True)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """There is none: recipes that ask for it are refused."""
        raise NotImplementedError("embeddings have no task loss")

    def fisher_loss(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """Σ v·embedding with random signs v."""
        rows = logits.float()[torch.isfinite(logits).all(dim=-1)]
        return ((torch.randint(0, 2, rows.shape, generator=generator).to(rows) * 2 - 1) * rows).sum()
