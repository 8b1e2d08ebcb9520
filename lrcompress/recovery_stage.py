"""The stage of LoRA-LRD's training, in one go or in rounds."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.artifacts import (
    RankPlan,
    Spectrum,
    read_factors,
    read_json,
    read_spectrum,
    read_values,
    write_factors,
    write_json,
    write_tensors,
)
from lrcompress.evaluate.scorer import Scorer
from lrcompress.lowrank import low_rank_module, swapped
from lrcompress.ranks import Budget, Frontier
from lrcompress.recovery import Recovered, modules_with, recover
from lrcompress.recovery.rounds import Learned, Result, Spectra, product, through_rounds
from lrcompress.recovery.settings import Recovery
from lrcompress.recovery.state import clear_states
from lrcompress.recovery.whitening import Coordinates
from lrcompress.refit import Checked, better, distance
from lrcompress.seeds import generator
from lrcompress.stages import (
    batches_of,
    collected,
    coordinates_in,
    decompose,
    method_coordinates,
    statistics_in,
    stored,
    unpivoted,
)
from lrcompress.workspace import RowSpec, Workspace

FAR_SEQUENCES = 64
"""Held-out sequences that say whether a closed form is far from the dense model."""


def recovery(work: Workspace, folder: Path) -> list[str]:
    """LoRA-LRD: train the factors of each learned row; the training state stays in the partial folder until the end."""
    settings = work.recipe.recovery
    assert settings is not None
    examples = work.training_examples(settings.length)
    rows = [row for row in work.rows if row.name == "lora_lrd"]
    for row in rows:
        if not (folder / f"{row.key}.safetensors").exists():
            _recover(work, folder, row, settings)
    epochs = settings.steps * settings.batch / len(examples)
    notes = [f"{settings.steps} steps of {settings.batch} sequences, {epochs:.2f} passes over {len(examples)}"]
    for row in rows:
        found = read_json(folder / f"check-{row.ranks}.json")["notes"]
        notes += [note if row.ranks == "plan" else f"{row.ranks}: {note}" for note in found]
    for place in folder.glob("round-*"):
        shutil.rmtree(place)
    return [*notes, *unpivoted(work, rows, folder)]


def _rounds(work: Workspace, row: RowSpec, settings: Recovery, start: Learned) -> tuple[int, str]:
    """How many sizes are trained, and a note that says why; 1 is a training in one go."""
    if not settings.rounds:
        return 1, ""
    if work.start_of(row.ranks).name == "refit":
        return 1, "no rounds: the training starts from the refit"
    spans = settings.spans(work.share_of(row.ranks))
    if len(spans) == 1:
        return 1, "no rounds: they would keep everything, or have no step"
    examples = work.training_examples(settings.length)
    indices = work.spare_indices(examples, FAR_SEQUENCES) or work.calibration_indices(examples, FAR_SEQUENCES)
    far = distance(Scorer(work.model, batches_of(work, examples, indices, settings.batch), work.task), start)
    if far <= settings.rounds_above:
        return 1, f"no rounds: KL of the closed form to dense is {far:.4f}, not above {settings.rounds_above:g}"
    shares = ", ".join(f"{len(steps)} steps at a share of {share:g}" for share, steps in spans)
    return len(spans), f"rounds, since the KL of the closed form to dense is {far:.4f}: {shares}"


def _recover(work: Workspace, folder: Path, row: RowSpec, settings: Recovery) -> None:
    start = work.pairs(work.start_of(row.ranks))
    decided = folder / f"rounds-{row.ranks}.json"  # once: a resumed run goes the way it began
    if not decided.exists():
        write_json(decided, _rounds(work, row, settings, start))
    count, why = read_json(decided)
    seconds = 0.0
    if count > 1:
        rounds = _Rounds(work, folder, row, settings)
        result, seconds = rounds.run(), rounds.seconds()
    else:
        recovered = _train(work, folder, _title(row), settings, start, range(settings.steps), method_coordinates(work))
        result = Result(recovered, work.plan(row.ranks))
    checked = _checked(work, row, result.recovered, settings)
    others = result.recovered.others if checked.kept else {}
    plan = result.plan if checked.kept else work.plan(row.ranks)
    write_json(
        folder / f"check-{row.ranks}.json",
        {
            "kept": checked.kept,
            "notes": [note for note in (why, checked.note) if note],
            "rounds": count,
            "seconds": seconds,
        },
    )
    write_json(folder / f"ranks-{row.ranks}.json", asdict(plan))
    write_tensors(folder / f"others-{row.ranks}.safetensors", _cast(others, work.source.dtype))
    write_json(folder / f"curve-{row.ranks}.json", result.recovered.curve)
    clear_states(folder)  # before the factors, whose file says that the row is done
    kept = stored(work, checked.factors, work.numbers(plan), method_coordinates(work))
    write_factors(folder / f"{row.key}.safetensors", kept)


def _title(row: RowSpec) -> str:
    return "recovery" if row.ranks == "plan" else f"recovery, {row.ranks}"


def _train(
    work: Workspace,
    state: Path,
    title: str,
    settings: Recovery,
    start: Learned,
    steps: range,
    coordinates: Callable[[str], Coordinates],
) -> Recovered:
    with work.display.training_bar(title, len(steps)) as progress:
        return recover(
            work.model, work.layers, start, work.training_examples(settings.length), settings, work.task,
            seed=work.seed, coordinates=coordinates, steps=steps, state=state, progress=progress,
        )  # fmt: skip


class _Rounds:
    """The rounds of one row: each leaves its factors, then statistics and spectra of the model that has them."""

    def __init__(self, work: Workspace, folder: Path, row: RowSpec, settings: Recovery) -> None:
        self.work, self.folder, self.row, self.settings = work, folder, row, settings
        self.keep = work.share_of(row.ranks)

    def run(self) -> Result:
        """All of them; those that a killed run has finished are read."""
        work = self.work
        spectra = self._spectra(work.stage("spectra") / work.recipe.method.kind, {})
        return through_rounds(
            self.settings, self.keep, spectra, select=self._select, train=self._train, again=self._again
        )

    def _select(self, share: float, values: Mapping[str, Tensor]) -> RankPlan:
        selector = self.work.recipe.ranks
        assert isinstance(selector, Budget | Frontier)  # the recipe allows no other
        return selector.at(share, self.work.layers, values)

    def _place(self, number: int) -> Path:
        return self.folder / f"round-{self.row.ranks}-{number}"

    def _train(self, number: int, start: Learned, steps: range, coordinates: Callable[[str], Coordinates]) -> Recovered:
        if number == len(self.settings.spans(self.keep)) - 1:
            return _train(self.work, self.folder, _title(self.row), self.settings, start, steps, coordinates)
        place = self._place(number)
        file = place / "factors.safetensors"
        if not file.exists():
            place.mkdir(exist_ok=True)
            title = f"{_title(self.row)}, round {number + 1}"
            found = _train(self.work, place, title, self.settings, start, steps, coordinates)
            write_json(place / "curve.json", found.curve)
            write_factors(file, found.factors)
            clear_states(place)
        factors = {name: pair.factors() for name, pair in read_factors(file).items()}
        return Recovered(factors, {}, read_json(place / "curve.json"))

    def _again(self, number: int, pairs: Learned) -> Spectra:
        work, method, began = self.work, self.work.recipe.method, time.perf_counter()
        sums, place = self._place(number) / "statistics", self._place(number) / "spectra"
        done = self._place(number) / "seconds.json"
        if not done.exists():
            sums.mkdir(exist_ok=True)
            place.mkdir(exist_ok=True)
            with swapped(work.model, self._modules(pairs)):
                title, share = f"round {number + 1}, statistics", self.settings.rounds_calibration
                for note in collected(work, sums, method.needs, title, share):
                    work.display.detail(f"  {note}")
            with work.display.bar(f"round {number + 1}, spectra", len(work.layers)) as advance:
                for name, layer in work.layers.items():
                    file = place / f"{name}.safetensors"
                    if not file.exists():
                        weight = product(work.model.get_submodule(name), pairs.get(name)).to(work.device)
                        found = statistics_in(sums / f"{name}.safetensors", work.device)
                        decompose(file, method, weight, found, layer)
                    advance()
            write_json(done, time.perf_counter() - began)
        shutil.rmtree(sums, ignore_errors=True)  # as large as all that the stage of that name holds
        return self._spectra(place, pairs)

    def _modules(self, pairs: Learned) -> dict[str, nn.Module]:
        device = self.work.device
        return {name: low_rank_module(pair, device=device, dtype=torch.float32) for name, pair in pairs.items()}

    def seconds(self) -> float:
        """That statistics and spectra between the rounds took, of the last part of a killed run."""
        return sum(read_json(file) for file in self.folder.glob(f"round-{self.row.ranks}-*/seconds.json"))

    def _spectra(self, place: Path, pairs: Learned) -> Spectra:
        def read(name: str, rank: int) -> Spectrum:
            return read_spectrum(place / f"{name}.safetensors", rank, self.work.device)

        values = {name: read_values(place / f"{name}.safetensors") for name in self.work.layers}
        return Spectra.of(self.work.model, pairs, values, read, coordinates_in(place))


def _checked(work: Workspace, row: RowSpec, result: Recovered, settings: Recovery) -> Checked:
    """What was learned, or the untrained factors where those are nearer to the dense model on validation data."""
    if not work.checks_training:
        return Checked(result.factors, None, "")
    examples = work.validation_examples(settings.length)
    order = torch.randperm(len(examples), generator=generator(work.seed, "recovery check"))
    batches = batches_of(work, examples, order[: settings.check].tolist(), settings.batch)
    others = modules_with(work.model, result.others)
    untrained = work.pairs(work.untrained(row.ranks))
    return better(work.model, untrained, result.factors, batches, work.task, what="training", others=others)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
