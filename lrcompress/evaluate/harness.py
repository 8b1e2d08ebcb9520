"""Run tasks of the lm-evaluation-harness on every row of a report, in this process (lm-eval, the extra `[eval]`).

Sequences, prompts and scores are lm-eval's own. It is called with the seeds that its command line uses.
"""

import copy
import hashlib
import io
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompress.artifacts import Measurement, read_json, write_json
from lrcompress.errors import DataError, NumericalError, RecipeError, nearest
from lrcompress.evaluate.lm_eval import LmEval
from lrcompress.lowrank import swapped

PYTHON_SEED, SEED = 0, 1234
"""lm-eval's defaults: of Python's generator, and of numpy's, torch's and the choice of examples."""

BOOTSTRAP = 1000
"""Draws for the standard error of a metric without a closed form; lm-eval itself takes up to a hundred times as many,
for an error of the error of 0.2 % in place of 2 %."""


@dataclass(frozen=True)
class TaskScores:
    """What one row scores in one entry of `tasks`."""

    measurements: list[Measurement]
    """named `task.metric`, or `task.metric.filter` where answers are filtered in several ways"""
    definitions: dict[str, str]
    """name → what was measured: task, its version, shots, documents"""


def folder_fingerprint(entry: LmEval) -> str | None:
    """What changes when a file in the folder of own tasks does, data beside the YAMLs among them."""
    folder = _folder(entry)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check_names(entries: Sequence[LmEval]) -> None:
    """Raise RecipeError where lm-eval is missing, a folder is, or a task is unknown; reads no data."""
    if not entries:
        return
    if find_spec("lm_eval") is None:
        raise RecipeError(
            "`evaluate` asks for lm_eval, which is not installed", got="no package lm_eval",
            do="pip install 'lrcompress[eval]', or remove the entry",
        )  # fmt: skip
    for entry in entries:
        if entry.include is not None and not Path(entry.include).is_dir():
            raise RecipeError(
                "lm_eval: `include` is no folder", got=entry.include, allowed="a folder with YAML files of tasks",
                do=f"correct the path; relative paths start at {Path.cwd()}",
            )  # fmt: skip
        known = _manager(entry).all_tasks
        for name in entry.tasks:
            if name not in known:
                own = _index(_folder(entry), defaults=False).all_tasks if entry.include else []
                raise RecipeError(
                    "lm_eval: no such task", got=name,
                    allowed=f"{len(known):,} names, by `lm-eval ls tasks`"
                    + (f"; in {entry.include}: {', '.join(own) or 'none that can be read'}" if entry.include else ""),
                    do=nearest(name, own) or nearest(name, known) or "correct the name, or set `include`",
                )  # fmt: skip


def check_tasks(entries: Sequence[LmEval]) -> None:
    """Raise an InputError for every task that could not be run later; loads their data, and no model."""
    check_names(entries)
    origin: dict[str, str] = {}
    for entry in entries:
        for name in entry.tasks:
            for task, found in _load(entry, name)["tasks"].items():
                if getattr(found, "UNSAFE_CODE", False) or getattr(found, "MULTIMODAL", False):
                    raise RecipeError(
                        f"lm_eval: the task `{task}` cannot be run here",
                        got="a task that runs code which the model wrote, or that needs images or sound",
                        allowed="tasks of text", do=f"remove `{name}`, and run it with the command line of lm-eval",
                    )  # fmt: skip
                if task in origin:
                    raise RecipeError(
                        "lm_eval: a task would be measured twice", got=f"{task}, in {origin[task]} and in {name}",
                        allowed="each task once", do="remove one of the two",
                    )  # fmt: skip
                origin[task] = name


def measure_tasks(
    model: nn.Module,
    rows: Mapping[str, Mapping[str, nn.Module]],
    tokenizer: Any,
    entries: Sequence[LmEval],
    *,
    batch_size: int,
    state: Path,
    advance: Callable[[int], None] = lambda pairs: None,
) -> dict[str, list[TaskScores]]:
    """Scores of each row, whose modules take the dense ones' places while it runs.

    `state` grows by each (row, task) that is done; a killed measurement goes on after the last of them. The
    tokenizer is left as it is. Raises NumericalError for outputs that are not finite, DataError for a task whose
    data cannot be loaded.
    """
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    done: dict[str, dict[str, Any]] = read_json(state) if state.exists() else {}
    with _harness():
        own = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token, which would end up in the checkpoint
        # rows are swapped into the model that it holds
        lm = HFLM(pretrained=model, tokenizer=own, backend="causal", batch_size=batch_size)  # type: ignore[arg-type]
    for entry in entries:
        for name in entry.tasks:
            left = [row for row in rows if name not in done.get(row, {})]
            advance(len(rows) - len(left))
            for row in left:
                # loaded for each row: what a task draws while it is loaded is drawn alike
                loaded = _load(entry, name)
                with swapped(model, rows[row]), _finite_outputs(model, f"row {row}, task {name}"):
                    scores = _scores(lm, loaded, name, entry, row)
                done.setdefault(row, {})[name] = asdict(scores)
                write_json(state, done)
                advance(1)
    return {row: [read_scores(done[row][name]) for entry in entries for name in entry.tasks] for row in rows}


