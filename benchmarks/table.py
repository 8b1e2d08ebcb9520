"""The tables of README.md, benchmarks/README.md and benchmarks/NEGATIVE.md, and plots, from the committed results.

`python -m benchmarks table` writes them between their marks.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compare, experiments
from benchmarks.compare import heading, line_of
from benchmarks.harder import harder

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BENCHMARKS = HERE / "README.md"
NEGATIVE = HERE / "NEGATIVE.md"
PAGES = (README, BENCHMARKS, NEGATIVE)
END = "<!-- end of results -->\n"

SELECTED = {"minilm_sst2": "MiniLM-L6 on SST-2, all encoder layers", "demo": "`demo`, all layers"}
STEPS = ("mlp", "demo", "minilm_sst2", "llama")


def rank_selectors(case: str) -> str:
    """The selectors at each size, closed form and trained, and the frontier."""
    value = _read(f"rank_selectors_{case}")
    metric = "accuracy" if "minilm" in case else "loss"
    where = _where(value)
    scored = f"{value['scored']} windows" if value.get("scored") else "all sentences"
    lines = [
        f"**{SELECTED[case]}** ({where}; chosen on {value['examples']} validation sequences, scored on {scored} of "
        "each split)",
        "",
        heading(["selector", "keep", "KL val.", "KL test", f"{metric} val.", f"{metric} test", "trained KL val.",
               "trained KL test", "seconds"]),
        line_of(["dense", "1", "0", "0", *(_score(value["dense"][split], metric) for split in ("validation", "test")),
              "", "", ""]),
    ]  # fmt: skip
    for row in value["rows"]:
        if "refused" in row:
            cells = ["refused", "", "", "", "", "", f"{row['seconds']:.0f}"]
        else:
            closed, trained = row["closed_form"], row.get("trained")
            cells = [_kl(closed["validation"]), _kl(closed["test"])]
            cells += [_score(closed[split], metric) for split in ("validation", "test")]
            cells += [_kl(trained[split]) if trained else "" for split in ("validation", "test")]
            cells.append(f"{sum(row['stages'].values()):.1f}")
        lines.append(line_of([f"`{row['selector']}`", f"{row['keep']:g}", *cells]))
    refused = {row["selector"]: row["refused"] for row in value["rows"] if "refused" in row}
    lines += ["", *(f"`{name}` refused: {why}." for name, why in refused.items())]
    lines += [
        "",
        "The frontier, closed form:",
        "",
        heading(["keep", "budget KL val.", "test", "uniform KL val.", "test"]),
    ]
    for share in dict.fromkeys(row["keep"] for row in value["frontier"]):
        found = {row["allocation"]: row for row in value["frontier"] if row["keep"] == share}
        cells = [_kl(found[how][split]) for how in ("budget", "uniform") for split in ("validation", "test")]
        lines.append(line_of([f"{share:g}", *cells]))
    return "\n".join(lines) + "\n"


def source_steps(bed: str) -> str:
    """Rank by rank: rank loss, quality before and after replacement, φ."""
    value = _read(f"source_steps_{bed}")
    dense = value["dense"]
    lines = [
        f"**{value['about']}** ({_where(value)}; dense accuracy {100 * dense['accuracy']:.1f} %; means of the seeds "
        f"{' and '.join(map(str, value['seeds']))})",
        "",
        heading(["layers", "rank", "variant", "rank loss", "before: KL", "after: KL", "after: accuracy %",
               "φ_A at r/4 (random)", "φ_B at r/4 (random)"]),
    ]  # fmt: skip
    keys = dict.fromkeys((row["layers"], row["rank"], row["variant"]) for row in value["rows"])
    for key in keys:
        rows = [row for row in value["rows"] if (row["layers"], row["rank"], row["variant"]) == key]
        phi = rows[-1]["phi"]
        before = f"{_mean(row['before']['kl'] for row in rows):.3f}" if rows[0]["before"] else ""
        cells = [f"{_mean(row['rank_loss'] for row in rows):.3f}", before]
        cells += [f"{_mean(row['after']['kl'] for row in rows):.3f}"]
        cells += [f"{100 * _mean(row['after']['accuracy'] for row in rows):.1f}"]
        cells += [f"{phi[factor]['quarter']:.2f} ({phi[factor]['quarter_random']:.2f})" for factor in ("A", "B")]
        lines.append(line_of([key[0], str(key[1]), key[2], *cells]))
    lines += ["", f"![φ of two seeds](pictures/source_steps_{bed}.png)"]
    return "\n".join(lines) + "\n"


def candidates(study: str) -> str:
    """Each idea beside the tool, from the same start with the same steps: means over seeds, paired differences."""
    value = _read(f"candidates_{study}")
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in value["rows"]:
        found.setdefault(row["candidate"], {})[row["seed"]] = row
    tool = found["the tool"]
    lines = [
        f"**`{value['bed']}`, keep {value['keep']:g}**, {value['recipe']['recovery']['steps']} steps at learning "
        f"rate {value['rate']:g}; validation data ({_where(value)})",
        "",
        heading(["what is tried", "KL to dense", "difference to the tool, paired, 95 %", "seeds"]),
    ]  # fmt: skip
    for name, rows in found.items():
        kls = [row["kl"] for row in rows.values()]
        pairs = [rows[seed]["kl"] - tool[seed]["kl"] for seed in rows.keys() & tool.keys()]
        beside = "" if name == "the tool" else compare.difference(pairs)
        lines.append(line_of([name, compare.spread(kls, 4), beside, str(len(rows))]))
    return "\n".join(lines) + "\n"


def curvature(bed: str) -> str:
    """Closed forms by each estimate of the curvature, beside the tool's."""
    return _beside_the_tool(f"curvature_{bed}", "estimate", "closed forms, plain layout")


def refits(bed: str) -> str:
    """Each way to refit, beside the tool's."""
    return _beside_the_tool(f"refits_{bed}", "refit", "closed forms, pivoted layout")


def _beside_the_tool(name: str, what: str, about: str) -> str:
    """The candidates of a study at its sizes, and their KL as a share of the tool's."""
    value = _read(name)
    found: dict[str, dict[float, dict[int, float]]] = {}
    for row in value["rows"]:
        keep = row.get("keep", value.get("keep"))
        found.setdefault(row["candidate"], {}).setdefault(keep, {})[row["seed"]] = row["kl"]
    tool = found["the tool"]
    titles = [what, *(f"KL to dense, keep {keep:g}" for keep in tool), "of the tool's", "seeds"]
    lines = [f"**`{value['bed']}`**, {about}; validation data ({_where(value)})", "", heading(titles)]
    for candidate, sizes in found.items():
        seeds = sorted(set.intersection(*(set(kls) & set(tool[keep]) for keep, kls in sizes.items())))
        ratios = [_mean(kls[s] for s in seeds) / _mean(tool[keep][s] for s in seeds) for keep, kls in sizes.items()]
        cells = [compare.spread([kls[seed] for seed in seeds], 4) for kls in sizes.values()]
        beside = "" if candidate == "the tool" else ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(line_of([candidate, *cells, beside, str(len(seeds))]))
    return "\n".join(lines) + "\n"


def cross_terms(bed: str) -> str:
    """What parts of a block cost alone and together, the sum over blocks of each alone."""
    value = _read(f"cross_terms_{bed}")
    found: dict[str, dict[float, float]] = {}
    for row in value["rows"]:
        found.setdefault(row["parts"], {})[row["keep"]] = sum(row["kl"])
    keeps = list(next(iter(found.values())))
    titles = [title for keep in keeps for title in (f"KL to dense, keep {keep:g}", "of the sum of its parts")]
    lines = [f"**`{bed}`**, `kron`'s closed form ({_where(value)})", "", heading(["parts", *titles])]
    single = [parts for parts in found if " " not in parts]
    for parts, kls in found.items():
        members = [part for part in parts.split() if part in found] or single  # of the whole model: all
        cells = []
        for keep in keeps:
            alone = sum(found[part][keep] for part in members)
            cells += [f"{kls[keep]:.4f}", f"{kls[keep] / alone:.2f}" if len(members) > 1 else ""]
        lines.append(line_of([parts if members is single else ", ".join(members), *cells]))
    return "\n".join(lines) + "\n"


def hub_beds(_: str) -> str:
    """The beds that no result is from here: what they measure, and published numbers to stand beside."""
    lines = [heading(["bed", "model", "train, validation, test data", "keep", "lm-eval", "published"])]
    for bed in experiments.beds().values():
        if bed.needs != "hub":
            continue
        data = bed.settings["data"].values()
        names = " ".join(dict.fromkeys(f"{one['path']}/{one['name']}" for one in data))
        tasks = [task for one in bed.settings.get("evaluate", []) for task in one.get("tasks", [])]
        sizes = ", ".join(f"{keep:g}" for keep in bed.keeps)
        lines.append(line_of([f"`{bed.name}`", bed.model, names, sizes, ", ".join(tasks), " ".join(bed.published)]))
    return "\n".join(lines) + "\n"


def calibration(bed: str) -> str:
    """Closed forms by the number of calibration sequences, means over seeds."""
    value = _read(f"calibration_{bed}")
    lines = [
        f"**`{bed}`, keep {value['keep']:g}**, validation data ({_where(value)})",
        "",
        heading(["sequences", "tokens", "KL: `svd_llm`", "`kron`", "`kron`, refitted", "seconds: statistics", "refit",
               "seeds"]),
    ]  # fmt: skip
    for count in sorted({row["sequences"] for row in value["rows"]}):
        rows = [row for row in value["rows"] if row["sequences"] == count]
        cells = [f"{count:,}", f"{_mean(row['tokens'] for row in rows):,.0f}"]
        cells += [compare.spread([row["kl"][key] for row in rows], 4) for key in ("svd_llm", "kron", "refit")]
        cells += [f"{_mean(row['seconds'][stage] for row in rows):.0f}" for stage in ("statistics", "refit")]
        lines.append(line_of([*cells, str(len(rows))]))
    return "\n".join(lines) + "\n"


