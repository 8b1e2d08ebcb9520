"""Kronecker-factored curvature on both sides of the weight."""

from typing import ClassVar, Literal, final

from pydantic import Field

from lrcompress.artifacts import LayerStatistics
from lrcompress.linalg import Roots, psd_root
from lrcompress.methods.base import AbstractMethod, Statistic, required


@final
class Kron(AbstractMethod):
    """Second-order estimate of the loss increase, tr(G Δ C Δᵀ) for Δ = W − BA.

    G = Σ g gᵀ per sequence and C = Σ ‖g‖² x xᵀ / Σ ‖g‖², with g gradients at the layer's output whose second moment
    at the logits is the Fisher information of the model's own labels (`fisher_probe`; K-FAC, arXiv 1503.05671,
    sec. 3; as truncation: GFWSVD, arXiv 2505.17974, and IO-SVD, arXiv 2605.15626). Weighting x xᵀ by ‖g‖² needs only
    the direction of g, not its size, to be independent of x. G is per sequence, not per token, so that layers that
    see different numbers of tokens compare.
    """

    kind: Literal["kron"] = "kron"
    input_damping: float = Field(default=1e-4, ge=0, le=1)
    """added to C's diagonal, as a share of its mean eigenvalue"""
    output_damping: float = Field(default=1e-3, ge=0, le=1)
    """added to G's diagonal, as a share of its mean eigenvalue"""
    needs: ClassVar[frozenset[Statistic]] = frozenset({"weighted_input_moment", "grad_moment"})
    estimates_loss: ClassVar[bool] = True

    def roots(self, statistics: LayerStatistics) -> Roots:
        """L and R dense."""
        weighted = required(statistics.weighted_input_moment, "weighted_input_moment")
        grad_moment = required(statistics.grad_moment, "grad_moment")
        # tr G = Σ‖g‖², the sum that the weighted moment was weighted with
        norm = grad_moment.diagonal().sum().clamp_min(1e-300)
        return Roots(
            left=psd_root(grad_moment / statistics.sequences, damping=self.output_damping, side="left"),
            right=psd_root(weighted / norm, damping=self.input_damping, side="right"),
        )
