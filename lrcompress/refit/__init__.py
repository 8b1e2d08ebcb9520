"""Sequential refit: factors solved again for the inputs that the compressed model gives them."""

from lrcompress.refit.settings import Refit
from lrcompress.refit.solve import better, refit

__all__ = ["Refit", "better", "refit"]
