"""What each stage of a run does. A stage reads what earlier ones left on disk and writes into its own folder.

Each function gets the workspace and the stage's folder (still under its partial name, with whatever a killed
run left there) and returns notes for the reader of the report.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress import __version__
from lrcompress.artifacts import (
    Factors,
    Layer,
    LayerStatistics,
    Pivoted,
    optional_tensors,
    read_json,
    read_layouts,
    read_spectrum,
    read_tensors,
    write_factors,
    write_json,
    write_spectrum,
    write_tensors,
)
from lrcompress.calibrate import collect, mean_of, passes, siblings
from lrcompress.data import Examples
from lrcompress.errors import ModelError, NumericalError
from lrcompress.evaluate import harness
from lrcompress.evaluate.run import measure_rows
from lrcompress.experts import Experts, fuse, regrouped
from lrcompress.hf import write_model
from lrcompress.latency import write_timings
from lrcompress.layers import bias_of, find_layers, read_weight
from lrcompress.linalg import Roots, truncate, weighted_svd
from lrcompress.lowrank import put_factors, swapped
from lrcompress.methods import Method, Statistic
from lrcompress.pivoting import laid_out
from lrcompress.recovery import before_replacement
from lrcompress.recovery.whitening import Coordinates
from lrcompress.refit import better
from lrcompress.refit import refit as refit_layers
from lrcompress.source import load_model
from lrcompress.tasks import Batch, to_device
from lrcompress.timing import TimingSpec, peak_bytes, time_rows
from lrcompress.verify import check_in_fresh_process
from lrcompress.workspace import RowSpec, Workspace

BEFORE = "before replacement"
"""The pseudo-row of the blended model, where the schedule of τ does not end at 1."""

MEASUREMENTS, TASK_SCORES = "measurements.json", "tasks.json"
"""Files of the evaluation: by row, what was measured on sequences, and by tasks of lm-eval."""

VERIFY_TOLERANCE = 1e-4

COORDINATES = ".coordinates.safetensors"
"""The end of the file beside a spectrum that holds the coordinates of the training."""

REFIT_BATCHES = 8
"""Forward passes of the refit that take turns, each with two threads."""


def layers(work: Workspace, folder: Path) -> list[str]:
    """Find the target layers on the meta device."""
    found = find_layers(work.skeleton, work.recipe.targets)
    write_json(folder / "layers.json", [asdict(layer) for layer in found.values()])
    return []


def needed_statistics(methods: Mapping[str, Method]) -> frozenset[Statistic]:
    """What the methods of a recipe ask for together."""
    return frozenset().union(*(method.needs for method in methods.values()))


def statistics(work: Workspace, folder: Path) -> list[str]:
    """Sum the moments over the calibration set, as many layers a pass as memory takes; one file a layer."""
    needs = needed_statistics(work.recipe.methods)
    return collected(work, folder, needs, "statistics") if needs else ["no method asks for any"]


def collected(work: Workspace, folder: Path, needs: frozenset[Statistic], what: str, share: float = 1.0) -> list[str]:
    """Sum the moments of the model as it stands; a file that is there already is left.

    `what`: for the bar. `share`: of the calibration sequences.
    """
    settings = work.recipe.calibration
    examples = work.training_examples(settings.length)
    indices = work.calibration_indices(examples, share=share)
    notes = [f"{len(indices)} sequences of {work.splits['train'].origin}, {len(examples)} there"]
    if len(examples) < settings.sequences:
        notes.append(f"fewer than the {settings.sequences} asked for")
    duplicates = work.splits["train"].without_duplicates().duplicates
    if duplicates:
        notes.append(f"{duplicates} duplicated texts dropped")
    groups = passes(work.layers, needs)
    for number, group in enumerate(groups):
        names = [name for name in group if not (folder / f"{name}.safetensors").exists()]
        if not names:
            continue
        with work.display.bar(f"{what} {number + 1}/{len(groups)}", len(indices)) as advance:
            batches = (to_device(one, work.device) for one in examples.batches(settings.batch, among=indices))
            chosen = {name: work.layers[name] for name in names}
            found, dropped = collect(work.model, chosen, batches, needs, work.task, seed=work.seed, advance=advance)
        for name, value in found.items():
            write_tensors(folder / f"{name}.safetensors", optional_tensors(value))
        if dropped:
            notes.append(f"{dropped} sequences with non-finite outputs dropped")
    unseen = [name for name in work.layers if not (folder / f"{name}.safetensors").exists()]
    for name in unseen:
        others = (statistics_in(folder / f"{other}.safetensors") for other in siblings(name, work.layers, unseen))
        write_tensors(folder / f"{name}.safetensors", optional_tensors(mean_of(name, others)))
    if unseen:
        notes.append(f"no token was routed to {len(unseen)} expert layers, which got the mean of their siblings")
    return notes


def spectra(work: Workspace, folder: Path) -> list[str]:
    """The weighted SVD of each layer by each method; one folder a method, one file a layer."""
    notes, seconds = [], {}
    found = work.layers
    with work.display.bar("spectra", len(found) * len(work.recipe.methods)) as advance:
        for kind, method in work.recipe.methods.items():
            place = folder / kind
            place.mkdir(exist_ok=True)
            began = time.perf_counter()
            for name, layer in found.items():
                file = place / f"{name}.safetensors"
                if not file.exists():
                    weight = read_weight(work.model.get_submodule(name)).detach()
                    decompose(file, method, weight, read_statistics(work, name), layer)
                advance()
            seconds[kind] = time.perf_counter() - began
    write_json(folder / "seconds.json", seconds)
    return notes


def decompose(file: Path, method: Method, weight: Tensor, statistics: LayerStatistics, layer: Layer) -> None:
    """Write the weighted SVD of one layer, and beside it the coordinates that it is trained in.

    An eigendecomposition of a wide side takes as long as the SVD: it is done once.
    """
    try:
        roots = method.roots(statistics)
        found = weighted_svd(weight, roots, layer.max_rank)
    except NumericalError as error:
        raise NumericalError(f"layer {layer.name}, method {method.kind}: {error}") from error
    Coordinates.of(roots).write(file.with_suffix(COORDINATES))
    write_spectrum(file, found)


def read_statistics(work: Workspace, name: str) -> LayerStatistics:
    """The sums of a layer, on the run's device; empty if no method asks for any."""
    if not needed_statistics(work.recipe.methods):
        return LayerStatistics(tokens=0, sequences=0)
    return statistics_in(work.stage("statistics") / f"{name}.safetensors", work.device)


