"""Empty low-rank layers where a checkpoint's tensors will go, and the check that each tensor did go there.

transformers fills what a checkpoint lacks with random numbers and only warns; here that is an error.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lrcompress.artifacts import Layout
from lrcompress.errors import ModelError, nearest
from lrcompress.experts import unfuse
from lrcompress.layers import kind_of, read_weight
from lrcompress.lowrank import AbstractLowRank, PivotedLinear, empty_layer, put_module

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

_AGAIN = "get the checkpoint's files again: config.json and the weights must be of one save"


_PAIRS = {"A": "B", "rows": "rest"}
_HALVES = tuple(f".{half}.weight" for pair in _PAIRS.items() for half in pair)
_SHAPES = "A [R, I] and B [O, R], or rows [R, I] and rest [O − R, R]"


def empty_factors(
    dense: nn.Module, rank: int, layout: Layout, device: torch.device | str, *, int8: bool
) -> AbstractLowRank:
    """A low-rank layer in the shape and dtype of a dense one, its numbers not set to anything."""
    weight = read_weight(dense)  # [O, I]
    return empty_layer(
        weight.shape[1], weight.shape[0], rank, dense.bias is not None,
        layout=layout, int8=int8, device=device, dtype=weight.dtype,
    )  # fmt: skip


def stored_factors(files: Iterable[str]) -> dict[str, int] | None:
    """Rank of each pair `X.A.weight` [R, I], `X.B.weight` [O, R] in safetensors files by X; reads headers.

    Or of `X.rows.weight` [R, I], `X.rest.weight` [O − R, R] in the pivoted layout. None if there are no such
    files. The names are those on disk, which transformers may map to others. Raises ModelError for a pair whose
    halves do not fit.
    """
    shapes: dict[str, list[int]] = {}
    files = [file for file in files if file.endswith(".safetensors")]
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = (name for name in tensors.keys() if name.endswith(_HALVES))
            shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
    ranks: dict[str, int] = {}
    for key, first in shapes.items():
        name, half = key.removesuffix(".weight").rsplit(".", 1)
        second = shapes.get(f"{name}.{_PAIRS.get(half)}.weight")
        if second is None or len(first) != 2 or len(second) != 2:
            continue
        if first[0] != second[1]:
            found = f"{half} {first}, {_PAIRS[half]} {second}"
            raise _damaged(f"the factors of layer {name!r} do not fit together", found, _SHAPES)
        ranks[name] = first[0]
    return ranks if files else None


def check_stored(model: "PreTrainedModel", ranks: Mapping[str, int], stored: Mapping[str, int]) -> None:
    """Raise ModelError unless the files hold a pair of factors for each of `ranks`, and of that rank.

    A pair beyond `ranks` is wrong if the model has a dense layer there, which would stay without numbers.
    """
    for name, rank in ranks.items():
        found = next((stored[key] for key in spellings(model, name) if key in stored), rank)
        if found != rank:
            raise _damaged(f"the weights hold layer {name!r} at another rank than config.json says", found, rank)
    absent = Counter(ranks.values()) - Counter(stored.values())
    if absent:  # by count, because names on disk may differ from the model's
        without = [name for name in ranks if not any(key in stored for key in spellings(model, name))]
        raise _damaged("the weights lack factors that config.json lists", without[:4] or f"ranks {list(absent)}", None)
    listed = {key for name in ranks for key in spellings(model, name)}
    modules = dict(model.named_modules())
    for name in stored.keys() - listed:
        found = (modules.get(key) for key in spellings(model, name))
        if any(module is not None and kind_of(module) for module in found):
            raise _damaged(
                "the weights hold factors of a layer that config.json does not list", name, sorted(ranks)[:4]
            )


def place_factors(
    model: "PreTrainedModel", ranks: Mapping[str, int], pivoted: Collection[str], *, int8: bool
) -> dict[str, AbstractLowRank]:
    """Replace the layers named in `ranks` by empty low-rank layers on the meta device. Changes the model.

    Returns them by their names in this model. A name may be absent where only a part of what was saved is
    loaded (a base without its head). Raises ModelError for any other absent name, and for a layer that is not
    dense.
    """
    unfuse(model, (key for name in ranks for key in spellings(model, name)))
    modules = dict(model.named_modules())
    placed: dict[str, AbstractLowRank] = {}
    for saved, rank in ranks.items():
        name = next((name for name in spellings(model, saved) if name in modules), None)
        if name is None:
            _check_partial(model, saved, modules)
            continue
        if kind_of(modules[name]) is None:
            raise ModelError(
                f"config.json lists {saved!r} as low-rank; in {type(model).__name__} it is no dense layer",
                got=type(modules[name]).__name__,
                allowed="Linear or Conv1D",
                do=f"load it as {_architectures(model)}, with the transformers version named in config.json",
            )
        layout: Layout = "pivoted" if saved in pivoted else "plain"
        placed[name] = empty_factors(modules[name], rank, layout, "meta", int8=int8)
    for name, layer in placed.items():
        put_module(model, name, layer)
    return placed


def check_loaded(model: "PreTrainedModel", layers: Mapping[str, AbstractLowRank], *, whole: bool) -> None:
    """Raise ModelError unless every factor came from the checkpoint in its right shape.

    Unless `whole` (each listed layer was placed, and no factors are left over), the dense layers inside the
    model's blocks must have come from the checkpoint too: factors may have been meant for them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(_came_from_checkpoint(parameter) for parameter in parameters.values()):
        return  # all offloaded, or a transformers that keeps no such mark: the files were checked before
    for name, layer in layers.items():
        for part, shape in layer.shapes().items():
            _check_parameter(f"{name}.{part}", parameters[f"{name}.{part}"], shape)
        if isinstance(layer, PivotedLinear):
            _check_place(name, layer)
    for name, module in model.named_modules():
        in_block = any(part.isdigit() for part in name.split("."))
        if not whole and in_block and kind_of(module) is not None:
            _check_parameter(f"{name}.weight", parameters[f"{name}.weight"], None)


