"""The task of any module, with the caller's own forward and loss."""

from collections.abc import Callable, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from lrcompress.tasks.base import AbstractTask, Batch, Scored, first_tensor


@final
class UserTask(AbstractTask):
    """Any module with the caller's own forward and loss."""

    name = "user"
    needs_targets: ClassVar[bool] = False

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

    def token_masks(self, batch: Batch) -> Sequence[Tensor]:
        """None: all rows are real."""
        return ()

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
