"""How much of a harder baseline's excess is left: `svd_llm` that borrows from this tool, or has its time."""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.compare import CLOSED, TRAINED, excess, heading, line_of, metric_of, results, where_it_helps
from benchmarks.experiments import HERE, Bed, beds
from benchmarks.runner import whole_sweep

EQUAL_STEPS = ("svd_llm", "svd_llm-whitened", "svd_llm-pivoted")
"""Variants of the experiments, each with what those before it have."""

EQUAL_TIME = {
    "svd_llm": "svd_llm, as long",
    "svd_llm-whitened": "svd_llm, in the coordinates of its own SVD, as long",
}
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
    metric = metric_of(bed)
    theirs, ours = (
        {seed: excess(row, metric) for seed, row in where_it_helps(found, closed, trained, keep).items()}
        for closed, trained in zip(CLOSED, ((variant,), TRAINED[1]), strict=True)
    )
    return _ratio(ours, theirs)


def _equal_time(bed: Bed, timed: Sequence[Mapping[str, Any]], name: str, keep: float) -> str:
    def rows(candidate: str) -> dict[int, float]:
        return {row["seed"]: _excess(bed, row) for row in timed if (row["candidate"], row["keep"]) == (candidate, keep)}

    return _ratio(rows("the tool"), rows(name))


def _excess(bed: Bed, row: Mapping[str, Any]) -> float:
    return row["kl"] if metric_of(bed) == "kl" else row["loss"] - row["dense_loss"]


def _ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Of the means over the seeds of both."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return ""
    ratio = fmean(ours[seed] for seed in both) / fmean(theirs[seed] for seed in both)
    shown = f"**{ratio:.2f}**" if ratio > 0.5 else f"{ratio:.2f}"
    return f"{shown} ({len(both)} seeds)" if len(both) > 1 else shown


def _timed(bed: Bed) -> list[Mapping[str, Any]]:
    file = HERE / "results" / f"equal_time_{bed.name}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []
