"""Sequential refit: factors solved again for the inputs that the compressed model gives them."""

from lrcompress.refit.settings import Refit
from lrcompress.refit.solve import Checked, better, distance, refit

__all__ = ["Checked", "Refit", "better", "distance", "refit"]
