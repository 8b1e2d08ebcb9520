"""The run around a rank selector: scores plans on validation data, teaches layers, and remembers both."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from lrcompress.artifacts import (
    Factors,
    Layer,
    RankPlan,
    Score,
    Spectrum,
    StoredFactors,
    read_json,
    write_factors,
    write_json,
)
from lrcompress.evaluate.scorer import Scorer
from lrcompress.layers import bias_of, read_weight
from lrcompress.linalg import truncate
from lrcompress.lowrank import LowRankLinear, in_place_of
from lrcompress.progress import Advance, Display
from lrcompress.ranks.context import AbstractContext, LearningRun
from lrcompress.recovery import modules_with, recover
from lrcompress.recovery.loop import TrainingData
from lrcompress.recovery.settings import Recovery
from lrcompress.recovery.state import clear_states
from lrcompress.recovery.whitening import Coordinates
from lrcompress.tasks import AbstractTask, Batch


@dataclass(frozen=True)
class Subject:
    """The dense model that ranks are chosen for, and what is known of it."""

    load: Callable[[], nn.Module]
    """gives the model, which is not needed by every selector"""
    layers: Mapping[str, Layer]
    task: AbstractTask
    spectrum: Callable[[str, int], Spectrum]
    """(layer, rank) → the method's spectrum of a layer, cut at a rank"""
    coordinates: Callable[[str], Coordinates]
    """those that a layer is trained in"""
    training: Callable[[int], TrainingData]
    """(tokens a sequence) → the training data"""
    validation: Callable[[], Sequence[Batch]]
    """the batches that plans are scored on; raises a DataError where there are none"""
    recovery: Recovery | None
    seed: int


