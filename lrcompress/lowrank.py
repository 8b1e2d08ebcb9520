"""The two layers that stand in a dense one's place, and putting them into a model.

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

The pivoted layer computes the same function from R(I + O − R) numbers: R of the outputs are `rows·x`, the others
combinations of them (PIFA, arXiv 2501.19090).

    x [.., I]
       │
┌──────┴──────┐
│ rows [R, I] ├──────┐
└──────┬──────┘      │
┌──────┴───────┐     │
│ rest [O−R, R]│     │
└──────┬───────┘     │
       └──── place ──┘      the outputs in their order
             + bias
               │
            y [.., O]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Factors, Layout, Pivoted
from lrcompress.int8 import Int8Linear, dequantized
from lrcompress.remote.deferred import defer


class AbstractLowRank(nn.Module, ABC):
    """What stands in the place of a dense layer of `in_features` → `out_features`."""

    layout: Layout

    @property
    @abstractmethod
    def in_features(self) -> int:
        """I."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """O."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """R."""

    @abstractmethod
    def halves(self) -> tuple[nn.Module, nn.Module]:
        """The two modules that hold its numbers."""

    @abstractmethod
    def _paired(self, first: Tensor, second: Tensor) -> Factors:
        """The plain factors of the halves' weights."""

    def pair(self) -> Factors:
        """The plain factors A `[R, I]`, B `[O, R]` of the same function, and the bias."""
        first, second = self.halves()
        return self._paired(dense_weight(first), dense_weight(second))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its name within the layer, as rank and sizes demand it."""
        names = [name for name, _ in self.named_parameters()]
        wanted = self._shapes()
        return {name: wanted[name] for name in names}

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def weight(self) -> Tensor:
        """The product `B·A` `[O, I]`, multiplied when its values are used: most models read a weight for its dtype."""
        shape = (self.out_features, self.in_features)
        first, second = self.halves()
        if isinstance(first, Int8Linear) and isinstance(second, Int8Linear):
            stored = (first.weight, first.scale, second.weight, second.scale)
            return defer(
                lambda a, s, b, t: _product(self._paired(dequantized(a, s), dequantized(b, t))),
                stored,
                shape,
                first.scale,
            )
        inputs = (dense_weight(first), dense_weight(second))
        return defer(lambda *weights: _product(self._paired(*weights)), inputs, shape, inputs[0])

    def extra_repr(self) -> str:
        """Shape, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(AbstractLowRank):
    """`y = B(A(x))` with two plain `nn.Linear`s; the bias sits on `B`.

    Plain submodules, so that PEFT, torchao, Trainer and torch.compile see ordinary layers.
    """

    layout: Layout = "plain"

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
    def bias(self) -> Tensor | None:
        """`B`'s bias."""
        return self.B.bias

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "A.weight": (self.rank, self.in_features),
            "A.scale": (self.rank,),
            "B.weight": (self.out_features, self.rank),
            "B.scale": (self.out_features,),
            "B.bias": (self.out_features,),
        }

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """A and B."""
        return self.A, self.B

    def _paired(self, first: Tensor, second: Tensor) -> Factors:
        return Factors(first, second, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        return self.B(self.A(x))


class PivotedLinear(AbstractLowRank):
    """`y[o] = [p, rest(p)][place[o]] + bias[o]` with `p = rows(x)`."""

    layout: Layout = "pivoted"

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
        self.rows = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.rest = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.place: Tensor
        self.register_buffer("place", torch.arange(out_features, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def of(cls, pivoted: Pivoted, *, device: torch.device | str, dtype: torch.dtype) -> "PivotedLinear":
        """A layer that holds these numbers, cast to `dtype` on `device`."""
        (rank, in_features), out_features = pivoted.rows.shape, len(pivoted.place)
        layer = cls(in_features, out_features, rank, pivoted.bias is not None, device="meta", dtype=dtype)
        layer.rows.weight = _parameter(pivoted.rows, device, dtype)
        layer.rest.weight = _parameter(pivoted.rest, device, dtype)
        layer.place = pivoted.place.to(device)
        if pivoted.bias is not None:
            layer.bias = _parameter(pivoted.bias, device, dtype)
        return layer

    @property
    def in_features(self) -> int:
        """I."""
        return self.rows.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.rows.out_features + self.rest.out_features

    @property
    def rank(self) -> int:
        """R."""
        return self.rows.out_features

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "rows.weight": (self.rank, self.in_features),
            "rows.scale": (self.rank,),
            "rest.weight": (self.out_features - self.rank, self.rank),
            "rest.scale": (self.out_features - self.rank,),
            "bias": (self.out_features,),
        }

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """The rows and the rest."""
        return self.rows, self.rest

    def _paired(self, first: Tensor, second: Tensor) -> Factors:
        return Pivoted(first, second, self.place, self.bias).factors()

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        p = self.rows(x)
        y = torch.cat([p, self.rest(p)], dim=-1).index_select(-1, self.place)
        return y if self.bias is None else y + self.bias


LAYERS: Mapping[Layout, type[LowRankLinear] | type[PivotedLinear]] = {"plain": LowRankLinear, "pivoted": PivotedLinear}


def empty_layer(
    in_features: int,
    out_features: int,
    rank: int,
    bias: bool,
    *,
    layout: Layout,
    int8: bool,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> LowRankLinear | PivotedLinear:
    """A layer to be filled with a checkpoint's tensors."""
    layer = LAYERS[layout](in_features, out_features, rank, bias, device="meta", dtype=dtype)
    if int8:
        to_int8(layer)
    return layer if str(device) == "meta" else layer.to_empty(device=device)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight `[O, I]` of a factor, whatever it is stored in: a Linear has it, others make it."""
    weight = module.dense_weight() if isinstance(module, Int8Linear) else module.weight
    assert isinstance(weight, Tensor)  # a parameter, but under torch.func.functional_call
    return weight


def low_rank_module(
    stored: Factors | Pivoted,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    int8: bool = False,
    scales: torch.dtype | None = None,
) -> LowRankLinear | PivotedLinear:
    """The layer of a pair in its layout, computed in `dtype`; its factors in 8 bits if asked for.

    `scales`: the dtype that the scales of 8 bits are saved in, where it is not `dtype`.
    """
    # factors on a grid of 8 bits are no numbers of a half dtype
    exact = torch.promote_types(dtype, torch.float32) if int8 else dtype
    if isinstance(stored, Pivoted):
        layer = PivotedLinear.of(stored, device=device, dtype=exact)
    else:
        layer = LowRankLinear.of(stored, device=device, dtype=exact)
    if int8:
        to_int8(layer, scales or dtype)
    return layer.to(dtype)


def to_int8(layer: AbstractLowRank, scales: torch.dtype | None = None) -> None:
    """Store a low-rank layer's factors in 8 bits, with scales that `scales` (None: their dtype) holds exactly.

    Changes the layer.
    """
    for name, module in layer.named_children():
        if isinstance(module, nn.Linear):
            setattr(layer, name, Int8Linear.of(module, scales))


def put_factors(model: nn.Module, factors: Mapping[str, Factors | Pivoted], int8: bool = False) -> None:
    """Replace the named layers by layers of these factors. Changes the model."""
    for name, pair in factors.items():
        weight = next(model.get_submodule(name).parameters())
        put_module(model, name, low_rank_module(pair, device=weight.device, dtype=weight.dtype, int8=int8))


def in_place_of(dense: nn.Module, pair: Factors) -> LowRankLinear:
    """The plain layer of a pair, on the device and in the dtype of the dense layer whose place it takes."""
    weight = next(dense.parameters())
    return LowRankLinear.of(pair, device=weight.device, dtype=weight.dtype)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule at a dotted name. Changes the model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of each low-rank layer by its dotted name; one that stands at two names is listed twice."""
    return {name: module.rank for name, module in _low_rank_layers(model)}


def is_int8(model: nn.Module) -> bool:
    """Whether the low-rank layers hold their factors in 8 bits."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def pivoted_in(model: nn.Module) -> list[str]:
    """Names of the low-rank layers in the pivoted layout, sorted."""
    return sorted(name for name, module in _low_rank_layers(model) if module.layout == "pivoted")


def _low_rank_layers(model: nn.Module) -> list[tuple[str, AbstractLowRank]]:
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, AbstractLowRank)]


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


def _product(pair: Factors) -> Tensor:
    return pair.B @ pair.A


def _parameter(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> nn.Parameter:
    # a copy: factors of several rows may share storage with what they were cut from
    return nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True).contiguous())
