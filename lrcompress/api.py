"""Compression of any `torch.nn.Module` with the caller's own batches and loss, in memory."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress import __version__
from lrcompress import recipe as recipes
from lrcompress.analysis.findings import findings
from lrcompress.analysis.measure import compare_selectors, measure_layers
from lrcompress.analysis.schema import LayerAnalysis, SelectorRow
from lrcompress.analysis.settings import all_methods
from lrcompress.artifacts import Factors, LayerStatistics, RankPlan, Spectrum
from lrcompress.calibrate import collect, mean_of, passes, siblings
from lrcompress.errors import DataError, NumericalError, RecipeError
from lrcompress.evaluate.scorer import Scorer
from lrcompress.experts import fuse, unfuse
from lrcompress.hf import attach_config
from lrcompress.layers import bias_of, find_layers, read_weight
from lrcompress.linalg import Roots, truncate, weighted_svd
from lrcompress.lowrank import in_place_of, put_factors, ranks_of, swapped
from lrcompress.methods import Method, Statistic
from lrcompress.pivoting import laid_out
from lrcompress.progress import Display
from lrcompress.ranks import Budget, Frontier
from lrcompress.ranks.context import AbstractContext
from lrcompress.recipe import Recipe
from lrcompress.recovery import Recovered, modules_with, recover
from lrcompress.recovery.rounds import Learned, Result, Spectra, product, through_rounds
from lrcompress.recovery.settings import Learning, Recovery
from lrcompress.recovery.whitening import Coordinates
from lrcompress.refit import better, distance, refit
from lrcompress.selection import Bench, Memory, Pairs, Subject
from lrcompress.tasks import Batch, UserTask, default_forward, first_tensor, to_device


@dataclass(frozen=True)
class Compressed:
    """A compressed model and how it came about."""

    model: nn.Module
    """the model that was passed in, its chosen layers replaced"""
    plan: RankPlan
    """the ranks that the layers have: one that pivoting would hurt is plain, of a smaller rank than was chosen"""
    factors: dict[str, Factors]
    training: list[dict[str, Any]]
    """the recovery's curve, [] without one"""


@dataclass(frozen=True)
class LayerFindings:
    """An analysis of a plain module."""

    layers: list[LayerAnalysis]
    selectors: list[SelectorRow]
    findings: list[str]
    """sentences made from the numbers"""


