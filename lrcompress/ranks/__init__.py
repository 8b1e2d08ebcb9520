"""The rank selectors; the union is the registry."""

from typing import Annotated

from pydantic import Field

from lrcompress.ranks.base import AbstractSelector
from lrcompress.ranks.budget import Budget
from lrcompress.ranks.energy import Energy
from lrcompress.ranks.fixed import Fixed
from lrcompress.ranks.uniform import Uniform

Selector = Annotated[Fixed | Uniform | Energy | Budget, Field(discriminator="kind")]

__all__ = ["AbstractSelector", "Budget", "Energy", "Fixed", "Selector", "Uniform"]
