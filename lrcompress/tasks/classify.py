"""Tasks with classes: of a text, of its words, of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from lrcompress.data import Examples, Kind, Rows
from lrcompress.data.examples import labelled_tokens, sentences
from lrcompress.data.media import images
from lrcompress.errors import ModelError
from lrcompress.tasks.base import Batch, Scored
from lrcompress.tasks.model import AbstractModelTask, Cut, at_labels, label_ids, of_each, sequence_of, tells_apart


@final
class SequenceClassification(AbstractModelTask):
    """One label a text or pair of texts; `labels` [B] may be absent.

    A model with one output gives a number (STS-B, rerankers), taken as the mean of a Gaussian of variance 1 as
    embeddings are: the softmax of one logit says nothing.
    """

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    endings = ("ForSequenceClassification",)
    arguments = ("input_ids", "attention_mask", "token_type_ids")
    reads_pairs: ClassVar[bool] = True

    def __init__(self, *, has_classes: bool = True) -> None:
        """`has_classes`: several outputs, of which one is right; else one output, a number."""
        self.has_classes = has_classes

    def of(self, config: Any, files: Mapping[str, Any]) -> "SequenceClassification":
        """By the number of outputs. Raises ModelError for several that are not alternatives."""
        _check_alternatives(config, one_output=True)
        return SequenceClassification(has_classes=config.num_labels > 1)

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Single texts, or single pairs."""
        known = label_ids(config) if self.has_classes else None
        types = tells_apart(config)
        return sentences(rows, processor, cut.length, known, types=types)

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Each sequence is one prediction."""
        return replace(of_each(logits, batch), gaussian=not self.has_classes)


@final
class TokenClassification(AbstractModelTask):
    """One label a word, at its first token; `labels` [B, T] may be absent: then every token counts."""

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    endings = ("ForTokenClassification",)
    kind: ClassVar[Kind] = "words"
    # without it the byte-level tokenizers of RoBERTa's kind would join the words
    processor_settings: ClassVar[Mapping[str, Any]] = MappingProxyType({"add_prefix_space": True})

    def __init__(self, classes: Sequence[str] = ()) -> None:
        """`classes`: the model's names of them, by number."""
        self.classes = classes

    def of(self, config: Any, files: Mapping[str, Any]) -> "TokenClassification":
        """With the names of the model's classes."""
        return TokenClassification([name for _, name in sorted(config.id2label.items())])

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Lists of words."""
        return labelled_tokens(rows, processor, cut.length, label_ids(config))

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Each word is one prediction."""
        if "labels" in batch:
            return replace(at_labels(logits, batch["labels"]), classes=self.classes)
        real = batch["attention_mask"].bool()
        return Scored(logits[real], None, sequence_of(real)[real])


@final
class ImageClassification(AbstractModelTask):
    """One label an image; `labels` [B] may be absent."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    endings = ("ForImageClassification",)
    kind: ClassVar[Kind] = "image"
    processor: ClassVar[str] = "AutoImageProcessor"
    arguments: ClassVar[tuple[str, ...]] = ("pixel_values",)
    masks: ClassVar[tuple[str, ...]] = ()

    def of(self, config: Any, files: Mapping[str, Any]) -> "ImageClassification":
        """Itself. Raises ModelError where the outputs are not alternatives."""
        _check_alternatives(config)
        return self

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Single images."""
        return images(rows, processor, label_ids(config))

    def example_inputs(self, config: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise of the model's own size."""
        seen = getattr(config, "vision_config", config)
        size = getattr(seen, "image_size", None) or 224  # networks of convolutions take any
        if isinstance(size, Mapping):
            size = size["height"], size["width"]
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(seen, "num_channels", 3)
        return {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Each image is one prediction."""
        return of_each(logits, batch)


def _check_alternatives(config: Any, *, one_output: bool = False) -> None:
    """Raise ModelError for outputs of which not one is right; `one_output`: a single number is right too."""
    kind, count = getattr(config, "problem_type", None), config.num_labels
    several = kind == "multi_label_classification" or (kind == "regression" and count > 1)
    if several or (count == 1 and not one_output):
        raise ModelError(
            "the model's outputs are not classes of which one is right",
            got=f"{count} output{'s' * (count > 1)}, problem_type {kind}",
            allowed=f"problem_type single_label_classification{', or one output that is a number' * one_output}",
            do="compress it from Python with its own loss: lrcompress.compress, recovery.loss {kind: task}",
        )  # fmt: skip
