"""The recipe section of the sequential refit."""

from pydantic import Field

from lrcompress.part import Part


class Refit(Part):
    """Solve the factors again, layer by layer, for the inputs of the compressed model."""

    damping: float = Field(default=1e-2, gt=0, le=1)
    """added to the input moments, as a share of their mean eigenvalue: directions that hardly occur keep W; with less,
    the refit learns the calibration set by heart"""
    check: int = Field(default=256, ge=0)
    """sequences of data.train, none of the calibration's, on which the refitted factors must be nearer to the dense
    model than the closed-form ones, or those stay; 0: the refitted ones in any case"""
    start_below: float = Field(default=0.7, ge=0)
    """the recovery starts from the refitted factors if their KL on those sequences is below this share of the
    closed-form ones', and else from these: what a refit shrinks, a training has to undo first"""

    def starts(self, share: float | None) -> bool:
        """Whether the recovery starts from refitted factors with this share of the KL; None: not checked."""
        return share is None or share < self.start_below
