"""The closed-form methods; the union is the registry."""

from typing import Annotated

from pydantic import Field

from lrcompress.methods.asvd import Asvd
from lrcompress.methods.base import BACKWARD, AbstractMethod, Statistic
from lrcompress.methods.fwsvd import Fwsvd
from lrcompress.methods.kron import Kron
from lrcompress.methods.svd import Svd
from lrcompress.methods.svd_llm import SvdLlm

Method = Annotated[Svd | Fwsvd | Asvd | SvdLlm | Kron, Field(discriminator="kind")]

__all__ = ["BACKWARD", "AbstractMethod", "Asvd", "Fwsvd", "Kron", "Method", "Statistic", "Svd", "SvdLlm"]
