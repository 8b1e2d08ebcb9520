"""The report's views: complete, escaped, stable, and without a number that report.json lacks."""

import html.parser
import io
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from lrcompress.report import (
    Environment,
    Latency,
    LayerRow,
    Metric,
    ModelInfo,
    Report,
    Row,
    StageRow,
    TaskMetric,
    TrainingPoint,
    content,
    figures,
    model_card,
    numbers,
    summary,
    to_html,
    to_markdown,
)

REVISION = "8d2a1c0f4b7e6a5d3c9b8f7e6d5c4b3a29180f7e"
SHAPES = {
    "attn.c_attn": (1152, 384),
    "attn.c_proj": (384, 384),
    "mlp.c_fc": (1536, 384),
    "mlp.c_proj": (384, 1536),
}


def language_report() -> Report:
    """A causal LM, all parts present."""
    draw = random.Random(7)
    rows = [_language_row(draw, *case) for case in LANGUAGE_ROWS]
    return Report(
        model=ModelInfo(
            id="someone/code-gpt2-small",
            revision=REVISION,
            model_type="gpt2",
            task="causal-lm",
            parameters=12_264_576,
            license="apache-2.0",
            dtype="float32",
        ),
        recipe={
            "targets": {"groups": ["attention", "mlp"]},
            "data": {"test": {"path": "wikitext", "name": "wikitext-2-raw-v1", "split": "test"}},
            "method": {"kind": "kron"},
            "ranks": {"kind": "budget", "keep_parameters": 0.31, "round_to": 1},
            "recovery": {
                "steps": 287,
                "learning_rate": 1.3e-05,
                "tau": {"schedule": "theseus", "start": 0.29},
            },
        },
        environment=ENVIRONMENT,
        rows=rows,
        layers=_layers(draw),
        stages=STAGES,
        training=_training(draw),
        definitions={
            "token_perplexity": "exp of the mean negative log-likelihood, in windows of 253 tokens.",
            "kl": "Mean Kullback-Leibler divergence from the dense model.",
            "agreement": "Share of tokens for which the most likely token is the dense model's.",
        },
        notes=["2 calibration rows were dropped: not finite."],
    )


def classifier_report() -> Report:
    """An encoder by the source's literal recipe, which falls at replacement; no timing."""
    cases = [
        ("dense", None, 0, 22_713_986, 0.866557, None, None),
        ("svd_llm", "uniform", 0, 13_812_098, 0.773476, 0.26634, None),
        ("svd_llm", "plan", 0, 13_812_417, 0.801208, 0.15327, None),
        ("kron", "plan", 0, 13_812_417, 0.840747, 0.09815, None),
        ("lora_lrd", "plan", 149, 13_812_417, 0.498627, 0.47829, 0.859418),
    ]
    rows = [
        Row(
            name=name,
            ranks=ranks,
            trained_steps=steps,
            parameters=parameters,
            target_parameters=parameters - 12_095_618,
            file_bytes=4 * parameters + 10_437,
            metrics={"accuracy": Metric(value=accuracy, stderr=0.008377, count=1821)}
            | ({"kl": Metric(value=kl, stderr=kl / 37, count=1821)} if kl else {}),
            before_replacement={"accuracy": Metric(value=before, stderr=0.008146, count=1821)} if before else None,
        )
        for name, ranks, steps, parameters, accuracy, kl, before in cases
    ]
    model = ModelInfo(
        id="/home/someone/models/minilm-sst2",
        model_type="bert",
        task="sequence-classification",
        parameters=22_713_986,
        dtype="float32",
    )
    recipe = {
        "method": {"kind": "kron"},
        "data": {"test": {"path": "/home/someone/data/sst2_test.tsv", "text": 0}},
    }
    note = "accuracy falls from 85.9 to 49.9 at replacement"
    return Report(model=model, recipe=recipe, environment=ENVIRONMENT, rows=rows, notes=[note])


def dense_only() -> Report:
    """Nothing compressed, nothing timed, nothing trained."""
    full = classifier_report()
    return full.model_copy(update={"rows": full.rows[:1], "notes": [], "recipe": {}})


