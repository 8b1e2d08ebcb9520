"""Sequential refit: each layer's factors, solved again for the inputs that the compressed layers before it give.

A closed-form method fits each layer to the dense model's inputs; in the compressed model they are others, and errors
add up. Here the layers are taken in the order in which the model calls them. With inputs x of the dense model and x̃
of the compressed one (all earlier layers solved already), BA and the bias minimise

    E‖L (W x + b − B A x̃ − b̃)‖²,     L = the method's output-side root

which is a reduced-rank regression: M = W E[x x̃ᵀ] E[x̃ x̃ᵀ]⁻¹ is the best full-rank answer, and the best of rank r is the
truncated SVD of L M E[x̃ x̃ᵀ]^½ (Izenman 1975). No gradients, two forward passes over the calibration set: every
batch's pass waits at each layer until the layer is solved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Factors
from lrcompress.evaluate.scorer import Scorer
from lrcompress.heap import trim
from lrcompress.layers import read_weight
from lrcompress.linalg import Root, Roots, psd_root, truncate, weighted_svd
from lrcompress.lowrank import in_place_of, swapped
from lrcompress.refit.settings import Refit
from lrcompress.refit.walk import Seat, Walk, going
from lrcompress.tasks import AbstractTask, Batch


def refit(
    model: nn.Module,
    start: Mapping[str, Factors],
    left: Callable[[str], Root | None],
    batches: Sequence[Batch],
    settings: Refit,
    task: AbstractTask,
    *,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Factors]:
    """Factors of the same ranks as in `start`; the model is left as it was.

    `left` gives a layer's output-side root. Biases are solved too, where a layer has one. A layer that is not
    called, or called by routed tokens that differ between the two models, keeps its `start`. The hidden states of all
    batches are held at once, twice, and each batch has two threads: few large batches do best.
    """
    model.eval()
    seats = {name: Seat(name, model.get_submodule(name), pair) for name, pair in start.items()}
    walks = [(Walk(model, task, batch, dense=True), Walk(model, task, batch, dense=False)) for batch in batches]
    solved: dict[str, Factors] = {}
    with swapped(model, seats), going(walks):
        moments = _Moments()
        while any(not one.ended for pair in walks for one in pair) and len(solved) < len(start):
            name = next(one.waits_at.name for pair in walks for one in pair if one.waits_at is not None)
            seat = seats[name]
            here = [pair for pair in walks if any(one.waits_at is seat for one in pair)]
            if name not in solved:
                met = [pair for pair in here if all(one.waits_at is seat for one in pair) and _comparable(pair)]
                if met:
                    found = _solve(seat.dense, start[name], left(name), moments.of(met), settings.damping)
                    seat.take(found)
                solved[name] = seat.pair
                advance()
            for pair in here:
                for one in pair:
                    if one.waits_at is seat:
                        one.go_on()
            trim()  # the passes' threads would each keep what they freed
    return {name: seat.pair for name, seat in seats.items()}


@dataclass(frozen=True)
class Checked:
    """What held-out sequences say of a refit."""

    factors: dict[str, Factors]
    """the later ones, or those before, whichever are nearer to the dense model"""
    share: float | None
    """KL of the later ones, as a share of that before; None where there was nothing to check it on"""
    note: str

    @property
    def kept(self) -> bool:
        """Whether `factors` are the later ones."""
        return self.share is None or self.share < 1.0


def better(
    model: nn.Module,
    start: Mapping[str, Factors],
    refitted: dict[str, Factors],
    held_out: Sequence[Batch],
    task: AbstractTask,
    *,
    what: str = "refit",
    others: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Checked:
    """Those of the two that are nearer to the dense model, by KL on sequences that neither was fitted to.

    A refit is not always better: it makes each layer the best answer to noisy inputs, and so shrinks what it says; nor
    is a training, whose steps may be too long for a start that is near already. `others` are modules that go with the
    latter.
    """
    if not held_out:
        return Checked(refitted, None, f"factors after the {what}, which no held-out sequences were there to check")
    scorer = Scorer(model, held_out, task)
    before, after = distance(scorer, start), distance(scorer, refitted, others)
    verdict = "kept" if after < before else "dropped: the factors before it stay"
    note = f"KL to dense on held-out sequences {before:.4f} before the {what}, {after:.4f} after it; {verdict}"
    return Checked(refitted if after < before else dict(start), after / max(before, 1e-12), note)


def distance(
    scorer: Scorer, pairs: Mapping[str, Factors], others: Mapping[str, nn.Module] = MappingProxyType({})
) -> float:
    """KL of the model with these factors, and other modules, to the dense one; its loss where it has no logits."""
    layers = {name: in_place_of(scorer.model.get_submodule(name), pair) for name, pair in pairs.items()}
    score = scorer.score({**layers, **others})
    return score.cost("loss" if score.kl is None else "kl")


def _comparable(pair: "tuple[Walk, Walk]") -> bool:
    return pair[0].rows.shape == pair[1].rows.shape


def _solve(dense: nn.Module, start: Factors, left: Root | None, moments: "_Pair", damping: float) -> Factors:
    weight = read_weight(dense).detach().double()  # [O, I]
    inputs, cross = moments.centred() if start.bias is not None else (moments.inputs, moments.cross)
    ridge = (damping * inputs.diagonal().mean()).clamp_min(1e-30) * torch.eye(len(inputs)).to(inputs)
    inputs, cross = inputs + ridge, cross + ridge
    best = weight @ torch.linalg.solve(inputs, cross.T).T  # cross · inputs⁻¹
    roots = Roots(left=left, right=psd_root(inputs, damping=1e-9, side="right"))
    rank = start.A.shape[0]
    pair = truncate(weighted_svd(best, roots, rank), rank)
    if start.bias is None:
        return pair
    bias = start.bias.to(weight) + weight @ moments.mean_dense - pair.B @ (pair.A @ moments.mean_compressed)
    return Factors(pair.A, pair.B, bias)


@dataclass(frozen=True)
class _Pair:
    """Means over tokens of what a layer gets in the compressed model, x̃, and in the dense one, x; float64."""

    inputs: Tensor
    """E[x̃ x̃ᵀ], [I, I]"""
    cross: Tensor
    """E[x x̃ᵀ], [I, I]"""
    mean_compressed: Tensor
    """E[x̃], [I]"""
    mean_dense: Tensor
    """E[x], [I]"""

    def centred(self) -> tuple[Tensor, Tensor]:
        """Both moments about the means."""
        about = torch.outer(self.mean_compressed, self.mean_compressed)
        return self.inputs - about, self.cross - torch.outer(self.mean_dense, self.mean_compressed)


class _Moments:
    """Moments at a layer; those of the last one are remembered, since q, k and v share their inputs."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []
        self._last: _Pair | None = None

    def of(self, pairs: "Sequence[tuple[Walk, Walk]]") -> _Pair:
        """Over all real tokens whose inputs are finite in both models."""
        seen = [one.x for pair in pairs for one in pair]
        same = len(seen) == len(self._seen) and all(a is b for a, b in zip(seen, self._seen, strict=True))
        if self._last is None or not same:
            self._last, self._seen = self._sum(pairs), seen
        return self._last

    def _sum(self, pairs: "Sequence[tuple[Walk, Walk]]") -> _Pair:
        size = pairs[0][0].rows.shape[1]
        like = pairs[0][0].rows.new_zeros((), dtype=torch.float64)
        inputs, cross = like.new_zeros(size, size), like.new_zeros(size, size)
        compressed_sum, dense_sum, count = like.new_zeros(size), like.new_zeros(size), 0
        for dense, compressed in pairs:
            x, y = dense.rows, compressed.rows
            finite = torch.isfinite(x).all(1) & torch.isfinite(y).all(1)
            x, y = x[finite], y[finite]
            inputs += y.T @ y
            cross += x.T @ y
            compressed_sum += y.sum(0)
            dense_sum += x.sum(0)
            count += len(x)
        count = max(count, 1)
        return _Pair(inputs / count, cross / count, compressed_sum / count, dense_sum / count)
