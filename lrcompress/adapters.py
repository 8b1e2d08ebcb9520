"""Which Linears PEFT has to adapt, by the names that layers had before they were compressed."""

from collections.abc import Iterable

from torch import nn

from lrcompress.errors import LayerError, nearest
from lrcompress.int8 import Int8Linear
from lrcompress.layers import kind_of
from lrcompress.lowrank import AbstractLowRank


def lora_targets(model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """What PEFT's `target_modules` must name to adapt these layers of a compressed model, sorted.

    `names` are names of layers or their last parts, as in PEFT: `q_proj` is every layer `….q_proj`, and `experts.up`
    that of all experts. A low-rank layer is named by its two factors, a dense one by itself. Adapters on factors merge
    into them, so that a merged model keeps its ranks and its size. Raises LayerError for a name that no layer has, and
    for factors in 8 bits.
    """
    names = [names] if isinstance(names, str) else list(names)
    layers = {name: module for name, module in model.named_modules() if _adaptable(module)}
    # what is inside a low-rank layer goes by the layer's name
    layers = {name: module for name, module in layers.items() if name.rpartition(".")[0] not in layers}
    targets: list[str] = []
    for asked in names:
        found = [name for name in layers if f".{name}".endswith(f".{asked}") or _of_expert(name, asked)]
        if not found:
            raise LayerError(
                f"no layer `{asked}` to adapt", got=asked,
                allowed=nearest(asked, layers) or ", ".join(sorted({name.rpartition(".")[2] for name in layers})),
                do='correct the name; for all layers give PEFT target_modules="all-linear"',
            )  # fmt: skip
        for name in found:
            targets += _linears(name, layers[name])
    return sorted(set(targets))


def _of_expert(name: str, asked: str) -> bool:
    group, _, number = name.rpartition(".")
    return number.isdigit() and ".experts." in name and f".{group}".endswith(f".{asked}")


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, AbstractLowRank) or kind_of(module) is not None


def _linears(name: str, layer: nn.Module) -> list[str]:
    if not isinstance(layer, AbstractLowRank):
        return [name]
    children = dict(layer.named_children())
    if any(isinstance(child, Int8Linear) for child in children.values()):
        raise LayerError(
            f"layer `{name}` has factors in 8 bits, which PEFT cannot adapt", got="dtype int8",
            allowed="factors in the model's dtype", do="compress with `dtype: model`",
        )  # fmt: skip
    return [f"{name}.{key}" for key in children]
