"""Statistics of the chosen layers: second moments of inputs and output gradients over the calibration set."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Layer, LayerStatistics
from lrcompress.errors import NumericalError
from lrcompress.experts import Experts, expert_holder
from lrcompress.methods import BACKWARD, Statistic
from lrcompress.tasks import AbstractTask, Batch, real_rows

MOMENT_BYTES = 8 << 30
"""Accumulators that one pass over the calibration set may hold; more layers take more passes."""

FISHER: Mapping[Statistic, int] = {"fisher_by_output": 1, "fisher_by_input": 0}
"""Which axis of the squared weight gradient `[O, I]` each is the sum over."""

MAX_DROPPED = 0.1
"""Share of calibration sequences that may have non-finite outputs."""


def passes(layers: Mapping[str, Layer], needs: Collection[Statistic], limit: int = MOMENT_BYTES) -> list[list[str]]:
    """Layer names in groups whose accumulators fit into `limit` bytes."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, layer in layers.items():
        size = sum(8 * shape.numel() for shape in _shapes(layer, needs).values())
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def collect(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Batch],
    needs: Collection[Statistic],
    task: AbstractTask,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda sequences: None,
) -> tuple[dict[str, LayerStatistics], int]:
    """One pass over the batches; returns the statistics and how many sequences were dropped as non-finite.

    Sums are held in float64, products within a batch in float32. Gradients are those of `task.fisher_loss`.
    Experts of a mixture to which no token was routed are left out. Raises NumericalError when more than 10 % of the
    sequences have non-finite outputs, and for any other layer without a token.
    """
    accumulators = {
        name: _Accumulator(layer, needs, _device(model), expert_holder(model, name)) for name, layer in layers.items()
    }
    generator = torch.Generator(_device(model)).manual_seed(seed)
    backward = not BACKWARD.isdisjoint(needs)
    model.eval()
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    hooks = [
        model.get_submodule(name).register_forward_hook(_hook(accumulator, backward))
        for name, accumulator in accumulators.items()
    ]
    seen = dropped = 0
    try:
        for batch in batches:
            for accumulator in accumulators.values():
                accumulator.begin(task.token_masks(batch), task.size(batch))
            with torch.set_grad_enabled(backward):
                logits = task.logits(model, batch)
                if backward:
                    loss = task.fisher_loss(logits, batch, generator)
                    if loss.requires_grad:  # not where no token of the batch came to any of the layers
                        loss.backward()
            seen += task.size(batch)
            dropped += int((~torch.isfinite(logits.detach().reshape(len(logits), -1)).all(dim=1)).sum())
            advance(task.size(batch))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trainable in frozen:
            parameter.requires_grad_(trainable)
    if dropped > MAX_DROPPED * seen:
        raise NumericalError(f"{dropped} of {seen} calibration sequences have non-finite outputs")
    kept = {name: one for name, one in accumulators.items() if one.tokens or one.holder is None}
    return {name: accumulator.result(seen - dropped) for name, accumulator in kept.items()}, dropped


def siblings(name: str, layers: Iterable[str], unseen: Collection[str]) -> list[str]:
    """The layers of the same list of experts that saw tokens."""
    group = name.rpartition(".")[0]
    return [other for other in layers if other.rpartition(".")[0] == group and other not in unseen]


