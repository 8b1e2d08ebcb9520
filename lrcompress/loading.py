"""Empty two-factor layers where a checkpoint's tensors will go, and the check that each tensor did go there.

transformers fills what a checkpoint lacks with random numbers and only warns; here that is an error.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lrcompress.errors import ModelError, nearest
from lrcompress.layers import kind_of, read_weight
from lrcompress.lowrank import LowRankLinear, put_module

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

_AGAIN = "get the checkpoint's files again: config.json and the weights must be of one save"


def empty_factors(dense: nn.Module, rank: int, device: torch.device | str) -> LowRankLinear:
    """A two-factor layer in the shape and dtype of a dense one, its numbers not set to anything."""
    weight = read_weight(dense)  # [O, I]
    bias = dense.bias is not None
    layer = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias, device="meta", dtype=weight.dtype)
    return layer if str(device) == "meta" else layer.to_empty(device=device)


def stored_factors(files: Iterable[str]) -> dict[str, int] | None:
    """Rank of each pair `X.A.weight` [R, I], `X.B.weight` [O, R] in safetensors files by X; reads headers.

    None if there are no such files. The names are those on disk, which transformers may map to others. Raises
    ModelError for a pair whose halves do not fit.
    """
    shapes: dict[str, list[int]] = {}
    files = [file for file in files if file.endswith(".safetensors")]
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = (name for name in tensors.keys() if name.endswith((".A.weight", ".B.weight")))
            shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
    ranks: dict[str, int] = {}
    for name in (key.removesuffix(".A.weight") for key in shapes if key.endswith(".A.weight")):
        first, second = shapes[f"{name}.A.weight"], shapes.get(f"{name}.B.weight")
        if second is None or len(first) != 2 or len(second) != 2:
            continue
        if first[0] != second[1]:
            raise _damaged(
                f"the factors of layer {name!r} do not fit together",
                f"A {first}, B {second}",
                "A [R, I], B [O, R]",
            )
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


def place_factors(model: "PreTrainedModel", ranks: Mapping[str, int]) -> dict[str, LowRankLinear]:
    """Replace the layers named in `ranks` by empty two-factor layers on the meta device. Changes the model.

    Returns them by their names in this model. A name may be absent where only a part of what was saved is
    loaded (a base without its head). Raises ModelError for any other absent name, and for a layer that is not
    dense.
    """
    modules = dict(model.named_modules())
    placed: dict[str, LowRankLinear] = {}
    for saved, rank in ranks.items():
        name = next((name for name in spellings(model, saved) if name in modules), None)
        if name is None:
            _check_partial(model, saved, modules)
            continue
        if kind_of(modules[name]) is None:
            raise ModelError(
                f"config.json lists {saved!r} as two factors; in {type(model).__name__} it is no dense layer",
                got=type(modules[name]).__name__,
                allowed="Linear or Conv1D",
                do=f"load it as {_architectures(model)}, with the transformers version named in config.json",
            )
        placed[name] = empty_factors(modules[name], rank, "meta")
    for name, layer in placed.items():
        put_module(model, name, layer)
    return placed


def check_loaded(model: "PreTrainedModel", layers: Mapping[str, LowRankLinear], *, whole: bool) -> None:
    """Raise ModelError unless every factor came from the checkpoint in its right shape.

    Unless `whole` (each listed layer was placed, and no factors are left over), the dense layers inside the
    model's blocks must have come from the checkpoint too: factors may have been meant for them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(_came_from_checkpoint(parameter) for parameter in parameters.values()):
        return  # all offloaded, or a transformers that keeps no such mark: the files were checked before
    for name, layer in layers.items():
        shapes: dict[str, tuple[int, ...]] = {
            "A.weight": (layer.rank, layer.in_features),
            "B.weight": (layer.out_features, layer.rank),
        }
        if layer.bias is not None:
            shapes["B.bias"] = (layer.out_features,)
        for part, shape in shapes.items():
            _check_parameter(f"{name}.{part}", parameters[f"{name}.{part}"], shape)
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


def _architectures(model: "PreTrainedModel") -> str:
    return " or ".join(model.config.architectures or ["the class that was saved"])


def _damaged(what: str, got: object, allowed: object) -> ModelError:
    return ModelError(what, got=got, allowed=allowed, do=_AGAIN)
