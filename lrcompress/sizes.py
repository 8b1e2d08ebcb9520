"""Exact sizes of a model with some layers factorised, from its skeleton on the meta device."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Layer, StoredDtype
from lrcompress.lowrank import empty_layer, swapped

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
"""In safetensors' order, which is that of its file from behind."""


@dataclass(frozen=True)
class Size:
    """Numbers in a model's parameters, and bytes of its safetensors file."""

    parameters: int
    file_bytes: int


def model_size(
    skeleton: nn.Module,
    layers: Mapping[str, Layer],
    ranks: Mapping[str, int],
    dtype: torch.dtype,
    stored: StoredDtype = "model",
) -> Size:
    """The size that the model has with these ranks, stored in `dtype` as one file, its factors in `stored`.

    Nothing is written.
    """
    modules = {
        name: empty_layer(layers[name].in_features, layers[name].out_features, rank, layers[name].bias,
                          layout=layers[name].layout, int8=stored == "int8", device="meta")
        for name, rank in ranks.items()
    }  # fmt: skip
    with swapped(skeleton, modules):
        parameters = dict(skeleton.named_parameters())  # a tied one counts once, as it is stored once
        persistent = skeleton.state_dict().keys()
        buffers = {name: buffer for name, buffer in skeleton.named_buffers() if name in persistent}
    count = sum(parameter.numel() for parameter in parameters.values())
    return Size(count, _file_bytes(parameters | buffers, dtype))


def _file_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """8 bytes of length, a JSON header padded to 8, the tensors (safetensors' format)."""
    kinds = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # safetensors' order; it decides how many digits the offsets take
    order = list(_NAMES)
    for name in sorted(tensors, key=lambda name: (-order.index(kinds[name]), name)):
        shape, kind = list(tensors[name].shape), kinds[name]
        end = offset + tensors[name].numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + offset