def compress(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Callable[[Tensor, Batch], Tensor],
    recipe: Recipe | str | Path | Mapping[str, Any],
    forward: Callable[[nn.Module, Batch], Tensor] = default_forward,
    validation: Iterable[Batch] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Compressed:
    """Compress any module by a recipe's targets, method, ranks and recovery. Changes the model.

    `batches` are what the module takes: `model(**batch)` for dicts, `model(batch[0])` for tuples and lists,
    else `model(batch)`, or `forward(model, batch)` for anything else; the first dimension of the first
    tensor counts sequences. `loss(outputs, batch)` is the mean task loss, []: the curvature of `kron` and
    `fwsvd` comes from its gradients, and the recovery with `loss: {kind: task}` minimises it. With
    `kind: distill` the outputs `[.., V]` are taken as logits of V classes. Batch sizes and lengths of the
    recipe do not apply: each step of the recovery is one of the batches. Rank selectors that score plans
    (random_search, target) do so on the batches of `validation`, by KL of the outputs or by the loss.

    The recipe's data, evaluation, baselines and timing are not used. `save_module` writes a plain module; a
    transformers model can be written with its own `save_pretrained`. Each layer keeps its dtype, and the modules keep
    their training mode. Raises InputError for what cannot be done.
    """
    _, recipe = recipes.resolve(recipe)
    with _apart(model):
        plan, factors, training = _compressed(
            _Subject(model, batches, validation, UserTask(forward, loss), recipe, seed, device)
        )
    _record(model, recipe)
    return Compressed(model, plan, factors, training)


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Within the block experts are Linears of their own; afterwards, an error or not, only where they must be.

    Modules are in training mode afterwards where they were before, and new ones where what they are in is.
    """
    training = {name: module.training for name, module in model.named_modules()}
    unfuse(model)
    try:
        yield
    finally:
        fuse(model)
        for name, module in model.named_modules():
            module.training = training.setdefault(name, training[name.rpartition(".")[0]])


def _compressed(subject: "_Subject") -> tuple[RankPlan, dict[str, Factors], list[dict[str, Any]]]:
    """Ranks, factors and training curve, with the factors in the model."""
    model, recipe, seed = subject.model, subject.recipe, subject.seed
    data, task, layers = subject.data, subject.task, subject.layers
    _check_outputs(model, data, task, recipe.recovery, subject.device)
    statistics = subject.statistics(recipe.method.needs)
    spectra = subject.spectra(recipe.method, statistics)
    values = {name: spectrum.values for name, spectrum in spectra.items()}
    roots = subject.roots(statistics)
    coordinates = coordinates_of(roots)
    plan = recipe.ranks.select(layers, values, subject.bench(spectra, coordinates))
    factors = {
        name: truncate(spectra[name], rank, bias_of(model.get_submodule(name))) for name, rank in plan.ranks.items()
    }
    untrained, refitted = factors, False
    if recipe.refit is not None:
        batches = [to_device(batch, subject.device) for batch in data.items]
        found = refit(model, factors, lambda name: roots(name).left, batches, recipe.refit, task)
        held_out = subject.validation if recipe.refit.check else []
        checked = better(model, factors, found, held_out, task)
        untrained, refitted = checked.factors, recipe.refit.starts(checked.share)
        if recipe.recovery is None or refitted:
            factors = untrained
    training: list[dict[str, Any]] = []
    if recipe.recovery is not None:
        settings = recipe.recovery.model_copy(update={"batch": 1})
        if settings.rounds and not refitted and subject.is_far(factors, settings.rounds_above):
            learned = subject.through_rounds(settings, spectra, coordinates)
        else:
            found = recover(model, layers, factors, data, settings, task, seed=seed, coordinates=coordinates)
            learned = Result(found, plan)
        result = learned.recovered
        training, held_out = result.curve, subject.validation if settings.checked else []
        others = modules_with(model, result.others)
        checked = better(model, untrained, result.factors, held_out, task, what="training", others=others)
        factors, plan = checked.factors, learned.plan if checked.kept else plan
        for name, value in result.others.items() if checked.kept else ():
            parameter = model.get_parameter(name)
            parameter.data = value.to(parameter.dtype)
    int8 = recipe.dtype == "int8"
    dtypes = {name: read_weight(model.get_submodule(name)).dtype for name in factors}
    stored = {
        name: laid_out(pair, recipe.layout, dtypes[name], int8=int8, coordinates=partial(coordinates, name))
        for name, pair in factors.items()
    }
    put_factors(model, stored, int8=int8)
    plan = plan.stored_as(layers, {name: (pair.layout, pair.rank) for name, pair in stored.items()})
    cut = {name: pair.factors() for name, pair in stored.items() if pair.rank < factors[name].rank}
    return plan, factors | cut, training


def analyze_module(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Callable[[Tensor, Batch], Tensor],
    recipe: Recipe | str | Path | Mapping[str, Any],
    forward: Callable[[nn.Module, Batch], Tensor] = default_forward,
    validation: Iterable[Batch] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LayerFindings:
    """What the layers of any module use of their dimensions; the module is left as it was.

    Arguments as for `compress`; of the recipe, targets, method, ranks and the section `analysis` are read. Without
    `validation` batches no plan is scored. Raises InputError for what cannot be done.
    """
    _, recipe = recipes.resolve(recipe)
    with _apart(model):
        return _analyzed(_Subject(model, batches, validation, UserTask(forward, loss), recipe, seed, device))


def _analyzed(subject: "_Subject") -> LayerFindings:
    model, recipe = subject.model, subject.recipe
    settings, methods = recipe.analysis, all_methods(recipe.method)
    _check_outputs(model, subject.data, subject.task, settings.learning, subject.device)
    scored = bool(subject.validation)
    selectors = settings.selectors(recipe.method, recipe.ranks, scored=scored)
    statistics = subject.statistics(frozenset().union(*(method.needs for method in methods)))
    spectra = {method.kind: subject.spectra(method, statistics) for method in methods}
    own = spectra[recipe.method.kind]
    memory, pairs = Memory(), Pairs()

    def context() -> tuple[AbstractContext, list[str]]:
        bench = subject.bench(own, coordinates_of(subject.roots(statistics)), memory, pairs)
        return bench, bench.notes

    values = {name: spectrum.values for name, spectrum in own.items()}
    rows, plans = compare_selectors(subject.layers, values, selectors, context, scored=scored)
    layers = measure_layers(
        subject.layers, context()[0], lambda name: statistics[name], lambda kind, name: spectra[kind][name],
        tuple(spectra), selectors, plans,
    )  # fmt: skip
    return LayerFindings(layers, rows, findings(layers, recipe.method.kind, rows, settings.rise))


class _Subject:
    """A module with the caller's batches, as statistics, spectra and selectors need it. Moves the module."""

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], validation: Iterable[Batch], task: UserTask, recipe: Recipe,
        seed: int, device: torch.device | str | None,
    ) -> None:  # fmt: skip
        self.model, self.task, self.recipe, self.seed = model, task, recipe, seed
        self.data, self.validation = _Batches(list(batches)), list(validation)
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        model.to(self.device)
        found = find_layers(model, recipe.targets)
        self.layers = {name: replace(layer, layout=recipe.layout) for name, layer in found.items()}

    def statistics(self, needs: frozenset[Statistic], share: float = 1.0) -> dict[str, LayerStatistics]:
        """Of all layers, as many a pass as memory takes, on a share of the batches."""
        found: dict[str, LayerStatistics] = {}
        items = self.data.items[: math.ceil(share * len(self.data.items))]
        for group in passes(self.layers, needs):
            batches = (to_device(batch, self.device) for batch in items)
            chosen = {name: self.layers[name] for name in group}
            found |= collect(self.model, chosen, batches, needs, self.task, seed=self.seed)[0]
        unseen = [name for name in self.layers if name not in found]
        for name in unseen:
            found[name] = mean_of(name, (found[other] for other in siblings(name, self.layers, unseen)))
        if unseen:
            warnings.warn(
                f"no token was routed to {', '.join(unseen[:4])}: they got the mean statistics of their siblings",
                stacklevel=3,
            )
        return found

    def spectra(self, method: Method, statistics: Mapping[str, LayerStatistics]) -> dict[str, Spectrum]:
        """Of all layers by one method."""
        return {
            name: weighted_svd(
                read_weight(self.model.get_submodule(name)).detach(), method.roots(statistics[name]), layer.max_rank
            )
            for name, layer in self.layers.items()
        }

    def roots(self, statistics: Mapping[str, LayerStatistics]) -> Callable[[str], Roots]:
        """Of the recipe's method, by layer."""
        return lambda name: self.recipe.method.roots(statistics[name])

    def is_far(self, pairs: Learned, nats: float) -> bool:
        """Whether the KL to the dense model is above this, on validation batches where there are any."""
        return distance(Scorer(self.model, self.validation or self.data.items, self.task), pairs) > nats

    def through_rounds(
        self, settings: Recovery, spectra: Mapping[str, Spectrum], coordinates: Callable[[str], Coordinates]
    ) -> Result:
        """The rounds of a recovery, from the dense model's spectra on."""
        selector, method = self.recipe.ranks, self.recipe.method
        assert isinstance(selector, Budget | Frontier)  # the recipe allows no other
        keep = selector.kept_share
        assert keep is not None

        def train(number: int, start: Learned, steps: range, there: Callable[[str], Coordinates]) -> Recovered:
            return recover(
                self.model, self.layers, start, self.data, settings, self.task,
                seed=self.seed, coordinates=there, steps=steps,
            )  # fmt: skip

        def again(number: int, pairs: Learned) -> Spectra:
            compressed = {name: in_place_of(self.model.get_submodule(name), pair) for name, pair in pairs.items()}
            with swapped(self.model, compressed):
                statistics = self.statistics(method.needs, settings.rounds_calibration)
            found = {}
            for name, layer in self.layers.items():
                weight = product(self.model.get_submodule(name), pairs.get(name)).to(self.device)
                found[name] = weighted_svd(weight, method.roots(statistics[name]), layer.max_rank)
            return held(found, pairs, coordinates_of(self.roots(statistics)))

        def held(found: Mapping[str, Spectrum], pairs: Learned, there: Callable[[str], Coordinates]) -> Spectra:
            values = {name: spectrum.values for name, spectrum in found.items()}
            return Spectra.of(self.model, pairs, values, lambda name, _: found[name], there)

        return through_rounds(
            settings, keep, held(spectra, {}, coordinates), train=train, again=again,
            select=lambda share, values: selector.at(share, self.layers, values),
        )  # fmt: skip

    def bench(
        self,
        spectra: Mapping[str, Spectrum],
        coordinates: Callable[[str], Coordinates],
        memory: Memory | None = None,
        pairs: Pairs | None = None,
    ) -> Bench:
        """A context for selectors, all in memory."""
        recovery = self.recipe.recovery
        subject = Subject(
            load=lambda: self.model,
            layers=self.layers,
            task=self.task,
            spectrum=lambda name, rank: _cut(spectra[name], rank),
            coordinates=coordinates,
            training=lambda length: self.data,
            validation=self._validation,
            recovery=recovery and recovery.model_copy(update={"batch": 1}),
            seed=self.seed,
        )
        return Bench(subject, memory or Memory(), pairs or Pairs(), Display(quiet=True))

    def _validation(self) -> list[Batch]:
        if not self.validation:
            raise DataError(
                f"ranks.kind `{self.recipe.ranks.kind}` chooses on validation data, and there are none",
                got="no `validation`", allowed="batches that are neither training nor test data",
                do="pass `validation`, or take another selector",
            )  # fmt: skip
        return self.validation


