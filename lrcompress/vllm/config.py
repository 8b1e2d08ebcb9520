"""vLLM's view of a compressed checkpoint's config.json: which of its layers hold low-rank ones, and of what rank."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
)

from lrcompress.errors import ModelError
from lrcompress.hf import LowRankConfig
from lrcompress.registration import METHOD
from lrcompress.vllm.linear import LowRankLinearMethod, Member

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper  # pyright: ignore[reportMissingImports]


class LowRankServingConfig(QuantizationConfig):
    """`LowRankConfig` as vLLM asks for it: by the names of its own layers, of which one may hold several of ours."""

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__()
        self.ranks = config.ranks
        self.pivoted = list(config.get("pivoted", ()))
        self.int8 = config.get("dtype") == "int8"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LowRankServingConfig":
        """From the `quantization_config` of a config.json. Raises ModelError as `LowRankConfig` does."""
        return cls(LowRankConfig(**config))

    def get_name(self) -> str:
        """The `quant_method` of config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of plain matrix products."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: there is no kernel of our own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Take over the names that vLLM's model gives to the checkpoint's layers. Changes the config."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self.pivoted = hf_to_vllm_mapper.apply_list(self.pivoted)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """How vLLM's layer of this name is made, filled and computed; None for what is no linear layer.

        Raises ModelError where the checkpoint has factors for a layer that is not a linear one here.
        """
        members = [self._member(name) for name in self._members(prefix)]
        low_rank = any(member.rank is not None for member in members)
        if isinstance(layer, LinearBase):
            return LowRankLinearMethod(members) if low_rank else UnquantizedLinearMethod()
        if low_rank or any(name.startswith(f"{prefix}.") for name in self.ranks):
            raise ModelError(
                f"config.json lists {prefix!r} as low-rank, which vLLM's model does not compute as a linear layer",
                got=type(layer).__name__,
                allowed="linear layers outside of experts and output head",
                do="serve a dense copy: lrcompress export RUN --to dense",
            )
        return None

    def _members(self, prefix: str) -> list[str]:
        parent, dot, name = prefix.rpartition(".")
        return [f"{parent}{dot}{member}" for member in self.packed_modules_mapping.get(name, [name])]

    def _member(self, name: str) -> Member:
        saved = self._saved_name(name)
        if saved is None:
            return Member(name, None)
        return Member(name, self.ranks[saved], "pivoted" if saved in self.pivoted else "plain", self.int8)

    def _saved_name(self, name: str) -> str | None:
        """The layer's name in `ranks`: the same, or the only one that differs by a leading part, as without a head."""
        if name in self.ranks:
            return name
        close = [key for key in self.ranks if f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")]
        return close[0] if len(close) == 1 else None
