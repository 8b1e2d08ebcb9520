"""Ideas that were tried and are not in the tool: `python benchmarks/candidates.py BED [--keep SHARE] [NAME...]`.

Each is measured on validation data beside what the tool does (the variant `rounds` of the experiments), from
the same start, with the same steps, sequences and learning rate, where it does not say otherwise. Writes
results/candidates_BED.json, or candidates_BED-SHARE.json for a size that is not the bed's first, as it goes on; what is
there is not measured again.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.experiments import beds, recipe_of
from benchmarks.study import Study, arguments, calibration_batches, modules
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors, Spectrum, read_spectrum
from lrcompress.calibrate import collect
from lrcompress.layers import block_names, read_weight
from lrcompress.linalg import weighted_svd
from lrcompress.lowrank import swapped
from lrcompress.ranks.allocate import allocate
from lrcompress.ranks.bounds import Bounds
from lrcompress.recovery import Recovered
from lrcompress.recovery.blended import BlendedLinear
from lrcompress.recovery.distill import Recorder, distillation
from lrcompress.recovery.loop import blended
from lrcompress.recovery.rounds import Spectra, product, through_rounds
from lrcompress.recovery.settings import Loss, Recovery, Round
from lrcompress.recovery.whitening import Coordinates
from lrcompress.seeds import generator
from lrcompress.stages import method_coordinates
from lrcompress.workspace import Workspace

RATES = {"demo": {0.4: 3e-3, 0.2: 6e-3}, "minilm-sst2": {0.15: 3e-5}}
"""Bed → size → learning rate."""
SEEDS = (0, 1, 2)
ATTENTION = ("attn.c_attn", "self.query", "self.key", "self.value")
"""How the layers that make queries, keys and values are called in these beds."""
Pairs = Mapping[str, Factors]


@dataclass(frozen=True)
class Training:
    """How the factors are trained; the defaults are the tool's."""

    rate: float = 1.0
    """times the bed's learning rate"""
    schedule: Literal["linear", "cosine"] = "linear"
    """how the learning rate falls after the warm-up"""
    beta: float = 0.999
    """AdamW's β₂"""
    hidden: float = 10.0
    temperature: float = 1.0
    b_rate: float = 1.0
    """times the rate for B (LoRA+, arXiv 2402.12354)"""
    average: float = 0.0
    """decay of an exponential moving average of the weights, which is the result"""
    norms: bool = False
    """train biases and normalisation layers too"""
    muon: bool = False
    """orthogonalised momentum for A and B instead of AdamW"""
    one_moment: bool = False
    """one second moment for each matrix instead of each of its numbers (as Adam-mini, arXiv 2406.16793): in whitened
    coordinates what is left is the natural gradient with momentum, and one step size a matrix"""
    skip_last: bool = False
    """no hidden-state error after the last block, whose effect the logits hold"""
    late_task: float = 0.0
    """weight of the task loss in the second half of the steps"""
    relations: float = 0.0
    """weight of the KL of the queries', keys' and values' relations among tokens, of each head of each block
    (MiniLMv2, arXiv 2012.15828, eq. 3)"""
    residual: tuple[float, float] | None = None
    """the layer is BA x + s (W − B₀A₀) x with s falling from 0.7 to 0, in the layer of the least estimated damage by
    the first share of the steps, in that of the most by the second"""
    ranks_by: float = 1.0
    """power of the estimated savings by which the ranks are allocated: below 1 nearer to uniform"""
    rounds: tuple[Round, ...] = ()
    """sizes before the last: cut, train, take statistics again, allocate again"""
    own_statistics: int = 0
    """how often, before anything is trained, statistics of the model cut to the first size take the place of the dense
    model's: they allocate the ranks and decompose the dense weights"""
    sequences: float = 1.0
    """share of the calibration sequences of which statistics are taken between rounds"""
    warm_again: int = 0
    """steps in which the learning rate rises after each cut"""
    recovery: Mapping[str, Any] = field(default_factory=dict)
    """settings of the tool's own"""


