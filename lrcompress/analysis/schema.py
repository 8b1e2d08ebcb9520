"""The schema of analysis.json; the other views are made from it and have no numbers of their own."""

from typing import Literal

from pydantic import Field, JsonValue

from lrcompress.part import Part
from lrcompress.report.schema import Environment, ModelInfo


class EffectiveRank(Part):
    """How many dimensions a spectrum of squares (σ², or a moment's eigenvalues) amounts to."""

    full: int
    """how many there are"""
    entropy: float
    """exp of the entropy of the shares (after Roy and Vetterli 2007, there with σ in place of σ²)"""
    stable: float
    """sum over the largest: ‖W‖_F² / ‖W‖₂²"""
    share_90: int
    """the least number of dimensions that hold 90 % of the sum"""
    share_95: int
    share_99: int


class RankCurve(Part):
    """A quantity at chosen ranks."""

    ranks: list[int]
    values: list[float]

    def near(self, rank: int) -> float:
        """The value at the chosen rank that is nearest to `rank`."""
        return self.values[min(range(len(self.ranks)), key=lambda i: abs(self.ranks[i] - rank))]


class Similarity(Part):
    """φ of two runs at one layer; ‖U₁[:i] U₂[:j]ᵀ‖² / min(i, j)."""

    ranks: list[int]
    """the i and j of the map"""
    map: list[list[float]]
    """φ(i, j)"""
    diagonal: list[float]
    """φ(i, i) at `ranks`"""
    level: list[float]
    """its mean for random subspaces"""
    deviation: list[float]
    """and their standard deviation"""
    range: tuple[int, int] | None
    """ranks at which φ(i, i) stands clearly above the random level"""


class AmplificationRow(Part):
    """‖BA‖ and ‖W‖ within r directions (arXiv 2106.09685, sec. 7.3)."""

    rank: int
    learned: float
    """norm of the learned BA in its own first r directions"""
    in_learned: float
    """norm of W in them"""
    in_own: float
    """norm of W in its own first r"""
    in_random: float
    """norm of W in random ones, root mean square"""
    factor: float
    """learned / in_learned"""


class LayerAnalysis(Part):
    """One layer."""

    name: str
    role: str
    group: Literal["attention", "mlp", "other"]
    block: int | None
    out_features: int
    in_features: int
    max_rank: int
    """the largest rank whose factors are smaller than the weight"""
    weight: EffectiveRank
    inputs: EffectiveRank
    """of E[x xᵀ]"""
    curvature: EffectiveRank
    """of E[g gᵀ], g the gradient at the output"""
    methods: dict[str, EffectiveRank]
    """of each method's weighted matrix"""
    spectra: dict[str, RankCurve]
    """share of the squares beyond a rank: of W (`weight`) and of each method's weighted matrix"""
    rank_loss: dict[str, RankCurve]
    """‖W − BA‖² / ‖W‖²: `optimum`, the recipe's method in closed form, `learned` by LoRA-LRD"""
    similarity: dict[Literal["A", "B"], Similarity]
    amplification: list[AmplificationRow]
    kept: dict[str, int | None]
    """selector → rank; None: dense"""


class SelectorRow(Part):
    """A selector at the common size."""

    name: str
    kept_share: float | None = None
    """of the target layers' parameters; None where it refused"""
    kl: float | None = None
    """validation, closed form"""
    loss: float | None = None
    accuracy: float | None = None
    notes: list[str] = Field(default_factory=list)
    refused: str | None = None
    """why it selects nothing"""
    seconds: float = 0.0


class Analysis(Part):
    """All that was found about a model's layers."""

    schema_version: Literal[1] = 1
    model: ModelInfo
    environment: Environment
    recipe: dict[str, JsonValue]
    method: str
    """the recipe's method"""
    keep_parameters: float
    """the size at which selectors are compared"""
    layers: list[LayerAnalysis]
    dense: SelectorRow | None = None
    """the dense model on the validation data"""
    selectors: list[SelectorRow]
    findings: list[str]
    """sentences made from the numbers"""
    notes: list[str] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)
    """stage → time"""
