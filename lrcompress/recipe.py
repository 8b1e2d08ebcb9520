"""The recipe: what a YAML file may say, with every default; load, override, resolve, save."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from lrcompress.analysis.settings import AnalysisSettings
from lrcompress.artifacts import Layout, StoredDtype
from lrcompress.data import Data
from lrcompress.errors import RecipeError, nearest
from lrcompress.evaluate import Evaluator, LmEval, SequenceEvaluator
from lrcompress.layers import Targets
from lrcompress.methods import Kron, Method
from lrcompress.part import Part
from lrcompress.ranks import Budget, Frontier, Selector
from lrcompress.recovery.settings import Recovery
from lrcompress.refit.settings import Refit
from lrcompress.timing import TimingSpec

TaskName = Literal[
    "auto", "causal-lm", "masked-lm", "sequence-classification", "token-classification", "image-classification",
    "speech-seq2seq", "seq2seq-lm", "feature-extraction",
]  # fmt: skip


class Calibration(Part):
    """The sequences that the statistics are summed over."""

    sequences: int = Field(default=512, ge=1)
    """how many, drawn from data.train"""
    length: int = Field(default=128, ge=2)
    """tokens a sequence: windows of a causal LM, the longest text of a classifier"""
    batch: int = Field(default=16, ge=1)
    """sequences at a time"""


class Evaluation(Part):
    """The sequences that the rows of the report are measured on."""

    split: Literal["test", "validation"] | None = None
    """null: test if the data have one, else validation"""
    length: int | None = Field(default=None, ge=2)
    """tokens a window; null: the model's positions, at most 1024 (a classifier: at most 512)"""
    stride: int | None = Field(default=None, ge=1)
    """tokens between the starts of two windows; null: windows that only share one token"""
    batch: int = Field(default=16, ge=1)
    """sequences at a time"""


class Recipe(Part):
    """How a model is compressed and what the report measures."""

    targets: Targets = Targets()
    """which layers"""
    data: Data | None = None
    """texts; needed by everything but plain SVD without an evaluation"""
    task: TaskName = "auto"
    """auto: from the model's config"""
    calibration: Calibration = Calibration()
    """for the statistics"""
    method: Method = Kron()
    """closed form: the start of the recovery, and a row of the report"""
    ranks: Selector = Budget(keep_parameters=0.5)
    """rank of each layer"""
    refit: Refit | None = None
    """solve the factors again, layer by layer, for the inputs that the compressed layers before give; null: don't"""
    layout: Layout = "plain"
    """how a factorised layer is stored and computed: plain (A and B), or pivoted, the same function in rank² numbers
    fewer, which buys larger ranks at the same size"""
    dtype: StoredDtype = "model"
    """what factors are stored and computed from: model (the model's dtype), or int8 with a scale for each output
    channel, a half or a quarter of the bytes; budgets count numbers, not bytes"""
    recovery: Recovery | None = Recovery()
    """LoRA-LRD; null: closed form only"""
    baselines: tuple[Method, ...] = ()
    """closed form, each at the uniform ranks of the same size; svd_llm at the plan's ranks too"""
    evaluate: tuple[Evaluator, ...] = ()
    """metrics; lm_eval: tasks of the lm-evaluation-harness"""
    evaluation: Evaluation = Evaluation()
    """for the metrics"""
    timing: TimingSpec | None = None
    """latency; null: not measured"""
    analysis: AnalysisSettings = AnalysisSettings()
    """for `lrcompress analyze`"""

    @model_validator(mode="before")
    @classmethod
    def _bare_kinds(cls, value: Any) -> Any:
        """`svd` stands for `{kind: svd}`."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if isinstance(value.get("method"), str):
            value["method"] = {"kind": value["method"]}
        for key in ("baselines", "evaluate"):
            if isinstance(value.get(key), (list, tuple)):
                value[key] = [{"kind": item} if isinstance(item, str) else item for item in value[key]]
        return value

    @model_validator(mode="after")
    def _compatible(self) -> "Recipe":
        if self.ranks.needs_loss_estimates and not self.method.estimates_loss:
            raise ValueError(
                f"ranks.kind `{self.ranks.kind}` compares singular values between layers, and those of method "
                f"`{self.method.kind}` do not estimate the loss (measured: worse than uniform ranks); use method "
                f"`kron`, or {self.ranks.without_loss_estimates}"
            )
        if getattr(self.ranks, "recovery_steps", 0) and self.recovery is None:
            raise ValueError(
                "ranks.recovery_steps trains finalists with the settings of `recovery`, which is null; give a "
                "recovery, or set ranks.finalists and ranks.recovery_steps to 0"
            )
        if self.recovery is not None and self.recovery.rounds:
            if not isinstance(self.ranks, Budget | Frontier):
                raise ValueError(
                    f"recovery.rounds allocates ranks at several sizes, by ranks.kind `budget` or `frontier`, got "
                    f"`{self.ranks.kind}`; take one of these, or set recovery.rounds to []"
                )
            if not self.method.needs:
                raise ValueError(
                    f"recovery.rounds takes statistics of the compressed model, and method `{self.method.kind}` has "
                    "none; take another method, or set recovery.rounds to []"
                )
        kinds = [method.kind for method in self.baselines]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"baselines name a method twice: {', '.join(kinds)}")
        tasks = [task for entry in self.task_evaluators for task in entry.tasks]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"evaluate names a task of lm_eval twice: {', '.join(tasks)}")
        return self

    @property
    def sequence_evaluators(self) -> tuple[SequenceEvaluator, ...]:
        """Those of `evaluate` that score the model's predictions of the evaluation split."""
        return tuple(entry for entry in self.evaluate if not isinstance(entry, LmEval))

    @property
    def task_evaluators(self) -> tuple[LmEval, ...]:
        """Those of `evaluate` that take the whole model and bring their own data."""
        return tuple(entry for entry in self.evaluate if isinstance(entry, LmEval))

    @property
    def methods(self) -> dict[str, Method]:
        """The method and the baselines by name; a method that is both counts once, as the method."""
        return {method.kind: method for method in (*self.baselines, self.method)}


