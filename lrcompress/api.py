"""Compression of any `torch.nn.Module` with the caller's own batches and loss, in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress import __version__
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors, LayerStatistics, RankPlan
from lrcompress.calibrate import collect, passes
from lrcompress.errors import DataError, NumericalError, RecipeError
from lrcompress.hf import attach_config
from lrcompress.layers import find_layers, read_weight
from lrcompress.linalg import truncate, weighted_svd
from lrcompress.lowrank import put_factors, ranks_of
from lrcompress.recipe import Recipe
from lrcompress.recovery import recover
from lrcompress.tasks import Batch, UserTask, default_forward, first_tensor, to_device


@dataclass(frozen=True)
class Compressed:
    """A compressed model and how it came about."""

    model: nn.Module
    """the model that was passed in, its chosen layers replaced"""
    plan: RankPlan
    factors: dict[str, Factors]
    training: list[dict[str, Any]]
    """the recovery's curve, [] without one"""


def compress(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Callable[[Tensor, Batch], Tensor],
    recipe: Recipe | str | Path | Mapping[str, Any],
    forward: Callable[[nn.Module, Batch], Tensor] = default_forward,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Compressed:
    """Compress any module by a recipe's targets, method, ranks and recovery. Changes the model.

    `batches` are what the module takes: `model(**batch)` for dicts, `model(batch[0])` for tuples and lists,
    else `model(batch)`, or `forward(model, batch)` for anything else; the first dimension of the first
    tensor counts sequences. `loss(outputs, batch)` is the mean task loss, []: the curvature of `kron` and
    `fwsvd` comes from its gradients, and the recovery with `loss: {kind: task}` minimises it. With
    `kind: distill` the outputs `[.., V]` are taken as logits of V classes. Batch sizes and lengths of the
    recipe do not apply: each step of the recovery is one of the batches.

    The recipe's data, evaluation, baselines and timing are not used. `save_module` writes a plain module; a
    transformers model can be written with its own `save_pretrained`. Raises InputError for what cannot be done.
    """
    _, recipe = recipes.resolve(recipe)
    data = _Batches(list(batches))
    place = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(place)
    task = UserTask(forward, loss)
    layers = find_layers(model, recipe.targets)
    _check_outputs(model, data, task, recipe, place)
    statistics = _statistics(model, layers, data, task, recipe, place, seed)
    spectra = {}
    for name, layer in layers.items():
        weight = read_weight(model.get_submodule(name)).detach()
        spectra[name] = weighted_svd(weight, recipe.method.roots(statistics[name]), layer.max_rank)
    plan = recipe.ranks.select(layers, {name: spectrum.values for name, spectrum in spectra.items()})
    biases = {name: model.get_submodule(name).bias for name in plan.ranks}
    factors = {name: truncate(spectra[name], rank, _detached(biases[name])) for name, rank in plan.ranks.items()}
    training: list[dict[str, Any]] = []
    if recipe.recovery is not None:
        settings = recipe.recovery.model_copy(update={"batch": 1})
        result = recover(model, layers, factors, data, settings, task, seed=seed)
        factors, training = result.factors, result.curve
        for name, value in result.others.items():
            model.get_parameter(name).data = value
    put_factors(model, factors)
    _record(model, recipe)
    return Compressed(model, plan, factors, training)


class _Batches:
    """The caller's batches, each as one item of the recovery's data."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        if not batches:
            raise DataError("there are no batches", do="give at least one")
        self.items = batches

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of this number."""
        return self.items[indices[0]]


@torch.no_grad()
def _check_outputs(model: nn.Module, data: _Batches, task: UserTask, recipe: Recipe, device: torch.device) -> None:
    model.eval()
    batch = to_device(data.batch([0]), device)
    outputs = task.logits(model, batch)
    if len(outputs) != len(first_tensor(batch)):
        raise DataError(
            "the model's outputs do not fit its batch",
            got=f"{len(outputs)} outputs of {len(first_tensor(batch))} inputs",
            allowed="the same first dimension", do="pass `forward` to take the right tensor of the output",
        )  # fmt: skip
    distilled = recipe.recovery is not None and recipe.recovery.loss.kind == "distill"
    if distilled and (outputs.ndim < 2 or outputs.shape[-1] < 2):
        raise RecipeError(
            "distillation needs logits of at least two classes", got=f"outputs of shape {list(outputs.shape)}",
            allowed="[batch, .., classes]", do="set recovery.loss to {kind: task}",
        )  # fmt: skip
    value = task.loss(outputs, batch)
    if value.numel() != 1 or not torch.isfinite(value):
        raise NumericalError(f"the loss of the first batch is {value.tolist()}; it must be one finite number")


def _statistics(
    model: nn.Module, layers: Mapping[str, Any], data: _Batches, task: UserTask, recipe: Recipe, device: torch.device,
    seed: int,
) -> dict[str, LayerStatistics]:  # fmt: skip
    found: dict[str, LayerStatistics] = {}
    for group in passes(layers, recipe.method.needs):
        batches = (to_device(batch, device) for batch in data.items)
        chosen = {name: layers[name] for name in group}
        found |= collect(model, chosen, batches, recipe.method.needs, task, seed=seed)[0]
    return found


def _detached(bias: Any) -> Tensor | None:
    return bias.detach() if isinstance(bias, Tensor) else None


def _record(model: nn.Module, recipe: Recipe) -> None:
    """A transformers model is told its ranks, so that its own save_pretrained writes what loads back."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        kind = "lora_lrd" if recipe.recovery else recipe.method.kind
        attach_config(model, ranks_of(model), {"lrcompress_version": __version__, "method": kind})
