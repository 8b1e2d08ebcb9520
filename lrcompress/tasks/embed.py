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
_MODES: dict[str, Literal["mean", "cls"]] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}


@final
class FeatureExtraction(AbstractModelTask):
    """A text's embedding, pooled over its tokens and normalised, which the compressed model is to keep.

    It is taken as the mean of a Gaussian of variance 1: then the curvature is that of the embedding itself (v with
    E[v vᵀ] = 1 in place of a label's gradient), and the divergence half the squared distance, 1 − cos.
    """

    name = "feature-extraction"
    auto_class = "AutoModel"
    has_loss: ClassVar[bool] = False
    has_classes = False
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
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                "feature-extraction needs an encoder", got=f"{config.model_type}, an encoder and a decoder",
                allowed="a model like BERT", do="set `task` in the recipe: seq2seq-lm, say",
            )  # fmt: skip
        kinds = {module.get("type", "").rpartition(".")[2] for module in files.get("modules.json", [])}
        if strange := sorted(kinds - {"Transformer", "Pooling", "Normalize"}):
            raise ModelError(
                "the model has modules of sentence-transformers that are not known (modules.json)",
                got=", ".join(strange), allowed="Transformer, Pooling, Normalize",
            )  # fmt: skip
        pooling = files.get(_POOLING)
        return self if pooling is None else FeatureExtraction(_stated(pooling))

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Single texts; labels are not read."""
        return sentences(Rows(rows.inputs, None, rows.origin), processor, cut.length, {})

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


def _stated(pooling: Mapping[str, Any]) -> Literal["mean", "cls"]:
    """The pooling of a sentence-transformers config: `pooling_mode`, or one flag for each as before version 6."""
    modes = pooling.get("pooling_mode") or [
        key.removeprefix("pooling_mode_") for key, value in pooling.items() if key.startswith("pooling_mode_") and value
    ]
    named = [modes] if isinstance(modes, str) else modes
    found: set[Literal["mean", "cls"] | None] = {_MODES.get(str(one)) for one in named}
    mode = found.pop() if len(found) == 1 else None
    if mode is None:
        raise ModelError(f"the model's pooling is not known ({_POOLING})", got=modes, allowed=", ".join(_MODES))
    return mode