def coordinates_of(roots: Callable[[str], Roots]) -> Callable[[str], Coordinates]:
    """Those of the training, by layer."""
    return lambda name: Coordinates.of(roots(name))


def _cut(spectrum: Spectrum, rank: int) -> Spectrum:
    return replace(spectrum, out_basis=spectrum.out_basis[:, :rank], in_basis=spectrum.in_basis[:rank])


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
def _check_outputs(
    model: nn.Module, data: _Batches, task: UserTask, training: Recovery | Learning | None, device: torch.device
) -> None:
    model.eval()
    batch = to_device(data.batch([0]), device)
    outputs = task.logits(model, batch)
    if len(outputs) != len(first_tensor(batch)):
        raise DataError(
            "the model's outputs do not fit its batch",
            got=f"{len(outputs)} outputs of {len(first_tensor(batch))} inputs",
            allowed="the same first dimension", do="pass `forward` to take the right tensor of the output",
        )  # fmt: skip
    distilled = training is not None and training.loss.kind == "distill"
    if distilled and (outputs.ndim < 2 or outputs.shape[-1] < 2):
        raise RecipeError(
            "distillation needs logits of at least two classes", got=f"outputs of shape {list(outputs.shape)}",
            allowed="[batch, .., classes]", do="set recovery.loss to {kind: task}",
        )  # fmt: skip
    value = task.loss(outputs, batch)
    if value.numel() != 1 or not torch.isfinite(value):
        raise NumericalError(f"the loss of the first batch is {value.tolist()}; it must be one finite number")


def _record(model: nn.Module, recipe: Recipe) -> None:
    """A transformers model is told its ranks, so that its own save_pretrained writes what loads back."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        kind = "lora_lrd" if recipe.recovery else recipe.method.kind
        attach_config(model, ranks_of(model), {"lrcompress_version": __version__, "method": kind})