@final
class Bench(AbstractContext):
    """A selector's context over a subject; scores are remembered in `memory`, learned pairs in `pairs`."""

    def __init__(self, subject: Subject, memory: "Memory", pairs: "Pairs", display: Display) -> None:
        self.subject, self.memory, self.pairs, self.display = subject, memory, pairs, display
        self.notes: list[str] = []
        self.records: dict[str, Any] = {}
        self._bars: dict[str, tuple[AbstractContextManager[Advance], Advance, int]] = {}

    @property
    def seed(self) -> int:
        """The run's."""
        return self.subject.seed

    @cached_property
    def model(self) -> nn.Module:
        """The subject's."""
        return self.subject.load()

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, self.subject.validation(), self.subject.task)

    def dense_score(self) -> Score:
        """The dense model."""
        return self.memory.score("dense", lambda: self._scorer.score({}))

    def score(self, plan: RankPlan, *, steps: int = 0) -> Score:
        """The factors as the spectra give them; with `steps` after a recovery of that length."""
        return self.memory.score(_key(dict(sorted(plan.ranks.items())), steps), lambda: self._measure(plan, steps))

    def _measure(self, plan: RankPlan, steps: int) -> Score:
        subject = self.subject
        if not steps:
            return self._scorer.score({name: self._module(name, rank) for name, rank in plan.ranks.items()})
        assert subject.recovery is not None  # the recipe was checked for it
        settings = subject.recovery.model_copy(update={"steps": steps})
        start = self._start(plan.ranks)
        result = recover(
            self.model, subject.layers, start, subject.training(settings.length), settings, subject.task,
            seed=subject.seed, coordinates=subject.coordinates,
        )  # fmt: skip
        layers = {name: in_place_of(self.model.get_submodule(name), pair) for name, pair in result.factors.items()}
        return self._scorer.score({**layers, **modules_with(self.model, result.others)})

    def _module(self, name: str, rank: int) -> LowRankLinear:
        spectrum, dense = self.subject.spectrum(name, rank), self.model.get_submodule(name)
        left = spectrum.out_basis * spectrum.values[:rank].to(spectrum.out_basis)
        return in_place_of(dense, Factors(spectrum.in_basis, left, bias_of(dense)))

    def _start(self, ranks: Mapping[str, int]) -> dict[str, Factors]:
        found = {}
        for name, rank in ranks.items():
            spectrum = self.subject.spectrum(name, rank)
            held = min(rank, len(spectrum.in_basis))  # spectra end at the last rank that makes a layer smaller
            found[name] = truncate(spectrum, held, bias_of(self.model.get_submodule(name)))
        return found

    def learned(self, run: LearningRun) -> Mapping[str, Factors]:
        """The pairs of a run, learned now unless they are remembered."""
        return self.pairs.of(run, self.teach)

    def teach(self, run: LearningRun, state: Path | None) -> dict[str, Factors]:
        """Run LoRA-LRD once; with `state` it goes on at the last save there."""
        subject, settings = self.subject, run.settings.recovery()
        start = self._start(run.ranks) if settings.start == "method" else self._shapes(run.ranks)
        with self.display.training_bar(f"learning, seed {run.seed}", settings.steps) as progress:
            result = recover(
                self.model, subject.layers, start, subject.training(settings.length), settings, subject.task,
                seed=run.seed, state=state, progress=progress,
            )  # fmt: skip
        return {name: Factors(pair.A.cpu(), pair.B.cpu(), None) for name, pair in result.factors.items()}

    def _shapes(self, ranks: Mapping[str, int]) -> dict[str, Factors]:
        """What LoRA's own start needs of a start: its shapes."""
        layers = self.subject.layers
        return {
            name: Factors(
                torch.empty(rank, layers[name].in_features, device="meta"),
                torch.empty(layers[name].out_features, rank, device="meta"),
                None,
            )
            for name, rank in ranks.items()
        }

    def weight(self, name: str) -> Tensor:
        """On the CPU, where the learned pairs are."""
        return read_weight(self.model.get_submodule(name)).detach().cpu()

    def note(self, text: str) -> None:
        """Kept for the report."""
        self.notes.append(text)

    def record(self, key: str, value: Any) -> None:
        """Kept for the report."""
        self.records[key] = value

    def progress(self, what: str, done: int, total: int, figures: str = "") -> None:
        """A bar for each thing that is counted."""
        if what not in self._bars:
            bar = self.display.bar(what, total)
            self._bars[what] = (bar, bar.__enter__(), 0)
        bar, advance, before = self._bars[what]
        advance(done - before, figures=figures)
        self._bars[what] = (bar, advance, done)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bars away; only one can be shown at a time."""
        for bar, _, _ in self._bars.values():
            bar.__exit__(None, None, None)
        self._bars.clear()


@dataclass
class Memory:
    """Scores by key; with a file they outlive the process: an interrupted search repeats none."""

    file: Path | None = None
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self.scores = read_json(self.file)

    def score(self, key: str, compute: Callable[[], Score]) -> Score:
        """The remembered score, or a new one that is remembered."""
        if key not in self.scores:
            self.scores[key] = asdict(compute())
            if self.file is not None:
                write_json(self.file, self.scores)
        return Score(**self.scores[key])


@dataclass
class Pairs:
    """Learned pairs by run; with a folder one file a run."""

    folder: Path | None = None
    held: dict[str, Mapping[str, Factors]] = field(default_factory=dict)

    def of(
        self, run: LearningRun, teach: Callable[[LearningRun, Path | None], dict[str, Factors]]
    ) -> Mapping[str, Factors]:
        """The pairs of a run, which is done if it has not been."""
        key = run_key(run)
        if self.folder is None:
            if key not in self.held:
                self.held[key] = teach(run, None)
            return self.held[key]
        file = self.folder / f"{key}.safetensors"
        if not file.exists():
            pairs = teach(run, self.folder)
            clear_states(self.folder)  # first: the next run must not go on at a state of this one
            write_factors(file, pairs)
        return StoredFactors(file)


def run_key(run: LearningRun) -> str:
    """Equal for equal runs."""
    return _key(dict(sorted(run.ranks.items())), run.settings.model_dump(mode="json"), run.seed)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
