"""What a model is asked to do: how its logits are scored, and which loss its gradients come from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.errors import ModelError

Batch = Any
"""What one call of the model gets: for transformers models a dict of tensors with `input_ids`, `attention_mask`
and maybe `labels`; for other modules whatever their own batches are."""


@dataclass(frozen=True)
class Scored:
    """The predictions that count: logits `[N, V]`, targets `[N]` or None, and each one's sequence `[N]`."""

    logits: Tensor
    targets: Tensor | None
    sequence: Tensor


class AbstractTask(ABC):
    """How to run a model on a batch and how to read its logits."""

    name: str
    needs_targets: ClassVar[bool] = True
    """Whether the task loss needs the labels that `scored` finds in a batch."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's output on a batch."""

    @abstractmethod
    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """The predictions that count, in the order of the sequences."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean task loss of a batch, []."""

    @abstractmethod
    def fisher_loss(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """A sum over sequences whose gradients' second moments are the Fisher information, []."""

    @abstractmethod
    def token_mask(self, batch: Batch) -> Tensor | None:
        """Which tokens are real, `[B, T]` bool; None when all are."""

    @abstractmethod
    def size(self, batch: Batch) -> int:
        """Sequences in a batch."""


class _Transformers(AbstractTask):
    """What both transformers tasks share; abstract."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        scored = self.scored(logits, batch)
        if scored.targets is None:
            raise ModelError("the data have no labels, and the task loss needs them", do="set data.train.label")
        return F.cross_entropy(scored.logits.float(), scored.targets)

    def fisher_loss(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        rows = self.scored(logits, batch).logits.float()
        rows = rows[torch.isfinite(rows).all(dim=-1)]
        return (fisher_probe(rows.detach().softmax(dim=-1), generator) * rows).sum()

    def token_mask(self, batch: Batch) -> Tensor | None:
        return batch["attention_mask"].bool()

    def size(self, batch: Batch) -> int:
        return len(batch["input_ids"])


def fisher_probe(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Random gradients v `[N, V]` at the logits, with E[v vᵀ] = diag p − p pᵀ: the Fisher information of the labels.

    v = √p ⊙ ξ − p·⟨√p, ξ⟩ with signs ξ. The gradient of a label sampled from the model, e_y − p, has the same second
    moment, but is large and rare where the model is sure, which takes many more sequences to average out. The data's
    own labels would give the empirical Fisher, which is not the curvature (Kunstner et al. 2019, arXiv 1905.12558).
    """
    root = probabilities.sqrt()
    signs = torch.randint(0, 2, root.shape, generator=generator).to(root) * 2 - 1
    drawn = root * signs
    return drawn - probabilities * drawn.sum(dim=-1, keepdim=True)


@final
class CausalLM(_Transformers):
    """Next-token prediction; `labels` [B, T] holds the ids to score, -100 elsewhere."""

    name = "causal-lm"

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Position t predicts token t + 1."""
        targets = batch["labels"][:, 1:]
        chosen = targets != -100  # [B, T - 1]
        sequence = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
        return Scored(logits[:, :-1][chosen], targets[chosen], sequence[chosen])


@final
class SequenceClassification(_Transformers):
    """One label a sequence; `labels` [B] may be absent."""

    name = "sequence-classification"

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Each sequence is one prediction."""
        return Scored(logits, batch.get("labels"), torch.arange(len(logits), device=logits.device))


@final
class UserTask(AbstractTask):
    """Any module with the caller's own forward and loss."""

    name = "user"
    needs_targets = False

    def __init__(
        self,
        forward: Callable[[nn.Module, Batch], Tensor],
        loss: Callable[[Tensor, Batch], Tensor],
        labels: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        """`labels` gives the classes `[N]` of a batch's predictions, where there are any."""
        self._forward, self._loss, self._labels = forward, loss, labels

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The caller's forward."""
        return self._forward(model, batch)

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """All positions; the last dimension holds the classes."""
        per_sequence = logits[0, ..., 0].numel()
        sequence = torch.arange(len(logits), device=logits.device).repeat_interleave(per_sequence)
        labels = None if self._labels is None else self._labels(batch)
        return Scored(logits.flatten(0, -2), labels, sequence)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The caller's loss."""
        return self._loss(logits, batch)

    def fisher_loss(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """The caller's loss times the batch: labels can't be sampled from an unknown loss (empirical Fisher)."""
        return self._loss(logits, batch) * len(logits)

    def token_mask(self, batch: Batch) -> Tensor | None:
        """None: all rows are real."""
        return None

    def size(self, batch: Batch) -> int:
        """Length of the first tensor."""
        return len(first_tensor(batch))


def default_forward(model: nn.Module, batch: Batch) -> Tensor:
    """`model(**batch)` for a dict, `model(batch[0])` for a tuple or list, else `model(batch)`; of it `.logits`."""
    if isinstance(batch, dict):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(batch[0])
    else:
        output = model(batch)
    return output if isinstance(output, Tensor) else output.logits


def first_tensor(batch: Batch) -> Tensor:
    """The first tensor of a dict, tuple, list, or the batch itself."""
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch
    return next(value for value in values if isinstance(value, Tensor))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
