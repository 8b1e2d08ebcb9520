"""The values that stages hand to each other, and how tensors and JSON are written to a run folder.

Shapes use one alphabet: `I` input features, `O` output features, `R` rank, `K` kept directions
of a spectrum (at most the break-even rank).
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrcompress.errors import RecipeError

Layout = Literal["plain", "pivoted"]
"""How a rank-R layer is stored. plain: A `[R, I]` and B `[O, R]`; pivoted: R rows of the product and what the
others are of them, R² numbers fewer for the same function"""

StoredDtype = Literal["model", "int8"]
"""What factors are stored in. model: the dtype of the model; int8: whole numbers and a scale for each output channel"""


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
    layout: Layout = "plain"

    @property
    def dense_parameters(self) -> int:
        """Numbers in the weight, without the bias."""
        return self.in_features * self.out_features

    @property
    def max_rank(self) -> int:
        """The largest rank whose factors have fewer numbers than the weight."""
        if self.layout == "pivoted":
            return min(self.in_features, self.out_features) - 1
        return max((self.dense_parameters - 1) // (self.in_features + self.out_features), 0)

    @property
    def break_even(self) -> float:
        """The rank at which factors have as many numbers as the weight."""
        return self.rank_of(1.0)

    def rank_of(self, share: float) -> float:
        """The rank, not rounded, at which factors have this share of the weight's numbers."""
        total, numbers = self.in_features + self.out_features, share * self.dense_parameters
        if self.layout == "pivoted":  # r(I + O) − r² = numbers
            return (total - math.sqrt(max(total**2 - 4 * numbers, 0.0))) / 2
        return numbers / total

    @property
    def role(self) -> str:
        """What the layer is within its block, as `attn.c_attn`; outside blocks its whole name."""
        return block_and_role(self.name)[1] if self.block is not None else self.name

    def numbers(self, rank: int) -> int:
        """In factors of this rank, without the bias, however many they are."""
        saved = rank**2 if self.layout == "pivoted" else 0
        return rank * (self.in_features + self.out_features) - saved

    def kept(self, rank: int | None) -> int:
        """Numbers that the layer has with factors of this rank, or dense (None)."""
        return self.dense_parameters if rank is None else self.numbers(rank)

    def cost(self, rank: int) -> int:
        """Numbers in factors of this rank, or in the dense weight where that is smaller."""
        if rank >= min(self.in_features, self.out_features):
            return self.dense_parameters
        return min(self.numbers(rank), self.dense_parameters)


def block_and_role(name: str) -> tuple[str, str]:
    """`transformer.h.0.attn.c_attn` → (`transformer.h.0`, `attn.c_attn`): a block ends at the first number."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), -1) + 1
    return ".".join(parts[:end]), ".".join(parts[end:])


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
    fisher_by_input: Tensor | None = None
    """the same, summed over outputs, [I]"""


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

    def stored_as(self, layers: Mapping[str, Layer], stored: Mapping[str, tuple[Layout, int]]) -> "RankPlan":
        """The plan of the layers as they are stored, by name: a layout, and a rank that may be below the plan's."""
        ranks = {name: stored[name][1] for name in self.ranks}
        layouts = {name: replace(layers[name], layout=layout) for name, (layout, _) in stored.items()}
        return replace(self, ranks=ranks, kept_parameters=kept_parameters({**layers, **layouts}, ranks))


