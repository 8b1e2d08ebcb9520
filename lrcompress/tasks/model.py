"""What a task says of transformers models: which class loads them, what they read, what counts in their output."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompress.data import Examples, Kind, Rows
from lrcompress.data.examples import IGNORED
from lrcompress.errors import DataError, ModelError
from lrcompress.tasks.base import AbstractTask, Batch, Scored, fisher_probe, random_signs


@dataclass(frozen=True)
class Cut:
    """How rows become sequences."""

    length: int
    """tokens a sequence, at most"""
    stride: int | None = None
    """tokens between the starts of two windows; None: windows side by side"""
    separator: str | None = None
    """put between rows when they are joined to one text"""
    language: str | None = None
    """of what is said in sounds"""


class AbstractModelTask(AbstractTask):
    """A task of transformers models; each is final and its own entry of `TASKS`."""

    name: ClassVar[str]
    auto_class: ClassVar[str]
    """the transformers class that loads a model for it"""
    endings: ClassVar[tuple[str, ...]]
    """how the names of its architectures end"""
    kind: ClassVar[Kind] = "text"
    processor: ClassVar[str] = "AutoTokenizer"
    """the transformers class that loads what makes inputs"""
    processor_settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """what it is loaded with"""
    arguments: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    """what the model gets of a batch"""
    masks: ClassVar[tuple[str, ...]] = ("attention_mask",)
    """what of a batch says which tokens are real"""
    reads_pairs: ClassVar[bool] = False
    """whether a row may be two texts"""
    has_loss: ClassVar[bool] = True
    """whether there is a loss without the dense model"""
    companions: ClassVar[tuple[str, ...]] = ()
    """files of a model's folder that belong to the result too, where they exist"""

    @abstractmethod
    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Rows as inputs of a model with this config. Raises DataError for rows that are of no use."""

    @abstractmethod
    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """The predictions that count, in the order of the sequences."""

    def of(self, config: Any, files: Mapping[str, Any]) -> "AbstractModelTask":
        """The task as a model wants it: its config, and its `companions` (JSON by name, where they exist)."""
        return self

    def read_texts(self, model: nn.Module, batch: Batch, processor: Any) -> tuple[list[str], list[str]]:
        """What the model writes for each sequence by greedy search, and what it should write."""
        raise NotImplementedError(f"{self.name} writes no texts")

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model's head gives."""
        return model(**{name: batch[name] for name in self.arguments if name in batch}).logits

    def example_inputs(self, config: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs of a model with this config, `length` tokens long where it reads tokens; on the CPU."""
        return random_tokens(config, batch, length, generator)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the labels, or squared error of numbers, []."""
        scored = self.scored(logits, batch)
        if scored.targets is None:
            raise DataError("the data have no labels, and the task loss needs them", do="set data.train.label")
        return scored.losses(scored.targets).mean()

    def fisher_loss(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """Σ v·logits with random v of the Fisher information's second moment, []."""
        scored = self.scored(logits, batch)
        rows = scored.logits.float()
        rows = rows[torch.isfinite(rows).all(dim=-1)]
        if scored.gaussian:
            return (random_signs(rows, generator) * rows).sum()
        return (fisher_probe(rows.detach().softmax(dim=-1), generator) * rows).sum()

    def token_masks(self, batch: Batch) -> Sequence[Tensor]:
        """Those of `masks`."""
        return [batch[name].bool() for name in self.masks if name in batch]

    def size(self, batch: Batch) -> int:
        """Length of the first argument."""
        return len(batch[self.arguments[0]])


def random_tokens(config: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`input_ids` and a full `attention_mask`, `[batch, length]`."""
    ids = torch.randint(config.get_text_config().vocab_size, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decoder_start(config: Any) -> int:
    """The id that a decoder begins with. Raises ModelError where the config states none."""
    for found in (getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)):
        if isinstance(found, int):
            return found
    raise ModelError(
        "the model's config does not say what its decoder begins with", got="no decoder_start_token_id",
        do="set it in config.json",
    )  # fmt: skip


def at_labels(logits: Tensor, labels: Tensor) -> Scored:
    """The positions `[B, T]` that have a label."""
    chosen = labels != IGNORED
    return Scored(logits[chosen], labels[chosen], sequence_of(labels)[chosen])


def sequence_of(positions: Tensor) -> Tensor:
    """Each position's sequence, [B, T]."""
    return torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions)


def of_each(logits: Tensor, batch: Batch) -> Scored:
    """One prediction a sequence; `labels` [B] may be absent."""
    return Scored(logits, batch.get("labels"), torch.arange(len(logits), device=logits.device))


def tells_apart(config: Any) -> bool:
    """Whether the model reads which text of a pair a token is of (`token_type_ids`)."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def label_ids(config: Any) -> dict[str, int]:
    """The model's class names with their numbers."""
    return dict(getattr(config, "label2id", None) or {})
