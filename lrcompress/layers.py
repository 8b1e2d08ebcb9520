"""Find a model's dense layers, and read and write their weights as `[O, I]` whatever their kind.

The only file that knows that transformers' Conv1D (GPT-2) stores `[I, O]`.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lrcompress.artifacts import Layer, block_and_role
from lrcompress.errors import LayerError, nearest
from lrcompress.part import Part
from lrcompress.patterns import matches

Kind = Literal["linear", "conv1d"]


class Targets(Part):
    """Which layers are compressed: groups and `include` together, without `exclude`."""

    groups: tuple[Literal["attention", "mlp", "all"], ...] = ()
    """layers inside the model's blocks: those of the attention, the others, or both (the default, if `include`
    is empty)"""
    include: tuple[str, ...] = ()
    """glob patterns on layer names or their ends; may name layers outside blocks, heads too"""
    exclude: tuple[str, ...] = ()
    """glob patterns; these stay dense"""


def find_layers(model: nn.Module, targets: Targets) -> dict[str, Layer]:
    """The layers that `targets` choose, in the model's order; works on a meta-device skeleton too.

    Layers are found by type. Blocks are the items of the outermost `nn.ModuleList`s; in a model without any,
    `all` means every dense layer. Embeddings and output heads are chosen only by name. Raises LayerError for
    a pattern that fits nothing, and for a chosen layer whose weight is tied to another module's.
    """
    candidates = _candidates(model)
    _check_patterns(candidates, (*targets.include, *targets.exclude))
    groups = targets.groups or (() if targets.include else ("all",))
    head = _output_head(model)
    tied = _tied(model)
    blocks = any(layer.block is not None for layer in candidates.values())
    chosen: dict[str, Layer] = {}
    for name, layer in candidates.items():
        named = any(matches(name, pattern) for pattern in targets.include)
        grouped = layer.group in groups or ("all" in groups and (layer.block is not None or not blocks))
        if name == head or name in tied:
            grouped = False
        if (named or grouped) and not any(matches(name, pattern) for pattern in targets.exclude):
            chosen[name] = layer
    refused = [name for name in chosen if name in tied]
    if refused:
        raise LayerError(
            f"{refused[0]} shares its weight with {tied[refused[0]]}",
            allowed="layers with a weight of their own: factors in one place would untie the two",
            do="exclude it, or untie the weights in the model first",
        )
    if not chosen:
        raise LayerError(
            "no layer is left to compress",
            got=targets.model_dump(),
            allowed=_overview(candidates),
            do="edit `targets`",
        )
    return chosen


def block_names(layers: Iterable[Layer]) -> list[str]:
    """Names of the blocks that hold these layers, in order."""
    return list(dict.fromkeys(block_and_role(layer.name)[0] for layer in layers if layer.block is not None))


def _candidates(model: nn.Module) -> dict[str, Layer]:
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks: dict[str, int] = {}
    found = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or not name:  # a model that is itself one layer has no place to put another
            continue
        block, role = block_and_role(name) if any(name.startswith(f"{item}.") for item in lists) else ("", name)
        index = blocks.setdefault(block, len(blocks)) if block else None
        out_features, in_features = read_weight(module).shape
        found[name] = Layer(name, kind, in_features, out_features, module.bias is not None, index, _group(role, block))
    return found


def _group(role: str, block: str) -> Literal["attention", "mlp", "other"]:
    if not block:
        return "other"
    lowered = role.lower()
    return "attention" if "attn" in lowered or "attention" in lowered else "mlp"


def _output_head(model: nn.Module) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _tied(model: nn.Module) -> dict[str, str]:
    """Dense layers whose weight another module uses too, or that stand at a second name → that module or name."""
    owners: dict[int, list[str]] = {}
    for parent, module in model.named_modules():
        for key, child in module._modules.items():  # named_children leaves a second name out
            for parameter in child.parameters(recurse=False) if child is not None else ():
                owners.setdefault(id(parameter), []).append(f"{parent}.{key}" if parent else key)
    return {
        name: next(other for other in owners[id(module.weight)] if other != name)
        for name, module in model.named_modules()
        if name and kind_of(module) and len(owners[id(module.weight)]) > 1
    }


def _check_patterns(candidates: dict[str, Layer], patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in candidates):
            roles = {block_and_role(name)[1] or name for name in candidates}
            raise LayerError(
                f"no layer matched `{pattern}`",
                allowed=_overview(candidates),
                do=f"edit `targets`; {nearest(pattern, [*roles, *candidates]) or 'patterns fit a name or its end'}",
            )


def _overview(candidates: dict[str, Layer]) -> str:
    roles = list(dict.fromkeys(block_and_role(name)[1] or name for name in candidates))
    shown = ", ".join(roles[:12]) + (" …" if len(roles) > 12 else "")
    return f"this model has {len(candidates)} candidate layers in {len(roles)} groups: {shown}"


def kind_of(module: nn.Module) -> Kind | None:
    """Which kind of dense layer this is; None for everything else, a `LowRankLinear` included.

    A subclass of Linear counts if it computes as Linear does; `nn.MultiheadAttention`'s output projection does
    not, because its weight is read by its parent and the layer itself is never called.
    """
    if isinstance(module, Conv1D):
        return "conv1d"
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    return "linear" if type(module).forward is nn.Linear.forward else None


def read_weight(module: nn.Module) -> Tensor:
    """The weight `[O, I]` of a dense layer: its parameter or a transposed view of it, in its dtype.

    Raises TypeError for a module that is no dense layer.
    """
    if kind_of(module) is None:
        raise TypeError(f"{type(module).__name__} is no dense layer")
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """A layer's bias `[O]` without its gradient; None if it has none."""
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy a weight `[O, I]` into a dense layer, cast to its dtype. Changes the layer."""
    with torch.no_grad():
        read_weight(module).copy_(weight)