def task_report() -> Report:
    """A causal LM that lm-eval has measured: one metric with either direction, one without an error or a direction."""
    full, draw = language_report(), random.Random(3)
    definitions = {
        f"{name}": f"{name.split('.')[1]} of the task {name.split('.')[0]} of lm-eval 0.4.13: version 1.7, 3 shots"
        for name in ("hellaswag.acc_norm", "lines.word_perplexity", "gsm8k.score.strict-match")
    }
    rows = [
        row.model_copy(
            update={
                "latency": [],
                "tasks": {
                    "hellaswag.acc_norm": _task(draw.uniform(0.25, 0.6), 0.0049, True),
                    "lines.word_perplexity": _task(draw.uniform(30, 400), draw.uniform(0.3, 3), False),
                    "gsm8k.score.strict-match": _task(draw.uniform(0, 0.1), None, None),
                },
            }
        )
        for row in full.rows
    ]
    more = {"layers": [], "training": [], "definitions": full.definitions | definitions}
    return full.model_copy(update={"rows": rows, **more})


def _task(value: float, stderr: float | None, higher: bool | None) -> TaskMetric:
    return TaskMetric(value=value, stderr=stderr, count=1319, higher_is_better=higher)


ENVIRONMENT = Environment(
    device="cpu",
    hardware="Xeon E5-2697, 18 cores",
    threads=17,
    python="3.11.9",
    torch="2.13.0",
    transformers="5.23.0",
    lrcompress="0.1.0",
    seed=23,
    compute_dtype="float32",
)
LANGUAGE_ROWS = [
    ("dense", None, 0, 1.0, 18.4213, 0.0),
    ("svd", "uniform", 0, 0.468, 412.93, 3.2174),
    ("fwsvd", "uniform", 0, 0.468, 122.67, 1.9382),
    ("asvd", "uniform", 0, 0.468, 97.134, 1.7219),
    ("svd_llm", "uniform", 0, 0.468, 33.586, 0.61357),
    ("svd_llm", "plan", 0, 0.4683, 30.217, 0.52291),
    ("kron", "plan", 0, 0.4683, 28.949, 0.46127),
    ("lora_lrd", "plan", 287, 0.4683, 22.718, 0.21463),
]
STAGES = [
    StageRow(name="layers", seconds=0.2174),
    StageRow(
        name="statistics",
        seconds=41.372,
        peak_memory_bytes=913_276_928,
        notes=["damping 1.7e-06 in 3 layers"],
    ),
    StageRow(name="spectra", seconds=19.846, peak_memory_bytes=702_113_792),
    StageRow(name="recovery", seconds=233.71, peak_memory_bytes=1_618_247_680),
    StageRow(name="evaluation", seconds=56.29),
]


def _language_row(draw, name, ranks, steps, part, perplexity, kl) -> Row:
    parameters = round(12_264_576 * part)
    metrics = {
        "token_perplexity": Metric(value=perplexity, stderr=perplexity / 143, count=48_914),
        "kl": Metric(value=kl, stderr=kl / 61 or None, count=48_914),
        "agreement": Metric(value=1 / (1 + kl), stderr=0.0019274, count=48_914),
    }
    return Row(
        name=name,
        ranks=ranks,
        trained_steps=steps,
        parameters=parameters,
        target_parameters=parameters - 4_113_792,
        file_bytes=4 * parameters + 21_336,
        metrics=metrics,
        device="cpu",
        peak_memory_bytes=4 * parameters + 117_440_512,
        seconds=draw.uniform(9, 240),
        latency=[_latency(draw, part, *case) for case in TIMED],
    )


TIMED = [("prefill", 1, 37.41), ("prefill", 8, 263.9), ("decode", 1, 6.827), ("decode", 8, 11.93)]


def _latency(draw, part, phase, batch, dense_ms) -> Latency:
    ratio = 1.0 if part == 1 else 0.55 + 0.4 * part + draw.uniform(-0.03, 0.03)
    median = dense_ms * ratio
    return Latency(
        batch=batch,
        phase=phase,
        median_ms=median,
        p10_ms=median * 0.953,
        p90_ms=median * draw.uniform(1.04, 1.2),
        ratio_to_dense=ratio,
        ratio_low=None if part == 1 else ratio * 0.971,
        ratio_high=None if part == 1 else ratio * 1.033,
        per_second=1000 * batch / median,
    )


def _layers(draw) -> list[LayerRow]:
    rows = []
    for block in range(6):
        for name, (out, inside) in SHAPES.items():
            decay = draw.uniform(18, 90) * (1 + block / 6)
            ranks = sorted({round(step * 384 / 40) for step in range(41)})
            spectrum = [math.exp(-rank / decay) * (1 - rank / 385) for rank in ranks]
            # Break-even is out·in/(out + in); the last projections keep their dense weights.
            rank = None if block == 5 and name == "mlp.c_proj" else round(draw.uniform(0.5, 1.1) * decay)
            rows.append(
                LayerRow(
                    name=f"transformer.h.{block}.{name}",
                    out_features=out,
                    in_features=inside,
                    rank=rank,
                    kept_parameters=out * inside if rank is None else rank * (out + inside),
                    relative_error=None if rank is None else draw.uniform(0.1, 0.6),
                    rank_loss=None if rank is None else draw.uniform(40, 4000),
                    block=block,
                    group="attention" if name.startswith("attn") else "mlp",
                    spectrum=spectrum,
                    spectrum_ranks=ranks,
                )
            )
    return rows


def _training(draw) -> list[TrainingPoint]:
    return [
        TrainingPoint(
            step=step,
            loss=0.19 + 1.3 * math.exp(-step / 47) + draw.uniform(-0.03, 0.03),
            tau=min(1.0, 0.29 + 0.71 * step / 172),
            seconds=0.8137 * step,
            tokens_per_second=draw.uniform(2400, 2700),
        )
        for step in range(1, 288, 2)
    ]


REPORTS = {"language": language_report, "classifier": classifier_report, "dense": dense_only, "tasks": task_report}
VIEWS = {"markdown": to_markdown, "html": to_html, "card": model_card}


@pytest.fixture(scope="module", params=REPORTS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def report(name) -> Report:
    return REPORTS[name]()


@cache
def seen(view: str, name: str) -> str:
    """A sample's view; plots take a second, so each page is drawn once."""
    return VIEWS[view](REPORTS[name]())


# ---- the schema


def test_schema_round_trip(report):
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert Report.model_validate(json.loads(json.dumps(report.model_dump(mode="json"), allow_nan=False))) == report


def test_schema_has_the_promised_keys():
    found = language_report().model_dump(mode="json")
    assert found["schema_version"] == 1
    assert {"model", "recipe", "environment", "rows", "layers", "stages"} <= set(found)
    assert {
        "name",
        "ranks",
        "trained_steps",
        "parameters",
        "target_parameters",
        "file_bytes",
        "metrics",
    } <= set(found["rows"][0])


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"accuracy": {"value": 86.7, "count": 9}}},
        {"metrics": {"bleu": {"value": 0.3, "count": 9}}},
        {"metrics": {"kl": {"value": math.inf, "count": 9}}},
        {"name": "magic"},
        {"color": "red"},
    ],
)
def test_schema_refuses(change):
    row = classifier_report().rows[0].model_dump() | change
    with pytest.raises(ValidationError):
        Row.model_validate(row)


@pytest.mark.parametrize(("value", "shown"), [(0.253, "25.3"), (1.0, "100.0"), (12.531, "1253.1")])
def test_more_words_may_be_wrong_than_were_said(value: float, shown: str):
    metrics = {"wer": Metric(value=value, count=9)}
    full = classifier_report()
    rows = [row.model_copy(update={"metrics": metrics, "before_replacement": None}) for row in full.rows]
    report = Report.model_validate(full.model_copy(update={"rows": rows}).model_dump())
    assert all(shown in view(report) for view in (to_markdown, to_html))
    with pytest.raises(ValidationError, match="wer"):
        Row.model_validate(rows[0].model_dump() | {"metrics": {"wer": {"value": -value, "count": 9}}})


