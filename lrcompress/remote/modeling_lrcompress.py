"""Loads this checkpoint where lrcompress is not installed: `from_pretrained(..., trust_remote_code=True)`.

Linear layers of the model are two factors each; their ranks are in config.json. Importing this file tells transformers
how to build them. Any model class asked of it is that of transformers. https://pypi.org/project/lrcompress
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .deferred import defer

METHOD = "lrcompress"
FORMAT_VERSION = 3
"""The newest layout of a checkpoint that this file reads."""


class Int8Linear(nn.Module):
    """Whole numbers `[O, I]` and a scale for each of the O outputs."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def _linear(in_features: int, out_features: int, bias: bool, dtype: torch.dtype, int8: bool) -> nn.Module:
    if int8:
        return Int8Linear(in_features, out_features, bias, dtype)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def _weight(first: Any, second: Any, product: Callable[..., Tensor], out_features: int) -> Tensor:
    """`product` `[O, I]` of the halves' weights, when its values are used: most models read a weight for its dtype."""
    shape = (out_features, first.weight.shape[1])
    if isinstance(first, Int8Linear):
        numbers = (first.weight, first.scale, second.weight, second.scale)
        return defer(
            lambda a, s, b, t: product(a.to(s.dtype) * s[:, None], b.to(t.dtype) * t[:, None]),
            numbers,
            shape,
            first.scale,
        )
    return defer(product, (first.weight, second.weight), shape, first.weight)


class LowRankLinear(nn.Module):
    """`y = B (A x) + bias`."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, dtype: torch.dtype, int8: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.A = _linear(in_features, rank, False, dtype, int8)
        self.B = _linear(rank, out_features, bias, dtype, int8)

    @property
    def weight(self) -> Tensor:
        """`B·A` `[O, I]`."""
        return _weight(self.A, self.B, lambda A, B: B @ A, self.out_features)

    @property
    def bias(self) -> Tensor | None:
        """`[O]`; that of B."""
        return self.B.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        return self.B(self.A(x))


class PivotedLinear(nn.Module):
    """R of the outputs are `rows(x)`, the others combinations of them, in the order of `place`."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, dtype: torch.dtype, int8: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rows = _linear(in_features, rank, False, dtype, int8)
        self.rest = _linear(rank, out_features - rank, False, dtype, int8)
        self.place: Tensor
        self.register_buffer("place", torch.empty(out_features, dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The rows and their combinations `[O, I]`, in the order of `place`."""

        def product(rows: Tensor, rest: Tensor) -> Tensor:
            return torch.cat([rows, rest @ rows]).index_select(0, self.place)

        return _weight(self.rows, self.rest, product, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        p = self.rows(x)
        y = torch.cat([p, self.rest(p)], dim=-1).index_select(-1, self.place)
        return y if self.bias is None else y + self.bias


class Experts(nn.Module):
    """A mixture's experts with one layer for each expert's matrix, in the place of three-dimensional weights."""

    _shell: Any

    def __init__(self, fused: Any) -> None:
        super().__init__()
        parts = ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")
        shell = copy.copy(fused)
        shell._parameters = dict.fromkeys(parts)
        self.__dict__["_shell"] = shell
        self.up, self.down = (
            nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype) for w in weights)
            for weights in (fused.get_parameter(part) for part in parts)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[N, H]` tokens, `[N, K]` experts of each and their weights → `[N, H]`."""
        result = torch.zeros_like(hidden_states)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, position = torch.where(top_k_index == number)
            if len(token) == 0:
                continue
            hidden = up(hidden_states[token])
            gated = self._shell._apply_gate(hidden) if self._shell.has_gate else self._shell.act_fn(hidden)
            found = down(gated) * top_k_weights[token, position, None]
            result.index_add_(0, token, found.to(result.dtype))
        return result


class LowRankConfig(QuantizationConfigMixin):
    """The section `quantization_config` of config.json."""

    def __init__(self, **values: Any) -> None:
        version = values.get("format_version")
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"this checkpoint's format_version is {version}, and the loader beside it reads 1 to {FORMAT_VERSION}: "
                "get all of the checkpoint's files again"
            )
        vars(self).update(values)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's."""
        return vars(self).get(key, default)


def _came(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


class LowRankQuantizer(HfQuantizer):
    """Puts the low-rank layers into the empty model before its weights are loaded."""

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        config, prefix = self.quantization_config, f"{model.base_model_prefix}."
        named = [(saved, saved.removeprefix(prefix), prefix + saved) for saved in config.get("ranks")]
        holders = {name.rpartition(".")[0].rpartition(".")[0] for names in named for name in names}
        for name, module in list(model.named_modules()):
            if name in holders and hasattr(module, "_apply_gate"):
                model.set_submodule(name, Experts(module))
        modules = dict(model.named_modules())
        self.pre_quantized = self.pre_quantized and hasattr(HfQuantizer, "get_new_dtype")
        self.layers: dict[str, nn.Module] = {}
        pivoted, int8 = set(config.get("pivoted", ())), config.get("dtype") == "int8"
        for saved, rank in config.get("ranks").items():
            name = next((n for n in (saved, saved.removeprefix(prefix), prefix + saved) if n in modules), None)
            if name is None:
                continue  # a part of the model is loaded
            dense: Any = modules[name]
            out_features, in_features = dense.weight.shape[::-1] if isinstance(dense, Conv1D) else dense.weight.shape
            kind = PivotedLinear if saved in pivoted else LowRankLinear
            with torch.device("meta"):
                layer = kind(in_features, out_features, rank, dense.bias is not None, dense.weight.dtype, int8)
            model.set_submodule(name, layer)
            self.layers[name] = layer
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        marked = any(_came(parameter) for parameter in model.parameters())  # some versions keep no such mark
        for name, layer in self.layers.items():
            lost = [key for key, value in layer.named_parameters() if not value.is_meta and not _came(value)]
            if marked and lost:
                raise ValueError(
                    f"{name}.{lost[0]} was not in the checkpoint, and would be random: get its files again"
                )
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        return model

    def is_serializable(self) -> bool:
        """Factors are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are plain Linears."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Factors are plain Linears."""
        return True


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(LowRankConfig)
    register_quantizer(METHOD)(LowRankQuantizer)


def __getattr__(name: str) -> Any:
    """The class of transformers, as one that is known to come from here: so that saving takes this file along."""
    base = getattr(transformers, name, None)
    if name.startswith("_") or not isinstance(base, type):
        raise AttributeError(name)
    own = {"__module__": __name__, "is_custom_code": classmethod(lambda cls: False)}
    globals()[name] = made = type(name, (base,), own)
    return made