def spellings(model: "PreTrainedModel", name: str) -> tuple[str, str, str]:
    """A saved layer's possible names in a model with another head, or without one."""
    prefix = model.base_model_prefix + "."
    return name, name.removeprefix(prefix), prefix + name


def _check_partial(model: "PreTrainedModel", name: str, modules: Mapping[str, nn.Module]) -> None:
    if type(model).__name__ in (model.config.architectures or ()):
        raise ModelError(
            f"config.json lists layer {name!r}, which {type(model).__name__} does not have",
            got=name,
            allowed=nearest(name, modules) or None,
            do="load it with the transformers version named in config.json",
        )


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...] | None) -> None:
    if parameter.is_meta:  # offloaded
        return
    if not _came_from_checkpoint(parameter):
        raise _damaged("a tensor was not in the checkpoint, and would be random", name, None)
    if shape is not None and tuple(parameter.shape) != shape:
        raise _damaged(f"tensor {name!r} has another shape than config.json says", tuple(parameter.shape), shape)


def _came_from_checkpoint(parameter: Tensor) -> bool:
    # the mark by which transformers knows what it must not initialise
    return getattr(parameter, "_is_hf_initialized", False)


def _check_place(name: str, layer: PivotedLinear) -> None:
    if not layer.place.is_meta and layer.place.sort().values.tolist() != list(range(layer.out_features)):
        raise _damaged(f"{name}.place is no order of the layer's outputs", layer.place.tolist()[:8], None)


def _architectures(model: "PreTrainedModel") -> str:
    return " or ".join(model.config.architectures or ["the class that was saved"])


def _damaged(what: str, got: object, allowed: object) -> ModelError:
    return ModelError(what, got=got, allowed=allowed, do=_AGAIN)
