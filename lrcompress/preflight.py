"""What can be found out before any weight is read: checks, sizes, the disk that a run needs."""

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrcompress import timing
from lrcompress.artifacts import Layer, RankPlan
from lrcompress.errors import DataError, ModelError, OutputError, RecipeError
from lrcompress.evaluate import harness, sequence_evaluators
from lrcompress.rank_stages import check_validation
from lrcompress.ranks.base import check_reachable
from lrcompress.recovery.settings import Learning, Recovery
from lrcompress.stages import canary, needed_statistics
from lrcompress.workspace import Workspace


def check(work: Workspace) -> None:
    """Raise an InputError for everything that would fail later; reads texts, not weights."""
    layers = work.find_layers()
    early_plan(work, layers)
    spec = work.recipe.timing
    if spec is not None:
        timing.check(spec, work.source.config, "causal-lm" if work.task_name == "causal-lm" else "other")
    _check_data(work)
    _check_canary(work)
    check_task_names(work)
    _ = work.stated_license  # while the Hub answers
    harness.check_tasks(work.recipe.task_evaluators)
    needed, free = disk_needed(work, layers), shutil.disk_usage(_existing(work.folder)).free
    held = sum(file.stat().st_size for file in work.folder.rglob("*") if file.is_file())
    if needed > free + held:  # a run that goes on needs only the rest
        raise OutputError(
            "the disk is too full for this run", got=f"{free:,} bytes free at {work.folder}, {held:,} in it",
            allowed=f"about {needed:,} bytes", do="free some, or name a folder on another disk with --output",
        )  # fmt: skip


def _check_canary(work: Workspace) -> None:
    try:
        canary(work)
    except AttributeError as error:
        raise ModelError(
            f"the inputs of a {work.source.config.model_type} are not known to task {work.task_name}", got=str(error),
            do="name another model, or compress it from Python with batches of its own (lrcompress.compress)",
        ) from error  # fmt: skip


def check_task_names(work: Workspace) -> None:
    """Raise an InputError for tasks of lm-eval that are unknown, or that the model is not fit for; reads no data."""
    entries = work.recipe.task_evaluators
    if entries and work.task_name != "causal-lm":
        raise ModelError(
            "`evaluate` asks for lm_eval, which needs a causal LM", got=f"{work.source.id}, task {work.task_name}",
            allowed="task causal-lm", do="remove the entry",
        )  # fmt: skip
    if entries:
        _ = work.processor
    harness.check_names(entries)


def early_plan(work: Workspace, layers: Mapping[str, Layer]) -> RankPlan | None:
    """The rank plan where it needs no data, else None after a check that the budget can be met."""
    selector = work.recipe.ranks
    if not selector.needs_spectra:
        return selector.select(layers, {})
    if selector.least_share is not None:
        check_reachable(layers, selector.least_share, selector.bounds(layers))
    else:
        selector.bounds(layers)  # patterns without a layer
    return None


def disk_needed(work: Workspace, layers: Mapping[str, Layer]) -> int:
    """Bytes that a whole run writes, roughly: statistics, spectra, factors, training state, model."""
    target = sum(layer.dense_parameters for layer in layers.values())
    needs = needed_statistics(work.recipe.methods)
    moments = 0
    for layer in layers.values():
        moments += 8 * layer.in_features**2 * len(needs & {"input_moment", "weighted_input_moment"})
        moments += 8 * layer.out_features**2 * len(needs & {"grad_moment"})
    spectra = 4 * target * len(work.recipe.methods)
    rounds = len(work.recipe.recovery.rounds) if work.recipe.recovery is not None else 0
    moments *= 2 if rounds else 1  # of one round at a time
    spectra += 8 * target * rounds  # and its factors
    dense = sum(parameter.numel() for parameter in work.skeleton.parameters())
    stored = work.source.dtype.itemsize
    rows = stored * target * len(work.rows)
    learned = [sum(layers[name].cost(rank) for name, rank in run.ranks.items()) for run in work.learning_runs]
    states = 2 * 12 * max([target * bool(work.recipe.recovery), *learned])
    states += 4 * sum(learned)
    return moments + spectra + rows + states + 2 * stored * dense


