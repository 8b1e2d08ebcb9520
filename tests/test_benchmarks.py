"""The pages with results say what the committed results say, and every result says where it is from."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from models import save_tiny, write_txt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compare, equal_time, experiments, harder, runner, study, table  # noqa: E402  the folder is no installed package
from benchmarks.beds import check_recipe, without_places  # noqa: E402
from lrcompress.recipe import parse  # noqa: E402
from lrcompress.workspace import RowSpec  # noqa: E402

PAGES = "".join(page.read_text() for page in table.PAGES)

STUDIES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
EXPERIMENTS = sorted((ROOT / "benchmarks" / "results" / "experiments").glob("*/*.json"))
FORBIDDEN = re.compile(r'"/(home|root|work|tmp)/|-dirty"')
"""What no result may hold: where it was made, or a commit that its code differed from."""


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_are_those_of_the_results(page: Path):
    text = page.read_text()
    assert table.updated(text) == text


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_study_says_how_it_was_made_and_has_its_place_in_a_page(file: Path):
    value = json.loads(file.read_text())
    script = re.match(r"python (?:benchmarks/(\w+)\.py|-m benchmarks (\w+))", value["command"])
    assert script
    assert (ROOT / "benchmarks" / f"{script[1] or script[2]}.py").is_file()
    assert value["command"] in PAGES
    assert value["environment"]["torch"]
    assert not FORBIDDEN.search(file.read_text())


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_an_experiment_says_how_it_was_made(file: Path):
    value = json.loads(file.read_text())
    bed = experiments.beds()[file.parent.name]
    assert value["command"] == f"python -m benchmarks run {bed.name}/{file.stem}"
    assert file.stem in bed.variants
    assert f"<!-- results: experiments {bed.name} -->" in PAGES
    assert not FORBIDDEN.search(file.read_text())
    for key, row in value["rows"].items():
        assert key == runner.cell_key(row["keep"], row["seed"])
        if "failed" in row:
            continue
        assert row["environment"]["torch"]
        assert row["environment"]["hardware"]
        assert row["commit"]
        assert row["seconds"]
        assert row["peak_memory_bytes"] > 0
        # a layer that pivoting would hurt stays plain, with rank² numbers more: then the page says so
        more = f"`{file.stem}` has {compare.surplus(row):.2f} × the parameters here"
        assert compare.surplus(row) <= compare.EXACT or more in PAGES
        if value["recipe"]["recovery"]:
            swept = runner.sweep_of(value, bed.swept_for(row["keep"]))
            if not swept:  # so a page says: the nearest size that is
                done = [size for size in bed.sweeps if runner.sweep_of(value, size)]
                swept = runner.sweep_of(value, min(done, key=lambda size: abs(size - row["keep"])))
            assert row["learning_rate"] == runner.best_rate(swept)
            assert set(swept) <= {f"{rate:g}" for rate in bed.rates}


def test_variants_of_a_bed_differ_in_nothing_but_what_their_files_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(experiments.SHARED, "/nowhere")
    for bed in experiments.beds().values():
        plain = experiments.recipe_of(bed, "kron", bed.sweeps[0], 1e-3)
        for variant in bed.variants:
            value = experiments.recipe_of(bed, variant, bed.sweeps[0], None)
            recipe = parse(value)
            said = experiments.variant_settings(bed, variant)
            assert said["about"]
            assert value["data"] == plain["data"]
            assert value.get("calibration") == plain.get("calibration")
            if recipe.recovery is not None:
                for key in ("steps", "batch", "length", "weight_decay", "gradient_clip", "warmup"):
                    assert value["recovery"].get(key) == plain["recovery"].get(key), (bed.name, variant, key)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_recipe_of_a_result_is_that_of_its_files(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(experiments.SHARED, "nowhere")
    found = json.loads(file.read_text())["recipe"]
    rate = found["recovery"] and found["recovery"]["learning_rate"]
    value = experiments.recipe_of(
        experiments.beds()[file.parent.name], file.stem, found["ranks"]["keep_parameters"], rate
    )
    assert found == json.loads(without_places(json.dumps(parse(value).model_dump(mode="json"))))


def test_cells_are_chosen_by_pattern_or_beginning():
    ids = [cell.id for cell in experiments.cells("demo/kron")]
    assert ids
    assert all(name.startswith("demo/kron/") for name in ids)
    assert [cell.id for cell in experiments.cells("demo/kron/0.4/0")] == ["demo/kron/0.4/0"]
    assert {cell.variant for cell in experiments.cells("demo/closed-*/0.4/0")} >= {"closed-kron", "closed-svd"}
    assert not list(experiments.cells("nowhere"))


def test_sections_overlay_and_other_kinds_replace():
    below = {"method": {"kind": "kron", "input_damping": 1}, "recovery": {"steps": 3, "loss": {"task": 1, "hidden": 2}}}
    above = {"method": {"kind": "svd"}, "recovery": {"loss": {"hidden": 5}}}
    assert experiments.overlay(below, above) == {
        "method": {"kind": "svd"}, "recovery": {"steps": 3, "loss": {"task": 1, "hidden": 5}},
    }  # fmt: skip
    assert experiments.overlay(below, {"recovery": None})["recovery"] is None


def test_paired_differences_have_students_interval():
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-4)
    assert compare.interval([1.0]) is None


def test_a_size_takes_its_rate_from_the_largest_sweep_that_is_not_above_it(monkeypatch: pytest.MonkeyPatch):
    bed = replace(experiments.beds()["demo"], sweeps=(0.4, 0.2), rates=(1e-3, 3e-3))
    assert [bed.swept_for(keep) for keep in (0.8, 0.5, 0.4, 0.3, 0.2, 0.1)] == [0.4, 0.4, 0.4, 0.2, 0.2, 0.2]
    row = {"scores": {"validation": {"kl": 0.1}}}
    worse = {"scores": {"validation": {"kl": 0.2}}}
    rows = {"0.4/0": {"learning_rate": 1e-3}, "0.2/0": {"learning_rate": 1e-3}}
    sweep = {"0.4/0.001": row | {"keep": 0.4}, "0.4/0.003": worse | {"keep": 0.4}}
    monkeypatch.setattr(runner, "read", lambda *_: {"rows": rows, "sweep": sweep})
    cells = {keep: experiments.Cell(bed, "kron", keep, 0) for keep in (0.4, 0.2)}
    assert [runner.is_done(cells[keep]) for keep in (0.4, 0.2)] == [True, False]  # at 0.2 nothing was swept
    sweep |= {"0.2/0.001": worse | {"keep": 0.2}, "0.2/0.003": row | {"keep": 0.2}}
    assert set(runner.sweep_of({"sweep": sweep}, 0.2)) == {"0.001", "0.003"}
    assert [runner.is_done(cells[keep]) for keep in (0.4, 0.2)] == [True, False]  # and now another rate is best
    rows["0.2/0"] = {"learning_rate": 3e-3}
    assert all(runner.is_done(cell) for cell in cells.values())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of one tiny bed, with a closed form, a trained variant, and one that cannot be."""
    folder = tmp_path / "experiments"
    (folder / "variants").mkdir(parents=True)
    (folder / "tiny").mkdir()
    defaults = yaml.safe_load((ROOT / "benchmarks/experiments/defaults.yaml").read_text())
    (folder / "defaults.yaml").write_text(yaml.safe_dump(defaults))
    for split in ("train", "validation", "test"):
        write_txt(tmp_path / f"{split}.txt", 60, seed=len(split))
    bed = {
        "title": "tiny", "model": str(save_tiny("gpt2", tmp_path / "gpt2")), "keeps": [0.5, 0.001],
        "fewest_seeds": 1, "sweep": {"keeps": [0.5], "rates": [1e-3, 1e-2]},
        "recipe": {
            "data": {split: {"path": str(tmp_path / f"{split}.txt")} for split in ("train", "validation", "test")},
            "calibration": {"sequences": 8, "length": 24, "batch": 4},
            "recovery": {"steps": 3, "batch": 2, "length": 24}, "evaluation": {"length": 24},
        },
    }  # fmt: skip
    (folder / "tiny" / "bed.yaml").write_text(yaml.safe_dump(bed))
    (folder / "variants" / "closed-kron.yaml").write_text("about: closed\nrecipe: {recovery: null}\n")
    (folder / "variants" / "kron.yaml").write_text("about: trained\nrecipe: {}\n")
    monkeypatch.setenv("LRCOMPRESS_EXPERIMENTS", str(folder))
    monkeypatch.setattr(experiments, "EXPERIMENTS", folder)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    return tmp_path


