"""Low-rank layers in the place of vLLM's linear layers: made empty, filled by its loader, cut for tensor parallelism.

One layer of vLLM may hold several of the checkpoint (q, k and v in one), each of its own rank and layout, or dense.
Where its outputs are divided among processes, each holds the whole of A and its rows of B; where its inputs are, its
columns of A and the whole of B, since a sum over processes goes through B unchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import set_weight_attrs  # pyright: ignore[reportMissingImports]

from lrcompress.artifacts import Layout
from lrcompress.errors import ModelError
from lrcompress.lowrank import PivotedLinear, empty_layer

DIVIDED = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
"""The layers of vLLM of which it is known here how they are divided; others divide in their own way."""

_BY_INPUT = {"A.weight", "rows.weight", "weight"}
_BY_OUTPUT = {"B.weight", "B.scale", "weight"}
_DENSE = "serve a dense copy: lrcompress export RUN --to dense"


@dataclass(frozen=True)
class Member:
    """A layer of the checkpoint: its name, its rank (None: dense), and how its factors are stored."""

    name: str
    rank: int | None
    layout: Layout = "plain"
    int8: bool = False

    @property
    def bias_on_b(self) -> bool:
        """Whether a bias would be stored as `B.bias`; other layers have theirs where vLLM looks for it."""
        return self.rank is not None and self.layout == "plain"

    def empty(self, in_features: int, out_features: int, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """A layer without a bias to be filled with the member's tensors."""
        if self.rank is None:
            return nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype).to_empty(device=device)
        return empty_layer(
            in_features, out_features, self.rank, False,
            layout=self.layout, int8=self.int8, device=device, dtype=dtype,
        )  # fmt: skip