def test_schema_refuses_a_spectrum_without_its_ranks():
    with pytest.raises(ValidationError, match="equal lengths"):
        LayerRow(name="a", out_features=3, in_features=3, rank=1, kept_parameters=6, spectrum=[0.3])


# ---- no number of their own

NUMERAL = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def _numerals(text: str) -> set[str]:
    return set(NUMERAL.findall(text))


def _shown(key: str, value) -> set[str]:
    """Every way in which the views may write a value that stands under this key."""
    if isinstance(value, str):
        return _numerals(value)
    if isinstance(value, bool) or value is None:
        return set()
    texts = [str(value), numbers.significant(value)]
    if isinstance(value, int):
        texts.append(numbers.integer(value))
    if key.endswith("_bytes"):
        texts.append(numbers.size(value))
    if key == "parameters":
        texts.append(numbers.millions(value))
    return _numerals(" ".join(texts))


def _walk(key: str, node) -> set[str]:
    if key.startswith("spectrum"):
        return set()  # only drawn
    if isinstance(node, dict):
        return {one for name, item in node.items() for one in _shown("", name) | _walk(name, item)}
    if isinstance(node, list):
        return {one for item in node for one in _walk(key, item)}
    return _shown(key, node)


def _allowed(report: Report) -> set[str]:
    """The JSON's values as the views write them; and what is derived: shares of dense, numbers of layers."""
    allowed = _walk("", report.model_dump(mode="json"))
    allowed |= _numerals(yaml.safe_dump(report.recipe))
    for row in report.rows:
        allowed |= _numerals(numbers.share(row.parameters, report.rows[0].parameters))
        allowed |= _numerals(numbers.share(row.target_parameters, report.rows[0].target_parameters))
        for name, metric in [*row.metrics.items(), *(row.before_replacement or {}).items()]:
            allowed |= _numerals(numbers.measured(name, metric)) | _numerals(f"{metric.value:.6g}")
            allowed |= _numerals(str(float(f"{metric.value:.6g}")))
        for metric in row.tasks.values():
            allowed |= _numerals(numbers.task(metric)) | _numerals(str(float(f"{metric.value:.6g}")))
    factorised = sum(layer.rank is not None for layer in report.layers)
    return allowed | {str(factorised), str(len(report.layers) - factorised)}


def unknown_numbers(text: str, report: Report) -> set[str]:
    """The numerals of a text that are no value of the report in one of its written forms."""
    return _numerals(text) - _allowed(report)


