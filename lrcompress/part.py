"""Part: the base of every recipe section."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen value read from a recipe; unknown keys are errors, attribute docstrings document the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
