"""The tables of an analysis, before any mark-up."""

from lrcompress.analysis.schema import Analysis, EffectiveRank, LayerAnalysis, SelectorRow
from lrcompress.report import numbers
from lrcompress.report.content import Cell, Column, Grid

DIMENSIONS = (
    "The least number of dimensions that holds 95 % of the squares: of the weight's own spectrum (at most the smaller "
    "side), of the inputs' and the output gradients' second moments, and of the method's weighted matrix."
)
SELECTORS = (
    "Every selector at the same size, scored on the validation data by closed form. Only `target` chooses the size "
    "itself."
)
KEPT = "The rank that each selector gives; a dash is a layer that stays dense."
EFFECTIVE = (
    "Entropy: exp of the entropy of the shares of the squares. Stable: their sum over the largest. 90 and 99: "
    "dimensions that hold so many per cent."
)
RANK_LOSS = "‖W − BA‖² / ‖W‖² at each rank that was learned, beside the least that any pair of that rank can have."
AMPLIFICATION = (
    "Norms of the learned BA and of W within the first directions of BA, against W in its own first directions and "
    "in random ones (arXiv 2106.09685, sec. 7.3)."
)


def dimension_grid(value: Analysis) -> Grid:
    """The table "how many dimensions does this layer need"."""
    heads = ("out × in", "W", "inputs", "gradients", value.method, "stable rank of W", "φ of B up to", "break-even")
    rows = tuple(
        _row(
            layer.name,
            f"{layer.out_features} × {layer.in_features}",
            layer.weight.share_95,
            layer.inputs.share_95,
            layer.curvature.share_95,
            layer.methods[value.method].share_95,
            numbers.significant(layer.weight.stable),
            _range_end(layer),
            layer.max_rank + 1,
        )
        for layer in value.layers
    )
    return _grid("layer", heads, rows)


def selector_grid(value: Analysis) -> Grid:
    """Size and validation scores of each selector."""
    shown = [*([value.dense] if value.dense else []), *value.selectors]
    scored = [key for key in ("kl", "loss", "accuracy") if any(getattr(row, key) is not None for row in shown)]
    heads = ("kept %", *scored, "time")
    ranked = [row for row in value.selectors if row.kl is not None and row.name != "target"]
    best = min((row.kl for row in ranked if row.kl is not None), default=None)
    rows = []
    for row in shown:
        share = numbers.MISSING if row.kept_share is None else numbers.percent(row.kept_share)
        cells = [Cell(row.name), Cell("refused" if row.refused else share)]
        cells += [Cell(_score(row, key), key == "kl" and row in ranked and row.kl == best) for key in scored]
        cells.append(Cell(numbers.MISSING if row is value.dense else numbers.seconds(row.seconds)))
        cells.append(Cell(row.refused or " ".join(row.notes)))
        rows.append(tuple(cells))
    columns = (Column("selector", "name"), *map(Column, heads), Column("notes", "text"))
    return Grid(columns, tuple(rows))


def kept_grid(value: Analysis) -> Grid:
    """Rank by layer and selector."""
    names = [row.name for row in value.selectors if not row.refused]
    rows = tuple(_row(layer.name, *(layer.kept.get(name) for name in names)) for layer in value.layers)
    return _grid("layer", tuple(names), rows) if names else Grid((), ())


def effective_grid(value: Analysis) -> Grid:
    """Effective ranks of the weight, the inputs and the curvature."""
    parts = ("W", "inputs", "gradients")
    heads = tuple(f"{part} {measure}" for part in parts for measure in ("entropy", "stable", "90", "99"))
    rows = tuple(
        _row(layer.name, *(cell for one in (layer.weight, layer.inputs, layer.curvature) for cell in _effective(one)))
        for layer in value.layers
    )
    return _grid("layer", heads, rows)


def rank_loss_grid(value: Analysis) -> Grid:
    """Learned and optimal rank loss at the ranks that were tried."""
    count = max(len(layer.rank_loss["learned"].ranks) for layer in value.layers)
    heads = tuple(title for place in range(count) for title in (f"rank {place + 1}", "learned", "optimum"))
    rows = []
    for layer in value.layers:
        cells: list[object] = []
        for rank, learned in zip(layer.rank_loss["learned"].ranks, layer.rank_loss["learned"].values, strict=True):
            cells += [rank, numbers.significant(learned), numbers.significant(layer.rank_loss["optimum"].near(rank))]
        rows.append(_row(layer.name, *cells, *[None] * (3 * count - len(cells))))
    return _grid("layer", heads, tuple(rows))


def amplification_grid(value: Analysis) -> Grid:
    """Norms within the learned directions, at the least number of directions."""
    heads = ("directions", "BA", "W in BA's", "W in its own", "W in random", "BA / W in BA's")
    rows = tuple(
        _row(
            layer.name,
            one.rank,
            *(numbers.significant(norm) for norm in (one.learned, one.in_learned, one.in_own, one.in_random)),
            numbers.significant(one.factor),
        )
        for layer in value.layers
        for one in layer.amplification
    )
    return _grid("layer", heads, rows)


def _effective(one: EffectiveRank) -> tuple[object, ...]:
    return numbers.significant(one.entropy), numbers.significant(one.stable), one.share_90, one.share_99


def _range_end(layer: LayerAnalysis) -> object:
    span = layer.similarity["B"].range
    return None if span is None else span[1]


def _score(row: SelectorRow, key: str) -> str:
    found = getattr(row, key)
    if found is None:
        return numbers.MISSING
    return numbers.percent(found) if key == "accuracy" else numbers.significant(found, 4)


def _row(*cells: object) -> tuple[Cell, ...]:
    shown = (numbers.integer(cell) if isinstance(cell, int) or cell is None else str(cell) for cell in cells)
    return tuple(Cell(text) for text in shown)


def _grid(first: str, heads: tuple[str, ...], rows: tuple[tuple[Cell, ...], ...]) -> Grid:
    return Grid((Column(first, "name"), *map(Column, heads)), rows)