class _Text(html.parser.HTMLParser):
    """What a page says: its text, alternative texts and titles, with the plots' axis ticks left out."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag, attrs):
        self._skipped += tag in ("style", "svg")
        self.said += [value for name, value in attrs if name in ("aria-label", "title", "alt") and value]

    def handle_endtag(self, tag):
        self._skipped -= tag in ("style", "svg")

    def handle_data(self, data):
        if not self._skipped:
            self.said.append(data)


def _said_by_page(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    return "\n".join([*parser.said, *(text for svg in _svgs(page) for text in _said_by_svg(svg))])


def _svgs(page: str) -> list[ElementTree.Element]:
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    namespace = '<svg xmlns:xlink="http://www.w3.org/1999/xlink"'
    return [ElementTree.fromstring(text.replace("<svg", namespace, 1)) for text in found]


def _said_by_svg(node: ElementTree.Element) -> list[str]:
    if re.search(r"-[xy]tick_\d+$", node.get("id", "")):
        return []
    own = [node.text or ""] if node.tag.endswith(("text", "tspan")) else []
    return own + [text for child in node for text in _said_by_svg(child)]


@pytest.mark.parametrize("view", VIEWS)
def test_views_have_no_number_of_their_own(view, name, report):
    text = seen(view, name)
    said = _said_by_page(text) if view == "html" else text
    assert unknown_numbers(said, report) == set()


@pytest.mark.parametrize("typed", ["4096", "3.7", "99.95 %", "17.3", "1,234,567", "5.5e-07"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_number_typed_into_a_view_is_found(view, typed):
    report, text = language_report(), seen(view, "language")
    if view == "html":
        text = _said_by_page(text.replace("<h2>Recipe</h2>", f"<h2>Recipe</h2><p>about {typed}</p>"))
    else:
        text = text.replace("## Recipe", f"## Recipe\n\nabout {typed}")
    assert unknown_numbers(text, report) == {typed.removesuffix(" %")}


def test_numbers_in_plots_are_checked():
    """Text drawn into a plot counts, its axis ticks do not."""
    page = seen("html", "language")
    planted = page.replace("</svg>", "<g><text>7777.7</text></g></svg>", 1)
    assert unknown_numbers(_said_by_page(planted), language_report()) == {"7777.7"}


@given(st.floats(min_value=0, max_value=1e9), st.integers(1, 4))
def test_significant_is_a_rounding(value, digits):
    text = numbers.significant(value, digits)
    shown = float(text.replace(",", ""))
    assert shown == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=1e-300)


# ---- winners


def _best_in(view: str, column: str) -> list[str]:
    lines = [line.strip("| ").split(" | ") for line in view.splitlines() if line.startswith("|")]
    place = next(i for i, title in enumerate(lines[0]) if title.startswith(column))
    table = lines[2 : next((i for i, line in enumerate(lines) if i > 2 and line[0].strip() == "row"), None)]
    return [f"{line[0]} {line[1]}" for line in table if len(line) > place and line[place].startswith("**")]


@pytest.mark.parametrize("view", [to_markdown, model_card])
def test_winners_by_the_sense_of_the_metric(view):
    text = view(language_report())
    assert _best_in(text, "token perplexity") == ["`lora_lrd` plan"]
    assert _best_in(text, "KL") == ["`lora_lrd` plan"]
    assert _best_in(text, "agreement") == ["`lora_lrd` plan"]
    assert _best_in(view(classifier_report()), "accuracy") == ["`kron` plan"]
    assert _best_in(view(classifier_report()), "KL") == ["`kron` plan"]


def test_html_marks_the_same_winners():
    page = seen("html", "classifier")
    assert re.findall(r'class="number best">([^<]*)<', page) == ["84.1 ± 0.8", "0.0982 ± 0.0027"]


def test_the_dense_model_never_wins_and_one_row_has_no_rival():
    full = classifier_report()
    alone = full.model_copy(update={"rows": [full.rows[0], full.rows[-1]]})
    assert "**" not in to_markdown(alone)
    assert 'best">' not in to_html(alone)


def test_equal_rows_share_the_mark():
    full = classifier_report()
    twin = full.rows[3].model_copy(update={"name": "asvd"})
    tied = full.model_copy(update={"rows": [*full.rows, twin]})
    assert sum(content.metric_cell(tied, row, "accuracy").best for row in tied.rows) == 2


def test_tasks_of_lm_eval_are_in_every_view_and_won_in_the_sense_of_their_metric():
    report = task_report()
    for view in VIEWS:
        text = seen(view, "tasks")
        assert "Tasks of lm-eval" in text
        assert "version 1.7, 3 shots" in text
        assert "Tasks of lm-eval" not in seen(view, "language")
        for row in report.rows:
            assert all(numbers.task(metric) in text for metric in row.tasks.values())
    grid = content.task_grid(report)
    assert [column.title for column in grid.columns[:3]] == ["task", "dense", "svd"]
    titles = [row[0].text for row in grid.rows]
    assert titles == ["hellaswag.acc_norm ↑", "lines.word_perplexity ↓", "gsm8k.score.strict-match"]
    best = [[index for index, cell in enumerate(row[1:]) if cell.best] for row in grid.rows]
    values = [[row.tasks[name].value for row in report.rows[1:]] for name in content.task_names(report)]
    assert best == [[1 + values[0].index(max(values[0]))], [1 + values[1].index(min(values[1]))], []]
    header = yaml.safe_load(model_card(report).split("\n---\n")[0].removeprefix("---\n"))
    names = {one["dataset"]["type"]: one["metrics"][0]["type"] for one in header["model-index"][0]["results"]}
    assert names["hellaswag"] == "acc_norm"
    assert names["gsm8k"] == "score.strict-match"


def test_the_terminal_has_tasks_where_there_is_room():
    console = Console(width=300, file=io.StringIO())
    console.print(summary(task_report(), 300))
    text = console.file.getvalue()
    assert "acc_norm ↑" in text
    best = max(row.tasks["hellaswag.acc_norm"].value for row in task_report().rows[1:])
    assert f"{best:.4f} " in text
    assert "±" not in text  # the report has the errors


# ---- hostile input

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "```\n# taken over",
    "a|b|c",
    "{{ 7*7 }}",
    "**bold** [link](javascript:alert(1))",
    '"><svg onload=alert(1)>',
    "&lt;b&gt;",
    "---\nlicense: mit\n---",
]


def _hostile(text: str) -> Report:
    full = dense_only()
    layers = [language_report().layers[0].model_copy(update={"name": text})]
    return full.model_copy(
        update={
            "model": full.model.model_copy(update={"id": text, "model_type": text, "license": None}),
            "recipe": {"method": {"kind": "kron"}, text: {"path": text}, "data": {"test": {"path": text}}},
            "layers": layers,
            "stages": [StageRow(name=text, seconds=1.5, notes=[text])],
            "definitions": {text: text},
            "notes": [text],
        }
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_html_escapes(text):
    page = to_html(_hostile(text))
    assert "<script" not in page
    assert page.count("<svg") == len(figures.plots(_hostile(text))) > 0
    assert "<img" not in page
    assert "49</h1>" not in page
    assert not re.findall(r"<[a-z]+[^>]*\son\w+=", page)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("view", [to_markdown, model_card])
def test_markdown_escapes(view, text):
    found = view(_hostile(text))
    outside = _outside_code(found)
    assert not re.search(r"(?<!\\)<", outside)
    assert "](javascript" not in re.sub(r"\\.", "", outside)
    assert not re.search(r"^# taken", outside, re.MULTILINE)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("| ---")}
    rows = {len(re.findall(r"(?<!\\)\|", line)) for line in found.splitlines() if line.startswith("| ")}
    assert rows <= widths


def _outside_code(text: str) -> str:
    """Markdown without its fenced blocks, code spans and YAML header."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    body = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "code", body)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_cards_header_survives(text):
    header = yaml.safe_load(model_card(_hostile(text)).split("\n---\n")[0].removeprefix("---\n"))
    assert header["library_name"] == "transformers"
    assert "license" not in header
    assert "base_model" not in header


