"""Tasks of lm-eval against sums of log-probabilities by transformers; what is refused, and how a killed one goes on."""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import BOS, POSITIONS, factorise, save_tiny, tiny_model, tiny_tokenizer
from runs import Case, causal_case, classifier_case, cli
from torch import Tensor, nn

import lrcompress
from lrcompress import build, pipeline, preflight, stages
from lrcompress.artifacts import Measurement
from lrcompress.errors import DataError, InputError, ModelError, NumericalError, RecipeError
from lrcompress.evaluate import LmEval, harness
from lrcompress.lowrank import LowRankLinear
from lrcompress.recipe import parse

WORDS = ("warm", "dull", "sharp", "slow", "funny", "empty", "fresh", "stale")


def draw_text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def documents() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions with three answers of unequal length, and texts, one of them longer than the model's positions."""
    draw = random.Random(0)
    questions = [
        {"question": draw_text(draw, 4), "choices": [draw_text(draw, n) for n in (1, 2, 3)], "label": draw.randrange(3)}
        for _ in range(12)
    ]
    return questions, [{"text": draw_text(draw, words)} for words in (3, 60, 9, 5)]


TASKS: dict[str, dict[str, Any]] = {
    "films": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "fewshot_split": "test",
        "tag": "all_films",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 2.5},
    },
    "films_b": {"include": "films.yaml", "task": "films_b"},
    "lines": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        "metadata": {"version": 1.0},
    },
    "first_choice": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{' ' + choices[0]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
}


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks and their data."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def write_tasks(folder: Path) -> Path:
    (folder / "own" / "data").mkdir(parents=True)
    for name, rows in zip(("questions", "texts"), documents(), strict=True):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "own" / "data" / f"{name}.jsonl").write_text(lines)
    for name, config in TASKS.items():
        file = "own/data/texts.jsonl" if name == "lines" else "own/data/questions.jsonl"
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}, "test_split": "test"}
        (folder / "own" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **config}))
    group = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    both = {"group": "both_films", "task": ["films", "films_b"], "aggregate_metric_list": [group]}
    (folder / "both.yaml").write_text(yaml.safe_dump(both))
    return folder


@pytest.fixture(scope="module")
def with_lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Needs lm-eval; its own thousands of tasks are left out, and data sets are cached apart."""
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    import datasets

    index = harness._index
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(harness, "_index", lambda folder, *, defaults: index(folder, defaults=False))
        yield


def rows_of() -> tuple[Any, dict[str, dict[str, nn.Module]]]:
    model, small = tiny_model("gpt2"), tiny_model("gpt2")
    factorise(small)
    return model, {"dense": {}, "small": {n: m for n, m in small.named_modules() if isinstance(m, LowRankLinear)}}


def measure(include: Path, state: Path, *tasks: str, tokenizer: Any = None, **settings: Any) -> dict[str, Any]:
    """Row → metric → measurement."""
    model, rows = rows_of()
    entries = [LmEval(tasks=tasks, include=str(include), **settings)]
    found = harness.measure_tasks(model, rows, tokenizer or tiny_tokenizer(), entries, batch_size=4, state=state)
    return {row: {one.name: one for scores in items for one in scores.measurements} for row, items in found.items()}


@pytest.fixture(scope="module")
def measured(with_lm_eval: None, include: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(include, tmp_path_factory.mktemp("state") / "tasks.json", "films", "lines", "first_choice")


def models() -> Mapping[str, nn.Module]:
    small = tiny_model("gpt2")
    factorise(small)
    return {"dense": tiny_model("gpt2"), "small": small}


@torch.no_grad()
def log_probability(model: nn.Module, context: Tensor, continuation: Tensor) -> float:
    """Of the continuation's tokens, each after all tokens before it."""
    ids = torch.cat([context, continuation])
    log_p = model(ids[None, :-1]).logits[0].double().log_softmax(-1)[-len(continuation) :]
    return float(log_p.gather(1, continuation[:, None]).sum())


def encode(text: str) -> Tensor:
    return torch.tensor(tiny_tokenizer()(text).input_ids)


# what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["dense", "small"])
def test_a_choice_is_the_one_whose_tokens_are_likeliest(measured: dict[str, Any], row: str):
    questions, _ = documents()
    model, acc, acc_norm = models()[row], [], []
    for one in questions:
        sums = [log_probability(model, encode(one["question"]), encode(f" {choice}")) for choice in one["choices"]]
        shares = [value / len(choice) for value, choice in zip(sums, one["choices"], strict=True)]
        acc.append(sums.index(max(sums)) == one["label"])
        acc_norm.append(shares.index(max(shares)) == one["label"])
    for name, right in (("films.acc", acc), ("films.acc_norm", acc_norm)):
        p, n = sum(right) / len(right), len(right)
        found: Measurement = measured[row][name]
        assert found.value == pytest.approx(p)
        assert found.stderr == pytest.approx(sqrt(p * (1 - p) / (n - 1)))
        assert (found.count, found.higher_is_better) == (n, True)
    assert 0 < sum(acc) + sum(acc_norm) < 2 * len(acc)


@pytest.mark.parametrize("row", ["dense", "small"])
def test_a_perplexity_counts_every_token_once(measured: dict[str, Any], row: str):
    _, texts = documents()
    model, total = models()[row], 0.0
    for one in texts:
        ids = torch.cat([torch.tensor([BOS]), encode(one["text"])])
        for begin in range(1, len(ids), POSITIONS):
            end = min(begin + POSITIONS, len(ids))
            total += log_probability(model, ids[max(end - POSITIONS - 1, 0) : begin], ids[begin:end])
    size = sum(len(one["text"]) for one in texts)
    words = sum(len(one["text"].split()) for one in texts)
    found = measured[row]
    assert max(len(one["text"]) for one in texts) > POSITIONS
    assert found["lines.byte_perplexity"].value == pytest.approx(exp(-total / size), rel=1e-4)
    assert found["lines.word_perplexity"].value == pytest.approx(exp(-total / words), rel=1e-3)
    assert found["lines.bits_per_byte"].value == pytest.approx(-total / size / log(2), rel=1e-4)
    assert found["lines.bits_per_byte"].stderr is None  # lm-eval has none
    assert not found["lines.bits_per_byte"].higher_is_better
    assert found["lines.bits_per_byte"].count == len(texts)


def test_a_metric_without_a_closed_form_has_its_error_by_bootstrap(measured: dict[str, Any]):
    questions, _ = documents()
    sums = torch.tensor(
        [
            log_probability(tiny_model("gpt2"), encode(one["question"]), encode(f" {one['choices'][0]}"))
            for one in questions
        ]
    ).double()
    found = measured["dense"]["first_choice.perplexity"]
    assert found.value == pytest.approx(exp(-float(sums.mean())), rel=1e-3)
    own = torch.Generator().manual_seed(1)
    drawn = torch.randint(len(sums), (4000, len(sums)), generator=own)
    assert found.stderr == pytest.approx(float((-sums[drawn].mean(1)).exp().std()), rel=0.25)


def test_a_group_with_a_score_stands_for_its_tasks_and_a_tag_for_each(
    measured: dict[str, Any], include: Path, tmp_path: Path
):
    group = measure(include, tmp_path / "group.json", "both_films")["small"]
    assert set(group) == {"both_films.acc"}
    assert group["both_films.acc"].count == 24
    assert group["both_films.acc"].value == pytest.approx(measured["small"]["films.acc"].value)
    tag = measure(include, tmp_path / "tag.json", "all_films")["small"]
    assert set(tag) == {"films.acc", "films.acc_norm", "films_b.acc", "films_b.acc_norm"}


def test_shots_and_limit_are_lm_evals_and_are_said(with_lm_eval: None, include: Path, tmp_path: Path):
    state = tmp_path / "tasks.json"
    found = measure(include, state, "films", limit=5, fewshot=2)["dense"]
    assert found["films.acc"].count == 5
    text = json.loads(state.read_text())["dense"]["films"]["definitions"]["films.acc"]
    for part in (
        "acc of the task films",
        f"lm-eval {harness.version()}",
        "version 2.5",
        "2 shots",
        "5 of 12 documents",
    ):
        assert part in text
    from lm_eval.tasks import TaskManager  # the same through lm-eval's own entry point

    model = rows_of()[0]
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4)
    task = harness._load(LmEval(tasks=("films",), include=str(include)), "films")["tasks"]["films"]
    manager = TaskManager(include_defaults=False)
    wanted: Any = simple_evaluate(
        lm, tasks=[task], limit=5, num_fewshot=2, task_manager=manager, bootstrap_iters=harness.BOOTSTRAP
    )
    for metric in ("acc", "acc_norm"):
        assert found[f"films.{metric}"].value == wanted["results"]["films"][f"{metric},none"]
        assert found[f"films.{metric}"].stderr == wanted["results"]["films"][f"{metric}_stderr,none"]


def test_nothing_of_the_callers_is_changed(
    with_lm_eval: None, include: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    place, state = Path.cwd(), (random.getstate(), torch.get_rng_state().tolist())
    measure(include, tmp_path / "tasks.json", "films", tokenizer=tokenizer)
    assert tokenizer.pad_token is None
    assert (Path.cwd(), random.getstate(), torch.get_rng_state().tolist()) == (place, *state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_a_killed_evaluation_repeats_no_finished_pair(
    measured: dict[str, Any], include: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
):
    scores, pairs = harness._scores, []

    def counted(lm: Any, loaded: Any, name: str, entry: LmEval, row: str) -> Any:
        if len(pairs) == killed:
            pairs.append(None)
            raise KeyboardInterrupt
        pairs.append((row, name))
        return scores(lm, loaded, name, entry, row)

    monkeypatch.setattr(harness, "_scores", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(include, tmp_path / "tasks.json", "films", "lines")
    again = measure(include, tmp_path / "tasks.json", "films", "lines")
    done = [pair for pair in pairs if pair]
    assert sorted(done) == sorted((row, name) for row in ("dense", "small") for name in ("films", "lines"))
    for row, found in again.items():
        assert found == {name: one for name, one in measured[row].items() if not name.startswith("first_choice")}


def test_outputs_that_are_not_finite_name_the_row(with_lm_eval: None, include: Path, tmp_path: Path):
    model, rows = rows_of()
    modules = dict(model.named_modules())
    with torch.no_grad():
        next(iter(rows["small"].values())).get_parameter("B.weight").fill_(float("nan"))
    entries = [LmEval(tasks=("films",), include=str(include))]
    with pytest.raises(NumericalError, match=r"row small, task films: .* not finite"):
        harness.measure_tasks(model, rows, tiny_tokenizer(), entries, batch_size=4, state=tmp_path / "tasks.json")
    assert dict(model.named_modules()) == modules
    assert set(json.loads((tmp_path / "tasks.json").read_text())) == {"dense"}


# what is refused ----------------------------------------------------------------------------------------------


def refused(entry: Mapping[str, Any], kind: type[InputError] = RecipeError) -> str:
    with pytest.raises(kind) as caught:
        harness.check_tasks([LmEval.model_validate(entry)])
    return str(caught.value)


def test_without_lm_eval_the_extra_is_named(include: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert "pip install 'lrcompress[eval]'" in refused({"tasks": ["films"], "include": str(include)})
    harness.check_tasks([])


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"kind": "lm_eval"}, "`evaluate.0.tasks`: Field required"),
        ({"kind": "lm_eval", "tasks": []}, "at least 1 item"),
        ({"kind": "lm_eval", "tasks": ["a", "a"]}, "twice: a, a"),
        ({"kind": "lm_eval", "tasks": ["a"], "limit": 0}, "`evaluate.0.limit`"),
        ({"kind": "lm_eval", "tasks": ["a"], "shots": 1}, "fewshot, include"),
    ],
)
def test_a_wrong_entry_is_a_mistake_of_the_recipe(value: Any, part: str):
    with pytest.raises(RecipeError) as caught:
        parse({"evaluate": [value]})
    assert part in str(caught.value)


