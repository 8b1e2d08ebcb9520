"""SVD with truncation-aware whitening of the inputs."""

from typing import ClassVar, Literal, final

from pydantic import Field

from lrcompress.artifacts import LayerStatistics
from lrcompress.linalg import Roots, psd_root
from lrcompress.methods.base import AbstractMethod, Statistic, required


@final
class SvdLlm(AbstractMethod):
    """Minimises the mean squared output error E‖(W − BA)x‖² (arXiv 2403.07378, sec. 3; DRONE, NeurIPS 2021).

    R = root of the input second moment E[x xᵀ].
    """

    kind: Literal["svd_llm"] = "svd_llm"
    damping: float = Field(default=1e-4, ge=0, le=1)
    """added to the moment's diagonal, as a share of its mean eigenvalue"""
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_moment"})

    def roots(self, statistics: LayerStatistics) -> Roots:
        """R dense."""
        moment = required(statistics.input_moment, "input_moment") / statistics.tokens
        return Roots(right=psd_root(moment, damping=self.damping, side="right"))
