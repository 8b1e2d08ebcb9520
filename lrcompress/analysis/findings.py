"""What an analysis says in words: sentences made from its numbers, each with the numbers it rests on."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median

from lrcompress.analysis.schema import LayerAnalysis, SelectorRow
from lrcompress.ranks.rank_loss import FLAT

LayerValue = Callable[[LayerAnalysis], float]


def findings(layers: Sequence[LayerAnalysis], method: str, selectors: Sequence[SelectorRow], rise: float) -> list[str]:
    """In the order of interest: dimensions, roles, depth, redundancy, selectors, what was learned."""
    found = [
        _dimensions(layers, method),
        _roles(layers, method),
        _depth(layers, method),
        _redundant(selectors, rise),
        _best(selectors),
        *_refused(selectors),
        _rank_loss(layers),
        _similarity(layers),
        _amplification(layers),
    ]
    return [text for text in found if text]


def need(layer: LayerAnalysis, method: str) -> float:
    """Share of the layer's dimensions that hold 95 % of the method's squares."""
    return layer.methods[method].share_95 / layer.methods[method].full


def by_role(layers: Iterable[LayerAnalysis], value: LayerValue) -> dict[str, float]:
    """Role → mean over its layers."""
    groups: dict[str, list[float]] = {}
    for layer in layers:
        groups.setdefault(layer.role, []).append(value(layer))
    return {role: mean(values) for role, values in groups.items()}


def _dimensions(layers: Sequence[LayerAnalysis], method: str) -> str:
    weight = mean(layer.weight.share_95 / layer.weight.full for layer in layers)
    inputs = mean(layer.inputs.share_95 / layer.inputs.full for layer in layers)
    curvature = mean(layer.curvature.share_95 / layer.curvature.full for layer in layers)
    weighted = mean(need(layer, method) for layer in layers)
    return (
        f"95 % of the squares lie in {weight:.0%} of the weights' dimensions, {inputs:.0%} of the inputs', "
        f"{curvature:.0%} of the output gradients', and {weighted:.0%} of those of {method}'s weighted matrix (means "
        f"over {len(layers)} layers): {_comment(weight, weighted, method)}"
    )


def _comment(weight: float, weighted: float, method: str) -> str:
    if weighted < 0.75 * weight:
        return "the data use far fewer dimensions than the weights have."
    if weighted > 1.1 * weight:
        return f"the weights' own spectrum promises more than {method} finds."
    return "the data use about as many dimensions as the weights have."


def _roles(layers: Sequence[LayerAnalysis], method: str) -> str:
    shares = by_role(layers, lambda layer: need(layer, method))
    if len(shares) < 2:
        return ""
    most, least = max(shares, key=lambda role: shares[role]), min(shares, key=lambda role: shares[role])
    return (
        f"Of the roles, {most} needs the most dimensions ({shares[most]:.0%} of its own for 95 % of {method}'s "
        f"squares), {least} the fewest ({shares[least]:.0%})."
    )


def _depth(layers: Sequence[LayerAnalysis], method: str) -> str:
    blocks: dict[int, list[float]] = {}
    for layer in layers:
        if layer.block is not None:
            blocks.setdefault(layer.block, []).append(need(layer, method))
    if len(blocks) < 2:
        return ""
    shares = {block: mean(values) for block, values in blocks.items()}
    most, least = max(shares, key=lambda block: shares[block]), min(shares, key=lambda block: shares[block])
    return (
        f"Of the {len(shares)} blocks, counted from 0, number {most} needs the most ({shares[most]:.0%} of its "
        f"dimensions) and number {least} the fewest ({shares[least]:.0%})."
    )


def _redundant(selectors: Sequence[SelectorRow], rise: float) -> str:
    row = _named(selectors, "target")
    if row is None:
        return ""
    if row.kept_share is None:
        return f"No size keeps the validation loss within {rise:.0%} by closed form: {row.refused}."
    return (
        f"{1 - row.kept_share:.0%} of the target layers' parameters are redundant at {rise:.0%} of the validation "
        "loss, by closed form and without any training."
    )


def _best(selectors: Sequence[SelectorRow]) -> str:
    rows = [row for row in selectors if row.kl is not None and row.name != "target"]
    if len(rows) < 2:
        return ""
    order = sorted(rows, key=lambda row: row.kl or 0.0)
    return (
        f"At the same size {order[0].name} is the closest to the dense model (validation KL {order[0].kl:.4f}), then "
        + ", ".join(f"{row.name} ({row.kl:.4f})" for row in order[1:])
        + "."
    )


def _refused(selectors: Sequence[SelectorRow]) -> list[str]:
    return [f"{row.name} selects nothing: {row.refused}." for row in selectors if row.refused and row.name != "target"]


def _rank_loss(layers: Sequence[LayerAnalysis]) -> str:
    curves = [layer.rank_loss["learned"].values for layer in layers]
    first, last = mean(curve[0] for curve in curves), mean(curve[-1] for curve in curves)
    optimum = mean(layer.rank_loss["optimum"].near(layer.rank_loss["learned"].ranks[-1]) for layer in layers)
    falls = sum(curve[0] - min(curve) >= FLAT for curve in curves)
    return (
        f"The learned rank loss goes from {first:.2f} of ‖W‖² at the least rank that was tried to {last:.2f} at the "
        f"largest, where the closed-form optimum is {optimum:.2f}; it falls by {FLAT} or more in {falls} of "
        f"{len(layers)} layers"
        + (": BA does the layer's work without coming near W." if last > 0.5 and falls < len(layers) / 2 else ".")
    )


def _similarity(layers: Sequence[LayerAnalysis]) -> str:
    parts = []
    for factor in ("A", "B"):
        ranges = [span for layer in layers if (span := layer.similarity[factor].range) is not None]
        if ranges:
            ends = f"the range ends at rank {median(span[1] for span in ranges):g} in the median"
            parts.append(
                f"{factor} of two runs agree clearly above chance in {len(ranges)} of {len(layers)} layers, {ends}"
            )
        else:
            parts.append(f"{factor} of two runs agree no better than random subspaces do in any layer")
    return "; ".join(parts) + "."


def _amplification(layers: Sequence[LayerAnalysis]) -> str:
    rows = [layer.amplification[0] for layer in layers]
    factor = median(row.factor for row in rows)
    ratio = median(row.in_learned / max(row.in_random, 1e-300) for row in rows)
    own = median(row.in_learned / max(row.in_own, 1e-300) for row in rows)
    return (
        f"In its first {rows[0].rank} directions the learned BA is {factor:.2f} times as large as W is there; W is "
        f"{ratio:.1f} times as large in them as in random ones, and {own:.0%} of what it is in its own first ones "
        "(medians)."
    )


def _named(selectors: Sequence[SelectorRow], name: str) -> SelectorRow | None:
    return next((row for row in selectors if row.name == name), None)
