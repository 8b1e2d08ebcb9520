"""Fisher-weighted SVD."""

from typing import ClassVar, Literal, final

from pydantic import Field

from lrcompress.artifacts import LayerStatistics
from lrcompress.linalg import Roots, diagonal_root
from lrcompress.methods.base import AbstractMethod, Statistic, required


@final
class Fwsvd(AbstractMethod):
    """Features weighted by their Fisher information (arXiv 2207.00112, eq. 7).

    L (or R) = diag √(squared weight gradient, summed over the other side). The gradient is the one of `kron`: its
    second moment is the Fisher information of the model's own labels, where the paper takes those of the data.
    """

    kind: Literal["fwsvd"] = "fwsvd"
    weigh: Literal["outputs", "inputs"] = "outputs"
    """the rows of the weight: of torch's `[O, I]` the outputs, of the paper's `Z = X W + b` the inputs"""
    damping: float = Field(default=1e-3, ge=0, le=1)
    """added to each feature's Fisher information, as a share of the mean"""
    needs: ClassVar[frozenset[Statistic]] = frozenset({"fisher_by_output", "fisher_by_input"})

    def roots(self, statistics: LayerStatistics) -> Roots:
        """L or R diagonal."""
        by_output = required(statistics.fisher_by_output, "fisher_by_output")
        by_input = required(statistics.fisher_by_input, "fisher_by_input")
        fisher = by_output if self.weigh == "outputs" else by_input
        root = diagonal_root(fisher / statistics.sequences, damping=self.damping)
        return Roots(left=root) if self.weigh == "outputs" else Roots(right=root)
