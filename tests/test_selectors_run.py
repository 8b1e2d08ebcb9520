"""Every selector from `lrcompress run` to the report: what is done again, what an interruption leaves, bad input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Case, classifier_case, cli, content, times, validated_case

import lrcompress
from lrcompress import build, pipeline, recovery_stage, stages
from lrcompress.errors import DataError, RecipeError
from lrcompress.evaluate.scorer import Scorer
from lrcompress.lowrank import ranks_of
from lrcompress.report import Report
from lrcompress.report.content import result_row
from lrcompress.workspace import STAGE_ORDER

FOLDERS = {name: f"{number:02d}-{name}" for number, name in enumerate(STAGE_ORDER, 1)}
QUICK = ("timing=null", "recovery=null", "baselines=[]")
LEARNING = "{steps: 4, batch: 4, length: 32}"
SELECTORS = {
    "energy": "{kind: energy, keep_parameters: 0.5}",
    "budget": "{kind: budget, keep_parameters: 0.5, floor: {attn.c_attn: 3}, pinned: {mlp.c_proj: dense}}",
    "rank_loss": f"{{kind: rank_loss, curve: optimum, keep_parameters: 0.5, learning: {LEARNING}}}",
    "random_search": "{kind: random_search, keep_parameters: 0.5, trials: 5, examples: 20, finalists: 2, "
    "recovery_steps: 2}",
    "subspace": f"{{kind: subspace, factor: B, unclear: uniform, keep_parameters: 0.5, learning: {LEARNING}}}",
    "target": "{kind: target, rise: 0.05, metric: kl, precision: 0.02, examples: 20}",
    "frontier": "{kind: frontier, keep_parameters: [0.8, 0.5, 0.3], choose: 0.5, recover: [0.3]}",
}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Without the check in a fresh process, which is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)
        yield


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures, which take seconds."""
    monkeypatch.setattr(build, "to_html", lambda report: "")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return validated_case(tmp_path_factory.mktemp("case"))


def run(case: Case, output: Path, *settings: str, **more: Any) -> Report | None:
    return lrcompress.run(str(case.model), case.recipe, output, settings=settings, **more)


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_selector_runs_to_a_model_and_a_report(case: Case, kind: str, tmp_path: Path) -> None:
    report = run(case, tmp_path / "out", "timing=null", f"ranks={SELECTORS[kind]}")
    assert report is not None
    assert report.selection is not None
    assert report.selection.kind == kind
    result = report.rows[-1]
    assert (result.name, result.ranks) == ("lora_lrd", "plan")
    plan = json.loads((tmp_path / "out" / "stages" / FOLDERS["ranks"] / "ranks.json").read_text())["plan"]
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert ranks_of(loaded) == plan["ranks"]
    assert sum(parameter.numel() for parameter in loaded.parameters()) == result.parameters
    if kind != "target":
        assert plan["kept_parameters"] <= 0.5 * plan["dense_parameters"]
    for view in ("report.md", "report.html"):
        text = (tmp_path / "out" / view).read_text()
        assert ("How the ranks were chosen" in text) == bool(report.selection.notes)
        assert ("Rank selection" in text) == (kind in ("random_search", "target"))
    html = (tmp_path / "out" / "report.html").read_text()
    title = {"random_search": "Search", "target": "Size against validation", "rank_loss": "Rank loss",
             "subspace": "Subspaces that two runs share", "frontier": "Frontier, KL to dense"}.get(kind)  # fmt: skip
    assert title is None or f"<h3>{title}</h3>" in html