def _sizes(*pairs: tuple[float, float]) -> tuple[Round, ...]:
    return tuple(Round(size=size, steps=steps) for size, steps in pairs)


ROUNDS = _sizes((1.5, 0.3))
CANDIDATES: dict[str, Training] = {
    "the tool": Training(),
    "without the scaling of components": Training(recovery={"components": False}),
    "plain coordinates": Training(recovery={"whiten": False}),
    "hidden states × 1": Training(hidden=1.0),
    "hidden states × 30": Training(hidden=30.0),
    "hidden states × 100": Training(hidden=100.0),
    "temperature 2": Training(temperature=2.0),
    "hidden states but for the last block": Training(skip_last=True),
    "relations × 1": Training(relations=1.0),
    "relations × 1, hidden states × 1": Training(relations=1.0, hidden=1.0),
    "LoRA+, B × 4": Training(b_rate=4.0),
    "cosine schedule": Training(schedule="cosine"),
    "β₂ 0.95": Training(beta=0.95),
    "average of the weights": Training(average=0.98),
    "average, twice the rate": Training(average=0.98, rate=2.0),
    "average, three times the rate": Training(average=0.98, rate=3.0),
    "biases and norms": Training(norms=True),
    "Muon": Training(muon=True),
    "Muon, a third of the rate": Training(muon=True, rate=1 / 3),
    "Muon, three times the rate": Training(muon=True, rate=3.0),
    "one second moment a matrix": Training(one_moment=True),
    "one second moment a matrix, a third of the rate": Training(one_moment=True, rate=1 / 3),
    "one second moment a matrix, three times the rate": Training(one_moment=True, rate=3.0),
    "task loss × 0.3 in the second half": Training(late_task=0.3),
    "the residual W − BA fades": Training(residual=(0.6, 0.6)),
    "the residual fades, later where the damage is larger": Training(residual=(0.3, 0.8)),
    "ranks by the estimate's power of 0.7": Training(ranks_by=0.7),
    "ranks by the estimate's power of 1.4": Training(ranks_by=1.4),
    "two rounds, 1.5 × the size for 0.3 of the steps": Training(rounds=ROUNDS),
    "three rounds, 2 ×, 1.5 ×": Training(rounds=_sizes((2.0, 0.2), (1.5, 0.2))),
    "four times the steps": Training(recovery={"steps": 800}),
    "four times the steps, two rounds": Training(rounds=ROUNDS, recovery={"steps": 800}),
}
"""Where the tool trains in one go."""
FAR: dict[str, Training] = {
    "the tool": Training(rounds=ROUNDS),
    "in one go": Training(),
    "three rounds, 1.5 ×, 1.25 ×": Training(rounds=_sizes((1.5, 0.15), (1.25, 0.15))),
    "three rounds, 1.8 ×, 1.4 ×": Training(rounds=_sizes((1.8, 0.15), (1.4, 0.15))),
    "four rounds, 1.6 ×, 1.4 ×, 1.2 ×": Training(rounds=_sizes((1.6, 0.1), (1.4, 0.1), (1.2, 0.1))),
    "the first size by statistics of its own": Training(rounds=ROUNDS, own_statistics=1),
    "the first size by statistics of its own, twice": Training(rounds=ROUNDS, own_statistics=2),
    "in one go, by statistics of its own": Training(own_statistics=1),
    "statistics of a half of the sequences between": Training(rounds=ROUNDS, sequences=0.5),
    "statistics of a quarter of the sequences between": Training(rounds=ROUNDS, sequences=0.25),
    "statistics of an eighth of the sequences between": Training(rounds=ROUNDS, sequences=0.125),
    "statistics of a quarter between, a quarter more steps": Training(
        rounds=ROUNDS, sequences=0.25, recovery={"steps": 250}
    ),
    "a quarter more steps": Training(rounds=ROUNDS, recovery={"steps": 250}),
    "in one go, a quarter more steps": Training(recovery={"steps": 250}),
    "in one go, half more steps": Training(recovery={"steps": 300}),
    "warm-up again after the cut": Training(rounds=ROUNDS, warm_again=10),
    "β₂ 0.95": Training(rounds=ROUNDS, beta=0.95),
    "hidden states × 30": Training(rounds=ROUNDS, hidden=30.0),
    "hidden states × 3": Training(rounds=ROUNDS, hidden=3.0),
    "relations × 1": Training(rounds=ROUNDS, relations=1.0),
}
"""Where the closed form is far from the dense model, so that the tool trains in rounds."""


