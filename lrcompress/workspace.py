"""One run's inputs, opened when they are first needed: recipe, model, tokenizer, data, run folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrcompress import artifacts, data, source
from lrcompress.artifacts import Factors, Layer, Pivoted, RankPlan
from lrcompress.data import DataSource, Examples
from lrcompress.errors import DataError, RecipeError
from lrcompress.layers import find_layers
from lrcompress.lowrank import low_rank_module
from lrcompress.progress import Display
from lrcompress.ranks import AbstractSelector, Frontier
from lrcompress.ranks.context import LearningRun
from lrcompress.recipe import Recipe
from lrcompress.recovery import modules_with
from lrcompress.seeds import generator
from lrcompress.selection import run_key
from lrcompress.tasks import TASKS, AbstractModelTask, Cut
from lrcompress.timing import positions

STAGE_ORDER = (
    "layers", "statistics", "spectra", "learning", "ranks", "factors", "refit", "recovery", "evaluation", "model",
    "timing",
)  # fmt: skip
"""The stages of a run, in the order in which they run; the model is written before the timing, so that it is there
early."""


ANALYSIS_ORDER = ("layers", "statistics", "spectra", "learning", "analysis")
"""The stages of an analysis."""
RECORD = "stage.json"
"""The file that is written of a stage at its end, in its folder."""


@dataclass
class Workspace:
    """What the stages of one run share. Nothing here outlives the process; stages meet on disk."""

    recipe: Recipe
    source: source.ModelSource
    folder: Path
    device: torch.device
    seed: int
    display: Display = field(default_factory=lambda: Display(quiet=True))
    order: tuple[str, ...] = STAGE_ORDER
    """names of the stages, in the order in which they run"""
    selectors: Mapping[str, AbstractSelector] | None = None
    """those that an analysis compares; None: only the recipe's is at work"""
    _made: dict[tuple[str, int, int | None], Examples] = field(default_factory=dict)
    _fingerprints: dict[str, str | None] = field(default_factory=dict)

    @cached_property
    def task_name(self) -> str:
        """The recipe's task, `auto` resolved."""
        return source.task_name(self.source.config, self.recipe.task)

    @cached_property
    def task(self) -> AbstractModelTask:
        """How the model is run and scored."""
        task = TASKS[self.task_name]
        files = {name: artifacts.read_json(file) for name, file in self.companions.items()}
        return task.of(self.source.config, files)

    @cached_property
    def companions(self) -> Mapping[str, Path]:
        """Files beside the model that belong to the task."""
        return source.companions(self.source, TASKS[self.task_name])

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device."""
        return source.skeleton(self.source, self.task_name)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model on the run's device, in float32."""
        return source.load_model(self.source, self.task_name, self.device, torch.float32)

    @cached_property
    def processor(self) -> Any:
        """The model's tokenizer, image processor, or both."""
        return source.load_processor(self.source, self.task.processor, **self.task.processor_settings)

    @cached_property
    def source_identity(self) -> str:
        """What changes when the model's weights do."""
        return source.identity(self.source)

    @cached_property
    def stated_license(self) -> tuple[str | None, str]:
        """The licence that the dense model's card states, and why the card cannot be read, or ""."""
        return source.stated_license(self.source)

    def data_fingerprint(self, split: str) -> str | None:
        """What changes when a split's data do; None if the recipe has no such split. Read once."""
        if split not in self._fingerprints:
            source = self.sources.get(split)
            self._fingerprints[split] = None if source is None else data.fingerprint(source)
        return self._fingerprints[split]

    @cached_property
    def stages(self) -> Path:
        """Folder of the stages."""
        return self.folder / "stages"

    def stage(self, name: str) -> Path:
        """A stage's folder, which is there once the stage is finished."""
        return self.stages / f"{self.order.index(name) + 1:02d}-{name}"

    def finished(self, name: str) -> bool:
        """Whether a stage's folder is complete."""
        return self.stage(name).exists()

    def record(self, name: str) -> dict[str, Any]:
        """What was written of a finished stage at its end: its fingerprint, seconds, peak memory, notes."""
        return artifacts.read_json(self.stage(name) / RECORD)

    def wants(self, name: str) -> bool:
        """Whether the recipe asks for a stage."""
        if name == "learning":
            return bool(self.learning_runs)
        if name == "refit":
            return self.recipe.refit is not None
        if name == "recovery":
            return self.recipe.recovery is not None
        if name == "evaluation":
            return bool(self.recipe.evaluate)
        return name != "timing" or self.recipe.timing is not None

    # what stages left behind ------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, Layer]:
        """The target layers, in the recipe's layout."""
        found = artifacts.read_json(self.stage("layers") / "layers.json")
        return {item["name"]: Layer(**item | {"layout": self.recipe.layout}) for item in found}

    def find_layers(self) -> dict[str, Layer]:
        """The same before the stage has run."""
        found = find_layers(self.skeleton, self.recipe.targets)
        return {name: replace(layer, layout=self.recipe.layout) for name, layer in found.items()}

    def layers_of(self, row: "RowSpec") -> dict[str, Layer]:
        """The target layers in the layouts that a row has them in: one that pivoting would hurt is plain."""
        stored = artifacts.read_layouts(self.factors_file(row))
        layers = self.layers
        return layers | {name: replace(layers[name], layout=layout) for name, (layout, _) in stored.items()}

    @cached_property
    def learning_runs(self) -> Sequence[LearningRun]:
        """The LoRA-LRD runs that the rank selectors look at, each once."""
        layers = self.find_layers()
        selectors = [self.recipe.ranks] if self.selectors is None else list(self.selectors.values())
        runs = [run for selector in selectors for run in selector.learning_runs(layers, self.seed)]
        return list({run_key(run): run for run in runs}.values())

    def spectrum_values(self) -> dict[str, Tensor]:
        """Singular values `[min(O, I)]` of each layer by the recipe's method."""
        place = self.stage("spectra") / self.recipe.method.kind
        return {name: artifacts.read_values(place / f"{name}.safetensors") for name in self.layers}

    def plan(self, name: str) -> RankPlan:
        """The rank plan `plan`, `uniform`, or one of a frontier."""
        return RankPlan(**artifacts.read_json(self.stage("ranks") / "ranks.json")[name])

    def plan_of(self, row: "RowSpec") -> RankPlan:
        """The rank plan that a row ends with.

        The rounds of a recovery allocate again, and a layer that pivoting would hurt is plain, of a smaller rank.
        """
        stored = artifacts.read_layouts(self.factors_file(row))
        plan = self.plan(row.ranks)
        if row.name == "lora_lrd":
            plan = RankPlan(**artifacts.read_json(self.stage("recovery") / f"ranks-{row.ranks}.json"))
        return plan.stored_as(self.layers, stored)

    def numbers(self, plan: RankPlan) -> dict[str, int]:
        """That each factorised layer may hold by a plan, without its bias."""
        layers = self.layers
        return {name: layers[name].numbers(rank) for name, rank in plan.ranks.items()}

    @property
    def rows(self) -> list["RowSpec"]:
        """The factorised rows of the report, in order; the last one is the result."""
        rows = [RowSpec(method.kind, "uniform") for method in self.recipe.baselines]
        if any(method.kind == "svd_llm" for method in self.recipe.baselines) and self.recipe.method.kind != "svd_llm":
            rows.append(RowSpec("svd_llm", "plan"))
        rows += self._frontier_rows()
        rows.append(RowSpec(self.recipe.method.kind, "plan"))
        if self.recipe.refit is not None:
            rows.append(RowSpec("refit", "plan"))
        if self.recipe.recovery is not None:
            rows.append(RowSpec("lora_lrd", "plan"))
        return list(dict.fromkeys(rows))

    def start_of(self, ranks: str) -> "RowSpec":
        """The row whose factors the recovery starts from."""
        closed = RowSpec(self.recipe.method.kind, ranks)
        if self.recipe.refit is None:
            return closed
        share = artifacts.read_json(self.stage("refit") / f"share-{ranks}.json")
        return RowSpec("refit", ranks) if self.recipe.refit.starts(share) else closed

    def untrained(self, ranks: str) -> "RowSpec":
        """The row whose factors stay where a training does not help: the refit's, if any, whether it helped or not."""
        return RowSpec("refit" if self.recipe.refit is not None else self.recipe.method.kind, ranks)

    def _frontier_rows(self) -> list["RowSpec"]:
        selector = self.recipe.ranks
        if not isinstance(selector, Frontier):
            return []
        rows = [RowSpec(self.recipe.method.kind, frontier_name(share)) for share in selector.others]
        trained = selector.recover if self.recipe.recovery is not None else ()
        for share in (share for share in selector.others if share in trained):
            rows += [RowSpec("refit", frontier_name(share))] if self.recipe.refit is not None else []
            rows.append(RowSpec("lora_lrd", frontier_name(share)))
        return rows

    def share_of(self, ranks: str) -> float:
        """The share of the target layers' parameters that a plan keeps, for ranks by budget or frontier."""
        selector = self.recipe.ranks
        shares = selector.others if isinstance(selector, Frontier) else ()
        found = {frontier_name(share): share for share in shares}.get(ranks, selector.kept_share)
        assert found is not None
        return found

    @property
    def timed_rows(self) -> list["RowSpec"]:
        """Those whose latency is measured: a frontier's further sizes are there for their quality."""
        return [row for row in self.rows if row.ranks in ("plan", "uniform")]

    @property
    def int8(self) -> bool:
        """Whether factors are stored in 8 bits."""
        return self.recipe.dtype == "int8"

    def factors(self, row: "RowSpec") -> dict[str, Factors | Pivoted]:
        """A row's factors in their layouts, as the checkpoint will have them."""
        return artifacts.read_factors(self.factors_file(row))

    def pairs(self, row: "RowSpec") -> dict[str, Factors]:
        """A row's factors as B and A, whatever their layout."""
        return {name: pair.factors() for name, pair in self.factors(row).items()}

    def factors_file(self, row: "RowSpec") -> Path:
        """Where a row's factors are."""
        folder = self.stage({"lora_lrd": "recovery", "refit": "refit"}.get(row.name, "factors"))
        return folder / f"{row.key}.safetensors"

    def modules(self, row: "RowSpec", dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        """A row's layers, ready to stand in the model; trained normalisation layers among them."""
        modules: dict[str, nn.Module] = {
            name: low_rank_module(pair, device=self.device, dtype=dtype, int8=self.int8, scales=self.source.dtype)
            for name, pair in self.factors(row).items()
        }
        if row.name == "lora_lrd":
            trained = modules_with(self.model, self.trained_parameters(row))
            modules |= {name: module.to(dtype) for name, module in trained.items()}
        return modules

    def trained_parameters(self, row: "RowSpec") -> dict[str, Tensor]:
        """Parameters outside the replaced layers that the recovery trained for a row, by name."""
        if row.name != "lora_lrd":
            return {}
        return artifacts.read_tensors(self.stage("recovery") / f"others-{row.ranks}.safetensors")

    @property
    def checks_training(self) -> bool:
        """Whether validation data decide if a training is kept."""
        return self.recipe.recovery is not None and self.recipe.recovery.checked and "validation" in self.sources

    def was_dropped(self, row: "RowSpec") -> bool:
        """Whether a row was trained in vain, and holds the untrained factors."""
        file = self.stage("recovery") / f"check-{row.ranks}.json"
        return row.name == "lora_lrd" and not artifacts.read_json(file)["kept"]

    def rounds_of(self, row: "RowSpec") -> int:
        """How many sizes a learned row went through."""
        return int(artifacts.read_json(self.stage("recovery") / f"check-{row.ranks}.json")["rounds"])

    # data -------------------------------------------------------------------------------------------------

    @cached_property
    def splits(self) -> Mapping[str, data.Rows]:
        """The rows of each split that the recipe names."""
        for split, found in self.sources.items():
            if found.text_pair is not None and not self.task.reads_pairs:
                able = ", ".join(name for name, task in TASKS.items() if task.reads_pairs)
                raise DataError(
                    f"data.{split}.text_pair does not fit task {self.task_name}", got=found.text_pair, allowed=able,
                    do="take it away, or set `task`",
                )  # fmt: skip
        paired = [split for split, found in self.sources.items() if found.text_pair is not None]
        if paired and len(paired) < len(self.sources):
            single = next(split for split in self.sources if split not in paired)
            raise DataError(
                "some data are pairs of texts and some are not", got=f"no data.{single}.text_pair",
                allowed=f"as in data.{paired[0]}: in all of them or in none", do=f"set data.{single}.text_pair",
            )  # fmt: skip
        return {split: data.read_rows(source, self.task.kind) for split, source in self.sources.items()}

    @property
    def sources(self) -> dict[str, DataSource]:
        """Split → data source."""
        if self.recipe.data is None:
            return {}
        found = {split: getattr(self.recipe.data, split) for split in data.Data.model_fields}
        return {split: source for split, source in found.items() if source is not None}

    @property
    def wanted_split(self) -> str:
        """Which split the recipe wants metrics on, whether or not its data have it."""
        return self.recipe.evaluation.split or ("test" if "test" in self.sources else "validation")

    @property
    def evaluation_split(self) -> str:
        """Which split the report's metrics are measured on."""
        asked = self.wanted_split
        if asked not in self.sources:
            raise DataError(
                "the recipe asks for metrics, and the data to measure them on are missing", got=f"no data.{asked}",
                allowed="data.test or data.validation", do=f"add data.{asked} to the recipe",
            )  # fmt: skip
        return asked

    def training_examples(self, length: int) -> Examples:
        """Sequences of data.train as the task makes them, duplicates dropped."""
        if "train" not in self.sources:
            raise DataError(
                "the recipe needs data.train", got="no data", allowed="a data source for calibration and recovery",
                do="add `data: {train: {path: …}}` to the recipe",
            )  # fmt: skip
        return self._examples("train", length, None)

    def evaluation_examples(self) -> Examples:
        """All sequences of the evaluation split."""
        settings, split = self.recipe.evaluation, self.evaluation_split
        return self._examples(split, self._evaluation_length(), settings.stride)

    def validation_examples(self, length: int) -> Examples:
        """Sequences of data.validation, as long as those of the training."""
        return self._examples("validation", length, None)

    def scoring_examples(self) -> Examples:
        """Sequences of data.validation, as those of the evaluation are made."""
        if "validation" not in self.sources:
            raise DataError(
                f"ranks.kind `{self.recipe.ranks.kind}` chooses on validation data, and there are none",
                got="no data.validation", allowed="a data source of its own: neither the training nor the test data",
                do="add data.validation to the recipe",
            )  # fmt: skip
        settings = self.recipe.evaluation
        return self._examples("validation", self._evaluation_length(), settings.stride)

    def _evaluation_length(self) -> int:
        return self.recipe.evaluation.length or min(positions(self.source.config) or 1024, 1024)

    def calibration_indices(self, examples: Examples, most: int | None = None, share: float = 1.0) -> list[int]:
        """Which training sequences calibrate: `sequences` of them, drawn by seed; a share, the first `most` of that."""
        whole = self._calibration_order(examples)[: self.recipe.calibration.sequences]
        return whole[: math.ceil(share * len(whole))][:most]

    def spare_indices(self, examples: Examples, count: int) -> list[int]:
        """At most `count` training sequences that do not calibrate, drawn as those are."""
        first = self.recipe.calibration.sequences
        return self._calibration_order(examples)[first : first + count]

    def _calibration_order(self, examples: Examples) -> list[int]:
        return torch.randperm(len(examples), generator=generator(self.seed, "calibration")).tolist()

    def checked_length(self, length: int) -> int:
        """`length`, or RecipeError if the model has fewer positions."""
        most = positions(self.source.config)
        if most is not None and length > most:
            raise RecipeError(
                "a sequence length is above the model's positions", got=length, allowed=f"at most {most}",
                do="lower calibration.length, recovery.length or evaluation.length",
            )  # fmt: skip
        return length

    def _examples(self, split: str, length: int, stride: int | None) -> Examples:
        if self.task.kind != "image":
            self.checked_length(length)
        key = (split, length, stride)
        if key not in self._made:
            rows = self.splits[split] if split != "train" else self.splits[split].without_duplicates()
            self._made[key] = self._sequences(split, length, stride, rows)
        return self._made[key]

    def _sequences(self, split: str, length: int, stride: int | None, rows: data.Rows) -> Examples:
        cut = Cut(length, stride, self.sources[split].separator, self.sources[split].language)
        return self.task.examples(rows, self.processor, self.source.config, cut)


def frontier_name(share: float) -> str:
    """The name of the rank plan of one of a frontier's budgets."""
    return f"keep-{share:g}"


@dataclass(frozen=True)
class RowSpec:
    """A factorised row of the report."""

    name: str
    """a method's kind, refit, or lora_lrd"""
    ranks: str
    """`plan`, `uniform`, or one of a frontier (`keep-0.5`)"""

    @property
    def key(self) -> str:
        """File name and identifier."""
        return f"{self.name}-{self.ranks}"