def test_a_frontier_has_a_row_for_each_size_and_trains_what_it_is_told_to(case: Case, tmp_path: Path) -> None:
    report = run(case, tmp_path / "out", f"ranks={SELECTORS['frontier']}")
    assert report is not None
    rows = [(row.name, row.ranks) for row in report.rows]
    assert rows == [
        ("dense", None), ("svd", "uniform"), ("svd_llm", "uniform"), ("svd_llm", "plan"), ("kron", "keep-0.8"),
        ("kron", "keep-0.3"), ("lora_lrd", "keep-0.3"), ("kron", "plan"), ("lora_lrd", "plan"),
    ]  # fmt: skip
    saved = result_row(report)
    assert saved is not None
    assert (saved.name, saved.ranks) == ("lora_lrd", "plan")
    by_key = {(row.name, row.ranks): row for row in report.rows}
    dense = by_key["dense", None].target_parameters
    for key, share in (("keep-0.8", 0.8), ("keep-0.3", 0.3), ("plan", 0.5)):
        assert 0.9 * share * dense < by_key["kron", key].target_parameters <= share * dense
        assert by_key["kron", key].metrics["kl"].value > 0
    assert by_key["lora_lrd", "keep-0.3"].trained_steps == 6
    assert by_key["lora_lrd", "keep-0.3"].parameters == by_key["kron", "keep-0.3"].parameters
    assert not by_key["kron", "keep-0.8"].latency
    assert by_key["kron", "plan"].latency
    # another size of the same frontier: its own factors and its own model, nothing before them
    before = times(tmp_path / "out" / "stages")
    again = run(case, tmp_path / "out", f"ranks={SELECTORS['frontier']}", "ranks.choose=0.3", "ranks.recover=[]")
    assert again is not None
    assert again.rows[-1].target_parameters == by_key["lora_lrd", "keep-0.3"].target_parameters
    assert again.rows[-1].metrics["kl"].value == pytest.approx(by_key["lora_lrd", "keep-0.3"].metrics["kl"].value)
    after = times(tmp_path / "out" / "stages")
    for name in ("layers", "statistics", "spectra"):
        assert all(after[file] == when for file, when in before.items() if file.startswith(FOLDERS[name]))


@pytest.mark.usefixtures("plain")
def test_a_recovery_that_a_refitted_frontier_gets_later_is_that_of_a_new_run(case: Case, tmp_path: Path) -> None:
    settings = ("timing=null", "baselines=[]", f"ranks={SELECTORS['frontier']}", "refit={check: 4}")
    run(case, tmp_path / "out", *settings, "recovery=null")
    before = times(tmp_path / "out" / "stages" / FOLDERS["factors"])
    later = run(case, tmp_path / "out", *settings)
    fresh = run(case, tmp_path / "fresh", *settings)
    assert later is not None
    assert fresh is not None
    assert [(row.name, row.ranks, row.metrics) for row in later.rows] == [
        (row.name, row.ranks, row.metrics) for row in fresh.rows
    ]
    assert content(tmp_path / "out" / "model") == content(tmp_path / "fresh" / "model")
    assert times(tmp_path / "out" / "stages" / FOLDERS["factors"]) == before


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", ["rank_loss", "subspace"])
def test_a_second_budget_learns_nothing_again(case: Case, kind: str, tmp_path: Path) -> None:
    ranks = SELECTORS[kind].replace("curve: optimum, ", "")
    if kind == "rank_loss":
        ranks = ranks.replace("learning: {", "learning: {start: method, ")
    run(case, tmp_path / "out", *QUICK, f"ranks={ranks}", until="ranks")
    before = times(tmp_path / "out" / "stages")
    assert sum(file.endswith(".safetensors") for file in before if FOLDERS["learning"] in file) == (
        5 if kind == "rank_loss" else 2
    )
    work = pipeline.open_workspace(
        str(case.model), case.recipe, tmp_path / "out",
        settings=(*QUICK, f"ranks={ranks}", "ranks.keep_parameters=0.4"),
    )  # fmt: skip
    todo = pipeline.plan_of_work(work, "ranks")
    assert [name for name, reason in todo.items() if reason] == ["ranks"]
    pipeline.execute(work, until="ranks")
    after = times(tmp_path / "out" / "stages")
    kept = [file for file in before if not file.startswith(FOLDERS["ranks"])]
    assert all(after[file] == before[file] for file in kept if "/" in file)