def parse(value: Any, origin: str = "recipe") -> Recipe:
    """A recipe from plain values. Raises RecipeError that names each wrong key with what is allowed there."""
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(f"{origin} is no mapping of keys", got=type(value).__name__, do="see recipes/attn_only.yaml")
    try:
        return Recipe.model_validate(value or {})
    except ValidationError as error:
        raise _explain(error, origin) from None


def load(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe file with `key.path=value` settings over it (values are YAML)."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML", got=str(error), do="correct the file") from error
    if value is not None and not isinstance(value, dict):
        raise RecipeError(f"{path} is no mapping of keys", got=type(value).__name__, do="see recipes/attn_only.yaml")
    value = value or {}
    for setting in settings:
        _override(value, setting)
    return parse(value, str(path))


def resolve(recipe: "Recipe | Mapping[str, Any] | str | Path", settings: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A recipe and its name from whatever stands for one: a Recipe, plain values, a file, or a shipped name."""
    if isinstance(recipe, (str, Path)):
        file = find(str(recipe))
        return file.stem, load(file, settings)
    value = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else copy.deepcopy(dict(recipe))
    for setting in settings:
        _override(value, setting)
    return "recipe", parse(value)


def find(name: str) -> Path:
    """The file of a recipe: a path, or the bare name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"no recipe `{name}`", got=f"neither a file (from {Path.cwd()}) nor a shipped recipe",
        allowed=", ".join(shipped), do=nearest(path.stem, shipped) or "correct the name",
    )  # fmt: skip


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes that come with the package (in a source tree: its recipes/ folder)."""
    package = Path(__file__).parent
    folder = next(f for f in (package / "recipes", package.parent / "recipes") if f.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def dump(recipe: Recipe) -> str:
    """YAML with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _override(value: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"--set {setting}", allowed="key.path=value", do="for example --set ranks.keep_parameters=0.3"
        )
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {setting}: the value is no YAML", got=str(error)) from error
    *parents, last = key.split(".")
    place = value
    for depth, parent in enumerate(parents, 1):
        inner = place.get(parent)
        if inner is None:
            inner = place[parent] = {}
        elif not isinstance(inner, dict):
            raise RecipeError(
                f"--set {setting}", got=f"`{'.'.join(parents[:depth])}` is {inner!r}, not a section",
                do="set the section as a whole, as {key: value}",
            )  # fmt: skip
        place = inner
    place[last] = parsed


def _explain(error: ValidationError, origin: str) -> RecipeError:
    lines = [
        _line(item["type"], item["loc"], item["msg"], item["input"], item.get("ctx", {})) for item in error.errors()
    ]
    return RecipeError(
        f"{origin} has {len(lines)} mistake{'s' if len(lines) > 1 else ''}",
        got="\n    ".join(lines),
        do="correct the recipe or the --set",
    )


def _line(kind: str, location: Sequence[Any], message: str, value: Any, context: Mapping[str, Any]) -> str:
    path, options = _locate(location)
    where = f"`{path}`"
    if kind == "extra_forbidden":
        sections = _locate(location[:-1])[1]
        known = list(sections[0].model_fields) if len(sections) == 1 else []
        hint = nearest(str(location[-1]), known)
        return f"{where} is no key; {hint + '; ' if hint else ''}allowed here: {', '.join(known)}"
    if kind == "union_tag_invalid":
        known = context["expected_tags"].replace("'", "")
        hint = nearest(str(context["tag"]), known.split(", "))
        return f"`{path}.kind` is {context['tag']!r}; {hint + '; ' if hint else ''}allowed: {known}"
    if kind == "union_tag_not_found":
        return f"{where} needs a `kind`; allowed: {', '.join(_kind(option) for option in options)}"
    text = message.removeprefix("Value error, ").replace("a valid tuple", "a list")
    text = text.replace("a valid dictionary or object to extract fields from", "a section of keys")
    got = "" if kind == "missing" or isinstance(value, (Mapping, BaseModel)) else f", got {value!r}"
    return f"{where}: {text}{got}" if path else text


def _locate(location: Sequence[Any]) -> tuple[str, list[type[BaseModel]]]:
    """An error's path as the recipe spells it (without the union tags between), and the sections allowed there."""
    options: list[type[BaseModel]] = [Recipe]
    path: list[str] = []
    for part in location:
        tagged = [option for option in options if "kind" in option.model_fields and _kind(option) == part]
        if tagged and len(options) > 1:
            options = tagged
            continue
        path.append(str(part))
        if isinstance(part, str):
            field = options[0].model_fields.get(part) if len(options) == 1 else None
            options = [] if field is None else _models(field.annotation)
    return ".".join(path), options


def _kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows, whatever unions and tuples are around them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
