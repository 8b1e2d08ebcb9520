"""Measure all rows of a report on the same sequences in the same order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompress.artifacts import Measurement, read_json, write_json
from lrcompress.data import Examples
from lrcompress.errors import NumericalError
from lrcompress.evaluate.base import AbstractEvaluator, Columns, Sums, Total
from lrcompress.lowrank import swapped
from lrcompress.tasks import AbstractModelTask, AbstractTask, Batch, Scored, to_device

Totals = dict[str, dict[str, Total]]
"""row → metric → what its batches add up to"""

SAVE_EVERY = 20
"""Batches between two saves of the sums."""


def measure_rows(
    model: nn.Module,
    rows: Mapping[str, Mapping[str, nn.Module]],
    examples: Examples,
    evaluators: Sequence[AbstractEvaluator],
    task: AbstractTask,
    *,
    batch_size: int,
    state: Path,
    processor: Any = None,
    advance: Callable[[int], None] = lambda sequences: None,
) -> dict[str, list[Measurement]]:
    """Measurements of each row, whose modules take the dense ones' places while it runs.

    All rows see a batch before the next one is read, so that the dense predictions are computed once. Sums go
    to `state` as they grow; a killed measurement goes on there. Raises NumericalError for non-finite logits:
    a batch is never left out. `processor` is what turns ids into texts, for metrics that read them.
    """
    model.eval()
    device = next(model.parameters()).device
    start, totals = _load(state)
    advance(min(start * batch_size, len(examples)))
    dense_needed = any(evaluator.needs_dense for evaluator in evaluators)
    reader = processor if any(evaluator.needs_texts for evaluator in evaluators) else None

    def predict(batch: Batch, row: str, modules: Mapping[str, nn.Module]) -> Scored:
        return _predict(model, modules, batch, task, row, reader)

    for number, cpu_batch in enumerate(examples.batches(batch_size, start), start + 1):
        batch = to_device(cpu_batch, device)
        dense = predict(batch, "dense", {}) if dense_needed else None
        for row, modules in rows.items():
            scored = dense if dense is not None and not modules else predict(batch, row, modules)
            for evaluator in evaluators:
                for metric, sums in evaluator.sums(scored, dense).items():
                    found = totals.setdefault(row, {})
                    found[metric] = _added(found.get(metric), sums)
        if number % SAVE_EVERY == 0:
            _save(state, number, totals)
        advance(task.size(batch))
    return {row: _measurements(evaluators, totals[row]) for row in rows}


@torch.inference_mode()
def _predict(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, task: AbstractTask, row: str, reader: Any
) -> Scored:
    with swapped(model, modules):
        scored = task.scored(task.logits(model, batch), batch)
        if reader is not None and isinstance(task, AbstractModelTask):
            written, wanted = task.read_texts(model, batch, reader)
            scored = replace(scored, written=written, wanted=wanted)
    if not torch.isfinite(scored.logits).all():
        raise NumericalError(f"row {row}: the model's output on the evaluation data is not finite")
    return scored


def _added(before: Total | None, now: Total) -> Total:
    return now if before is None else before + now  # type: ignore[operator]  # both are one metric's


def _measurements(evaluators: Sequence[AbstractEvaluator], totals: Mapping[str, Total]) -> list[Measurement]:
    return [
        evaluator.measurement(metric, totals[metric])
        for evaluator in evaluators
        for metric in evaluator.definitions
        if metric in totals
    ]


def _load(state: Path) -> tuple[int, Totals]:
    if not state.exists():
        return 0, {}
    saved = read_json(state)
    return saved["batches"], {
        row: {name: _total(value) for name, value in metrics.items()} for row, metrics in saved["totals"].items()
    }


def _total(value: Sequence[Any]) -> Total:
    """Two columns, or the sums' numbers."""
    return Columns(*map(tuple, value)) if isinstance(value[0], Sequence) else Sums(*value)


def _save(state: Path, number: int, totals: Totals) -> None:
    plain = {row: {name: astuple(sums) for name, sums in metrics.items()} for row, metrics in totals.items()}
    write_json(state, {"batches": number, "totals": plain})