def test_an_unknown_task_is_answered_with_the_nearest(with_lm_eval: None, include: Path, tmp_path: Path):
    text = refused({"tasks": ["films", "lins"], "include": str(include)})
    assert "got: lins" in text
    assert "nearest: lines" in text
    assert "in " + str(include) in text
    assert "no folder" in refused({"tasks": ["films"], "include": str(tmp_path / "nothing")})


def test_a_task_that_a_group_has_already_is_refused(with_lm_eval: None, include: Path):
    text = refused({"tasks": ["both_films", "films_b"], "include": str(include)})
    assert "films_b, in both_films and in films_b" in text


def test_data_that_are_not_there_are_said_before_any_work(with_lm_eval: None, tmp_path: Path):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "own" / "data" / "texts.jsonl").unlink()
    text = refused({"tasks": ["lines"], "include": str(folder)}, DataError)
    assert "cannot load the task `lines`" in text
    assert f"lines.yaml: relative paths start at {folder}" in text
    folder = tmp_path / "others"
    folder.mkdir()
    hub = {"task": "far", "dataset_path": "somebody/something", "test_split": "test", "output_type": "loglikelihood"}
    (folder / "far.yaml").write_text(yaml.safe_dump(hub))
    text = refused({"tasks": ["far"], "include": str(folder)}, DataError)
    assert "somebody/something" in text
    assert "HF_HUB_OFFLINE" in text


def test_a_classifier_is_refused(tmp_path: Path):
    case = classifier_case(tmp_path)
    work = pipeline.open_workspace(
        str(case.model), case.recipe, tmp_path / "out", settings=["evaluate=[{kind: lm_eval, tasks: [films]}]"]
    )
    for look in (preflight.check, preflight.overview):
        with pytest.raises(ModelError, match=r"(?s)needs a causal LM.*task sequence-classification"):
            look(work)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path):
    model = save_tiny("gpt2", tmp_path / "gpt2")
    for file in model.glob("*token*"):
        file.unlink()
    recipe = {
        "evaluate": [{"kind": "lm_eval", "tasks": ["films"]}],
        "ranks": {"kind": "uniform", "keep_parameters": 0.5},
    }
    with pytest.raises(ModelError, match="tokenizer"):
        preflight.overview(pipeline.open_workspace(str(model), recipe, tmp_path / "out"))


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known_and_their_data_are_looked_for():
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    harness.check_names([LmEval(tasks=("hellaswag", "wikitext", "mmlu"))])
    assert "nearest: hellaswag" in refused({"tasks": ["helaswag"]})
    text = refused({"tasks": ["hellaswag"]}, DataError)
    assert "Rowan/hellaswag" in text
    assert "HF_HUB_OFFLINE unset" in text


