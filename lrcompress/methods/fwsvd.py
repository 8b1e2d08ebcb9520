"""Fisher-weighted SVD."""

from typing import ClassVar, Literal, final

from pydantic import Field

from lrcompress.artifacts import LayerStatistics
from lrcompress.linalg import Roots, diagonal_root
from lrcompress.methods.base import AbstractMethod, Statistic, required


@final
class Fwsvd(AbstractMethod):
    """Rows weighted by their Fisher information (arXiv 2207.00112, eq. 7).

    L = diag √(row sums of the squared weight gradient); a row is an output feature of the `[O, I]` weight. The
    gradient is the one of `kron`: its second moment is the Fisher information of the model's own labels.
    """

    kind: Literal["fwsvd"] = "fwsvd"
    damping: float = Field(default=1e-3, ge=0, le=1)
    """added to each row's Fisher information, as a share of the mean"""
    needs: ClassVar[frozenset[Statistic]] = frozenset({"fisher_by_output"})

    def roots(self, statistics: LayerStatistics) -> Roots:
        """L diagonal."""
        fisher = required(statistics.fisher_by_output, "fisher_by_output")
        return Roots(left=diagonal_root(fisher / statistics.sequences, damping=self.damping))