# ---- the page


def test_html_is_one_file():
    page = seen("html", "language")
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\((?!#)", page)
    assert not re.search(r'(src|href)="(?!#)', page)
    assert 'name="viewport"' in page


def test_every_plot_is_there_once():
    titles = re.findall(r"<figure><h3>([^<]*)</h3>", seen("html", "language"))
    assert titles == [
        "Token perplexity against size",
        "KL to dense against size",
        "Rank of each layer",
        "Spectra",
        "Recovery",
        "Latency, prefill",
        "Latency, decode",
    ]
    assert [plot.title for plot in figures.plots(dense_only())] == []


def test_references_inside_the_plots_resolve_and_ids_are_unique():
    page = seen("html", "language")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.1, 30))
def test_labels_do_not_overlap(positions, gap):
    placed = figures.spread(positions, gap, 0, 100)
    room = min(gap, 100 / max(len(positions) - 1, 1))
    ordered = sorted(placed)
    assert all(b - a >= room - 1e-6 for a, b in pairwise(ordered))
    assert -1e-6 <= ordered[0]
    assert ordered[-1] <= 100 + 1e-6


# ---- missing parts, stable bytes, the card, the terminal


@pytest.mark.parametrize("view", VIEWS)
def test_equal_reports_give_equal_bytes(view, name, report):
    assert seen(view, name) == VIEWS[view](Report.model_validate_json(report.model_dump_json()))


