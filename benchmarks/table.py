"""README's table from the committed results: `python benchmarks/table.py` writes it between README's marks."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: benchmarks/table.py -->\n", "<!-- end of results -->\n"

CASES = {
    "demo": "`demo` (GPT-2 of Python code), all layers at 30 %",
    "minilm_sst2": "MiniLM-L6 on SST-2, all encoder layers at 15 %",
    "minilm_sst2_seed": "the same by `seed_tau01`, the source's literal method",
}
TITLES = {"token_perplexity": "perplexity", "accuracy": "accuracy %", "kl": "KL to dense"}


def table() -> str:
    """One Markdown table a case, each under a line with its hardware and versions."""
    return "\n".join(_case(title, json.loads((HERE / "results" / f"{case}.json").read_text())) for case, title in
                     CASES.items())  # fmt: skip


def _case(title: str, report: dict[str, Any]) -> str:
    names = [name for name in TITLES if name in report["rows"][0]["metrics"]]
    timed = bool(report["rows"][0]["latency"])
    heads = ["row", *(TITLES[name] for name in names), "parameters", "MB"]
    heads += ["latency, batch 1", "latency, batch 8"] if timed else []
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in report["rows"]:
        lines += _lines(row, names, timed)
    env = report["environment"]
    where = (
        f"{env['hardware']}, torch {env['torch']}, transformers {env['transformers']}, seed {env['seed']}, "
        f"commit {report['commit']}, `{report['command']}`"
    )
    return f"**{title}**\n({where})\n\n" + "\n".join(lines) + "\n"


def _lines(row: dict[str, Any], names: list[str], timed: bool) -> list[str]:
    label = row["name"] + (f" ({row['ranks']})" if row["ranks"] else "")
    if row["trained_steps"]:
        label += f", {row['trained_steps']} steps"
    tail = [f"{row['parameters']:,}", f"{row['file_bytes'] / 1e6:.1f}"]
    tail += _latencies(row) if timed else []
    lines = []
    if row["before_replacement"]:
        before = [_value(name, row["before_replacement"][name]) for name in names]
        lines.append(f"| {label}, before replacement | {' | '.join([*before, *['–'] * len(tail)])} |")
        label += ", after it"
    return [*lines, f"| {label} | {' | '.join([*(_value(name, row['metrics'][name]) for name in names), *tail])} |"]


def _value(name: str, metric: dict[str, Any]) -> str:
    value, error = metric["value"], metric["stderr"]
    if name == "accuracy":
        return f"{100 * value:.1f} ± {100 * error:.1f}"
    return f"{value:.2f}" if name == "token_perplexity" else f"{value:.3f}"


def _latencies(row: dict[str, Any]) -> list[str]:
    """Of the phase that takes longest with use: decode where there is one."""
    phases = {item["phase"] for item in row["latency"]}
    phase = "decode" if "decode" in phases else "forward"
    return [
        f"{item['median_ms']:.1f} ms (×{item['ratio_to_dense']:.2f})"
        for item in row["latency"]
        if item["phase"] == phase
    ]


def updated(readme: str) -> str:
    """README's text with the table of today."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