@pytest.mark.usefixtures("plain")
def test_learning_runs_again_when_its_settings_change(case: Case, tmp_path: Path) -> None:
    ranks = SELECTORS["subspace"]
    run(case, tmp_path / "out", *QUICK, f"ranks={ranks}", until="ranks")
    work = pipeline.open_workspace(
        str(case.model), case.recipe, tmp_path / "out",
        settings=(*QUICK, f"ranks={ranks.replace('steps: 4', 'steps: 5')}"),
    )  # fmt: skip
    todo = pipeline.plan_of_work(work)
    assert {name for name, reason in todo.items() if reason} == {
        "learning", "ranks", "factors", "evaluation", "model",
    }  # fmt: skip


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", ["random_search", "target"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_search_goes_on_with_the_trial_it_was_at(
    case: Case, kind: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("timing=null", "baselines=[]", "recovery.check=0", f"ranks={SELECTORS[kind]}")
    whole = run(case, tmp_path / "whole", *settings)
    scored: list[int] = []
    score = Scorer.score

    def counted(self: Scorer, modules: Any) -> Any:
        if len(scored) == at:
            raise Killed
        scored.append(len(modules))
        return score(self, modules)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", counted)
        with pytest.raises(Killed):
            run(case, tmp_path / "out", *settings)
    saved = json.loads((tmp_path / "out" / "stages" / f"{FOLDERS['ranks']}.partial" / "scores.json").read_text())
    assert len(saved) == at
    again: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", lambda self, modules: (again.append(1), score(self, modules))[1])
        report = run(case, tmp_path / "out", *settings)
    everything: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", lambda self, modules: (everything.append(1), score(self, modules))[1])
        run(case, tmp_path / "third", *settings, until="ranks")
    assert len(again) == len(everything) - at
    assert report is not None
    assert whole is not None
    assert report.selection == whole.selection
    assert content(tmp_path / "out" / "model") == content(tmp_path / "whole" / "model")


@pytest.mark.usefixtures("plain")
def test_a_killed_frontier_goes_on_to_the_same_bytes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two recoveries, and inside the second."""
    settings = ("timing=null", "baselines=[]", f"ranks={SELECTORS['frontier']}")
    run(case, tmp_path / "whole", *settings)
    wanted = content(tmp_path / "whole" / "stages" / FOLDERS["recovery"])
    for name in ("save_state", "clear_states"):
        calls: list[int] = []
        original = getattr(recovery_stage, name, None) or getattr(lrcompress.recovery.loop, name)

        def killed(*arguments: Any, calls: list[int] = calls, original: Any = original) -> None:
            original(*arguments)
            calls.append(1)
            if len(calls) == (4 if name == "save_state" else 1):  # noqa: B023
                raise Killed

        place = recovery_stage if name == "clear_states" else lrcompress.recovery.loop
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killed)
            with pytest.raises(Killed):
                run(case, tmp_path / name, *settings)
        run(case, tmp_path / name, *settings)
        found = content(tmp_path / name / "stages" / FOLDERS["recovery"])
        tensors = {file for file in wanted if file.endswith(".safetensors")}
        assert tensors == {file for file in found if file.endswith(".safetensors")}
        assert all(found[file] == wanted[file] for file in tensors)


# bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is a failure: bad input must be found before."""
    monkeypatch.setattr(lrcompress.source, "load_model", lambda *_, **__: pytest.fail("weights were read"))


BAD = [
    ("ranks={kind: random_search, keep_parameters: 0.001}", r"below what the smallest ranks need(?s:.)*at least 0\.0"),
    ("ranks={kind: frontier, keep_parameters: [0.001, 0.5], choose: 0.5}", r"below what the smallest ranks need"),
    ("ranks={kind: subspace, seeds: [1, 1]}", r"seeds must differ"),
    ("ranks={kind: random_serch, keep_parameters: 0.5}", r"nearest: random_search"),
    ("ranks={kind: target}", r"`ranks.rise`: Field required"),
    ("ranks={kind: target, rise: 0.1, alloction: uniform}", r"nearest: allocation"),
    ("ranks={kind: budget, keep_parameters: 0.5, pinned: {no.such: 3}}", r"`no.such` matches no target layer"),
    ("ranks={kind: energy, share: 0.9, keep_parameters: 0.5}", r"not both"),
    (
        "ranks={kind: subspace, learning: {loss: {kind: task}, length: 4000}}",
        r"above the model's positions",
    ),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("setting", "message"), BAD)