def test_the_suite_measures_what_is_missing_and_keeps_what_fails(bench: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    failed = runner.run(experiments.cells("tiny"), bench / "scratch", said.append)
    assert failed == 2  # a thousandth of the parameters is below the least ranks
    bed = experiments.beds()["tiny"]
    trained = runner.read(bed, "kron")
    assert set(trained["sweep"]) == {"0.5/0.001", "0.5/0.01"}
    closed = runner.read(bed, "closed-kron")["rows"]["0.5/0"]
    assert closed["learning_rate"] is None
    assert "recovery" not in closed["seconds"] | closed["tokens"]
    assert closed["scores"] != trained["rows"]["0.5/0"]["scores"]
    assert (bench / "scratch" / "tiny").exists()
    row = trained["rows"]["0.5/0"]
    assert row["learning_rate"] == runner.best_rate(runner.sweep_of(trained, 0.5))
    assert set(row["scores"]) == {"validation", "test"}
    assert row["tokens"]["recovery"] == 3 * 2 * 24
    assert row["dense"]["test"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "least ranks" in trained["rows"]["0.001/0"]["failed"] or "smallest" in trained["rows"]["0.001/0"]["failed"]
    before = {file: file.read_bytes() for file in (bench / "results").rglob("*.json")}
    assert len(before) == 2

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert runner.run(experiments.cells("tiny"), bench / "scratch", said.append) == 0
    assert {file: file.read_bytes() for file in (bench / "results").rglob("*.json")} == before
    lines = compare.table("tiny")
    assert "| `kron` |" in lines
    assert "failed" in lines
    compare.draw("tiny", bench / "plot.png")
    assert (bench / "plot.png").stat().st_size > 5000


def test_tasks_of_lm_eval_are_scored_where_a_bed_has_them(bench: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(bench / "cache"))
    (bench / "own").mkdir()
    lines = [json.dumps({"question": "warm dull", "answer": f" {word}"}) for word in ("sharp", "slow", "funny")]
    (bench / "own" / "answers.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": "answers", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "answers.jsonl"}},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}],
    }  # fmt: skip
    (bench / "own" / "answers.yaml").write_text(yaml.safe_dump(task))
    file = bench / "experiments" / "tiny" / "bed.yaml"
    bed = yaml.safe_load(file.read_text())
    bed["keeps"] = [0.5]
    bed["recipe"]["evaluate"] = [{"kind": "lm_eval", "tasks": ["answers"], "include": str(bench / "own")}]
    file.write_text(yaml.safe_dump(bed))
    assert runner.run(experiments.cells("tiny"), bench / "scratch", lambda text: None) == 0
    found = {variant: runner.read(experiments.beds()["tiny"], variant) for variant in ("closed-kron", "kron")}
    rows = [value["rows"]["0.5/0"] for value in found.values()]
    assert all("tasks" not in row for row in found["kron"]["sweep"].values())  # chosen on validation data alone
    assert rows[0]["dense_tasks"] == rows[1]["dense_tasks"]
    scores = [rows[0]["dense_tasks"], *(row["tasks"] for row in rows)]
    assert all(set(one) == {"answers.perplexity"} for one in scores)
    assert len({one["answers.perplexity"] for one in scores}) == 3
    shown = compare.table("tiny")
    assert "| lm-eval | answers.perplexity |" in shown
    assert f"| `kron` | {rows[1]['tasks']['answers.perplexity']:.4f} |" in shown