def overview(work: Workspace) -> dict[str, Any]:
    """What `--dry-run` prints. Raises an InputError for what can be known without data."""
    check_task_names(work)
    layers = work.find_layers()
    plan = early_plan(work, layers)
    dense = sum(parameter.numel() for parameter in work.skeleton.parameters())
    target = sum(layer.dense_parameters for layer in layers.values())
    keep = work.recipe.ranks.kept_share
    kept = plan.kept_parameters if plan else (int(keep * target) if keep is not None else None)
    return {
        "layers": layers,
        "plan": plan,
        "parameters": dense,
        "target_parameters": target,
        "kept_parameters": kept,
        "exact": plan is not None,
        "bytes_per_parameter": work.source.dtype.itemsize,
        "disk": disk_needed(work, layers),
    }


def _check_data(work: Workspace) -> None:
    recipe = work.recipe
    if needed_statistics(recipe.methods) or recipe.recovery is not None or work.learning_runs:
        work.training_examples(recipe.calibration.length)
    else:
        _ = work.splits
    section = "ranks.learning" if work.selectors is None else "analysis.learning"
    trainings = [("recovery", recipe.recovery), *((section, run.settings) for run in work.learning_runs[:1])]
    for key, settings in trainings:
        if settings is not None:
            _check_training(work, key, settings)
    if recipe.recovery is not None and work.checks_training:
        work.validation_examples(recipe.recovery.length)
    selectors = [recipe.ranks] if work.selectors is None else list(work.selectors.values())
    if any(selector.needs_scores for selector in selectors):
        check_validation(work)
        if not work.task.has_classes and any(getattr(one, "metric", None) == "accuracy" for one in selectors):
            raise RecipeError(
                f"ranks.metric `accuracy` does not fit task {work.task_name}, whose outputs are no classes",
                got="accuracy", allowed="loss, kl", do="correct `ranks.metric`",
            )  # fmt: skip
    _check_evaluators(work)
    if recipe.sequence_evaluators:
        examples = work.evaluation_examples()
        kinds = [evaluator.kind for evaluator in recipe.sequence_evaluators if evaluator.needs_targets]
        if kinds and "labels" not in examples.batch([0]):
            raise DataError(
                f"{' and '.join(kinds)} need labels", got=f"data.{work.evaluation_split} without a label",
                do=f"set data.{work.evaluation_split}.label",
            )  # fmt: skip


def _check_evaluators(work: Workspace) -> None:
    for evaluator in work.recipe.sequence_evaluators:
        if not evaluator.fits(work.task):
            fitting = [name for name, kind in sequence_evaluators().items() if kind.fits(work.task)]
            about = "" if work.task.has_classes else ", whose outputs are no classes"
            raise RecipeError(
                f"metric `{evaluator.kind}` does not fit task {work.task_name}{about}", got=evaluator.kind,
                allowed=", ".join(fitting), do="correct `evaluate` in the recipe",
            )  # fmt: skip

    if "word_errors" in [evaluator.kind for evaluator in work.recipe.sequence_evaluators] and not find_spec("jiwer"):
        raise RecipeError("word_errors needs jiwer", got="not installed", do="pip install 'lrcompress[audio]'")


def _check_training(work: Workspace, key: str, settings: Recovery | Learning) -> None:
    examples = work.training_examples(settings.length)
    labelled = "labels" in examples.batch([0])
    wanted = settings.loss.kind == "task" or settings.loss.task > 0
    if wanted and not work.task.has_loss:
        raise RecipeError(
            f"{work.task_name} has no task loss: embeddings are compared with the dense model's", got=f"{key}.loss",
            allowed="kind: distill, task: 0", do=f"correct `{key}.loss`",
        )  # fmt: skip
    if wanted and not labelled:
        raise DataError(
            f"the task loss of `{key}` needs labels", got="data.train without a label", do="set data.train.label"
        )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
