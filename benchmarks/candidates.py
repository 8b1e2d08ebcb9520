"""Ideas that were tried and are not in the tool: `python benchmarks/candidates.py BED [NAME...]`.

Each is measured on validation data beside what the tool does, from the same start and with the same steps. Writes
results/candidates_BED.json as it goes on; what is there is not measured again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.beds import HERE, commit, without_places
from benchmarks.experiments import beds, recipe_of
from lrcompress import build, pipeline
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors, Spectrum, read_spectrum
from lrcompress.calibrate import collect
from lrcompress.evaluate.scorer import Scorer
from lrcompress.layers import block_names, read_weight
from lrcompress.linalg import truncate, weighted_svd
from lrcompress.lowrank import LowRankLinear, swapped
from lrcompress.methods import Kron
from lrcompress.progress import Display
from lrcompress.ranks.allocate import allocate
from lrcompress.ranks.bounds import Bounds
from lrcompress.recovery.distill import Recorder, distillation
from lrcompress.recovery.settings import Loss
from lrcompress.seeds import generator
from lrcompress.selection import bias_of
from lrcompress.workspace import Workspace

KEEPS = {"demo": 0.4, "minilm-sst2": 0.15}
RATES = {"demo": 3e-3, "minilm-sst2": 3e-5}
SEEDS = (0, 1, 2)
Pairs = Mapping[str, Factors]


@dataclass(frozen=True)
class Training:
    """How the factors are trained; the defaults are the tool's."""

    rate: float = 1.0
    """times the bed's learning rate"""
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
    skip_last: bool = False
    """no hidden-state error after the last block, whose effect the logits hold"""
    late_task: float = 0.0
    """weight of the task loss in the second half of the steps"""
    residual: tuple[float, float] | None = None
    """the layer is BA x + s (W − B₀A₀) x with s falling from 0.7 to 0, in the layer of the least estimated damage by
    the first share of the steps, in that of the most by the second"""
    rounds: tuple[tuple[float, float], ...] = ()
    """(keep, share of the steps) of each round before the last: cut, train, take statistics again, allocate again"""


CANDIDATES: dict[str, Training] = {
    "the tool": Training(),
    "hidden states × 1": Training(hidden=1.0),
    "hidden states × 30": Training(hidden=30.0),
    "temperature 2": Training(temperature=2.0),
    "hidden states but for the last block": Training(skip_last=True),
    "LoRA+, B × 4": Training(b_rate=4.0),
    "LoRA+, B × 16": Training(b_rate=16.0),
    "average of the weights": Training(average=0.98),
    "average, twice the rate": Training(average=0.98, rate=2.0),
    "biases and norms": Training(norms=True),
    "Muon": Training(muon=True),
    "Muon, a third of the rate": Training(muon=True, rate=1 / 3),
    "Muon, three times the rate": Training(muon=True, rate=3.0),
    "task loss × 0.3 in the second half": Training(late_task=0.3),
    "the residual W − BA fades": Training(residual=(0.6, 0.6)),
    "the residual fades, later where the damage is larger": Training(residual=(0.3, 0.8)),
    "two rounds, 1.5 × the size for a third": Training(rounds=((1.5, 1 / 3),)),
    "three rounds, 2 ×, 1.5 ×": Training(rounds=((2.0, 0.25), (1.5, 0.25))),
}


