"""Subspaces that two runs of LoRA find at the same layer, and how much of a weight lies in one.

Pure tensors; all in float64.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lrcompress.linalg import product_svd, singular_values


def right_basis(matrix: Tensor) -> Tensor:
    """Right singular vectors `[min(R, I), I]` of a matrix `[R, I]`, by falling singular value.

    For A as they are; for B's left singular vectors pass `B.T`.
    """
    return torch.linalg.svd(matrix.double(), full_matrices=False).Vh


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """φ(i, j) = ‖U₁[:i] U₂[:j]ᵀ‖² / min(i, j) for all i and j, `[K₁, K₂]`, each in [0, 1].

    `first` [K₁, n], `second` [K₂, n] hold orthonormal rows (arXiv 2106.09685, eq. 4 and app. G). One product of
    the bases, squared and summed along both axes.
    """
    squares = (first @ second.T).square().cumsum(0).cumsum(1)
    i = torch.arange(1, len(first) + 1, device=squares.device)[:, None]
    j = torch.arange(1, len(second) + 1, device=squares.device)
    return (squares / torch.minimum(i, j)).clamp_max(1.0)


@dataclass(frozen=True)
class Level:
    """φ of two independent, uniformly random subspaces: mean and standard deviation."""

    mean: float
    deviation: float


def random_level(i: int, j: int, n: int) -> Level:
    """φ of random subspaces of dimensions i and j in ℝⁿ.

    tr(PQ) of two projections, one of them rotated uniformly, has the mean ij/n and the variance
    2·i(n−i)·j(n−j) / (n²(n−1)(n+2)).
    """
    least = min(i, j)
    variance = 2 * i * (n - i) * j * (n - j) / (n * n * (n - 1) * (n + 2)) if n > 1 else 0.0
    return Level(i * j / n / least, sqrt(variance) / least)


@dataclass(frozen=True)
class Evidence:
    """φ(i, i) beside its random level, i = 1 … R."""

    phi: Tensor
    """[R]"""
    level: Tensor
    """[R] mean of random subspaces"""
    deviation: Tensor
    """[R] their standard deviation"""

    def record(self) -> dict[str, list[float]]:
        """Plain values."""
        return {"phi": self.phi.tolist(), "level": self.level.tolist(), "deviation": self.deviation.tolist()}

    def clear(self, *, sigmas: float, excess: float) -> Tensor:
        """Which i stand clearly above the random level, `[R]` bool.

        By `sigmas` standard deviations, and by `excess` of the way from the level to 1: in large spaces the
        deviation is so small that a difference of no use would pass for one.
        """
        above = self.phi - self.level
        return (above > sigmas * self.deviation) & (above >= excess * (1 - self.level)) & (self.level < 1)

    def range(self, *, sigmas: float, excess: float) -> tuple[int, int] | None:
        """The longest run of ranks that stand clearly above the random level, first and last; None without any."""
        best: tuple[int, int] | None = None
        start = 0
        flags = [*self.clear(sigmas=sigmas, excess=excess).tolist(), False]
        for rank, flag in enumerate(flags, 1):
            if flag and not start:
                start = rank
            if not flag and start:
                if best is None or rank - start > best[1] - best[0] + 1:
                    best = (start, rank - 1)
                start = 0
        return best


def evidence(phi: Tensor, n: int) -> Evidence:
    """The diagonal of φ `[R, R]` of subspaces in ℝⁿ."""
    levels = [random_level(i, i, n) for i in range(1, len(phi) + 1)]
    return Evidence(
        phi.diagonal().double().cpu(),
        torch.tensor([level.mean for level in levels], dtype=torch.float64),
        torch.tensor([level.deviation for level in levels], dtype=torch.float64),
    )


@dataclass(frozen=True)
class Amplification:
    """‖ΔW‖ / ‖Uᵀ W V‖ for r directions (arXiv 2106.09685, sec. 7.3), ΔW being the learned BA cut at rank r."""

    rank: int
    learned: float
    """norm of the learned product within its first r directions"""
    in_learned: float
    """norm of W within them"""
    in_own: float
    """norm of W within its own first r directions"""
    in_random: float
    """norm of W within random directions, root mean square: ‖W‖·r / √(O·I)"""

    @property
    def factor(self) -> float:
        """How much the learned product is larger than W where it is."""
        return self.learned / max(self.in_learned, 1e-300)


def amplification(weight: Tensor, A: Tensor, B: Tensor, rank: int) -> Amplification:
    """Of the learned pair `B·A` (B `[O, R]`, A `[R, I]`) against the weight `[O, I]`, in `rank` directions."""
    weight = weight.double()
    u, s, vh = product_svd(B, A)
    left, right = u[:, :rank], vh[:rank]
    own = singular_values(weight)[:rank]
    out_features, in_features = weight.shape
    return Amplification(
        rank,
        s[:rank].norm().item(),
        (left.T @ weight @ right.T).norm().item(),
        own.norm().item(),
        weight.norm().item() * rank / sqrt(out_features * in_features),
    )
