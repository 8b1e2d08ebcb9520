"""A context for selectors in which everything is known: weights with given spectra, a loss that is a formula."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcompress.artifacts import Factors, Layer, RankPlan, Score
from lrcompress.ranks.context import AbstractContext, LearningRun
from lrcompress.seeds import generator

Teach = Callable[[str, int, int], Factors]
"""(layer, rank, seed) → the pair that LoRA-LRD would have learned"""


class World(AbstractContext):
    """The kl of a plan is the sum of the squared values that it cuts off; the loss is 1 more."""

    def __init__(
        self, layers: Mapping[str, Layer], values: Mapping[str, Tensor], *, teach: Teach | None = None, seed: int = 0
    ) -> None:
        self.layers, self.values, self._seed = layers, values, seed
        self.teach = teach or self._best
        self.notes: list[str] = []
        self.records: dict[str, Any] = {}
        self.scored: list[tuple[RankPlan, int]] = []
        self.counted: list[tuple[str, int, int]] = []

    @property
    def seed(self) -> int:
        return self._seed

    def dense_score(self) -> Score:
        return Score(0.0, 1.0, 1.0)

    def score(self, plan: RankPlan, *, steps: int = 0) -> Score:
        self.scored.append((plan, steps))
        cut = sum(float(self.values[name][rank:].square().sum()) for name, rank in plan.ranks.items())
        cut /= 1 + steps
        return Score(cut, 1 + cut, 1 / (1 + cut))

    def weight(self, name: str) -> Tensor:
        """Its singular values are the layer's."""
        layer, values = self.layers[name], self.values[name].double()
        left, right = (
            torch.linalg.qr(torch.randn(size, len(values), generator=generator(5, name, size), dtype=torch.float64)).Q
            for size in (layer.out_features, layer.in_features)
        )
        return (left * values) @ right.T

    def learned(self, run: LearningRun) -> Mapping[str, Factors]:
        return {name: self.teach(name, rank, run.seed) for name, rank in run.ranks.items()}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def record(self, key: str, value: Any) -> None:
        self.records[key] = value

    def progress(self, what: str, done: int, total: int, figures: str = "") -> None:
        self.counted.append((what, done, total))

    def close(self) -> None:
        pass

    def _best(self, name: str, rank: int, seed: int) -> Factors:
        """The closed-form optimum with a little noise of the run's own."""
        u, s, vh = torch.linalg.svd(self.weight(name), full_matrices=False)
        noise = 1e-3 * torch.randn(vh[:rank].shape, generator=generator(seed, name), dtype=torch.float64)
        return Factors(vh[:rank] + noise, u[:, :rank] * s[:rank], None)
