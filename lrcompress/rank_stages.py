"""The two stages that choose ranks: LoRA-LRD runs that look at layers, and the selector at work."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lrcompress.artifacts import RankPlan, Spectrum, read_spectrum, write_json
from lrcompress.errors import DataError
from lrcompress.ranks import Frontier, Uniform
from lrcompress.seeds import generator
from lrcompress.selection import Bench, Memory, Pairs, Subject
from lrcompress.stages import method_coordinates
from lrcompress.tasks import Batch
from lrcompress.workspace import Workspace, frontier_name

SCORES = "scores.json"


def learning(work: Workspace, folder: Path) -> list[str]:
    """Run LoRA-LRD as often as the selector wants to look at its pairs; one file a run."""
    runs, context = work.learning_runs, bench(work, None, folder)
    for run in runs:
        context.learned(run)
    return [f"{len(runs)} runs of {runs[0].settings.steps} steps"]


def ranks(work: Workspace, folder: Path) -> list[str]:
    """The rank plan of the recipe, uniform ranks of the same size for the baselines, a frontier's further plans."""
    found, selector = work.layers, work.recipe.ranks
    context = bench(work, folder, work.stage("learning"))
    values = work.spectrum_values() if selector.needs_spectra else {}
    for text in check_validation(work) if selector.needs_scores else ():
        context.note(text)
    try:
        plan = selector.select(found, values, context)
    finally:
        context.close()
    plans = {"plan": plan, "uniform": _uniform(work, plan)}
    if isinstance(selector, Frontier):
        plans |= {frontier_name(share): selector.at(share, found, values) for share in selector.others}
    write_json(folder / "ranks.json", {name: asdict(one) for name, one in plans.items()})
    write_json(folder / "selection.json", {"kind": selector.kind, "notes": context.notes, "record": context.records})
    (folder / SCORES).unlink(missing_ok=True)
    return [*context.notes, *(f"{name} {note}" for name, note in plan.notes.items())]


def bench(work: Workspace, scores: Path | None, pairs: Path, *, examples: int | None = None) -> Bench:
    """A selector's context over a run: scores are remembered in one folder, pairs are in the other.

    Plans are scored on `examples` validation sequences, or as many as the recipe's selector asks for.
    """
    count = examples or getattr(work.recipe.ranks, "examples", None)
    place = work.stage("spectra") / work.recipe.method.kind

    def spectrum(name: str, rank: int) -> Spectrum:
        return read_spectrum(place / f"{name}.safetensors", rank, work.device)

    subject = Subject(
        load=lambda: work.model,
        layers=work.layers,
        task=work.task,
        spectrum=spectrum,
        coordinates=method_coordinates(work),
        training=work.training_examples,
        validation=lambda: scoring_batches(work, count),
        recovery=work.recipe.recovery,
        seed=work.seed,
    )
    return Bench(subject, Memory(scores / SCORES if scores else None), Pairs(pairs), work.display)


def scoring_batches(work: Workspace, count: int | None) -> Sequence[Batch]:
    """The validation sequences that choose: `count` of them (None: all), drawn by seed."""
    examples = work.scoring_examples()
    order = torch.randperm(len(examples), generator=generator(work.seed, "scoring"))
    return list(examples.batches(work.recipe.evaluation.batch, among=order[:count].tolist()))


def check_validation(work: Workspace) -> list[str]:
    """Refuse to choose on the data that the report is measured on; returns notes on rows that both have."""
    work.scoring_examples()
    if "test" not in work.sources:
        return []
    chosen, measured = (set(work.splits[split].inputs) for split in ("validation", "test"))
    same = work.sources["validation"] == work.sources["test"]
    if same or chosen == measured:
        raise DataError(
            "data.validation is data.test: ranks chosen on the rows that the report is measured on would look better "
            "than they are",
            got="the same source" if same else "equal rows", allowed="a validation split of its own",
            do="set data.validation to other rows, for example a part of the training data",
        )  # fmt: skip
    both = len(chosen & measured)
    return [f"{both} rows are in data.validation and in data.test."] if both else []


def _uniform(work: Workspace, plan: RankPlan) -> RankPlan:
    if isinstance(work.recipe.ranks, Uniform):
        return plan
    keep = plan.kept_parameters / plan.dense_parameters
    return Uniform(keep_parameters=keep, round_to=work.recipe.ranks.round_to).select(work.layers, {})