def method_roots(work: Workspace) -> Callable[[str], Roots]:
    """The roots of the recipe's method, by layer."""
    method = work.recipe.method
    return lambda name: method.roots(read_statistics(work, name))


def method_coordinates(work: Workspace) -> Callable[[str], Coordinates]:
    """Those that a layer is trained in, by the recipe's method."""
    return coordinates_in(work.stage("spectra") / work.recipe.method.kind)


def coordinates_in(folder: Path) -> Callable[[str], Coordinates]:
    """By layer, what `decompose` left in a folder."""
    return lambda name: Coordinates.read(folder / f"{name}{COORDINATES}")


def statistics_in(file: Path, device: torch.device | str = "cpu") -> LayerStatistics:
    """The sums that a file holds."""
    tensors = read_tensors(file)
    counts = {key: int(tensors.pop(key)) for key in ("tokens", "sequences")}
    moved = {key: value.to(device) for key, value in tensors.items()}
    return LayerStatistics(**counts, **moved)  # type: ignore[arg-type]


def factors(work: Workspace, folder: Path) -> list[str]:
    """Truncate the spectra to the rows' ranks; one file a row, in the checkpoint's dtype."""
    rows = [row for row in work.rows if row.name not in ("refit", "lora_lrd")]
    with work.display.bar("factors", len(rows)) as advance:
        for row in rows:
            place, plan = work.stage("spectra") / row.name, work.plan(row.ranks)
            numbers = work.numbers(plan)
            pairs: dict[str, Factors | Pivoted] = {}
            for name, rank in plan.ranks.items():
                bias = bias_of(work.model.get_submodule(name))
                exact = truncate(read_spectrum(place / f"{name}.safetensors", rank, work.device), rank, bias)
                # one at a time: in float64 they are four times as large
                pairs |= stored(work, {name: exact}, numbers, coordinates_in(place))
            write_factors(folder / f"{row.key}.safetensors", pairs)
            advance()
    if work.recipe.layout == "plain":
        return []
    return unpivoted(work, rows, folder) or ["all layers are pivoted"]


def unpivoted(work: Workspace, rows: Sequence[RowSpec], folder: Path | None = None) -> list[str]:
    """A note on the layers of rows that are plain although the recipe says pivoted, if there are any.

    `folder`: where the stage's files are while it runs.
    """
    if work.recipe.layout == "plain":
        return []
    files = [folder / f"{row.key}.safetensors" if folder is not None else work.factors_file(row) for row in rows]
    plain = {name for file in files for name, (layout, _) in read_layouts(file).items() if layout == "plain"}
    dtype = "int8" if work.int8 else str(work.source.dtype).removeprefix("torch.")
    why = f"plain, and of the smaller rank that as many numbers allow, since pivoting would cost precision in {dtype}"
    return [f"{why}: {', '.join(sorted(plain))}"] if plain else []


