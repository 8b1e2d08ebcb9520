"""The two-factor layer, and putting factors into a model.

    x [.., I]                 x [.., I]
       │                         │
┌──────┴──────┐           ┌──────┴──────┐
│  W   [O, I] │           │  A   [R, I] │
│             │    →      └──────┬──────┘
│             │              [.., R]          R·(I + O) numbers in place of I·O
│             │           ┌──────┴──────┐
│      + bias │           │  B   [O, R] │
└──────┬──────┘           │      + bias │
       │                  └──────┬──────┘
    y [.., O]                 y [.., O]
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Factors


class LowRankLinear(nn.Module):
    """`y = B(A(x))` with two plain `nn.Linear`s; the bias sits on `B`.

    Takes the place of a Linear of `in_features` → `out_features`. Plain submodules, so that PEFT, torchao,
    Trainer and torch.compile see ordinary layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def of(cls, factors: Factors, *, device: torch.device | str, dtype: torch.dtype) -> "LowRankLinear":
        """A layer that holds these factors, cast to `dtype` on `device`."""
        rank, in_features = factors.A.shape
        layer = cls(in_features, factors.B.shape[0], rank, factors.bias is not None, device="meta", dtype=dtype)
        layer.A.weight = _parameter(factors.A, device, dtype)
        layer.B.weight = _parameter(factors.B, device, dtype)
        if factors.bias is not None:
            layer.B.bias = _parameter(factors.bias, device, dtype)
        return layer

    @property
    def in_features(self) -> int:
        """I."""
        return self.A.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.B.out_features

    @property
    def rank(self) -> int:
        """R."""
        return self.A.out_features

    @property
    def weight(self) -> Tensor:
        """The product `B·A` `[O, I]`, made at each call: some models read a layer's weight for its dtype."""
        return self.B.weight @ self.A.weight

    @property
    def bias(self) -> Tensor | None:
        """`B`'s bias."""
        return self.B.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        return self.B(self.A(x))

    def extra_repr(self) -> str:
        """Shape, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def put_factors(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Replace the named layers by `LowRankLinear`s of these factors. Changes the model."""
    for name, pair in factors.items():
        weight = next(model.get_submodule(name).parameters())
        put_module(model, name, LowRankLinear.of(pair, device=weight.device, dtype=weight.dtype))


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule at a dotted name. Changes the model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of each two-factor layer by its dotted name; one that stands at two names is listed twice."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module.rank for name, module in modules if isinstance(module, LowRankLinear)}


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block these modules stand at their names; afterwards the former ones do again."""
    former = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        put_module(model, name, module)
    try:
        yield
    finally:
        for name, module in former.items():
            put_module(model, name, module)


def _parameter(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> nn.Parameter:
    # a copy: factors of several rows may share storage with what they were cut from
    return nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True).contiguous())
