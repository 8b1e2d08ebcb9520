"""How much of a harder baseline's excess is left: `svd_llm` that borrows from this tool, or has its time."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.compare import (
    CLOSED,
    TRAINED,
    excess_pairs,
    heading,
    line_of,
    metric_of,
    paired,
    ratio,
    results,
    where_it_helps,
)
from benchmarks.equal_time import OTHERS, TOOL
from benchmarks.experiments import HERE, Bed, beds
from benchmarks.runner import whole_sweep

EQUAL_STEPS = ("svd_llm", "svd_llm-refit", "svd_llm-whitened", "svd_llm-pivoted")
"""Variants of the experiments: `svd_llm` with the refit; and in our coordinates, and then in our layout as well."""

_NAMES = {variant: name for name, variant in OTHERS.items()}
EQUAL_TIME = {variant: f"{_NAMES[variant]}, as long" for variant in ("svd_llm", "svd_llm-whitened")}
"""Variant → its row of equal_time.py."""


def harder() -> str:
    """Ratios of the mean excesses on test data, where more than `svd_llm` itself was measured; bold above a half."""
    lines = [heading(["model", "keep", *map("`{}`".format, EQUAL_STEPS), *map("`{}`, equal time".format, EQUAL_TIME)])]
    for bed in beds().values():
        found, timed = results(bed), _timed(bed)
        for keep in bed.keeps:
            cells = [_equal_steps(bed, found, variant, keep) for variant in EQUAL_STEPS]
            cells += [_equal_time(bed, timed, name, keep) for name in EQUAL_TIME.values()]
            if any(cells[1:]):
                lines.append(line_of([bed.title, f"{keep:g}", *cells]))
    return "\n".join(lines) + "\n"


def _equal_steps(bed: Bed, found: Mapping[str, Any], variant: str, keep: float) -> str:
    if variant not in found or not whole_sweep(bed, found[variant], keep):
        return ""
    theirs = where_it_helps(found, CLOSED[0], (variant,), keep)
    ours = where_it_helps(found, CLOSED[1], TRAINED[1], keep)
    return _shown(excess_pairs(ours, theirs, metric_of(bed)))


def _equal_time(bed: Bed, timed: Sequence[Mapping[str, Any]], name: str, keep: float) -> str:
    def rows(candidate: str) -> dict[int, float]:
        return {row["seed"]: _excess(bed, row) for row in timed if (row["candidate"], row["keep"]) == (candidate, keep)}

    return _shown(paired(rows(TOOL), rows(name)))


def _excess(bed: Bed, row: Mapping[str, Any]) -> float:
    return row["kl"] if metric_of(bed) == "kl" else row["loss"] - row["dense_loss"]


def _shown(pairs: Sequence[tuple[float, float]]) -> str:
    if not pairs:
        return ""
    share = ratio(pairs)
    shown = f"**{share:.2f}**" if share > 0.5 else f"{share:.2f}"
    return f"{shown} ({len(pairs)} seed{'s' if len(pairs) > 1 else ''})"


def _timed(bed: Bed) -> list[Mapping[str, Any]]:
    file = HERE / "results" / f"equal_time_{bed.name}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []
