"""From the results of the experiments to tables and plots: means, paired differences, quality against size."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.experiments import HERE, RESULTS, Bed, beds
from benchmarks.runner import best_rate, next_rate, sweep_of, whole_sweep

REFERENCE = {"closed": "closed-svd_llm", "trained": "svd_llm"}
"""What each kind of row is compared with: the strongest published closed form at uniform ranks, without and with the
same training."""

INT8 = "-int8"
"""The end of the names of variants with factors in 8 bits, which are compared at equal bytes instead."""

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t by degrees of freedom."""

REFERENCE_8 = "closed-refit-pivoted"
"""What 8 bits are compared with."""

SHOWN = {
    "closed-svd_llm": "C0", "closed-kron": "C1", "closed-refit-pivoted": "C2",
    "svd_llm": "C0", "refit-pivoted": "C2", "whitened": "C1", "rounds": "C3",
}  # fmt: skip
"""The variants of the plots, with their colours; closed forms are dashed."""


def heading(titles: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{line_of(titles)}\n|{' --- |' * len(titles)}"


def line_of(cells: Sequence[str]) -> str:
    """A line of one."""
    return f"| {' | '.join(cells)} |"


def results(bed: Bed) -> dict[str, dict[str, Any]]:
    """Variant → its results, for those that have any."""
    found = {}
    for variant in bed.variants:
        file = RESULTS / bed.name / f"{variant}.json"
        if file.exists():
            found[variant] = json.loads(file.read_text())
    return found


def rows_at(value: Mapping[str, Any], keep: float) -> dict[int, dict[str, Any]]:
    """Seed → row, of those that did not fail."""
    rows = [row for row in value["rows"].values() if row["keep"] == keep and "failed" not in row]
    return {row["seed"]: row for row in sorted(rows, key=lambda row: row["seed"])}


def kind_of(variant: str) -> str:
    """`closed` or `trained`."""
    return "closed" if variant.startswith("closed-") else "trained"


def excess(row: Mapping[str, Any], metric: str) -> float:
    """How much worse than dense on the test data: KL, or the loss above the dense model's."""
    scores = row["scores"]["test"]
    return scores["kl"] if metric == "kl" else scores["loss"] - row["dense"]["test"]["loss"]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and half width of its 95 % confidence interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    return fmean(values), STUDENT[min(len(values) - 1, 9)] * stdev(values) / math.sqrt(len(values))


def table(name: str) -> str:
    """All variants of a bed by their KL, then all about them at each size, and how the choices were made."""
    bed = beds()[name]
    found = results(bed)
    lines = [*_ranking(bed, found), ""]
    lines += [f"![quality against size](pictures/experiments_{name}.png)", "", "<details>"]
    lines += ["<summary>Each size: quality, paired differences, seeds, seconds, memory, tokens</summary>", ""]
    metric = metric_of(bed)
    for keep in bed.keeps:
        body = [_line(found, variant, keep, metric) for variant in found if not variant.endswith(INT8)]
        body = [line for line in body if line]
        if body:
            scores = (tests(value, keep) for value in found.values())
            title = next((_quality(one, metric)[0] for one in scores if one), "accuracy %")  # all may have failed
            lines += [f"**{bed.title}, keep {keep:g}**", "", _head(title), *body, ""]
            lines += [text for variant in found for text in _beyond(found[variant], variant, keep)]
            lines += _tasks(found, keep)
    lines += ["</details>", "", _provenance(bed, found)]
    return "\n".join(lines) + "\n"


def _ranking(bed: Bed, found: Mapping[str, Any]) -> list[str]:
    """KL at each size, from the best variant at the smallest one on."""
    rows = []
    for variant, value in found.items():
        kls = {keep: [one["kl"] for one in tests(value, keep)] for keep in bed.keeps}
        if variant.endswith(INT8) or not any(kls.values()):
            continue
        untrained = kind_of(variant) == "closed"
        cells = [
            spread(kls[keep], 4) + ("" if untrained or whole_sweep(bed, value, keep) else " *") if kls[keep] else ""
            for keep in bed.keeps
        ]
        last = kls[min(bed.keeps)]
        rows.append((fmean(last) if last else math.inf, line_of([f"`{variant}`", *cells])))
    return [
        f"**{bed.title}, KL to dense by the share that is kept**",
        "",
        heading(["variant", *(f"{keep:g}" for keep in bed.keeps)]),
        *(line for _, line in sorted(rows)),
        "",
        "Best at the smallest size first. *: at a learning rate that no whole sweep has chosen.",
    ]


def surplus(row: Mapping[str, Any]) -> float:
    """A row's parameters as a multiple of those that its size allows."""
    return row["parameters"] / (row["keep"] * row["dense_parameters"])


def _tasks(found: Mapping[str, Any], keep: float) -> list[str]:
    """The scores in tasks of lm-eval, where a bed has any: the dense model's, then those of each variant."""
    rows = {
        variant: [row for row in rows_at(value, keep).values() if "tasks" in row] for variant, value in found.items()
    }
    rows = {variant: scored for variant, scored in rows.items() if scored}
    if not rows:
        return []
    dense = next(iter(rows.values()))[0]["dense_tasks"]
    lines = [heading(["lm-eval", *dense]), line_of(["dense", *(f"{value:.4f}" for value in dense.values())])]
    for variant, scored in rows.items():
        means = [spread([row["tasks"][name] for row in scored], 4) for name in dense]
        lines.append(line_of([f"`{variant}`", *means]))
    return [*lines, ""]


def _beyond(value: Mapping[str, Any], variant: str, keep: float) -> list[str]:
    most = max((surplus(row) for row in rows_at(value, keep).values()), default=0.0)
    if most <= EXACT:
        return []
    return [
        f"`{variant}` has {most:.2f} × the parameters here: layers in which pivoting costs precision stay plain.",
        "",
    ]


DENSE_BITS = {"demo": 16, "minilm-sst2": 16}
"""Of a number of the dense checkpoint, where that is not float32."""


def bytes_table(name: str) -> str:
    """Factors in 8 bits beside those in the model's dtype, by the bytes of the compressed layers."""
    bed, rows, dense = beds()[name], [], DENSE_BITS.get(name, 32)
    title = "accuracy %"
    for variant, value in results(bed).items():
        if not variant.endswith(INT8) and variant != REFERENCE_8:
            continue
        for keep in bed.keeps:
            scores = tests(value, keep)
            if scores:
                bits = 8 if variant.endswith(INT8) else dense
                share = f"{100 * keep * bits / dense:.1f}"
                title, quality = _quality(scores, "kl")
                kl = spread([one["kl"] for one in scores], 4)
                cells = [share, str(bits), f"{keep:g}", kl, quality, str(len(scores))]
                rows.append((keep * bits, line_of(cells)))
    titles = ["bytes, % of dense", "bits a number", "keep", "KL to dense", title, "seeds"]
    lines = [f"**{bed.title}**", "", heading(titles)]
    return "\n".join(lines + [line for _, line in sorted(rows)]) + "\n"


def metric_of(bed: Bed) -> str:
    """What an excess is of: a language model's loss, else the KL to the dense model."""
    data = bed.settings.get("data")
    return "kl" if data is None or "label" in data["test"] else "loss"


def tests(value: Mapping[str, Any], keep: float) -> list[Mapping[str, Any]]:
    """The test scores of a variant at a size, of each seed."""
    return [row["scores"]["test"] for row in rows_at(value, keep).values()]


def _quality(scores: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, str]:
    """What a user of the model would look at, and its mean with its spread."""
    if metric == "loss":
        return "perplexity", spread([math.exp(one["loss"]) for one in scores], 2)
    if scores[0]["accuracy"] is None:  # a number instead of classes
        return "squared error", spread([one["loss"] for one in scores], 4)
    return "accuracy %", spread([100 * one["accuracy"] for one in scores], 1)


def _head(quality: str) -> str:
    titles = ["variant", "KL to dense", quality, "excess, of the reference's", "difference, paired, 95 %", "seeds",
              "learning rate", "seconds, all stages", "peak memory, GB",
              "tokens: calibration, training, teacher"]  # fmt: skip
    return heading(titles)


def _line(found: Mapping[str, Any], variant: str, keep: float, metric: str) -> str:
    rows = rows_at(found[variant], keep)
    failed = [row for row in found[variant]["rows"].values() if row["keep"] == keep and "failed" in row]
    if not rows:
        return f"| `{variant}` | failed: {failed[0]['failed']} | | | | | | | | |" if failed else ""
    scores = tests(found[variant], keep)
    ratio, difference = _against(found, variant, keep, metric)
    first = next(iter(rows.values()))
    seconds = fmean(sum(row["seconds"].values()) for row in rows.values())
    cells = [f"`{variant}`", spread([t["kl"] for t in scores], 4), _quality(scores, metric)[1], ratio,
             difference, f"{len(rows)}" + (f", {len(failed)} failed" if failed else ""),
             f"{first['learning_rate']:g}" if first["learning_rate"] else "", f"{seconds:.0f}",
             f"{fmean(row['peak_memory_bytes'] for row in rows.values()) / 1e9:.1f}",
             _tokens(found[variant]["recipe"], first["tokens"])]  # fmt: skip
    return line_of(cells)


def _tokens(recipe: Mapping[str, Any], tokens: Mapping[str, int]) -> str:
    """Of the calibration, of the training, and those that the dense model saw as its teacher."""
    trained = tokens.get("recovery", 0)
    distilled = trained and recipe["recovery"]["loss"]["kind"] == "distill"
    return ", ".join(f"{count:,}" for count in (tokens["calibration"], trained, trained if distilled else 0))


def _against(found: Mapping[str, Any], variant: str, keep: float, metric: str) -> tuple[str, str]:
    """Ratio of the mean excesses, and the mean paired difference with its interval, over the seeds of both."""
    reference = REFERENCE[kind_of(variant)]
    if variant == reference or reference not in found:
        return "", ""
    ours, theirs = rows_at(found[variant], keep), rows_at(found[reference], keep)
    pairs = excess_pairs(ours, theirs, metric)
    return (f"{ratio(pairs):.2f}", difference([a - b for a, b in pairs])) if pairs else ("", "")


def excess_pairs(
    ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]], metric: str
) -> list[tuple[float, float]]:
    """Excesses of rows by seed, of the seeds of both."""
    first, second = ({seed: excess(row, metric) for seed, row in rows.items()} for rows in (ours, theirs))
    return paired(first, second)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[tuple[float, float]]:
    """Values of the seeds of both."""
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Of the means."""
    return fmean(a for a, _ in pairs) / fmean(b for _, b in pairs)


def difference(values: Sequence[float]) -> str:
    """Mean of paired differences ± half width of its interval; empty for fewer than two."""
    found = interval(values)
    return "" if found is None else f"{found[0]:+.4f} ± {found[1]:.4f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def _provenance(bed: Bed, found: Mapping[str, Any]) -> str:
    rows = [row for value in found.values() for row in value["rows"].values() if "environment" in row]
    machines = {f"{row['environment']['hardware']}, {row['environment']['threads']} threads" for row in rows}
    versions = {f"torch {r['environment']['torch']}, transformers {r['environment']['transformers']}" for r in rows}
    commits = sorted({row["commit"] for row in rows})
    rates = "; ".join(_rate(bed, variant, value) for variant, value in found.items() if value["sweep"])
    excess_of = "loss above dense" if metric_of(bed) == "loss" else "KL to dense"
    text = (
        f"`python -m benchmarks run {bed.name}`; {', '.join(sorted(machines))}; {', '.join(sorted(versions))}; commits "
        f"{', '.join(commits)}. Excess: {excess_of}, as a share of that of `svd_llm` with "
        "the same training (closed forms: without). ± after a mean: standard deviation over seeds. A refit "
        "runs the dense and the compressed model over the calibration tokens once more."
    )
    sizes = ", ".join(f"{keep:g}" for keep in bed.sweeps)
    tried = (
        f" Learning rates {', '.join(f'{r:g}' for r in bed.rates)} at keep {sizes} on validation data, "
        "from the middle one on until both neighbours of the best are worse"
    )
    left = (
        " A variant not yet swept at one of these sizes has the rate of its nearest one there."
        if len(bed.sweeps) > 1
        else ""
    )
    made = f" The model: `{bed.made}`." if bed.made else ""
    return text + (f"{tried}; best: {rates}.{left}" if rates else "") + made


def _rate(bed: Bed, variant: str, value: Mapping[str, Any]) -> str:
    """The best rates of a variant, at each size that it was swept at."""
    parts = []
    for keep in bed.sweeps:
        sweep = sweep_of(value, keep)
        if sweep:
            unfinished = "" if next_rate(sweep, bed.rates) is None else " (unfinished)"
            where = "" if len(bed.sweeps) == 1 else f" at {keep:g}"
            parts.append(f"{best_rate(sweep):g}{where}{unfinished}")
    return f"`{variant}` {', '.join(parts)}"


def summary() -> str:
    """README's table: each bed and size, the strongest baseline, and this tool, without and with training."""
    titles = ["model", "keep", "svd_llm", "lrcompress, closed form", "svd_llm, trained", "lrcompress, trained",
              "KL, of svd_llm's trained alike", "excess, of svd_llm's trained alike"]  # fmt: skip
    lines = [heading(titles)]
    for bed in beds().values():
        found, metric = results(bed), metric_of(bed)
        for keep in bed.keeps:
            closed = [rows_at(found[variant], keep) if variant in found else {} for variant in CLOSED]
            trained = [where_it_helps(found, *both, keep) for both in zip(CLOSED, TRAINED, strict=True)]
            columns = [*closed, *trained]
            cells = [_kls(rows) for rows in columns]
            if all(columns):
                theirs, ours = trained
                pairs = [excess_pairs(ours, theirs, one) for one in ("kl", metric)]
                shares = [f"{ratio(each):.2f}" if each else "" for each in pairs]
                lines.append(line_of([bed.title, f"{keep:g}", *cells, *shares]))
    return "\n".join(lines) + "\n"


def _kls(rows: Mapping[int, dict[str, Any]]) -> str:
    """Test KL of rows; what is larger than its size allows says so."""
    if not rows:
        return ""
    most = max(map(surplus, rows.values()))
    more = f" (at {most:.2f} × the size)" if most > EXACT else ""
    return spread([row["scores"]["test"]["kl"] for row in rows.values()], 4) + more


EXACT = 1.0001
"""Ranks are whole numbers: a size is met from below, but for results of when layers that cannot be pivoted kept their
rank."""

CLOSED = ("closed-svd_llm", "closed-refit-pivoted")
TRAINED = (("svd_llm",), ("rounds", "whitened", "refit-pivoted"))
"""Of the baseline and of this tool; of several the first that was measured at a size."""


def where_it_helps(
    found: Mapping[str, Any], closed: str, trained: Sequence[str], keep: float
) -> dict[int, dict[str, Any]]:
    """Seed → the trained row, or the closed form where that is nearer to the dense model on validation data.

    So the tool decides (`recovery.check`), and here for the baseline too.
    """
    starts = rows_at(found[closed], keep) if closed in found else {}
    measured = (rows_at(found[variant], keep) for variant in trained if variant in found)
    rows: dict[int, dict[str, Any]] = next((rows for rows in measured if rows), {})

    def better(seed: int, row: dict[str, Any]) -> dict[str, Any]:
        start = starts.get(seed, row)
        return min(row, start, key=lambda one: one["scores"]["validation"]["kl"])

    return {seed: better(seed, row) for seed, row in rows.items()}


def draw(name: str, file: Path) -> None:
    """KL on the test data against the share of parameters that is kept; a line through the means, each seed a dot."""
    from matplotlib.figure import Figure

    bed = beds()[name]
    found = results(bed)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for variant, colour in ((name, colour) for name, colour in SHOWN.items() if name in found):
        points = [(keep, rows_at(found[variant], keep)) for keep in bed.keeps]
        points = [(keep, [row["scores"]["test"]["kl"] for row in rows.values()]) for keep, rows in points if rows]
        if not points:
            continue
        style = "--" if kind_of(variant) == "closed" else "-"
        axes.plot([keep for keep, _ in points], [fmean(kls) for _, kls in points], style, color=colour, label=variant)
        for keep, kls in points:
            axes.plot([keep] * len(kls), kls, ".", color=colour, markersize=5, alpha=0.7)
    axes.set_yscale("log")
    axes.set_xlabel("share of the layers' parameters that is kept")
    axes.set_ylabel("KL to the dense model, test data")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(bed.title.replace("`", ""), fontsize=10)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def pictures() -> None:
    """The plot of every bed that has results."""
    for name, bed in beds().items():
        if results(bed):
            draw(name, HERE / "pictures" / f"experiments_{name}.png")
