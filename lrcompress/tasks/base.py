"""What a task is: how a model is run, how its output is scored, and which loss its gradients come from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Any
"""What one call of the model gets: for transformers models a dict of tensors, its arguments by name and maybe `labels`;
for other modules whatever their own batches are."""


@dataclass(frozen=True)
class Scored:
    """The predictions that count: logits `[N, V]`, targets `[N]` or None, and each one's sequence `[N]`."""

    logits: Tensor
    targets: Tensor | None
    sequence: Tensor
    gaussian: bool = False
    """`logits` are no logits of classes but means of Gaussians of variance 1: embeddings or numbers, to be kept; the
    targets of numbers are numbers"""
    classes: Sequence[str] = ()
    """names of the V classes, where a metric reads them"""
    written: Sequence[str] = ()
    """what the model writes for each sequence, where a metric reads it"""
    wanted: Sequence[str] = ()
    """what it should write"""

    def divergence(self, other: "Scored", temperature: float = 1.0) -> Tensor:
        """KL of this model's predictions from the other's, both at a temperature, [N], nats.

        Of Gaussians of variance 1 it is half the squared distance of their means, divided by the temperature's square.
        """
        p, q = self.logits.float() / temperature, other.logits.float() / temperature
        if self.gaussian:
            return (p - q).square().sum(-1) / 2
        return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)

    def losses(self, targets: Tensor) -> Tensor:
        """Of each prediction, [N]: the cross-entropy of its class, nats, or the squared error of its number."""
        if self.gaussian:
            return (self.logits.float()[:, 0] - targets.float()).square()
        return F.cross_entropy(self.logits.float(), targets, reduction="none")


class AbstractTask(ABC):
    """How to run a model on a batch and how to read its logits."""

    name: str
    needs_targets: ClassVar[bool] = True
    """Whether the task loss needs the labels that `scored` finds in a batch."""

    has_classes: bool = True
    """Whether outputs are logits of classes or tokens, rather than embeddings or numbers."""

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
    def token_masks(self, batch: Batch) -> Sequence[Tensor]:
        """Which tokens are real, `[B, T]` bool each; a layer's is the one with as many; without one all are."""

    @abstractmethod
    def size(self, batch: Batch) -> int:
        """Sequences in a batch."""


def fisher_probe(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Random gradients v `[N, V]` at the logits, with E[v vᵀ] = diag p − p pᵀ: the Fisher information of the labels.

    v = √p ⊙ ξ − p·⟨√p, ξ⟩ with signs ξ. The gradient of a label sampled from the model, e_y − p, has the same second
    moment, but is large and rare where the model is sure, which takes many more sequences to average out. The data's
    own labels would give the empirical Fisher, which is not the curvature (Kunstner et al. 2019, arXiv 1905.12558).
    """
    root = probabilities.sqrt()
    drawn = root * random_signs(root, generator)
    return drawn - probabilities * drawn.sum(dim=-1, keepdim=True)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """−1 or 1 in this shape: random gradients whose second moment is that of Gaussians of variance 1, the identity.

    Drawn where the generator is: for a large vocabulary those of a CPU take longer than the model on a GPU.
    """
    drawn = torch.randint(0, 2, like.shape, generator=generator, device=generator.device, dtype=torch.int8)
    return drawn.to(like) * 2 - 1


def real_rows(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The rows `[N, I]` of an input `[.., I]` that belong to real tokens."""
    flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
    mask = next((mask for mask in masks if mask.numel() == len(flat)), None)
    return flat if mask is None else flat[mask.flatten()]


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
