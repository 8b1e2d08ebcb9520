"""Activation-aware SVD."""

from typing import ClassVar, Literal, final

from pydantic import Field

from lrcompress.artifacts import LayerStatistics
from lrcompress.linalg import Roots, diagonal_root
from lrcompress.methods.base import AbstractMethod, Statistic, required


@final
class Asvd(AbstractMethod):
    """Input features weighted by their mean absolute activation (arXiv 2312.05821, sec. 3.2).

    R = diag (mean |x|)^alpha.
    """

    kind: Literal["asvd"] = "asvd"
    alpha: float = Field(default=0.5, ge=0, le=2)
    """exponent of the mean absolute activation; 0 is plain SVD"""
    damping: float = Field(default=1e-6, ge=0, le=1)
    """added to each squared weight, as a share of the mean"""
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_abs_sum"})

    def roots(self, statistics: LayerStatistics) -> Roots:
        """R diagonal."""
        mean = required(statistics.input_abs_sum, "input_abs_sum").double() / statistics.tokens
        return Roots(right=diagonal_root(mean ** (2 * self.alpha), damping=self.damping))
