"""The experiments as files: `defaults.yaml`, a bed each folder, and variants that hold only what differs.

A cell is one measurement, `<bed>/<variant>/<keep>/<seed>`. Its recipe is `defaults.yaml`, overlaid by the bed's
`bed.yaml`, the variant's file in `variants/`, and the bed's own file of that name where it has one.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from lrcompress import hub

HERE = Path(__file__).parent
ROOT = HERE.parent
EXPERIMENTS = Path(os.environ.get("LRCOMPRESS_EXPERIMENTS", HERE / "experiments"))
RESULTS = HERE / "results" / "experiments"
SHARED = "LRCOMPRESS_SHARED"


@dataclass(frozen=True)
class Bed:
    """A model with its data, and the sizes at which variants are compared on it."""

    name: str
    title: str
    model: str
    needs: str | None
    """what must be there: `shared` (the folder that LRCOMPRESS_SHARED names), `hub`, `made` (what that command trains),
    or nothing"""
    keeps: tuple[float, ...]
    seeds: Mapping[float, int]
    """keep → how many seeds a variant has there"""
    rates: tuple[float, ...]
    """learning rates that every trained variant tries, on validation data"""
    sweeps: tuple[float, ...]
    """the sizes at which it does, from the largest on"""
    published: tuple[str, ...]
    made: str
    """the command that trains the model, where there is one"""
    settings: Mapping[str, Any]
    variants: tuple[str, ...]

    def swept_for(self, keep: float) -> float:
        """The size whose sweep a size takes its learning rate from: the largest that is not above it."""
        return max((size for size in self.sweeps if size <= keep), default=min(self.sweeps))

    def missing(self) -> str | None:
        """Why the bed cannot run here, if it cannot."""
        if self.needs == "shared" and not os.environ.get(SHARED):
            return f"{self.name} reads models and data below the folder that {SHARED} names, and it is not set"
        if self.needs == "hub" and not hub.answers(self.model, "model"):
            return f"the Hub, which {self.model} is on, does not answer"
        if self.needs == "made" and not (ROOT / self.model / "config.json").exists():
            return f"{self.model} is not there; make it with `{self.made}`"
        return None

    def model_path(self) -> str:
        """What `lrcompress run` is given."""
        places = {"shared": Path(os.environ.get(SHARED, SHARED)), "made": ROOT}
        return str(places[self.needs] / self.model) if self.needs in places else self.model


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    bed: Bed
    variant: str
    keep: float
    seed: int

    @property
    def id(self) -> str:
        """`<bed>/<variant>/<keep>/<seed>`."""
        return f"{self.bed.name}/{self.variant}/{self.keep:g}/{self.seed}"


def beds() -> dict[str, Bed]:
    """All of them, by name."""
    return {file.parent.name: _bed(file) for file in sorted(EXPERIMENTS.glob("*/bed.yaml"))}


def cells(pattern: str = "*") -> Iterator[Cell]:
    """The cells whose id fits a glob pattern, or begins with it; first seeds first, so that a row fills evenly."""
    for bed in beds().values():
        for seed in range(max(bed.seeds.values())):
            for variant in bed.variants:
                count = variant_settings(bed, variant).get("seeds")
                for keep in bed.keeps:
                    cell = Cell(bed, variant, keep, seed)
                    most = min(bed.seeds[keep], bed.seeds[keep] if count is None else count)
                    fits = fnmatchcase(cell.id, pattern) or cell.id.startswith(f"{pattern.rstrip('/')}/")
                    if seed < most and (fits or cell.id == pattern):
                        yield cell


def variant_settings(bed: Bed, variant: str) -> dict[str, Any]:
    """What a variant's files say: `recipe`, `about`, `seeds`."""
    found: dict[str, Any] = {}
    for file in (EXPERIMENTS / "variants" / f"{variant}.yaml", EXPERIMENTS / bed.name / f"{variant}.yaml"):
        if file.exists():
            found = overlay(found, _read(file))
    if not found:
        raise SystemExit(f"no experiment {bed.name}/{variant}; variants of {bed.name}: {', '.join(bed.variants)}")
    return found


def recipe_of(bed: Bed, variant: str, keep: float, rate: float | None = None) -> dict[str, Any]:
    """The resolved recipe of a variant at a size."""
    value = overlay(_read(EXPERIMENTS / "defaults.yaml")["recipe"], dict(bed.settings))
    value = overlay(value, variant_settings(bed, variant).get("recipe", {}))
    value["ranks"] = value["ranks"] | {"keep_parameters": keep}
    if rate is not None:
        value["recovery"] = value["recovery"] | {"learning_rate": rate}
    if bed.needs == "shared":
        for source in value["data"].values():
            source["path"] = str(Path(os.environ.get(SHARED, SHARED)) / source["path"])
    return value


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section; one with another `kind`, or null, takes the other's place."""
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = merged.get(key)
        same = (
            isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        )
        merged[key] = overlay(old, value) if same and isinstance(old, dict) else copy.deepcopy(value)
    return merged


def _bed(file: Path) -> Bed:
    value = _read(file)
    keeps = tuple(float(keep) for keep in value["keeps"])
    several = value.get("seeds", {})
    own = sorted(path.stem for path in file.parent.glob("*.yaml") if path.stem != "bed")
    variants = value.get("variants") or sorted(path.stem for path in (EXPERIMENTS / "variants").glob("*.yaml"))
    return Bed(
        name=file.parent.name,
        title=value["title"],
        model=value["model"],
        needs=value.get("needs"),
        keeps=keeps,
        seeds={keep: int(several.get(keep, value.get("fewest_seeds", 1))) for keep in keeps},
        rates=tuple(float(rate) for rate in value["sweep"]["rates"]),
        sweeps=tuple(sorted((float(keep) for keep in value["sweep"]["keeps"]), reverse=True)),
        published=tuple(value.get("published", ())),
        made=value.get("made", ""),
        settings=value.get("recipe", {}),
        variants=tuple(dict.fromkeys([*variants, *own])),
    )


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