def test_bad_settings_are_refused_before_any_work(case: Case, tmp_path: Path, setting: str, message: str) -> None:
    outcome = cli(*case.arguments(tmp_path / "out", "--set", setting))
    assert outcome.code == 2
    import re

    assert re.search(message, " ".join(outcome.err.split())) or re.search(message, outcome.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights")
def test_choosing_needs_validation_data_of_its_own(case: Case, tmp_path: Path) -> None:
    ranks = f"ranks={SELECTORS['random_search']}"
    with pytest.raises(DataError, match=r"chooses on validation data(?s:.)*add data\.validation"):
        run(case, tmp_path / "out", ranks, "data.validation=null")
    test = case.folder / "test.txt"
    with pytest.raises(DataError, match=r"data\.validation is data\.test(?s:.)*the same source"):
        run(case, tmp_path / "out", ranks, f"data.validation={{path: {test}}}")
    copy = case.folder / "copy.txt"
    copy.write_text(test.read_text())
    with pytest.raises(DataError, match=r"data\.validation is data\.test(?s:.)*equal rows"):
        run(case, tmp_path / "out", ranks, f"data.validation={{path: {copy}}}")


@pytest.mark.usefixtures("plain")
def test_rows_that_validation_and_test_share_are_said(tmp_path: Path) -> None:
    case = classifier_case(tmp_path)
    test = (tmp_path / "test.tsv").read_text().splitlines()
    lines = (tmp_path / "train.tsv").read_text().splitlines()[:30]
    (tmp_path / "validation.tsv").write_text("\n".join([*lines, *test[:3]]) + "\n")
    split = f"data.validation={{path: {tmp_path}/validation.tsv, label: label}}"
    report = run(case, tmp_path / "out", *QUICK, split, f"ranks={SELECTORS['random_search']}", "recovery={steps: 2}")
    assert report is not None
    assert report.selection is not None
    both = {line.split("\t")[0] for line in [*lines, *test[:3]]} & {line.split("\t")[0] for line in test}
    assert len(both) >= 3
    assert f"{len(both)} rows are in data.validation and in data.test." in report.selection.notes


@pytest.mark.usefixtures("plain")
def test_a_metric_that_the_data_lack_is_refused(tmp_path: Path) -> None:
    case = classifier_case(tmp_path)
    (tmp_path / "validation.txt").write_text("a film\n")
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"text": f"film {i}"}) + "\n" for i in range(9)))
    with pytest.raises(RecipeError, match=r"`accuracy` cannot be measured(?s:.)*allowed: kl"):
        run(
            case, tmp_path / "out", *QUICK, f"data.validation={{path: {tmp_path}/validation.jsonl}}",
            "ranks={kind: random_search, keep_parameters: 0.5, metric: accuracy, trials: 2}",
        )  # fmt: skip


@pytest.mark.usefixtures("plain")
def test_a_target_that_no_size_reaches_names_the_nearest_on_the_command_line(case: Case, tmp_path: Path) -> None:
    outcome = cli(*case.arguments(tmp_path / "out", "--set", "ranks={kind: target, rise: 1.0e-9, metric: kl}"))
    assert outcome.code == 2
    assert "no size keeps the rise" in outcome.err
    assert "at least" in outcome.err


@pytest.mark.usefixtures("no_weights")
def test_finalists_without_a_recovery_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ranks\.recovery_steps trains finalists(?s:.)*null"):
        run(case, tmp_path / "out", f"ranks={SELECTORS['random_search']}", "recovery=null")