def kept_parameters(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> int:
    """Numbers in all layers, one without a rank being dense."""
    return sum(layer.kept(ranks.get(name)) for name, layer in layers.items())


@dataclass(frozen=True)
class Factors:
    """`y = B (A x) + bias`: A `[R, I]`, B `[O, R]`, bias `[O]` or None."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    layout: ClassVar[Layout] = "plain"

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A)

    def factors(self) -> "Factors":
        """Itself: every layout gives its plain pair."""
        return self


@dataclass(frozen=True)
class Pivoted:
    """The same function as a pair of factors in R(I + O − R) numbers: R rows of `B·A`, and the others in terms of them.

    Row o of `B·A` is row `place[o]` of `[1; rest]·rows`.
    """

    rows: Tensor
    """[R, I]: the pivot rows of B·A"""
    rest: Tensor
    """[O − R, R]: each other row as a combination of the pivot rows"""
    place: Tensor
    """[O] int32: where each output feature stands among the pivot rows and the others after them"""
    bias: Tensor | None
    """[O], in the order of the output features"""
    layout: ClassVar[Layout] = "pivoted"

    @property
    def rank(self) -> int:
        """R."""
        return len(self.rows)

    def factors(self) -> Factors:
        """The pair A = rows, B = [1; rest] in the order of the output features."""
        B = torch.cat([torch.eye(len(self.rows)).to(self.rest), self.rest])
        return Factors(self.rows, B[self.place.long()], self.bias)


MetricKey = Literal["loss", "kl", "accuracy"]
"""loss: the task's own, mean cross-entropy per prediction, or squared error of a number; kl: KL(dense ‖ compressed);
accuracy: share of predictions whose largest logit is the target"""


@dataclass(frozen=True)
class Score:
    """A plan's quality on the validation data; None where the data have no targets, or the outputs no classes."""

    kl: float | None
    loss: float | None
    accuracy: float | None

    def cost(self, metric: MetricKey) -> float:
        """The metric as a number that should be small: an accuracy as its error. RecipeError where it is missing."""
        value = getattr(self, metric)
        if value is None:
            raise RecipeError(
                f"ranks.metric `{metric}` cannot be measured here",
                got="outputs that are no classes" if metric == "kl" else "validation data without labels",
                allowed=", ".join(key for key, one in vars(self).items() if one is not None),
                do="set data.validation.label, or another ranks.metric",
            )  # fmt: skip
        return 1 - value if metric == "accuracy" else value


@dataclass(frozen=True)
class Measurement:
    """One number of a report, with the standard error of its mean and how many items it covers."""

    name: str
    value: float
    stderr: float | None
    count: int
    higher_is_better: bool | None
    """None: not known"""


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(_json(value))
    os.replace(aside, path)


def put_folder(new: Path, place: Path) -> None:
    """Rename a finished folder to its place; a former one there is moved aside before, and removed after.

    So `place` is never half a folder. After a kill in between `settle_folder` puts in order what is aside.
    """
    aside = _former(place)
    if aside.exists():
        shutil.rmtree(aside)
    if place.exists():
        os.replace(place, aside)
    os.replace(new, place)
    shutil.rmtree(aside, ignore_errors=True)


def settle_folder(place: Path) -> None:
    """Give a folder its place back that a killed `put_folder` moved aside; remove it if there is another one."""
    aside = _former(place)
    if aside.exists() and not place.exists():
        os.replace(aside, place)
    elif aside.exists():
        shutil.rmtree(aside)


def _former(place: Path) -> Path:
    return place.with_name(f"{place.name}.former")


def write_views(folder: Path, name: str, value: Mapping[str, Any], markdown: str, html: str) -> None:
    """`name`.md, .html and .json; the JSON, whose name is given last, says that the others are there.

    OSError where the disk is full: the files that were there before stay, for all are written before one is renamed.
    """
    texts = {"md": markdown, "html": html, "json": _json(value)}
    for end, text in texts.items():
        (folder / f"{name}.{end}.partial").write_text(text, encoding="utf-8")
    for end in texts:
        os.replace(folder / f"{name}.{end}.partial", folder / f"{name}.{end}")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


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


def write_factors(path: Path, factors: Mapping[str, Factors | Pivoted]) -> None:
    """Layers in one file, each under its name: `.A`, `.B`, `.bias`, or `.rows`, `.rest`, `.place`, `.bias`."""
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        tensors |= {f"{name}.{key}": value for key, value in vars(pair).items() if value is not None}
    write_tensors(path, tensors)


def read_factors(path: Path) -> dict[str, Factors | Pivoted]:
    """What `write_factors` wrote."""
    tensors = read_tensors(path)
    found: dict[str, Factors | Pivoted] = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        bias = tensors.get(f"{name}.bias")
        if part == "A":
            found[name] = Factors(tensors[key], tensors[f"{name}.B"], bias)
        elif part == "rows":
            found[name] = Pivoted(tensors[key], tensors[f"{name}.rest"], tensors[f"{name}.place"], bias)
    return found


def read_layouts(path: Path) -> dict[str, tuple[Layout, int]]:
    """Layout and rank of each layer that `write_factors` wrote; reads headers only."""
    layouts: dict[str, Layout] = {"A": "plain", "rows": "pivoted"}
    found: dict[str, tuple[Layout, int]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            name, _, part = key.rpartition(".")
            if part in layouts:
                found[name] = layouts[part], file.get_slice(key).get_shape()[0]
    return found


class StoredFactors(Mapping[str, Factors]):
    """The layers of a file that `write_factors` wrote; a layer's tensors are read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self._keys = frozenset(file.keys())
        self._names = sorted(key.removesuffix(".A") for key in self._keys if key.endswith(".A"))

    def __getitem__(self, name: str) -> Factors:
        if f"{name}.A" not in self._keys:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            bias = file.get_tensor(f"{name}.bias") if f"{name}.bias" in self._keys else None
            return Factors(file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B"), bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_spectrum(path: Path, spectrum: Spectrum) -> None:
    """Bases in float32, values in float64."""
    added = {f"added.{side}": torch.tensor(value, dtype=torch.float64) for side, value in spectrum.added.items()}
    bases = {"out_basis": spectrum.out_basis.float(), "in_basis": spectrum.in_basis.float()}
    write_tensors(path, bases | {"values": spectrum.values} | added)


def read_spectrum(path: Path, rank: int | None = None, device: torch.device | str = "cpu") -> Spectrum:
    """What `write_spectrum` wrote, its bases cut at `rank`: no more of them is read from the file."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        keys = list(file.keys())
        out_basis, in_basis = file.get_slice("out_basis")[:, :rank], file.get_slice("in_basis")[:rank]
        added = {key.removeprefix("added."): file.get_tensor(key).item() for key in keys if key.startswith("added.")}
        return Spectrum(out_basis, file.get_tensor("values"), in_basis, added)


def read_values(path: Path) -> Tensor:
    """Only the singular values `[min(O, I)]` of what `write_spectrum` wrote."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("values")


def optional_tensors(value: LayerStatistics) -> dict[str, Tensor]:
    """The tensors that a statistics value holds, by field name, and its counts as int64 scalars."""
    fields = {key: item for key, item in vars(value).items() if isinstance(item, Tensor)}
    return fields | {"tokens": torch.tensor(value.tokens), "sequences": torch.tensor(value.sequences)}