@pytest.mark.parametrize("best", range(5))
def test_a_sweep_finds_the_best_of_a_grid_and_stops(best: int):
    rates = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    sweep: dict[str, Any] = {}
    while (rate := runner.next_rate(sweep, rates)) is not None:
        assert f"{rate:g}" not in sweep
        kl = abs(rates.index(rate) - best) + 1.0
        broke = rate > 10 * rates[best]
        sweep[f"{rate:g}"] = {"failed": "diverged"} if broke else {"scores": {"validation": {"kl": kl}}}
    assert runner.best_rate(sweep) == rates[best]
    assert all(f"{rate:g}" in sweep for rate in rates[max(best - 1, 0) : best + 2])


def test_processes_side_by_side_measure_the_same(bench: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for jobs in (1, 3):
        monkeypatch.setattr(runner, "RESULTS", bench / f"results-{jobs}")
        said: list[str] = []
        assert runner.run(experiments.cells("tiny/*/0.5/*"), bench / f"scratch-{jobs}", said.append, jobs=jobs) == 0
        values = [json.loads(file.read_text()) for file in sorted((bench / f"results-{jobs}").rglob("*.json"))]
        assert len(values) == 2
        rows = [one["sweep"] | one["rows"] for one in values]
        found.append([{key: row["scores"] for key, row in one.items()} for one in rows])
    assert found[0] == found[1]
    assert {place.name for place in (bench / "scratch-3").iterdir()} <= {"0", "1", "2"}


def test_memory_that_ran_out_beside_others_is_no_result(bench: Path, monkeypatch: pytest.MonkeyPatch):
    killed = bench / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(SystemExit, match="fewer --jobs"):
        runner.run(experiments.cells("tiny/*/0.5/*"), bench / "scratch", lambda text: None, jobs=2)
    assert not list((bench / "results").rglob("*.json"))
    alone = list(experiments.cells("tiny/closed-kron/0.5/*"))
    assert runner.run(alone, bench / "scratch", lambda text: None) == 1
    assert all(map(runner.is_done, alone))


def test_a_process_that_dies_leaves_a_row_that_says_so(bench: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert runner.run(experiments.cells("tiny/closed-kron/0.5"), bench / "scratch", lambda text: None) == 1
    row = runner.read(experiments.beds()["tiny"], "closed-kron")["rows"]["0.5/0"]
    assert "the process ended with 1" in row["failed"]


def test_a_bed_without_its_data_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(experiments.SHARED, raising=False)
    said: list[str] = []
    bed = experiments.beds()["minilm-sst2"]
    cell = experiments.Cell(bed, "closed-svd", 0.15, 4321)
    assert runner.run([cell], Path("unused"), said.append) == 0
    assert "LRCOMPRESS_SHARED" in said[0]


def test_pictures_that_a_page_shows_are_there():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert shown
    assert all((ROOT / "benchmarks" / name).is_file() for name in shown)


def test_a_study_measures_each_row_once(bench: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "HERE", bench)
    (bench / "results").mkdir()
    recipe = parse(experiments.recipe_of(experiments.beds()["tiny"], "closed-kron", 0.5))
    first = study.Study("script", "tiny", recipe, keep=0.5)
    assert not first.has(candidate="a", seed=0)
    with first.opened(recipe, 0, "factors", 4) as (work, scorer):
        pairs = {name: pair.factors() for name, pair in work.factors(RowSpec("kron", "plan")).items()}
        score = scorer.score(study.modules(pairs))
        assert score == scorer.score(work.modules(RowSpec("kron", "plan")))
        # at least four sequences, and not all
        assert 4 <= sum(len(batch["input_ids"]) for batch in scorer.batches) < len(work.scoring_examples())
        first.add(work, candidate="a", seed=0, **vars(score))
    again = study.Study("script", "tiny", recipe, keep=0.5)
    assert again.has(candidate="a", seed=0)
    assert not again.has(candidate="a", seed=1)
    assert again.value["rows"][0]["kl"] == score.kl
    assert again.value["command"] == "python benchmarks/script.py tiny"
    assert again.value["environment"]["torch"]
    other = parse(experiments.recipe_of(experiments.beds()["tiny"], "closed-kron", 0.4))
    with pytest.raises(SystemExit, match=r"script_tiny\.json was measured by another recipe"):
        study.Study("script", "tiny", other)
    beside = study.Study("script", "tiny", other, options="--keep 0.4", keep=0.4)
    assert beside.file.name == "script_tiny-0.4.json"
    assert beside.value["command"] == "python benchmarks/script.py tiny --keep 0.4"
    assert not beside.has(candidate="a", seed=0)


@pytest.mark.parametrize("rounds", [1, 2])
def test_in_an_equal_time_all_take_as_long_as_the_tool(rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "check-plan.json").write_text(json.dumps({"rounds": rounds}))
    measured: list[str] = []

    class Timed:
        """The tool's stages before the training take 60 s, others' 10 s; a step takes half a second."""

        def __init__(self, bed: experiments.Bed, variant: str, seed: int, folder: Path) -> None:
            self.bed, self.variant = bed, variant
            self.work = SimpleNamespace(stage=lambda name: tmp_path)

        def measure(self, keep: float, rate: float, splits: Any, untrained: bool, changes: Any) -> dict[str, Any]:
            measured.append(self.variant)
            before, training = 60.0 if self.variant == "rounds" else 10.0, 0.5 * changes["recovery"]["steps"]
            return {
                "seconds": {"statistics": before, "recovery": training}, "parameters": 1,
                "scores": {"test": {"kl": 1.0, "loss": 2.0}}, "dense": {"test": {"loss": 1.0}},
            }  # fmt: skip

    monkeypatch.setattr(equal_time, "Measuring", Timed)
    value: dict[str, Any] = {"rows": []}
    demo = experiments.beds()["demo"]
    monkeypatch.setattr(study.Study, "add", lambda self, work, **row: self.value["rows"].append(row))
    place = study.Study("tiny", "demo", parse(experiments.recipe_of(demo, "rounds", 0.2, 3e-3)))
    place.value = value
    equal_time.Trial(place, 0.2, 0).run()
    totals = {row["candidate"]: row["total"] for row in value["rows"]}
    longer = [name for name in totals if name.endswith("as long")]
    assert len(longer) == (3 if rounds > 1 else 2)  # in one go it is the tool itself
    assert all(totals[name] == totals[equal_time.TOOL] == 160 for name in longer)
    done = len(measured)
    equal_time.Trial(place, 0.2, 0).run()
    assert len(measured) == done  # what is there stays
    one = next(iter(runner.read(demo, "svd_llm")["sweep"].items()))
    part = {"svd_llm": {"sweep": dict([one])}}  # no choice yet
    monkeypatch.setattr(equal_time, "read", lambda bed, variant: runner.read(bed, variant) | part.get(variant, {}))
    value["rows"].clear()
    equal_time.Trial(place, 0.2, 0).run()
    assert {row["candidate"] for row in value["rows"]} == set(totals) - {"svd_llm", "svd_llm, as long"}


def test_beside_harder_baselines_the_excess_is_a_share_of_theirs(monkeypatch: pytest.MonkeyPatch):
    bed = experiments.beds()["demo"]

    def variant(*losses: float, rates: tuple[float, ...] = bed.rates) -> dict[str, Any]:
        def row(seed: int, loss: float) -> dict[str, Any]:
            scores = {"loss": 2.0 + loss, "kl": loss}
            return {"keep": 0.2, "seed": seed, "scores": {"test": scores, "validation": scores},
                    "dense": {"test": {"loss": 2.0}}, "parameters": 1, "dense_parameters": 5}  # fmt: skip

        sweep = {f"0.2/{rate:g}": row(0, abs(rate - 0.003)) for rate in rates}
        return {"rows": {f"0.2/{seed}": row(seed, loss) for seed, loss in enumerate(losses)}, "sweep": sweep}

    found = {
        "rounds": variant(0.3, 0.5, 0.1), "svd_llm": variant(1.0, 1.0), "svd_llm-whitened": variant(0.5, 0.5),
        "closed-svd_llm": variant(2.0, 0.6), "svd_llm-pivoted": variant(0.1, rates=bed.rates[:1]),
    }  # fmt: skip
    timed = [{"candidate": name, "keep": 0.2, "seed": 0, "kl": 9.0, "loss": loss, "dense_loss": 2.0}
             for name, loss in (("the tool", 2.2), ("svd_llm, as long", 2.8))]  # fmt: skip
    monkeypatch.setattr(harder, "beds", lambda: {"demo": bed})
    monkeypatch.setattr(harder, "results", lambda bed: found)
    monkeypatch.setattr(harder, "_timed", lambda bed: timed)
    (line,) = [line for line in harder.harder().splitlines() if "| 0.2 |" in line]
    # over the seeds of both, a training that does not help left away: (.3 + .5) / (1 + .6); unswept ones are left out
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert cells == ["0.50 (2 seeds)", "", "**0.80** (2 seeds)", "", "0.25 (1 seed)", ""]


def test_rows_are_not_added_to_results_of_another_recipe(tmp_path: Path):
    bed, file = experiments.beds()["demo"], tmp_path / "candidates_demo.json"
    recipe = parse(experiments.recipe_of(bed, "rounds", 0.4, 3e-3))
    older = recipe.model_dump(mode="json")
    del older["data"]["train"]["text_pair"]  # a setting that was not there yet
    check_recipe({"rows": []}, recipe, file)
    check_recipe({"recipe": older}, recipe, file)
    with pytest.raises(SystemExit, match=r"candidates_demo\.json was measured by another recipe"):
        check_recipe({"recipe": older | {"layout": "plain"}}, recipe, file)
