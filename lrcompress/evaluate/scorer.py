"""Scores of many candidate models on a few fixed batches: the choice between rank plans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Score
from lrcompress.errors import NumericalError
from lrcompress.evaluate.accuracy import Accuracy
from lrcompress.evaluate.base import Sums
from lrcompress.lowrank import swapped
from lrcompress.tasks import AbstractTask, Batch, Scored, to_device

CACHE_BYTES = 512 << 20
"""The dense model's logits are held up to this size, and computed again for each candidate beyond it."""


@dataclass
class Scorer:
    """Measures what stands in a model's place on the same batches, beside the dense model."""

    model: nn.Module
    batches: Sequence[Batch]
    task: AbstractTask
    _dense: list[Scored] = field(default_factory=list)

    def score(self, modules: Mapping[str, nn.Module]) -> Score:
        """Means over all predictions. Raises NumericalError for outputs that are not finite."""
        self.model.eval()
        device = next(self.model.parameters()).device
        sums: dict[str, Sums] = {}
        for number, cpu_batch in enumerate(self.batches):
            batch = to_device(cpu_batch, device)
            if modules:
                dense = self._dense_scored(number, batch)
                logits, scored = self._predict(modules, batch)
            else:
                logits, scored = self._predict({}, batch)
                dense = self._dense_scored(number, batch, scored)
            for name, values in self._values(logits, scored, dense, batch).items():
                sums[name] = sums.get(name, Sums()) + Sums.of(values, scored.sequence)
        means = {name: total.mean for name, total in sums.items()}
        return Score(means.get("kl"), means.get("loss"), means.get("accuracy"))

    def _values(self, logits: Tensor, scored: Scored, dense: Scored, batch: Batch) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if scored.gaussian or (scored.logits.ndim > 1 and scored.logits.shape[-1] > 1):
            values["kl"] = dense.divergence(scored)
        if scored.targets is not None:
            values["loss"] = scored.losses(scored.targets)
            values |= {} if scored.gaussian else Accuracy().values(scored, None)
        elif not self.task.needs_targets:
            values["loss"] = self.task.loss(logits, batch).detach().expand(len(scored.sequence))
        return values

    def _dense_scored(self, number: int, batch: Batch, known: Scored | None = None) -> Scored:
        if number < len(self._dense):
            return self._dense[number]
        scored = known or self._predict({}, batch)[1]
        held = sum(one.logits.nbytes for one in self._dense)
        if number == len(self._dense) and held + scored.logits.nbytes <= CACHE_BYTES:
            self._dense.append(scored)
        return scored

    @torch.no_grad()
    def _predict(self, modules: Mapping[str, nn.Module], batch: Batch) -> tuple[Tensor, Scored]:
        with swapped(self.model, modules):
            logits = self.task.logits(self.model, batch)
        if not torch.isfinite(logits).all():
            raise NumericalError("a candidate's output on the validation data is not finite")
        return logits, self.task.scored(logits, batch)
