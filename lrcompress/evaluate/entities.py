"""F1 of entities."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lrcompress.artifacts import Measurement
from lrcompress.evaluate.base import AbstractEvaluator, Sums, Total
from lrcompress.tasks import Scored


@final
class Entities(AbstractEvaluator):
    """How many entities are found whole, of word labels like B-PER and I-PER."""

    kind: Literal["entities"] = "entities"
    needs_targets: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = frozenset({"token-classification"})
    definitions: ClassVar[Mapping[str, str]] = {
        "entity_f1": "2 × entities found, of the right kind and with both ends right, over those marked by the model "
        "and those in the data together, 0 to 1 (as conlleval counts)"
    }

    def sums(self, scored: Scored, dense: Scored | None) -> dict[str, Sums]:
        """Twice the hits, and the entities of both sides, of each sequence."""
        assert scored.targets is not None
        hits, marked = [], []
        for one in scored.sequence.unique().tolist():
            here = scored.sequence == one
            found = entities(_names(scored, scored.logits[here].argmax(-1)))
            wanted = entities(_names(scored, scored.targets[here]))
            hits.append(2 * len(found & wanted))
            marked.append(len(found) + len(wanted))
        return {"entity_f1": Sums.over(*(torch.tensor(x, dtype=torch.float64) for x in (hits, marked)))}

    def measurement(self, name: str, sums: Total) -> Measurement:
        """0 where neither side has an entity."""
        return super().measurement(name, sums) if sums.n else Measurement(name, 0.0, 0.0, 0, True)

    def higher_is_better(self, name: str) -> bool:
        """Higher is better."""
        return True


def _names(scored: Scored, numbers: Tensor) -> list[str]:
    return [scored.classes[int(number)] for number in numbers]


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, end, kind) of each run of a kind that B- or another kind does not interrupt; O is outside."""
    found: set[tuple[int, int, str]] = set()
    start, kind = None, ""
    for at, tag in enumerate([*tags, "O"]):
        place, dash, named = tag.partition("-") if tag != "O" else ("O", "", "")
        if not dash and tag != "O":  # labels without places: a run of one label is an entity
            place, named = "I", tag
        if start is not None and (place in ("B", "S", "U", "O") or named != kind):
            found.add((start, at, kind))
            start = None
        if place != "O" and start is None:
            start, kind = at, named
        if start is not None and place in ("S", "U", "E", "L"):
            found.add((start, at + 1, kind))
            start = None
    return found