@dataclass
class Lab:
    """A bed with one seed's statistics and spectra."""

    work: Workspace
    keep: float
    steps: int
    rate: float
    dense: dict[str, nn.Module] = field(default_factory=dict)
    taught: dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense = {name: self.work.model.get_submodule(name) for name in self.work.layers}
        self.points = block_names(self.work.layers.values())

    def spectra(self) -> dict[str, Spectrum]:
        """Kron's, from the run folder."""
        place = self.work.stage("spectra") / "kron"
        return {name: read_spectrum(place / f"{name}.safetensors") for name in self.dense}

    def cut(self, spectra: Mapping[str, Spectrum], keep: float, former: Pairs) -> dict[str, Factors]:
        """Factors at one global budget."""
        layers = self.work.layers
        values = {name: spectrum.values for name, spectrum in spectra.items()}
        ranks = allocate("budget", layers, values, keep, Bounds.of(layers, 1, 1)).ranks
        return {
            name: truncate(spectra[name], rank, former[name].bias if name in former else bias_of(self.dense[name]))
            for name, rank in ranks.items()
        }

    def again(self, pairs: Pairs) -> dict[str, Spectrum]:
        """Spectra of the compressed model: its own products, with statistics taken on it."""
        work, settings = self.work, self.work.recipe.calibration
        examples = work.training_examples(settings.length)
        indices = work.calibration_indices(examples)
        batches = (examples.batch(indices[i : i + settings.batch]) for i in range(0, len(indices), settings.batch))
        with swapped(work.model, modules(pairs)):
            statistics, _ = collect(work.model, work.layers, batches, Kron.needs, work.task, seed=work.seed)
        found = {}
        for name, layer in work.layers.items():
            pair = pairs.get(name)
            weight = read_weight(self.dense[name]).detach() if pair is None else pair.B.double() @ pair.A.double()
            found[name] = weighted_svd(weight, Kron().roots(statistics[name]), layer.max_rank)
        return found

    def teach(self, indices: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """The dense model's logits and hidden states of these sequences; held, since every candidate asks for them."""
        if indices not in self.taught:
            recorder = Recorder(self.work.model, self.points)
            try:
                with torch.no_grad(), swapped(self.work.model, self.dense):
                    logits = self.work.task.logits(self.work.model, self._batch(indices))
            finally:
                recorder.close()
            self.taught[indices] = logits, recorder.take()
        return self.taught[indices]

    def train(self, start: Pairs, how: Training, seed: int, steps: int) -> dict[str, Factors]:
        """Directly, at τ = 1."""
        model, task = self.work.model, self.work.task
        for step in range(steps):  # before anything outside the layers is trained
            self.teach(self._indices(seed, step))
        layers = {name: LowRankLinear.of(pair, device="cpu", dtype=torch.float32) for name, pair in start.items()}
        model.requires_grad_(False)
        norms = [m for m in model.modules() if type(m).__name__.lower().endswith("norm")] if how.norms else []
        saved = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in norms]
        others = [p for norm in norms for p in norm.parameters(recurse=False)]
        others += [layer.bias for layer in layers.values() if layer.bias is not None] if how.norms else []
        groups = {"A": [m.A.weight for m in layers.values()], "B": [m.B.weight for m in layers.values()], "": others}
        for layer in layers.values():
            layer.requires_grad_(False)
        for parameter in (p for group in groups.values() for p in group):
            parameter.requires_grad_(True)
        optimizer = _Optimizer(groups, how)
        fading = self._fading(layers, how)
        points = self.points[:-1] if how.skip_last else self.points
        average: list[Tensor] = []
        everything = [p for group in groups.values() for p in group]
        for step in range(steps):
            indices = self._indices(seed, step)
            logits, hidden = self.teach(indices)
            late = how.late_task if 2 * step >= steps else 0.0
            loss = Loss(temperature=how.temperature, hidden=how.hidden, task=late)
            for layer in fading.values():
                layer.at(step / steps)
            batch = self._batch(indices)
            recorder = Recorder(model, points)
            try:
                with swapped(model, fading or layers):
                    student = task.logits(model, batch)
                losses = distillation(student, logits, recorder.take(), hidden[: len(points)], batch, task, loss)
                losses.total.backward()
            finally:
                recorder.close()
            torch.nn.utils.clip_grad_norm_([p for p in everything if p.grad is not None], 1.0)
            optimizer.step(self.rate * how.rate * _schedule(step, steps))
            if how.average:
                decay = min(how.average, (step + 1) / (step + 10))
                average = [
                    p.detach().clone() if not average else a.lerp(p.detach(), 1 - decay)
                    for p, a in zip(everything, average or everything, strict=True)
                ]
        if average:
            for parameter, value in zip(everything, average, strict=True):
                parameter.data = value
        self.trained_norms = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in norms]
        for norm, state in zip(norms, saved, strict=True):
            norm.load_state_dict(state)
        return {name: _detached(layer.pair()) for name, layer in layers.items()}

    def _fading(self, layers: Mapping[str, LowRankLinear], how: Training) -> dict[str, "_Fading"]:
        if how.residual is None:
            return {}
        damage = {name: float(spectrum.values[layers[name].rank :].square().sum())
                  for name, spectrum in self.spectra().items() if name in layers}  # fmt: skip
        order = sorted(damage, key=lambda name: damage[name])
        first, last = how.residual
        return {
            name: _Fading(layers[name], self.dense[name], first + (last - first) * place / max(len(order) - 1, 1))
            for place, name in enumerate(order)
        }

    def candidate(self, how: Training, seed: int) -> dict[str, Factors]:
        """All rounds."""
        pairs: dict[str, Factors] = {}
        spectra, left = self.spectra(), self.steps
        for number, (times, share) in enumerate(how.rounds):
            steps = round(share * self.steps)
            pairs = self.train(self.cut(spectra, min(times * self.keep, 0.95), pairs), how, seed + 100 * number, steps)
            spectra, left = self.again(pairs), left - steps
        return self.train(self.cut(spectra, self.keep, pairs), how, seed + 100 * len(how.rounds), left)

    def _batch(self, indices: Sequence[int]) -> Any:
        assert self.work.recipe.recovery is not None
        return self.work.training_examples(self.work.recipe.recovery.length).batch(indices)

    def _indices(self, seed: int, step: int) -> tuple[int, ...]:
        settings = self.work.recipe.recovery
        assert settings is not None
        count = len(self.work.training_examples(settings.length))
        epoch, position = divmod(step, count // settings.batch)
        order = torch.randperm(count, generator=generator(seed, "epoch", epoch))
        return tuple(order[position * settings.batch : (position + 1) * settings.batch].tolist())


class _Fading(nn.Module):
    """A low-rank layer beside what its start left of the dense weight, which fades."""

    def __init__(self, layer: LowRankLinear, dense: nn.Module, until: float) -> None:
        super().__init__()
        self.layer, self.until, self.share = layer, until, 0.0
        self.left = read_weight(dense).detach() - layer.weight.detach()

    def at(self, progress: float) -> None:
        """Set what is left at a share of the steps."""
        self.share = 0.7 * max(1 - progress / self.until, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        y = self.layer(x)
        return y + self.share * nn.functional.linear(x, self.left) if self.share else y


class _Optimizer:
    """AdamW, or Muon for the factors (orthogonalised momentum by a Newton-Schulz iteration; Jordan et al. 2024)."""

    def __init__(self, groups: Mapping[str, list[nn.Parameter]], how: Training) -> None:
        self.how = how
        self.matrices = [*groups["A"], *groups["B"]] if how.muon else []
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        rest = {"": groups[""]} if how.muon else groups
        chosen = [{"params": list(ps), "times": how.b_rate if key == "B" else 1.0} for key, ps in rest.items() if ps]
        self.adam = torch.optim.AdamW(chosen, lr=0.0, weight_decay=0.0) if chosen else None

    def step(self, rate: float) -> None:
        """One step at a learning rate, and gradients away."""
        for parameter, momentum in zip(self.matrices, self.momentum, strict=True):
            assert parameter.grad is not None
            momentum.mul_(0.95).add_(parameter.grad)
            update = _orthogonal(parameter.grad.add(momentum, alpha=0.95))
            parameter.data.add_(update, alpha=-rate * max(1.0, len(parameter) / parameter.shape[1]) ** 0.5)
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


def _schedule(step: int, steps: int) -> float:
    warm = 0.06 * steps
    return (step + 1) / (warm + 1) if step < warm else (steps - step) / (steps - warm)


def _detached(pair: Factors) -> Factors:
    return Factors(pair.A.detach(), pair.B.detach(), None if pair.bias is None else pair.bias.detach())


def modules(pairs: Pairs) -> dict[str, nn.Module]:
    """Layers of these factors."""
    return {name: LowRankLinear.of(pair, device="cpu", dtype=torch.float32) for name, pair in pairs.items()}


def measure(name: str, chosen: Sequence[str], file: Path, write: Callable[[Any], None]) -> None:
    """Every candidate with every seed that has no row yet."""
    bed = beds()[name]
    value: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    done = {(row["candidate"], row["seed"]) for row in value["rows"]}
    for seed in SEEDS:
        recipe = recipes.resolve(recipe_of(bed, "kron", KEEPS[name], RATES[name]))[1]
        with tempfile.TemporaryDirectory() as folder:
            work = pipeline.open_workspace(bed.model_path(), recipe, folder, seed=seed, display=Display(quiet=True))
            todo = [key for key in chosen if (key, seed) not in done]
            if not todo:
                continue
            pipeline.execute(work, until="spectra")
            settings = work.recipe.recovery
            assert settings is not None
            lab = Lab(work, KEEPS[name], settings.steps, settings.learning_rate)
            held = list(work.scoring_examples().batches(work.recipe.evaluation.batch))
            scorer = Scorer(work.model, held, work.task)
            scorer.score({})
            for key in todo:
                began = time.perf_counter()
                pairs = lab.candidate(CANDIDATES[key], seed)
                seconds = time.perf_counter() - began
                norms = [m for m in work.model.modules() if type(m).__name__.lower().endswith("norm")]
                own = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in norms]
                for norm, state in zip(norms, lab.trained_norms, strict=False):
                    norm.load_state_dict(state)
                score = scorer.score(modules(pairs))
                for norm, state in zip(norms, own, strict=True):
                    norm.load_state_dict(state)
                row = {"candidate": key, "seed": seed, "seconds": seconds, "kl": score.kl, "loss": score.loss,
                       "accuracy": score.accuracy, "commit": commit()}  # fmt: skip
                value |= {
                    "command": f"python benchmarks/candidates.py {name}", "bed": name, "keep": KEEPS[name],
                    "rate": RATES[name], "environment": build.environment(work).model_dump(),
                    "recipe": work.recipe.model_dump(mode="json"),
                }  # fmt: skip
                value["rows"].append(row)
                write(value)
                print(name, key, seed, f"KL {score.kl:.4f}, {seconds:.0f} s" if score.kl else score, flush=True)


def main() -> None:
    """Measure one bed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bed", choices=list(KEEPS))
    parser.add_argument("names", nargs="*", help="candidates; default: all")
    arguments = parser.parse_args()
    file = HERE / "results" / f"candidates_{arguments.bed}.json"

    def write(value: Any) -> None:
        file.write_text(without_places(json.dumps(value, indent=1)) + "\n")

    measure(arguments.bed, arguments.names or list(CANDIDATES), file, write)


if __name__ == "__main__":
    main()
