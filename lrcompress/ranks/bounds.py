"""Which ranks a layer may get: steps, floors, ceilings, and layers that are pinned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from lrcompress.artifacts import Layer
from lrcompress.errors import RecipeError
from lrcompress.patterns import matches

Dense = Literal["dense"]
NO_RANKS: Mapping[str, int] = {}
Value = TypeVar("Value")


@dataclass(frozen=True)
class Bounds:
    """The least and the largest rank of each layer; above its `max_rank` a layer is dense."""

    layers: Mapping[str, Layer]
    step: int
    least: Mapping[str, int]
    most: Mapping[str, int]

    @classmethod
    def of(
        cls,
        layers: Mapping[str, Layer],
        step: int,
        min_rank: int,
        *,
        floor: Mapping[str, int] = NO_RANKS,
        ceiling: Mapping[str, int] = NO_RANKS,
        pinned: Mapping[str, int | Dense] = NO_RANKS,
    ) -> "Bounds":
        """From a recipe's keys; of the patterns that match a layer the first counts.

        Raises RecipeError for a pattern without a layer, a rank above a layer's own, and a floor above the ceiling.
        """
        for key, patterns in (("floor", floor), ("ceiling", ceiling), ("pinned", pinned)):
            check_patterns(layers, patterns, f"ranks.{key}")
        least: dict[str, int] = {}
        most: dict[str, int] = {}
        for name, layer in layers.items():
            fixed = first_match(name, pinned)
            if fixed is not None:
                least[name] = most[name] = _dense(layer) if fixed == "dense" else check_rank(layer, fixed)
                continue
            low, high = first_match(name, floor), first_match(name, ceiling)
            low = max(min_rank, 1 if low is None else check_rank(layer, low))
            least[name] = _up(low, step, layer)
            most[name] = _dense(layer) if high is None else max(check_rank(layer, high) // step * step, 1)
            if high is not None and least[name] > most[name]:
                raise RecipeError(
                    f"the least rank of {name} is above its ceiling", got=f"{least[name]} and {high}",
                    allowed="a ceiling of at least ranks.floor, ranks.min_rank and one step of ranks.round_to",
                    do="raise ranks.ceiling, or lower the others",
                )  # fmt: skip
        return cls(layers, step, least, most)

    def clip(self, name: str, rank: int) -> int:
        """A rank that the layer may get, at most `rank` where its least one allows that; dense stays dense."""
        if rank > self.layers[name].max_rank:
            return self.most[name]
        return min(max(rank // self.step * self.step, self.least[name]), self.most[name])

    def next(self, name: str, rank: int) -> int:
        """The next larger rank that the layer may get; the same where there is none."""
        return min((rank // self.step + 1) * self.step, self.most[name])


def check_patterns(layers: Mapping[str, Layer], patterns: Mapping[str, object], key: str) -> None:
    """RecipeError for a pattern that matches no layer."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in layers):
            raise RecipeError(
                f"{key}: `{pattern}` matches no target layer",
                allowed=", ".join(list(layers)[:8]) + (" …" if len(layers) > 8 else ""),
                do="correct the pattern, or remove it",
            )


def check_rank(layer: Layer, rank: int) -> int:
    """`rank`, or RecipeError if it is above the layer's own."""
    full = min(layer.in_features, layer.out_features)
    if rank > full:
        raise RecipeError(
            f"rank of {layer.name} is above the layer's",
            got=rank,
            allowed=f"at most {full}; only up to {layer.max_rank} makes the layer smaller",
            do="lower the rank, or exclude the layer",
        )
    return rank


def first_match(name: str, patterns: Mapping[str, Value]) -> Value | None:
    """The value of the first pattern that fits a layer's name."""
    return next((value for pattern, value in patterns.items() if matches(name, pattern)), None)


def _up(rank: int, step: int, layer: Layer) -> int:
    """The least multiple of the step, the rank itself where no multiple shrinks the layer, dense where it does not."""
    multiple = -(-rank // step) * step
    if multiple <= layer.max_rank:
        return multiple
    return rank if rank <= layer.max_rank else _dense(layer)


def _dense(layer: Layer) -> int:
    """The rank that stands for the dense weight: the full one, which is always above `max_rank`."""
    return min(layer.in_features, layer.out_features)
