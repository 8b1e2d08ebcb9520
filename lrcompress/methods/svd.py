"""Plain truncated SVD."""

from typing import ClassVar, Literal, final

from lrcompress.artifacts import LayerStatistics
from lrcompress.linalg import Roots
from lrcompress.methods.base import AbstractMethod, Statistic


@final
class Svd(AbstractMethod):
    """The best rank-r approximation of the weight itself: minimises ‖W − BA‖_F (Eckart and Young 1936)."""

    kind: Literal["svd"] = "svd"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def roots(self, statistics: LayerStatistics) -> Roots:
        """Both identity."""
        return Roots()