# in a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(with_lm_eval: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = causal_case(tmp_path_factory.mktemp("case"))
    write_tasks(made.folder / "tasks")
    more = f"{{kind: lm_eval, tasks: [films, lines], include: {made.folder}/tasks, limit: 6}}"
    text = made.recipe.read_text().replace("[perplexity, divergence]", f"[perplexity, {more}]")
    made.recipe.write_text(f"{text}ranks: {{kind: uniform, keep_parameters: 0.5}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)
        yield made


SETTINGS = ("timing=null", "recovery=null", "baselines=[svd]", "method=svd_llm")


def test_a_run_measures_every_row_and_all_views_have_it(case: Case):
    report = lrcompress.run(str(case.model), case.recipe, case.folder / "out", settings=SETTINGS)
    assert report is not None
    names = ["films.acc", "films.acc_norm", "lines.word_perplexity", "lines.byte_perplexity", "lines.bits_per_byte"]
    assert [list(row.tasks) for row in report.rows] == [names] * len(report.rows)
    assert len(report.rows) == 3
    assert report.rows[0].tasks["lines.bits_per_byte"].value != report.rows[2].tasks["lines.bits_per_byte"].value
    assert all("token_perplexity" in row.metrics for row in report.rows)
    assert set(names) < set(report.definitions)
    assert any("films (6), lines (6)" in note for note in report.notes)
    folder = case.folder / "out"
    value = report.rows[2].tasks["lines.bits_per_byte"].value
    for file in ("report.md", "report.html", "model/README.md"):
        text = (folder / file).read_text()
        assert "bits_per_byte" in text, file
        assert f"{value:.3f}" in text, file
        assert f"lm-eval {harness.version()}" in text, file
    assert json.loads((folder / "report.json").read_text())["rows"][2]["tasks"]["films.acc"]["count"] == 6


def test_a_changed_file_beside_the_tasks_runs_the_evaluation_again(case: Case, tmp_path: Path):
    output = tmp_path / "out"
    lrcompress.run(str(case.model), case.recipe, output, settings=SETTINGS, until="evaluation")

    def todo() -> dict[str, str]:
        work = pipeline.open_workspace(str(case.model), case.recipe, output, settings=SETTINGS)
        return {name: why for name, why in pipeline.plan_of_work(work, "evaluation").items() if why}

    assert todo() == {}
    file = case.folder / "tasks" / "own" / "data" / "questions.jsonl"
    former = file.read_text()
    file.write_text("".join(former.splitlines(keepends=True)[1:]))
    assert todo() == {"evaluation": "changed: evaluate"}
    file.write_text(former)


def test_a_run_killed_at_the_tasks_goes_on_there(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    scores, measure_rows = harness._scores, stages.measure_rows

    def killed_once(lm: Any, loaded: Any, name: str, entry: LmEval, row: str) -> Any:
        if done[-2:] == ["dense films", "svd-uniform films"]:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(f"{row} {name}")
        return scores(lm, loaded, name, entry, row)

    monkeypatch.setattr(harness, "_scores", killed_once)
    monkeypatch.setattr(stages, "measure_rows", lambda *a, **k: (done.append("sequences"), measure_rows(*a, **k))[1])
    for _ in range(2):
        with suppress(KeyboardInterrupt):
            lrcompress.run(str(case.model), case.recipe, tmp_path / "out", settings=SETTINGS, until="evaluation")
    rows = ("dense", "svd-uniform", "svd_llm-plan")
    pairs = [f"{row} {name}" for name in ("films", "lines") for row in rows]
    assert done == ["sequences", *pairs[:2], "killed", *pairs[2:]]


def test_tasks_alone_need_no_data_of_the_recipe(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(build, "to_html", lambda report: "")
    entry = {"kind": "lm_eval", "tasks": ["films"], "include": str(case.folder / "tasks"), "limit": 2}
    recipe = {"evaluate": [entry], "method": "svd", "ranks": {"kind": "uniform", "keep_parameters": 0.5}}
    report = lrcompress.run(str(case.model), recipe | {"recovery": None}, tmp_path / "out")
    assert report is not None
    assert [row.metrics for row in report.rows] == [{}, {}]
    assert all(set(row.tasks) == {"films.acc", "films.acc_norm"} for row in report.rows)


def test_a_dry_run_knows_the_names(case: Case, tmp_path: Path):
    good = cli(*case.arguments(tmp_path / "out", "--dry-run"))
    assert good.code == 0, good.err
    wrong = case.recipe.read_text().replace("films, lines", "films, lins")
    (tmp_path / "wrong.yaml").write_text(wrong)
    bad = cli("run", case.model, "--recipe", tmp_path / "wrong.yaml", "--output", tmp_path / "out", "--dry-run")
    assert bad.code == 2
    assert "nearest: lines" in bad.err