@dataclass(frozen=True)
class Taught:
    """What the dense model says of a batch."""

    logits: Tensor
    hidden: list[Tensor]
    """outputs of the blocks"""
    attention: list[Tensor]
    """outputs of the layers that make queries, keys and values"""


@dataclass
class Lab:
    """A bed with one seed's statistics, spectra and refit."""

    work: Workspace
    keep: float
    dense: dict[str, nn.Module] = field(default_factory=dict)
    taught: dict[tuple[int, ...], Taught] = field(default_factory=dict)
    """held where norms are trained, which are the dense model's too"""

    def __post_init__(self) -> None:
        self.dense = {name: self.work.model.get_submodule(name) for name in self.work.layers}
        self.points = block_names(self.work.layers.values())
        self.attention = [name for name in self.dense if name.endswith(ATTENTION)]
        assert self.work.recipe.recovery is not None
        self.settings: Recovery = self.work.recipe.recovery

    def spectra(self) -> Spectra:
        """The dense model's, from the run folder."""
        place = self.work.stage("spectra") / self.work.recipe.method.kind
        found = {name: read_spectrum(place / f"{name}.safetensors") for name in self.dense}
        return self._held(found, {}, method_coordinates(self.work))

    def start(self) -> dict[str, Factors]:
        """Of a training in one go: the closed form, or the refit where the tool starts from that."""
        return {name: pair.factors() for name, pair in self.work.factors(self.work.start_of("plan")).items()}

    def cut(self, spectra: Spectra, share: float, power: float = 1.0) -> dict[str, Factors]:
        """The closed form at ranks by this power of the estimate."""
        values = {name: value**power for name, value in spectra.values.items()}
        ranks = allocate("budget", self.work.layers, values, share, Bounds.of(self.work.layers, 1, 1)).ranks
        return {name: spectra.cut(name, rank) for name, rank in ranks.items()}

    def again(self, pairs: Pairs, *, dense: bool = False, sequences: float = 1.0) -> Spectra:
        """Spectra of the compressed model: its own products, or the dense weights, with statistics taken on it."""
        work, method, batches = self.work, self.work.recipe.method, calibration_batches(self.work)
        batches = batches[: math.ceil(sequences * len(batches))]
        with swapped(work.model, modules(pairs)):
            statistics, _ = collect(work.model, work.layers, batches, method.needs, work.task, seed=work.seed)
        found, coordinates = {}, {}
        for name, layer in work.layers.items():
            roots = method.roots(statistics[name])
            weight = product(self.dense[name], None if dense else pairs.get(name))
            found[name] = weighted_svd(weight, roots, layer.max_rank)
            coordinates[name] = Coordinates.of(roots)
        return self._held(found, {} if dense else pairs, coordinates.__getitem__)

    def _held(self, found: Mapping[str, Spectrum], pairs: Pairs, coordinates: Callable[[str], Coordinates]) -> Spectra:
        values = {name: spectrum.values for name, spectrum in found.items()}
        return Spectra.of(self.work.model, pairs, values, lambda name, _: found[name], coordinates)

    def teach(self, indices: tuple[int, ...]) -> Taught:
        """The dense model's outputs for these sequences, or those that were taken before its norms were trained."""
        if indices in self.taught:
            return self.taught[indices]
        with torch.no_grad(), swapped(self.work.model, self.dense), self._recorders(self.points) as recorders:
            logits = self.work.task.logits(self.work.model, self._batch(indices))
            return Taught(logits, *(recorder.take() for recorder in recorders))

    @contextmanager
    def _recorders(self, points: Sequence[str]) -> Iterator[tuple[Recorder, Recorder]]:
        with ExitStack() as stack:
            recorders = Recorder(self.work.model, points), Recorder(self.work.model, self.attention)
            for recorder in recorders:
                stack.callback(recorder.close)
            yield recorders

    def train(
        self, start: Pairs, how: Training, seed: int, steps: range, coordinates: Callable[[str], Coordinates]
    ) -> dict[str, Factors]:
        """Directly, at τ = 1: these of all steps."""
        work = self.work
        for step in steps if how.norms else ():  # before anything outside the layers is trained
            indices = self._indices(seed, step)
            self.taught[indices] = self.teach(indices)
        norms = [m for m in work.model.modules() if _is_norm(m)] if how.norms else []
        saved = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in norms]
        with blended(work.model, start, self.settings, seed, coordinates) as pairs:
            for pair in pairs.values():
                pair.tau = 1.0
            others = [p for norm in norms for p in norm.parameters(recurse=False)]
            others += [pair.bias for pair in pairs.values() if pair.bias is not None] if how.norms else []
            for parameter in others:
                parameter.requires_grad_(True)
            groups = {"A": [p.A for p in pairs.values()], "B": [p.B for p in pairs.values()], "": others}
            self._run(groups, self._fading(pairs, how), how, seed, steps)
            factors = {name: pair.replacement() for name, pair in pairs.items()}
        self.taught.clear()
        self.trained_norms = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in norms]
        for norm, state in zip(norms, saved, strict=True):
            norm.load_state_dict(state)
        return factors

    def _run(
        self, groups: Mapping[str, list[nn.Parameter]], fading: "Mapping[str, _Fading]", how: Training, seed: int,
        steps: range,
    ) -> None:  # fmt: skip
        model, task, whole = self.work.model, self.work.task, self.settings.steps
        optimizer, everything = _Optimizer(groups, how), [p for group in groups.values() for p in group]
        points = self.points[:-1] if how.skip_last else self.points
        average: list[Tensor] = []
        for step in steps:
            indices = self._indices(seed, step)
            taught, batch = self.teach(indices), self._batch(indices)
            late = how.late_task if 2 * step >= whole else 0.0
            loss = Loss(temperature=how.temperature, hidden=how.hidden, task=late)
            for layer in fading.values():
                layer.at(step / whole)
            with swapped(model, fading), self._recorders(points) as recorders:
                student = task.logits(model, batch)
                hidden, attention = (recorder.take() for recorder in recorders)
            total = distillation(student, taught.logits, hidden, taught.hidden[: len(points)], batch, task, loss).total
            if how.relations:
                total = total + how.relations * self._relations(attention, taught.attention)
            total.backward()
            torch.nn.utils.clip_grad_norm_([p for p in everything if p.grad is not None], 1.0)
            after_cut = step - steps.start + 1 if steps.start else math.inf
            optimizer.step(how.rate * self._rate(step, how) * min(1.0, after_cut / (how.warm_again + 1)))
            if how.average:
                decay = min(how.average, (step + 1) / (step + 10))
                average = [
                    p.detach().clone() if not average else a.lerp(p.detach(), 1 - decay)
                    for p, a in zip(everything, average or everything, strict=True)
                ]
        for parameter, value in zip(everything, average, strict=False):
            parameter.data = value

    def _rate(self, step: int, how: Training) -> float:
        steps, warm = self.settings.steps, self.settings.warmup * self.settings.steps
        if how.schedule == "linear" or step < warm:
            return self.settings.rate(step)
        return self.settings.learning_rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    def _relations(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean over layers, heads and tokens of the KL of the softmax of scaled products of the tokens' vectors."""
        config = self.work.source.config
        found = []
        for one, other in zip(student, teacher, strict=True):
            # GPT-2 has one layer for all three
            for parts in zip(one.split(config.hidden_size, -1), other.split(config.hidden_size, -1), strict=True):
                ours, theirs = (_relation(x, config.num_attention_heads).log_softmax(-1) for x in parts)
                found.append(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean())
        return torch.stack(found).mean()

    def _fading(self, pairs: Mapping[str, BlendedLinear], how: Training) -> "dict[str, _Fading]":
        if how.residual is None:
            return {}
        values = self.spectra().values
        damage = {name: float(values[name][len(pair.A) :].square().sum()) for name, pair in pairs.items()}
        order = sorted(damage, key=lambda name: damage[name])
        first, last = how.residual
        return {
            name: _Fading(pairs[name], self.dense[name], first + (last - first) * place / max(len(order) - 1, 1))
            for place, name in enumerate(order)
        }

    def candidate(self, how: Training, seed: int) -> dict[str, Factors]:
        """In one go, or through its rounds."""
        own, self.settings = self.settings, self.settings.model_copy(update=dict(how.recovery))
        try:
            return self._candidate(how, seed)
        finally:
            self.settings = own

    def _candidate(self, how: Training, seed: int) -> dict[str, Factors]:
        layers, spectra = self.work.layers, self.spectra()
        first = how.rounds[0].size * self.keep if how.rounds else self.keep
        for _ in range(how.own_statistics):
            spectra = self.again(self.cut(spectra, first), dense=True)
        if not how.rounds:
            as_it_is = how.ranks_by == 1.0 and not how.own_statistics
            start = self.start() if as_it_is else self.cut(spectra, self.keep, how.ranks_by)
            return self.train(start, how, seed, range(self.settings.steps), spectra.coordinates)

        def train(number: int, start: Pairs, steps: range, coordinates: Callable[[str], Coordinates]) -> Recovered:
            return Recovered(self.train(start, how, seed, steps, coordinates), {}, [])

        return through_rounds(
            self.settings.model_copy(update={"rounds": how.rounds}), self.keep, spectra,
            select=lambda share, values: allocate("budget", layers, values, share, Bounds.of(layers, 1, 1)),
            train=train, again=lambda number, pairs: self.again(pairs, sequences=how.sequences),
        ).recovered.factors  # fmt: skip

    def _batch(self, indices: Sequence[int]) -> Any:
        return self.work.training_examples(self.settings.length).batch(indices)

    def _indices(self, seed: int, step: int) -> tuple[int, ...]:
        size, count = self.settings.batch, len(self.work.training_examples(self.settings.length))
        epoch, position = divmod(step, count // size)
        order = torch.randperm(count, generator=generator(seed, "epoch", epoch))
        return tuple(order[position * size : (position + 1) * size].tolist())


class _Fading(nn.Module):
    """A low-rank layer beside what its start left of the dense weight, which fades."""

    def __init__(self, layer: BlendedLinear, dense: nn.Module, until: float) -> None:
        super().__init__()
        self.layer, self.until, self.share = layer, until, 0.0
        start = layer.replacement()
        self.left = read_weight(dense).detach() - start.B @ start.A

    def at(self, progress: float) -> None:
        """Set what is left at a share of the steps."""
        self.share = 0.7 * max(1 - progress / self.until, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        y = self.layer(x)
        return y + self.share * nn.functional.linear(x, self.left) if self.share else y


class _Optimizer:
    """AdamW; or, for the factors, Muon or Adam with one second moment a matrix.

    Muon is orthogonalised momentum by a Newton-Schulz iteration (Jordan et al. 2024).
    """

    def __init__(self, groups: Mapping[str, list[nn.Parameter]], how: Training) -> None:
        self.how = how
        own = how.muon or how.one_moment
        self.matrices = [*groups["A"], *groups["B"]] if own else []
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.squares, self.done = [0.0] * len(self.matrices), 0
        rest = {"": groups[""]} if own else groups
        chosen = [{"params": list(ps), "times": how.b_rate if key == "B" else 1.0} for key, ps in rest.items() if ps]
        self.adam = torch.optim.AdamW(chosen, lr=0.0, betas=(0.9, how.beta), weight_decay=0.0) if chosen else None

    def step(self, rate: float) -> None:
        """One step at a learning rate, and gradients away."""
        self.done += 1
        for number, (parameter, momentum) in enumerate(zip(self.matrices, self.momentum, strict=True)):
            assert parameter.grad is not None
            if self.how.muon:
                momentum.mul_(0.95).add_(parameter.grad)
                update = _orthogonal(parameter.grad.add(momentum, alpha=0.95))
                parameter.data.add_(update, alpha=-rate * max(1.0, len(parameter) / parameter.shape[1]) ** 0.5)
            else:
                beta, found = self.how.beta, parameter.grad.square().mean().item()
                momentum.lerp_(parameter.grad, 0.1)
                self.squares[number] = beta * self.squares[number] + (1 - beta) * found
                root = math.sqrt(self.squares[number] / (1 - beta**self.done))
                parameter.data.add_(momentum, alpha=-rate / (1 - 0.9**self.done) / (root + 1e-12))
            parameter.grad = None
        if self.adam is not None:
            for group in self.adam.param_groups:
                group["lr"] = rate * group["times"]
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)


def _orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def _relation(x: Tensor, heads: int) -> Tensor:
    """Products of the tokens' vectors `[B, T, D]` by head, scaled: `[B, H, T, T]`."""
    split = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith("norm")


def measure(
    name: str, keep: float, candidates: Mapping[str, Training], chosen: Sequence[str], seeds: Sequence[int]
) -> None:
    """Every chosen candidate with every seed that has no row yet."""
    rate, is_first = RATES[name][keep], keep == next(iter(RATES[name]))
    recipe = recipes.resolve(recipe_of(beds()[name], "rounds", keep, rate))[1]
    study = Study("candidates", name, recipe, options="" if is_first else f"--keep {keep:g}", keep=keep, rate=rate)
    for seed in seeds:
        todo = [key for key in chosen if not study.has(candidate=key, seed=seed)]
        if not todo:
            continue
        with study.opened(recipe, seed, "refit") as (work, scorer):
            lab = Lab(work, keep)
            scorer.score({})  # the dense outputs, before any norm is another
            for key in todo:
                began = time.perf_counter()
                pairs = lab.candidate(candidates[key], seed)
                seconds = time.perf_counter() - began
                norms = [m for m in work.model.modules() if _is_norm(m)]
                own = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in norms]
                for norm, state in zip(norms, lab.trained_norms, strict=False):
                    norm.load_state_dict(state)
                score = scorer.score(modules(pairs))
                for norm, state in zip(norms, own, strict=True):
                    norm.load_state_dict(state)
                study.add(work, candidate=key, seed=seed, seconds=seconds, **vars(score))


if __name__ == "__main__":
    command = arguments(__doc__, list(RATES))
    command.add_argument("names", nargs="*", help="candidates; default: all")
    command.add_argument("--keep", type=float, help="one of the bed's sizes; default: the first")
    command.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds; default: all")
    given = command.parse_intermixed_args()
    size = given.keep or next(iter(RATES[given.bed]))
    if size not in RATES[given.bed]:
        command.error(f"{given.bed} is tried at {', '.join(map(str, RATES[given.bed]))}, not at {size:g}")
    ideas = FAR if (given.bed, size) == ("demo", 0.2) else CANDIDATES
    if unknown := [name for name in given.names if name not in ideas]:
        command.error(f"there is no candidate {unknown[0]!r}; there are: {', '.join(ideas)}")
    measure(given.bed, size, ideas, given.names or list(ideas), SEEDS[: given.seeds])
