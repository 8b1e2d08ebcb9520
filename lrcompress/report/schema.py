"""The schema of report.json; every other view of a run is made from it and has no numbers of its own."""

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from ..part import Part

MetricName = Literal[
    "token_perplexity", "accuracy", "kl", "agreement", "entity_f1", "cosine", "spearman", "wer", "squared_error",
    "label_spearman",
]  # fmt: skip
RowName = Literal["dense", "svd", "fwsvd", "asvd", "svd_llm", "kron", "refit", "lora_lrd"]
Phase = Literal["prefill", "decode", "forward"]

HIGHER_IS_BETTER: frozenset[MetricName] = frozenset(
    {"accuracy", "agreement", "entity_f1", "cosine", "spearman", "label_spearman"}
)
BESIDE_DENSE: frozenset[MetricName] = frozenset({"kl", "agreement", "cosine", "spearman"})
"""These compare with the dense model: of no use for itself."""
FRACTIONS: frozenset[MetricName] = frozenset({"accuracy", "agreement", "entity_f1", "wer"})
BOUNDED = FRACTIONS - {"wer"}
"""At most 1; more words can be wrong than were said."""
MAX_SPECTRUM_RANKS = 64


class Metric(Part):
    """One measured quality."""

    value: float
    """those of BOUNDED are in [0, 1], a word error rate may be above; kl is in nats"""
    stderr: float | None = None
    """standard error of the mean"""
    count: int
    """items that the value covers: tokens or examples"""


class TaskMetric(Metric):
    """One measured quality of a task of lm-eval, in the metric's own unit."""

    higher_is_better: bool | None = None
    """None: lm-eval does not say"""


class Latency(Part):
    """The time of one phase at one batch size, over all samples."""

    batch: int
    phase: Phase
    """decode is per generated token, prefill and forward per batch"""
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio_to_dense: float | None = None
    """median over the dense model's median; below one is faster"""
    ratio_low: float | None = None
    """lower end of the ratio's interval"""
    ratio_high: float | None = None
    """upper end of the ratio's interval"""
    per_second: float | None = None
    """tokens (prefill, decode) or examples (forward) in a second, over the whole batch"""


class Row(Part):
    """One model of the comparison."""

    name: RowName
    ranks: str | None = Field(pattern=r"^(plan|uniform|keep-[0-9.e-]+)$")
    """`plan`, `uniform`, or one of a frontier's (`keep-0.5`), of which rounds keep the size; None: no factors"""
    trained_steps: int = 0
    rounds: int = 1
    """sizes that the training went through; after more than one the row has ranks of its own"""
    start: RowName | None = None
    """the row whose factors the training started from, or which stay where it did not help"""
    parameters: int
    """numbers in the whole model"""
    target_parameters: int
    """numbers in the layers that the recipe targets"""
    file_bytes: int
    """weights on disk"""
    metrics: dict[MetricName, Metric]
    before_replacement: dict[MetricName, Metric] | None = None
    """quality while the dense weights still took part; None where the schedule ends at τ = 1"""
    tasks: dict[str, TaskMetric] = Field(default_factory=dict)
    """`task.metric` of lm-eval → quality; `definitions` has version, shots and documents of each"""
    latency: list[Latency] = Field(default_factory=list)
    device: str | None = None
    """what the latency was measured on"""
    seconds: float | None = None
    """time to make this row from the dense model"""
    peak_memory_bytes: int | None = None
    """peak memory of the model while it was timed"""

    @model_validator(mode="after")
    def _fractions(self) -> "Row":
        for name, metric in [*self.metrics.items(), *(self.before_replacement or {}).items()]:
            if name in FRACTIONS and (metric.value < 0 or (name in BOUNDED and metric.value > 1)):
                allowed = "a fraction in [0, 1]" if name in BOUNDED else "not below 0"
                raise ValueError(f"{self.name}: {name} is {allowed}, got {metric.value}")
        return self


class LayerRow(Part):
    """One target layer of the result."""

    name: str
    out_features: int
    in_features: int
    rank: int | None
    """None: the layer stays dense"""
    kept_parameters: int
    relative_error: float | None = None
    """norm of the weight's error over the norm of the weight"""
    rank_loss: float | None = None
    """sum of the weight's squared errors"""
    pivot_condition: float | None = None
    """condition number of the pivot block; None in the plain layout"""
    group: Literal["attention", "mlp", "other"] = "other"
    block: int | None = None
    """position of the layer's block; None outside blocks"""
    spectrum: list[float] | None = None
    """share of the method's squared spectrum beyond each of `spectrum_ranks`"""
    spectrum_ranks: list[int] | None = None

    @model_validator(mode="after")
    def _aligned(self) -> "LayerRow":
        shares, ranks = self.spectrum or [], self.spectrum_ranks or []
        if len(shares) != len(ranks) or len(shares) > MAX_SPECTRUM_RANKS:
            raise ValueError(
                f"{self.name}: spectrum and spectrum_ranks need equal lengths of at most "
                f"{MAX_SPECTRUM_RANKS}, got {len(shares)} and {len(ranks)}"
            )
        return self


class StageRow(Part):
    """What one stage cost, and what it wants known."""

    name: str
    seconds: float
    peak_memory_bytes: int | None = None
    notes: list[str] = Field(default_factory=list)


class Selection(Part):
    """How the ranks of the plan were chosen."""

    kind: str
    """the selector's"""
    notes: list[str] = Field(default_factory=list)
    record: dict[str, JsonValue] = Field(default_factory=dict)
    """what it measured: `trials` or `sizes` with their scores, `rank_loss`, `subspace` by layer"""


class TrainingPoint(Part):
    """One logged step of the recovery."""

    step: int
    loss: float
    tau: float
    seconds: float
    """since the recovery began"""
    tokens_per_second: float | None = None
    kl: float | None = None
    hidden: float | None = None
    """normalised error of the hidden states"""


class ModelInfo(Part):
    """The dense model that was compressed."""

    id: str
    revision: str | None = None
    """commit on the Hub; None for what is not from the Hub"""
    model_type: str
    task: str
    parameters: int
    license: str | None = None
    """as the card of the dense model states it, several joined by commas"""
    dtype: str


class Environment(Part):
    """Where and with what the run was made: its last stage, the timing if there is one."""

    device: str
    hardware: str
    threads: int
    python: str
    torch: str
    transformers: str
    lrcompress: str
    seed: int
    compute_dtype: str


class Report(Part):
    """All that a run found."""

    schema_version: Literal[1] = 1
    model: ModelInfo
    recipe: dict[str, JsonValue]
    """the resolved recipe, every default written out"""
    environment: Environment
    rows: list[Row]
    layers: list[LayerRow] = Field(default_factory=list)
    selection: Selection | None = None
    stages: list[StageRow] = Field(default_factory=list)
    training: list[TrainingPoint] = Field(default_factory=list)
    definitions: dict[str, str] = Field(default_factory=dict)
    """metric → a sentence that defines it"""
    notes: list[str] = Field(default_factory=list)
    """warnings for the reader"""