def mean_of(name: str, others: Iterable[LayerStatistics]) -> LayerStatistics:
    """For an expert to which no token was routed: the mean sums of its siblings. NumericalError if it has none."""
    total, count, tokens, sequences = {}, 0, 0, 0
    for other in others:
        values = {key: value for key, value in vars(other).items() if isinstance(value, Tensor)}
        total = {key: value + total[key] if total else value for key, value in values.items()}
        count, tokens, sequences = count + 1, tokens + other.tokens, other.sequences
    if not count:
        raise NumericalError(f"layer {name} saw no token of the calibration set, nor did an expert like it")
    mean = {key: value / count for key, value in total.items()}
    return LayerStatistics(tokens=max(tokens // count, 1), sequences=sequences, **mean)


def _shapes(layer: Layer, needs: Collection[Statistic]) -> dict[Statistic, torch.Size]:
    i, o = layer.in_features, layer.out_features
    shapes: dict[Statistic, tuple[int, ...]] = {
        "input_moment": (i, i),
        "input_abs_sum": (i,),
        "weighted_input_moment": (i, i),
        "grad_moment": (o, o),
        "fisher_by_output": (o,),
        "fisher_by_input": (i,),
    }
    return {name: torch.Size(shape) for name, shape in shapes.items() if name in needs}


class _Accumulator:
    """The sums of one layer."""

    def __init__(
        self, layer: Layer, needs: Collection[Statistic], device: torch.device, holder: Experts | None
    ) -> None:
        self.layer, self.holder = layer, holder
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in _shapes(layer, needs).items()
        }
        self.tokens = 0
        self.masks: Sequence[Tensor] = ()
        self.batch_size = 0

    def begin(self, masks: Sequence[Tensor], batch_size: int) -> None:
        """Take note of the batch that comes."""
        self.masks, self.batch_size = masks, batch_size

    def masks_of(self, x: Tensor) -> Sequence[Tensor]:
        """The masks of the rows of an input that the layer gets now."""
        return self.masks if self.holder is None else self.holder.masks(self.masks, len(x))

    def forward(self, x: Tensor, masks: Sequence[Tensor]) -> None:
        """Sums of inputs `[.., I]`."""
        rows = real_rows(_finite(x), masks)
        self.tokens += len(rows)
        if "input_moment" in self.sums:
            self.sums["input_moment"] += rows.T @ rows
        if "input_abs_sum" in self.sums:
            self.sums["input_abs_sum"] += rows.abs().sum(0)

    def backward(self, x: Tensor, g: Tensor, masks: Sequence[Tensor]) -> None:
        """Sums of gradients `[.., O]` at the output, with the inputs `[.., I]` they belong to."""
        x, g = _finite(x), _finite(g)
        rows, grads = real_rows(x, masks), real_rows(g, masks)
        if "weighted_input_moment" in self.sums:
            weighted = rows * grads.square().sum(1, keepdim=True)
            self.sums["weighted_input_moment"] += weighted.T @ rows
        if "grad_moment" in self.sums:
            self.sums["grad_moment"] += grads.T @ grads
        self._add_fisher(x, g)

    def result(self, sequences: int) -> LayerStatistics:
        """The sums as a value; NumericalError if the layer never saw a token."""
        if self.tokens == 0:
            raise NumericalError(
                f"layer {self.layer.name} saw no token of the calibration set: the model does not call it, or uses its "
                f"weight alone; leave it dense, targets.exclude: [{self.layer.name}]"
            )
        return LayerStatistics(tokens=self.tokens, sequences=sequences, **self.sums)

    def _add_fisher(self, x: Tensor, g: Tensor) -> None:
        """The squared weight gradient `[O, I]` of each sequence, by the sums that are asked for."""
        wanted = [(self.sums[name], axis) for name, axis in FISHER.items() if name in self.sums]
        if not wanted:
            return
        if self.holder is not None or len(x.flatten(0, -2)) % self.batch_size:  # tokens of mixed sequences
            x, g = x.flatten(0, -2).square(), g.flatten(0, -2).square()
            for total, axis in wanted:
                total += g.T @ x.sum(1) if axis == 1 else x.T @ g.sum(1)
            return
        shape = (self.batch_size, -1)
        for one_x, one_g in zip(x.reshape(*shape, x.shape[-1]), g.reshape(*shape, g.shape[-1]), strict=True):
            squared = (one_g.T @ one_x).square()
            for total, axis in wanted:
                total += squared.sum(axis)


def _hook(accumulator: _Accumulator, backward: bool) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0].detach()
        masks = accumulator.masks_of(x)  # now: an expert's tokens are known while it runs
        with torch.no_grad():
            accumulator.forward(x, masks)
        if not backward:
            return None
        if not output.requires_grad:  # the first layers of a frozen model: the graph starts here
            output = output.detach().requires_grad_()
        output.register_hook(lambda grad: _without_grad(accumulator, x, grad, masks))
        # what follows may change its input in place: no leaf allows that, and a view would lose its hook
        return output.clone()

    return hook


def _without_grad(accumulator: _Accumulator, x: Tensor, grad: Tensor, masks: Sequence[Tensor]) -> None:
    with torch.no_grad():
        accumulator.backward(x, grad.detach(), masks)


def _finite(x: Tensor) -> Tensor:
    """float32 with non-finite rows set to 0, so that they add nothing."""
    x = x.float()
    return torch.where(torch.isfinite(x).all(dim=-1, keepdim=True), x, 0.0)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