@pytest.mark.parametrize(
    "change",
    [
        {"training": []},
        {"layers": []},
        {"stages": []},
        {"rows": []},
        {"definitions": {}},
        {"recipe": {}},
        {"training": language_report().training[:1]},
        {"layers": [language_report().layers[0].model_copy(update={"spectrum": None, "spectrum_ranks": None})]},
        {"layers": [LayerRow(name="0", out_features=9, in_features=9, rank=2, kept_parameters=36)]},
        {
            "rows": [
                row.model_copy(update={"latency": [], "device": None, "seconds": None, "peak_memory_bytes": None})
                for row in language_report().rows
            ]
        },
        {"rows": language_report().rows[1:]},
        {"rows": [row.model_copy(update={"metrics": {}}) for row in language_report().rows]},
    ],
)
def test_missing_parts_break_nothing(change):
    full = language_report()
    few = {"layers": full.layers[-4:], "rows": full.rows[::3], "training": full.training[:5]}
    partial = full.model_copy(update=few | change)
    for view in VIEWS.values():
        assert view(partial)
    Console(width=80, quiet=True).print(summary(partial, 80))


def test_before_and_after_replacement_is_said():
    for view in VIEWS:
        text = seen(view, "classifier")
        assert "Before and after replacement" in text
        assert "85.9 ± 0.8 %" in text
        assert "49.9 ± 0.8 %" in text
    assert "Before and after" not in to_markdown(language_report())


def test_card_has_no_timing_and_no_path():
    slow = language_report()
    fast = slow.model_copy(
        update={
            "rows": [row.model_copy(update={"latency": [], "seconds": 1.5, "device": "cuda"}) for row in slow.rows],
            "stages": [],
            "training": [],
            "environment": ENVIRONMENT.model_copy(update={"hardware": "another", "threads": 3}),
        }
    )
    assert model_card(slow) == model_card(fast)
    assert "/home/" not in model_card(classifier_report())
    assert "sst2_test.tsv" in model_card(classifier_report())


def test_card_header():
    header = yaml.safe_load(model_card(language_report()).split("\n---\n")[0].removeprefix("---\n"))
    assert header["base_model"] == "someone/code-gpt2-small"
    assert header["base_model_revision"] == REVISION
    assert header["license"] == "apache-2.0"
    assert header["pipeline_tag"] == "text-generation"
    assert header["tags"] == ["lrcompress", "low-rank", "compression"]
    results = header["model-index"][0]["results"][0]
    assert results["dataset"]["type"] == "wikitext"
    assert {one["type"] for one in results["metrics"]} == {"perplexity", "kl_divergence", "agreement"}


@pytest.mark.parametrize("model_id", ["/data/models/m", "./m", "..\\m", "C:\\models\\m", "models/m", "demo"])
def test_a_local_model_is_no_base_model(model_id):
    full = classifier_report()
    card = model_card(full.model_copy(update={"model": full.model.model_copy(update={"id": model_id})}))
    header = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert not [key for key in header if key.startswith("base_model")]
    assert "/data" not in card
    assert "C:" not in card


def test_cards_snippet_imports_lrcompress_first(report):
    snippet = re.search(r"```python\n(.*?)```", model_card(report), re.DOTALL)
    assert snippet
    assert snippet.group(1).splitlines()[0] == "import lrcompress"
    compile(snippet.group(1), "snippet", "exec")
    assert "Unknown quantization type" in model_card(report)


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_terminal_table_fits(width, report):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary(report, width))
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert not any("…" in line for line in lines)
    assert sum(line.startswith(tuple(row.name for row in report.rows)) for line in lines) == len(report.rows)


def test_wider_terminals_show_more():
    columns = [len(summary(language_report(), width).columns) for width in (40, 60, 80, 160)]
    assert columns == sorted(columns)
    assert columns[0] >= 2
    assert columns[-1] > columns[1]