def step_cost(bed: str) -> str:
    """Seconds of a step of the recovery, and its ratio to a plain one."""
    value = _read(f"step_cost_{bed}")
    rows = [line_of([row["variant"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}"]) for row in value["rows"]]
    about = f"**`{bed}`, keep {value['keep']:g}** ({_where(value)}; {value['rounds']} rounds)"
    return "\n".join([about, "", heading(["step", "seconds", "of a plain one"]), *rows]) + "\n"


def equal_time(bed: str) -> str:
    """The tool beside what has as many seconds."""
    value = _read(f"equal_time_{bed}")
    lines = [f"**`{bed}`**, test data ({_where(value)})"]
    for keep in dict.fromkeys(row["keep"] for row in value["rows"]):
        rows = [row for row in value["rows"] if row["keep"] == keep]
        titles = ["steps", "seconds, all stages", "of these, training", "KL to dense", "loss above dense", "seeds"]
        lines += ["", heading([f"keep {keep:g}", *titles])]
        for name in dict.fromkeys(row["candidate"] for row in rows):
            same = [row for row in rows if row["candidate"] == name]
            cells = [f"{_mean(row['steps'] for row in same):.0f}", f"{_mean(row['total'] for row in same):.0f}"]
            cells.append(f"{_mean(row['seconds']['recovery'] for row in same):.0f}")
            cells.append(compare.spread([row["kl"] for row in same], 4))
            cells.append(compare.spread([row["loss"] - row["dense_loss"] for row in same], 4))
            lines.append(line_of([name, *cells, str(len(same))]))
    return "\n".join(lines) + "\n"


def families(_: str) -> str:
    """What each model family can do."""
    value = _read("families")
    vllm = value.get("vllm", {"outcomes": {}})
    titles = ["targets", "closed form", "recovery", "native load", "remote load", "merge", "ONNX"]
    lines = [heading(["family", *titles, "vLLM"])]
    for name, row in value["rows"].items():
        served = vllm["outcomes"].get(name)
        cells = [_capability(row.get(title)) for title in titles]
        lines.append(line_of([f"`{name}`", *cells, _capability(served and {"ok": not served["FAILED"]})]))
    wrong = [
        f"`{name}`, {title}: {cell['text']}."
        for name, row in value["rows"].items()
        for title, cell in row.items()
        if not cell["ok"]
    ]
    served = f"; vLLM {vllm['version']}: {vllm['last'].strip('= ')}" if "version" in vllm else ""
    return "\n".join([*lines, "", *wrong, f"{_where(value)}{served}."]) + "\n"


def _capability(found: dict[str, Any] | None) -> str:
    return "–" if found is None else "pass" if found["ok"] else "**fail**"


MAKERS: dict[str, Callable[[str], str]] = {
    "summary": lambda _: compare.summary(),
    "experiments": compare.table,
    "bytes": compare.bytes_table,
    "calibration": calibration,
    "candidates": candidates,
    "cross_terms": cross_terms,
    "curvature": curvature,
    "equal_time": equal_time,
    "families": families,
    "harder": lambda _: harder(),
    "hub_beds": hub_beds,
    "refits": refits,
    "step_cost": step_cost,
    "rank_selectors": rank_selectors,
    "source_steps": source_steps,
}
"""First word of a mark, `<!-- results: NAME ARGUMENT -->`, to what makes its table of the argument."""


def updated(text: str) -> str:
    """A README with the tables of today between its marks."""
    for mark, table in _tables(text).items():
        before, _, rest = text.partition(mark)
        _, _, after = rest.partition(END)
        text = f"{before}{mark}\n{table}\n{END}{after}"
    return text


def _tables(text: str) -> dict[str, str]:
    """Mark → table, for the marks of a text."""
    found = {}
    for mark, name, argument in re.findall(r"(<!-- results: (\w+)(?: ([\w.-]+))? -->\n)", text):
        found[mark] = MAKERS[name](argument)
    return found


def _read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def _where(value: dict[str, Any]) -> str:
    env = value["environment"]
    commits = [value["commit"]] if "commit" in value else sorted({row["commit"] for row in value["rows"]})
    threads = f", {env['threads']} threads" if env["threads"] != 2 else ""
    return (
        f"{env['hardware']}{threads}, torch {env['torch']}, transformers {env['transformers']}, commit "
        f"{', '.join(commits)}, `{value['command']}`"
    )


def _kl(score: dict[str, Any]) -> str:
    return f"{score['kl']:.4f}"


def _score(score: dict[str, Any], metric: str) -> str:
    return f"{100 * score['accuracy']:.1f}" if metric == "accuracy" else f"{score['loss']:.3f}"


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def write() -> None:
    """All pages, and the plots."""
    compare.pictures()
    for file in PAGES:
        file.write_text(updated(file.read_text()))


if __name__ == "__main__":
    write()