class LowRankLinearMethod(LinearMethodBase):
    """Creates, fills and applies the members of one linear layer of vLLM.

    `layer.members` hold the numbers. Beside them stand parameters without any, at the names that a checkpoint has for
    them (`A.weight`, `B.bias`, …): vLLM's loaders look for these, and each passes on what it is given.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.loaded: set[tuple[int, str]] = set()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: object,
    ) -> None:
        """Put empty members into `layer`. Changes it. Raises ModelError for a layer that is divided in another way."""
        self._check_kind(layer, len(output_partition_sizes))
        first = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        self.inputs = slice(first, first + input_size_per_partition)
        self.outputs, sizes = self._divide(layer, output_partition_sizes, output_size)
        self.stored: list[dict[str, Tensor]] = []  # without numbers, in the shapes and dtypes of the checkpoint
        layer.members = nn.ModuleList()
        for member, outputs, size in zip(self.members, self.outputs, sizes, strict=True):
            self.stored.append(member.empty(input_size, size, "meta", params_dtype).state_dict())
            # which rows of `rest` this process needs, only `place` will tell
            held = size if member.layout == "pivoted" else len(outputs)
            module = member.empty(input_size_per_partition, held, torch.get_default_device(), params_dtype)
            layer.members.append(module.requires_grad_(False))
        for part, tensor in {part: tensor for tensors in self.stored for part, tensor in tensors.items()}.items():
            _put_door(layer, part, tensor.dtype, partial(self._load, layer, part))
        if any(member.bias_on_b for member in self.members):
            _put_door(layer, "B.bias", params_dtype, partial(self._load_bias, layer))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep of pivoted members what this process needs. Changes `layer`. ModelError where a tensor is missing."""
        wanted = {(index, part) for index, tensors in enumerate(self.stored) for part in tensors}
        if layer.bias is not None:
            wanted |= {(index, "B.bias") for index, member in enumerate(self.members) if member.bias_on_b}
        missing = sorted(f"{self.members[index].name}.{part}" for index, part in wanted - self.loaded)
        if missing:
            raise _damaged("the weights lack tensors of layers that config.json lists", missing[:4], None)
        for member, module, outputs in zip(self.members, layer.members, self.outputs, strict=True):
            if isinstance(module, PivotedLinear) and member.rank is not None:
                _keep_outputs(member.name, member.rank, module, outputs)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [.., I] → [.., O], the members' outputs after each other."""
        outputs = [member(x) for member in layer.members]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias

    def _check_kind(self, layer: Any, parts: int) -> None:
        names = [member.name for member in self.members]
        if len(names) not in (1, parts):
            raise ModelError(
                f"vLLM makes {parts} layers of one, which hold low-rank ones in another number",
                got=names, allowed="one for each, or one for all", do=_DENSE,
            )  # fmt: skip
        if layer.tp_size > 1 and type(layer) not in DIVIDED:
            raise ModelError(
                f"how vLLM divides {names[0]!r} among processes is not known here",
                got=type(layer).__name__, allowed=", ".join(kind.__name__ for kind in DIVIDED),
                do=f"serve it with tensor_parallel_size=1, or {_DENSE}",
            )  # fmt: skip

    def _divide(self, layer: Any, parts: list[int], output_size: int) -> tuple[list[Tensor], list[int]]:
        """Of each member the outputs that this process holds, by number, and how many there are in all."""
        outputs, sizes = [], []
        for index, part in enumerate(parts):
            shares, share = layer.tp_size, layer.tp_rank
            if sum(parts) == output_size:  # not divided by outputs
                shares, share = 1, 0
            elif index > 0 and isinstance(layer, QKVParallelLinear):  # several processes may hold the same keys
                shares, share = (number // layer.num_kv_head_replicas for number in (shares, share))
            outputs.append(torch.arange(share * part, (share + 1) * part, device="cpu"))
            sizes.append(shares * part)
        if len(self.members) == 1:
            offsets = [sum(sizes[:index]) for index in range(len(sizes))]
            shifted = [numbers + offset for numbers, offset in zip(outputs, offsets, strict=True)]
            outputs, sizes = [torch.cat(shifted)], [sum(sizes)]
        return outputs, sizes

    def _load(self, layer: Any, part: str, _: Tensor, value: Tensor, shard: str | int | None = None) -> None:
        """Copy a tensor of the checkpoint into its member, or what this process holds of it. Changes `layer`."""
        index = self._index(shard)
        name, stored = f"{self.members[index].name}.{part}", self.stored[index].get(part)
        if stored is None:
            raise _damaged("the weights hold a tensor that config.json does not speak of", name, None)
        if part != "weight":
            value = _as_saved(value, stored.shape)
        found, wanted = ((tuple(x.shape), x.dtype == torch.int8) for x in (value, stored))
        if found != wanted:
            raise _damaged(f"tensor {name!r} is not what config.json says: shape, and whether int8", found, wanted)
        if part in _BY_INPUT:
            value = value[:, self.inputs]
        if part in _BY_OUTPUT:
            value = value[self.outputs[index].to(value.device)]
        layer.members[index].state_dict()[part].copy_(value)
        self.loaded.add((index, part))

    def _load_bias(self, layer: Any, _: Tensor, value: Tensor, shard: str | int | None = None) -> None:
        """Pass the bias on B on to vLLM's own. Changes `layer`."""
        index = self._index(shard)
        if layer.bias is None:
            raise ModelError(
                f"{self.members[index].name!r} has a bias in the checkpoint and none in vLLM's model",
                got="B.bias", do=_DENSE,
            )  # fmt: skip
        layer.bias.weight_loader(layer.bias, value, *([] if shard is None else [shard]))
        self.loaded.add((index, "B.bias"))

    def _index(self, shard: Any) -> int:
        if len(self.members) == 1 and shard is None:
            return 0
        index = {"q": 0, "k": 1, "v": 2}.get(shard, shard)
        if len(self.members) == 1 or not isinstance(index, int):
            names = [member.name for member in self.members]
            raise ModelError(
                "vLLM loads a part of a layer that cannot be told from the others", got=shard, allowed=names, do=_DENSE
            )
        return index


def _put_door(layer: Any, name: str, dtype: torch.dtype, load: Callable[..., None]) -> None:
    """A parameter without numbers at a dotted name, whose loader is `load`. Changes `layer`."""
    child, _, last = name.rpartition(".")
    if child and child not in dict(layer.named_children()):
        layer.add_module(child, nn.Module())
    door = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    set_weight_attrs(door, {"weight_loader": load})
    layer.get_submodule(child).register_parameter(last, door)


def _as_saved(value: Tensor, shape: torch.Size) -> Tensor:
    # vLLM transposes what GPT-2 stores as [in, out], by its name: factors are [out, in] always
    turned = value.ndim == 2 and value.t().shape == shape
    return value.t() if turned and (value.shape != shape or not value.is_contiguous()) else value


def _keep_outputs(name: str, rank: int, layer: PivotedLinear, outputs: Tensor) -> None:
    """Cut `place` to these outputs, and `rest` to the rows they need. Changes `layer`. ModelError for a wrong order."""
    # vLLM's backend of transformers models puts layers of its own for `rows` and `rest`: their weights alone are asked
    if layer.place.sort().values.tolist() != list(range(len(layer.place))):
        raise _damaged(f"{name}.place is no order of the layer's outputs", layer.place.tolist()[:8], None)
    if len(outputs) == len(layer.place):
        return
    place = layer.place[outputs.to(layer.place.device)].long()
    others = place >= rank
    for key, parameter in list(layer.rest.named_parameters()):
        setattr(layer.rest, key, nn.Parameter(parameter[place[others] - rank], requires_grad=False))
    place[others] = rank + torch.arange(int(others.sum()), device=place.device)
    layer.place = place.to(torch.int32)


def _damaged(what: str, got: object, allowed: object) -> ModelError:
    return ModelError(
        what, got=got, allowed=allowed,
        do="get the checkpoint's files again: config.json and the weights must be of one save",
    )  # fmt: skip
