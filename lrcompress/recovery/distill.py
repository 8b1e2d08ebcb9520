"""The losses of the recovery, and the dense model as its own teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrcompress.recovery.blended import BlendedLinear, Branch
from lrcompress.recovery.settings import Loss
from lrcompress.tasks import AbstractTask, Batch, real_rows


@dataclass(frozen=True)
class Losses:
    """The loss of a step, [], and its parts."""

    total: Tensor
    kl: Tensor | None = None
    hidden: Tensor | None = None


class Recorder:
    """Outputs of chosen modules during a forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.outputs: list[Tensor] = []
        self._hooks = [model.get_submodule(name).register_forward_hook(self._record) for name in names]

    def _record(self, module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.outputs.append(output if isinstance(output, Tensor) else output[0])

    def take(self) -> list[Tensor]:
        """What was recorded since the last call."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def as_teacher(
    layers: Mapping[str, BlendedLinear], trained: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within the block the model is the dense one: W's branch in each layer, other trained parameters as they were.

    So the teacher needs no second model in memory, whatever is trained.
    """
    branches: dict[str, Branch] = {name: layer.branch for name, layer in layers.items()}
    current = {name: parameter.data for name, parameter in trained.items()}
    for layer in layers.values():
        layer.branch = "dense"
    for name, parameter in trained.items():
        parameter.data = originals[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.branch = branches[name]
        for name, parameter in trained.items():
            parameter.data = current[name]


def distillation(
    student: Tensor,
    teacher: Tensor,
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    batch: Batch,
    task: AbstractTask,
    settings: Loss,
) -> Losses:
    """T²·KL(dense ‖ student) on the logits, the blocks' relative squared errors, and the task loss, weighted."""
    s, t = task.scored(student, batch), task.scored(teacher, batch)
    kl = settings.temperature**2 * t.divergence(s, settings.temperature).mean()
    total, hidden = kl, None
    if settings.hidden and student_hidden:
        masks = task.token_masks(batch)
        errors = [_relative(a, b, masks) for a, b in zip(student_hidden, teacher_hidden, strict=True)]
        hidden = torch.stack(errors).mean()
        total = total + settings.hidden * hidden
    if settings.task:
        total = total + settings.task * task.loss(student, batch)
    return Losses(total, kl.detach(), None if hidden is None else hidden.detach())


def _relative(student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² over real tokens, []."""
    student, teacher = (real_rows(x.float(), masks) for x in (student, teacher))
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)