def stored(
    work: Workspace, pairs: Mapping[str, Factors], numbers: Mapping[str, int], coordinates: Callable[[str], Coordinates]
) -> dict[str, Factors | Pivoted]:
    """In the recipe's layout and dtype, each within its numbers by the plan: what is measured is what is saved."""
    found: dict[str, Factors | Pivoted] = {}
    for name, pair in pairs.items():
        try:
            found[name] = laid_out(
                pair, work.recipe.layout, work.source.dtype, int8=work.int8, most=numbers[name],
                coordinates=partial(coordinates, name),
            )  # fmt: skip
        except NumericalError as error:
            raise NumericalError(f"layer {name}: {error}") from error
    return found


def refit(work: Workspace, folder: Path) -> list[str]:
    """Solve the factors of the rows that are trained, or saved, again; one file a row."""
    settings, notes = work.recipe.refit, []
    assert settings is not None
    examples, roots = work.training_examples(work.recipe.calibration.length), method_roots(work)
    indices, spare = work.calibration_indices(examples), work.spare_indices(examples, settings.check)
    size = max(-(-len(indices) // REFIT_BATCHES), 1)
    batches = batches_of(work, examples, indices, size)
    for row in (row for row in work.rows if row.name == "refit"):
        if (folder / f"{row.key}.safetensors").exists():
            continue
        start = work.pairs(RowSpec(work.recipe.method.kind, row.ranks))
        with work.display.bar("refit", len(start)) as advance:
            found = refit_layers(
                work.model, start, lambda name: roots(name).left, batches, settings, work.task, advance=advance
            )
        checked = better(work.model, start, found, batches_of(work, examples, spare, size), work.task)
        note = checked.note
        if not settings.starts(checked.share):
            note += f", and not below {settings.start_below:g} of it: a recovery starts from those before the refit"
        notes.append(note if row.ranks == "plan" else f"{row.ranks}: {note}")
        write_json(folder / f"share-{row.ranks}.json", checked.share)
        kept = stored(work, checked.factors, work.numbers(work.plan(row.ranks)), method_coordinates(work))
        write_factors(folder / f"{row.key}.safetensors", kept)
    return [*notes, *unpivoted(work, [row for row in work.rows if row.name == "refit"], folder)]


def batches_of(work: Workspace, examples: Examples, indices: Sequence[int], size: int) -> list[Batch]:
    """These sequences in batches, from the shortest on, on the run's device."""
    return [to_device(batch, work.device) for batch in examples.batches(size, among=indices)]


def evaluation(work: Workspace, folder: Path) -> list[str]:
    """Measure the dense model and every row on the same sequences, and by the same tasks of lm-eval."""
    rows: dict[str, Mapping[str, nn.Module]] = {"dense": {}}
    rows |= {row.key: work.modules(row) for row in work.rows}
    notes = [_evaluate_sequences(work, folder, rows)] if work.recipe.sequence_evaluators else []
    return [*notes, _evaluate_tasks(work, folder, rows)] if work.recipe.task_evaluators else notes


def _evaluate_sequences(work: Workspace, folder: Path, rows: Mapping[str, Mapping[str, nn.Module]]) -> str:
    examples, evaluators = work.evaluation_examples(), work.recipe.sequence_evaluators
    note = f"{len(examples)} sequences of {work.splits[work.evaluation_split].origin} ({work.evaluation_split})"
    if (folder / MEASUREMENTS).exists():  # a killed run was at the tasks
        return note
    if (before := _before_replacement(work)) is not None:
        rows = {**rows, BEFORE: before}
    if any(e.needs_targets for e in evaluators) and "labels" not in examples.batch([0]):
        raise ModelError("the evaluation data have no labels", do=f"set data.{work.evaluation_split}.label")
    with work.display.bar("evaluation", len(examples)) as advance:
        measured = measure_rows(
            work.model, rows, examples, evaluators, work.task,
            batch_size=work.recipe.evaluation.batch, state=folder / "sums.json", processor=work.processor,
            advance=advance,
        )  # fmt: skip
    (folder / "sums.json").unlink(missing_ok=True)
    write_json(folder / MEASUREMENTS, {row: [asdict(m) for m in items] for row, items in measured.items()})
    return note


def _evaluate_tasks(work: Workspace, folder: Path, rows: Mapping[str, Mapping[str, nn.Module]]) -> str:
    entries = work.recipe.task_evaluators
    with work.display.bar("lm-eval", len(rows) * sum(len(entry.tasks) for entry in entries)) as advance:
        harness.measure_tasks(
            work.model, rows, work.processor, entries, batch_size=work.recipe.evaluation.batch,
            state=folder / TASK_SCORES, advance=advance,
        )  # fmt: skip
    return f"lm-eval {harness.version()}: {', '.join(task for entry in entries for task in entry.tasks)}"


def _before_replacement(work: Workspace) -> dict[str, nn.Module] | None:
    settings, row = work.recipe.recovery, work.rows[-1]
    if settings is None or settings.tau.final(settings.steps) == 1.0 or work.was_dropped(row):
        return None
    start = work.pairs(work.start_of(row.ranks))
    return work.modules(row) | before_replacement(work.model, start, work.pairs(row), settings)


def model(work: Workspace, folder: Path, card: str) -> list[str]:
    """Write the result as a transformers checkpoint, and load it in a fresh process."""
    result = work.rows[-1]
    pairs = work.factors(result)
    dense = load_model(work.source, work.task_name, torch.device("cpu"), work.source.dtype)
    put_factors(dense, pairs, int8=work.int8)
    fuse(dense)
    state = dense.state_dict()
    for name, value in work.trained_parameters(result).items():
        state[name].copy_(value)
    ranks = work.plan_of(result).ranks
    write_model(
        dense,
        ranks,
        folder,
        processor=work.processor,
        companions=work.companions,
        provenance=_provenance(work),
        card=card,
    )
    with swapped(work.model, work.modules(result)):
        difference = check_in_fresh_process(
            folder,
            work.model,
            canary(work),
            auto_class=work.task.auto_class,
            tolerance=VERIFY_TOLERANCE,
        )
    return [f"loaded in a fresh process; largest difference of a logit {difference:.1e}"]


def _provenance(work: Workspace) -> dict[str, str]:
    base = work.source.id if work.source.kind != "local" else work.source.name
    revision = {"base_revision": work.source.revision} if work.source.revision else {}
    kind = "lora_lrd" if work.recipe.recovery else work.recipe.method.kind
    return {"lrcompress_version": __version__, "method": kind, "base_model": base} | revision


def canary(work: Workspace) -> dict[str, Tensor]:
    """Random inputs of the model, on which the written model is compared with the one in memory."""
    return work.task.example_inputs(
        work.source.config, 2, min(16, work.recipe.calibration.length), torch.Generator().manual_seed(work.seed)
    )


def timing(work: Workspace, folder: Path) -> list[str]:
    """Latency and memory of dense and compressed models, side by side; rows of equal shapes share a measurement."""
    spec = work.recipe.timing
    assert spec is not None
    groups = equal_shapes(work)
    # CUDA is timed in the dtype that the model is served in; few CPUs compute in half precision
    dtype = work.source.dtype if work.device.type == "cuda" else torch.float32
    mixture = any(isinstance(module, Experts) for module in work.model.modules())
    timed_model: nn.Module = work.model
    if mixture or dtype != torch.float32:
        timed_model = load_model(work.source, work.task_name, work.device, dtype, fused=True)
    rows: dict[str, Mapping[str, nn.Module]] = {"dense": {}}
    for members in groups:
        rows[members[-1].key] = regrouped(work.model, work.modules(members[-1], dtype), dtype)
    how: dict[str, Any] = {"device": work.device, "seed": work.seed, **timed_inputs(work, spec, dtype)}
    repetitions = len(spec.batches) * (spec.warmup + spec.repeats)
    with work.display.bar("timing", repetitions) as advance:
        timed = time_rows(timed_model, rows, spec, progress=lambda text: advance(figures=text), **how)
    peaks = peak_bytes(timed_model, rows, spec, **how)
    write_timings(folder / "timing.json", timed, peaks)
    shared = [[row.key for row in members] for members in groups]
    write_json(folder / "shared.json", shared)
    notes = [f"measured once, for equal shapes: {', '.join(names)}" for names in shared if len(names) > 1]
    return notes


def timed_inputs(work: Workspace, spec: TimingSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What the timing is told of the model's inputs: random tokens are its own business, others are the task's."""
    task, config = work.task, work.source.config
    if {"input_ids", "attention_mask", "token_type_ids"}.issuperset(task.arguments):
        kind = "causal-lm" if task.name == "causal-lm" else "other"
        return {"task": kind, "vocab_size": config.get_text_config().vocab_size}

    def inputs(batch: int) -> Batch:
        made = task.example_inputs(config, batch, spec.prompt, torch.Generator().manual_seed(work.seed))
        return {
            name: value.to(work.device, dtype) if value.is_floating_point() else value.to(work.device)
            for name, value in made.items()
        }

    return {"task": "other", "vocab_size": 0, "inputs": inputs}


def equal_shapes(work: Workspace) -> list[list[RowSpec]]:
    """The rows in groups of equal ranks and layouts everywhere, whose models differ in numbers only."""
    groups: dict[str, list[RowSpec]] = {}
    for row in work.timed_rows:
        stored = sorted(read_layouts(work.factors_file(row)).items())
        groups.setdefault(repr(stored), []).append(row)
    return list(groups.values())


def curve(work: Workspace, ranks: str = "plan") -> list[dict[str, float]]:
    """The training curve of the learned row with these ranks, [] without a recovery."""
    return read_json(work.stage("recovery") / f"curve-{ranks}.json") if work.recipe.recovery else []