def read_scores(value: Mapping[str, Any]) -> TaskScores:
    """What `asdict` made of a TaskScores."""
    return TaskScores([Measurement(**one) for one in value["measurements"]], dict(value["definitions"]))


def _scores(lm: Any, loaded: Any, name: str, entry: LmEval, row: str) -> TaskScores:
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (entry.fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=entry.fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    with _harness():
        try:
            found: Any = evaluate(lm, loaded, limit=entry.limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
        except OverflowError as error:
            raise NumericalError(f"row {row}, task {name}: a perplexity is too large for a number") from error
    # a group that has a score of its own stands for its tasks
    shown = [name] if name in found.get("groups", {}) else list(loaded["tasks"])
    measurements, definitions = [], {}
    for task in shown:
        for one, text in _measured(found, task):
            if not isfinite(one.value):
                raise NumericalError(f"row {row}: {one.name} of lm-eval is {one.value}")
            measurements.append(one)
            definitions[one.name] = text
    return TaskScores(measurements, definitions)


def _measured(found: Any, task: str) -> Iterator[tuple[Measurement, str]]:
    """The numbers of one task of lm-eval's results, each with its definition."""
    values, counts = found["results"][task], found["n-samples"].get(task)
    count = counts["effective"] if counts else values["sample_len"]
    documents = f"{count:,} documents"
    if counts and counts["original"] > count:
        documents = f"the first {count:,} of {counts['original']:,} documents"
    facts = [f"version {found['versions'].get(task)}", f"{found['n-shot'].get(task, 'mixed')} shots", documents]
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        stderr = float(error) if isinstance(error, Real) and isfinite(error) else None
        better = found["higher_is_better"].get(task, {}).get(metric)
        direction = {True: "higher is better", False: "lower is better"}.get(better, "direction not stated")
        filtered = "" if kind == "none" else f", answers filtered by {kind}"
        label = f"{task}.{metric}" if kind == "none" else f"{task}.{metric}.{kind}"
        text = f"{metric} of the task {task} of lm-eval {version()}{filtered}: {', '.join(facts)}; {direction}"
        yield Measurement(label, float(value), stderr, int(count), better), text


def version() -> str:
    """lm-eval's."""
    return metadata.version("lm_eval")


def _folder(entry: LmEval) -> Path | None:
    return Path(entry.include).resolve() if entry.include is not None else None


def _manager(entry: LmEval) -> Any:
    """lm-eval's index of tasks, without its own 14,000, which take a quarter of a minute, where none is asked for."""
    if entry.include is not None:
        own = _index(_folder(entry), defaults=False)
        if set(entry.tasks) <= set(own.all_subtasks):  # a group may name others
            return own
    return _index(_folder(entry), defaults=True)


@cache
def _index(folder: Path | None, *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    with _harness():
        return TaskManager(include_path=folder, include_defaults=defaults)


def _load(entry: LmEval, name: str) -> Any:
    """The tasks and groups of a name, with their data."""
    manager, folder = _manager(entry), _folder(entry)
    place = manager.task_index[name].yaml_path
    own = folder is not None and (place is None or folder in place.parents)
    try:
        with _harness(), _inside(folder or Path.cwd()):
            return manager.load([name])
    except Exception as error:  # a task is a program by anybody, and so is what it raises
        first = (str(error).strip() or "no message").splitlines()[0]
        raise DataError(
            f"lm-eval cannot load the task `{name}`", got=f"{type(error).__name__}: {first}",
            allowed="data in the cache, on the Hub where it can be reached, or in local files",
            do="for data on the Hub, run once with a network (HF_HUB_OFFLINE unset), which fills the cache"
            + (f"; for files, correct {place or name}: relative paths start at {folder}" if own else ""),
        ) from error  # fmt: skip


@contextmanager
def _finite_outputs(model: nn.Module, what: str) -> Iterator[None]:
    """Within the block the model raises NumericalError for logits that are not finite: a choice would hide them."""

    def check(_: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.isfinite(output.logits).all():
            raise NumericalError(f"{what}: the model's output is not finite")

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Within the block this is the folder that relative paths start at."""
    former = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(former)


@contextmanager
def _harness() -> Iterator[None]:
    """Within the block lm-eval says nothing, forks no process, and draws from its own seeds."""
    import numpy  # lm-eval brings it

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork this process, threads and all, to bootstrap
    former = random.getstate(), numpy.random.get_state()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
        random.seed(PYTHON_SEED)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(former[0])
            numpy.random.set_state(former[1])
