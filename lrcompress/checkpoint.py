"""Saving and loading a compressed `torch.nn.Module` that is no transformers model.

A folder of two files: `model.safetensors`, and `lrcompress.json` with `format_version`, `ranks` (layer →
rank), `tied` (name → the name under which its tensor is stored) and, from format 2 on, `pivoted` (layers in that
layout), from format 3 on `dtype` (int8).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrcompress.artifacts import Layout, read_json, read_tensors, write_json, write_tensors
from lrcompress.errors import ModelError, check_empty, nearest
from lrcompress.layers import kind_of
from lrcompress.loading import empty_factors
from lrcompress.lowrank import AbstractLowRank, is_int8, pivoted_in, put_module, ranks_of, swapped

FORMAT_VERSION = 3
"""1: all layers plain; 2: with pivoted ones; 3: factors in 8 bits. The least one that will do is written."""
WEIGHTS, DESCRIPTION = "model.safetensors", "lrcompress.json"


def save_module(model: nn.Module, folder: Path) -> None:
    """Write the module's state: same tensors, same bytes. Raises OutputError if `folder` holds anything.

    Tensors that are one in memory are stored once. Raises ModelError for state that is no tensor.
    """
    check_empty(folder, "the module's folder")
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError("a module's state is no tensor", got=odd, allowed="parameters and buffers", do="drop it")
    tied = _tied(state)
    folder.mkdir(parents=True, exist_ok=True)
    # cloned: two views of one storage cannot be written
    write_tensors(folder / WEIGHTS, {name: state[name].clone() for name in sorted(state.keys() - tied.keys())})
    pivoted, int8 = pivoted_in(model), is_int8(model)
    description: dict[str, Any] = {"format_version": 3 if int8 else 2 if pivoted else 1}
    description |= {"ranks": dict(sorted(ranks_of(model).items())), "tied": tied}
    description |= ({"pivoted": pivoted} if pivoted else {}) | ({"dtype": "int8"} if int8 else {})
    write_json(folder / DESCRIPTION, description)


def load_module(model: nn.Module, folder: Path) -> None:
    """Put low-rank layers into a freshly built dense module where the saved one had them; load all tensors.

    Changes the module; it keeps its device and dtypes. Raises ModelError, the module unchanged, if the folder
    holds no such checkpoint, or one of another module: each tensor must be there, in its shape, and no other.
    """
    description = _description(folder)
    tensors = read_tensors(folder / WEIGHTS)
    tensors |= {name: tensors[kept] for name, kept in description["tied"].items() if kept in tensors}
    pivoted, int8 = description.get("pivoted", ()), description.get("dtype") == "int8"
    layers = _layers(model, description["ranks"], pivoted, int8=int8)
    with swapped(model, layers):
        _check(model.state_dict(), tensors, folder)
    for name, layer in layers.items():
        put_module(model, name, layer)
    model.load_state_dict(tensors)


def _description(folder: Path) -> dict[str, Any]:
    for file in (folder / DESCRIPTION, folder / WEIGHTS):
        if not file.is_file():
            raise ModelError(
                "the folder holds no saved module",
                got=f"no {file.name} in {folder}",
                allowed=f"a folder with {WEIGHTS} and {DESCRIPTION}",
                do="name the folder that save_module wrote; load a transformers model by from_pretrained",
            )
    description = read_json(folder / DESCRIPTION)
    if description.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise ModelError(
            f"{folder / DESCRIPTION}: format_version is unknown",
            got=description.get("format_version"),
            allowed=f"1 to {FORMAT_VERSION}",
            do="upgrade lrcompress: pip install --upgrade lrcompress",
        )
    return description


def _layers(model: nn.Module, ranks: dict[str, int], pivoted: Collection[str], *, int8: bool) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, AbstractLowRank] = {}  # a layer that stands at several names stays one layer
    layers: dict[str, nn.Module] = {}
    for name, rank in ranks.items():
        dense = modules.get(name)
        if dense is None or kind_of(dense) is None:
            raise ModelError(
                f"the saved module is low-rank at {name!r}, and this one has no dense layer there",
                got="nothing" if dense is None else type(dense).__name__,
                allowed=nearest(name, (key for key, module in modules.items() if kind_of(module))) or "a dense layer",
                do="build the module as it was built before it was compressed",
            )
        if id(dense) not in made:
            layout: Layout = "pivoted" if name in pivoted else "plain"
            empty = empty_factors(dense, rank, layout, dense.get_parameter("weight").device, int8=int8)
            made[id(dense)] = empty.train(dense.training)
        layers[name] = made[id(dense)]
    return layers


def _check(state: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    problems = [f"no tensor {name}" for name in sorted(state.keys() - tensors.keys())]
    problems += [f"a tensor {name} that the module lacks" for name in sorted(tensors.keys() - state.keys())]
    problems += [
        f"{name} {list(tensors[name].shape)}, the module's is {list(state[name].shape)}"
        for name in sorted(state.keys() & tensors.keys())
        if tensors[name].shape != state[name].shape
    ]
    if problems:
        raise ModelError(
            f"the checkpoint {folder} is not of this module",
            got="; ".join(problems[:4]) + (f"; {len(problems) - 4} more" if len(problems) > 4 else ""),
            allowed="every tensor of the module, in its shape, and no other",
            do="build the module as it was built before it was compressed, or save it again",
        )


def _tied(state: dict[str, Tensor]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in sorted(state.items()):
        if tensor.numel() == 0:  # has no address
            continue
        same = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        kept = first.setdefault(same, name)
        if kept != name:
            tied[name] = kept
    return tied
