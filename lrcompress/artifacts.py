"""The values that stages hand to each other, and how tensors and JSON are written to a run folder.

Shapes use one alphabet: `I` input features, `O` output features, `R` rank, `K` kept directions
of a spectrum (at most the break-even rank).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A layer that can be factorised; `block` is its block's position in the model, None outside blocks."""

    name: str
    kind: Literal["linear", "conv1d"]
    in_features: int
    out_features: int
    bias: bool
    block: int | None
    group: Literal["attention", "mlp", "other"]

    @property
    def dense_parameters(self) -> int:
        """Numbers in the weight, without the bias."""
        return self.in_features * self.out_features

    @property
    def max_rank(self) -> int:
        """The largest rank whose factors have fewer numbers than the weight."""
        return max((self.dense_parameters - 1) // (self.in_features + self.out_features), 0)

    def cost(self, rank: int) -> int:
        """Numbers in factors of this rank, or in the dense weight where that is smaller."""
        return min(rank * (self.in_features + self.out_features), self.dense_parameters)


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the real (unmasked) tokens of the calibration set; only what was asked for is present."""

    tokens: int
    sequences: int
    input_moment: Tensor | None = None
    """Σ x xᵀ, [I, I]"""
    input_abs_sum: Tensor | None = None
    """Σ |x|, [I]"""
    weighted_input_moment: Tensor | None = None
    """Σ ‖g‖² x xᵀ, [I, I]"""
    grad_moment: Tensor | None = None
    """Σ g gᵀ, [O, O]; its trace is Σ ‖g‖²"""
    fisher_by_output: Tensor | None = None
    """Σ over sequences of the squared weight gradient, summed over inputs, [O]"""


@dataclass(frozen=True)
class Spectrum:
    """`W ≈ out_basis[:, :r] · diag(values[:r]) · in_basis[:r]`, with the roots already undone."""

    out_basis: Tensor
    """[O, K]"""
    values: Tensor
    """[min(O, I)], all of them, descending; the squared tail is the weighted error"""
    in_basis: Tensor
    """[K, I]"""
    added: dict[str, float]
    """share of the mean eigenvalue that was added to each root's moment"""


@dataclass(frozen=True)
class RankPlan:
    """A rank for each layer that is factorised; a target layer without one stays dense."""

    ranks: dict[str, int]
    kept_parameters: int
    dense_parameters: int
    notes: dict[str, str]


@dataclass(frozen=True)
class Factors:
    """`y = B (A x) + bias`: A `[R, I]`, B `[O, R]`, bias `[O]` or None."""

    A: Tensor
    B: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Measurement:
    """One number of a report, with the standard error of its mean and how many items it covers."""

    name: str
    value: float
    stderr: float | None
    count: int
    higher_is_better: bool


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(aside, path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, written aside and renamed."""
    aside = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)
    os.replace(aside, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    return load_file(path)


def write_factors(path: Path, factors: Mapping[str, Factors]) -> None:
    """Factors of many layers in one file: `<layer>.A`, `<layer>.B`, `<layer>.bias`."""
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        tensors |= {f"{name}.A": pair.A, f"{name}.B": pair.B}
        if pair.bias is not None:
            tensors[f"{name}.bias"] = pair.bias
    write_tensors(path, tensors)


def read_factors(path: Path) -> dict[str, Factors]:
    """What `write_factors` wrote."""
    tensors = read_tensors(path)
    names = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
    return {name: Factors(tensors[f"{name}.A"], tensors[f"{name}.B"], tensors.get(f"{name}.bias")) for name in names}


def optional_tensors(value: LayerStatistics) -> dict[str, Tensor]:
    """The tensors that a statistics value holds, by field name, and its counts as int64 scalars."""
    fields = {key: item for key, item in vars(value).items() if isinstance(item, Tensor)}
    return fields | {"tokens": torch.tensor(value.tokens), "sequences": torch.tensor(value.sequences)}
