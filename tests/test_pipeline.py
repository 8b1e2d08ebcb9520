"""Stages: what runs again and why, what a killed run leaves, and that the report is about the model on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from models import tiny_model, tiny_tokenizer, write_txt
from runs import Case, causal_case, content, times
from safetensors import safe_open
from safetensors.torch import load_file

import lrcompress
from lrcompress import build, chain, data, pipeline, recovery_stage, stages
from lrcompress.data import DataSource, read_rows, windows
from lrcompress.evaluate import run as evaluate_run
from lrcompress.lowrank import swapped
from lrcompress.recovery import loop
from lrcompress.report import Report
from lrcompress.workspace import STAGE_ORDER

STAGES = [stage.name for stage in pipeline.STAGES if stage.name != "learning"]
"""Those that the recipe of these tests wants."""
FOLDERS = {name: f"{number:02d}-{name}" for number, name in enumerate(STAGE_ORDER, 1)}
UNTIMED = "timing=null"


class Killed(BaseException):
    """What no handler catches."""


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Without the check in a fresh process and without figures: seconds each, and tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)
        patch.setattr(build, "to_html", lambda report: "")
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = causal_case(tmp_path_factory.mktemp("case"))
    made.recipe.write_text(made.recipe.read_text() + "refit: {check: 4}\n")
    return made


def run(case: Case, output: Path, *settings: str, **more: Any) -> Report | None:
    return lrcompress.run(str(case.model), case.recipe, output, settings=settings, **more)


@pytest.fixture(scope="module")
def finished(case: Case) -> Path:
    """A whole run with timing; tests leave it as it is."""
    folder = case.folder / "finished"
    run(case, folder)
    return folder


@pytest.fixture(scope="module")
def reference(case: Case) -> tuple[Path, Counter[str]]:
    """An uninterrupted run without timing, and how many files each of its stages renames."""
    folder, renames = case.folder / "reference", Counter[str]()
    rename = os.replace

    def counted(stage: chain.Stage) -> chain.Stage:
        def work(workspace: Any, place: Path) -> list[str]:
            def count(*names: Any) -> None:
                renames[stage.name] += 1
                rename(*names)

            with patch("os.replace", count):
                return stage.work(workspace, place)

        return replace(stage, work=work)

    with patch.object(pipeline, "STAGES", tuple(map(counted, pipeline.STAGES))):
        run(case, folder, UNTIMED)
    return folder, renames


# what runs again ----------------------------------------------------------------------------------------------

RESULT = {"recovery", "evaluation", "model", "timing"}
FROM_SPECTRA = {"spectra", "ranks", "factors", "refit"} | RESULT
FROM_STATISTICS = {"statistics"} | FROM_SPECTRA

CHANGES: dict[str, set[str]] = {
    "recovery.steps=7": RESULT,
    "recovery.tau={schedule: linear, start: 0.3}": RESULT,
    "recovery.save_every=3": set(),
    "recovery=null": {"evaluation", "model", "timing"},
    "baselines=[svd, svd_llm, fwsvd]": FROM_STATISTICS - {"ranks", "refit", "recovery"},
    "baselines=[svd_llm]": FROM_SPECTRA - {"ranks", "refit", "recovery"},
    "baselines=[svd, {kind: svd_llm, damping: 0.01}]": FROM_SPECTRA - {"ranks", "refit", "recovery"},
    "method={kind: kron, input_damping: 0.01}": FROM_SPECTRA,
    "ranks={kind: budget, keep_parameters: 0.4}": FROM_SPECTRA - {"spectra"},
    "layout=pivoted": FROM_SPECTRA,
    "dtype=int8": {"factors", "refit"} | RESULT,
    "refit={damping: 0.01}": {"refit"} | RESULT,
    "refit=null": RESULT,
    "timing.repeats=4": {"timing"},
    "timing.prompt=9": {"timing"},
    "timing=null": set(),
    "evaluate=[perplexity]": {"evaluation", "model"},
    "evaluation.batch=3": {"evaluation", "model"},
    "data.test.path={other}": {"evaluation", "model"},
    "data.train.path={other}": FROM_STATISTICS,
    "data.validation={path: {other}}": {"recovery", "evaluation", "model"},  # it checks the training
    "evaluation.split=validation": {"recovery", "evaluation", "model"},
    "calibration.sequences=12": FROM_STATISTICS,
    "targets.groups=[mlp]": {"layers"} | FROM_STATISTICS,
    "task=causal-lm": set(),
}


def will_run(case: Case, folder: Path, *settings: str, **more: Any) -> dict[str, str]:
    """Stage → why, of those that would run."""
    work = pipeline.open_workspace(str(case.model), case.recipe, folder, settings=settings, **more)
    return {name: reason for name, reason in pipeline.plan_of_work(work).items() if reason}


@pytest.mark.parametrize("setting", CHANGES)
def test_a_changed_key_runs_exactly_the_stages_that_read_it(case: Case, finished: Path, setting: str):
    other = write_txt(case.folder / "other.txt", 60, seed=7)
    more = ["data.validation={path: " + str(other) + "}"] if "validation" in setting else []
    todo = will_run(case, finished, *more, setting.replace("{other}", str(other)))
    assert set(todo) == CHANGES[setting]
    assert all(reason.startswith("changed: ") for reason in todo.values())
    key = setting.partition("=")[0].split(".")[0]
    named = {
        "data": {"data.train", "data.evaluation", "recovery.check"},
        "evaluation": {"evaluation", "data.evaluation", "recovery.check"},
        "baselines": {"baselines", "statistics"},
    }
    for reason in todo.values():
        assert named.get(key, {key}) & set(reason.removeprefix("changed: ").split(", "))


def test_another_seed_runs_all_that_is_drawn(case: Case, finished: Path):
    assert set(will_run(case, finished, seed=1)) == FROM_STATISTICS


def test_changed_data_run_again_under_the_same_name(case: Case, finished: Path, tmp_path: Path):
    own = Case(case.model, tmp_path / "recipe.yaml")
    shutil.copy(case.folder / "test.txt", tmp_path / "test.txt")
    own.recipe.write_text(case.recipe.read_text())
    run(own, tmp_path / "out", f"data.test.path={tmp_path}/test.txt", until="layers")
    setting = f"data.test.path={tmp_path}/test.txt"
    before = {name: chain.fingerprint(opened(own, tmp_path / "out", setting), stage(name)) for name in STAGES}
    with (tmp_path / "test.txt").open("a") as stream:
        stream.write("one more line\n")
    after = {name: chain.fingerprint(opened(own, tmp_path / "out", setting), stage(name)) for name in STAGES}
    assert {name for name in STAGES if before[name] != after[name]} == {"evaluation", "model"}


def test_data_are_hashed_once_a_run(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []
    fingerprint = data.fingerprint
    monkeypatch.setattr(data, "fingerprint", lambda source: (hashed.append(source.path), fingerprint(source))[1])
    run(case, tmp_path / "out", UNTIMED, until="statistics")
    assert sorted(hashed) == sorted(set(hashed))
    assert len(hashed) == 2


def test_changed_weights_run_everything_again(case: Case, finished: Path, tmp_path: Path):
    shutil.copytree(case.model, tmp_path / "gpt2")
    tiny_model("gpt2", seed=1).save_pretrained(tmp_path / "gpt2")
    work, other = opened(case, finished), opened(Case(tmp_path / "gpt2", case.recipe), finished)
    assert all(chain.fingerprint(work, s) != chain.fingerprint(other, s) for s in pipeline.STAGES)


def opened(case: Case, folder: Path, *settings: str) -> Any:
    return pipeline.open_workspace(str(case.model), case.recipe, folder, settings=settings)


def stage(name: str) -> chain.Stage:
    return next(stage for stage in pipeline.STAGES if stage.name == name)


def test_a_finished_run_does_nothing(case: Case, finished: Path):
    before = times(finished / "stages") | times(finished / "model")
    assert will_run(case, finished) == {}
    run(case, finished)
    assert times(finished / "stages") | times(finished / "model") == before


def test_a_model_folder_that_is_gone_is_written_again(case: Case, finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    assert list(will_run(case, tmp_path / "out")) == ["model"]
    run(case, tmp_path / "out")
    assert content(tmp_path / "out" / "model") == content(finished / "model")


@pytest.mark.parametrize(
    ("setting", "more"),
    [("recovery.steps=7", {}), ("recovery=null", {}), ("baselines=[svd, fwsvd]", {}), (UNTIMED, {"seed": 1})],
    ids=["recovery", "no recovery", "baselines", "seed"],
)
def test_a_run_after_a_change_is_as_good_as_a_new_one(
    case: Case, reference: tuple[Path, Counter[str]], tmp_path: Path, setting: str, more: dict[str, int]
):
    shutil.copytree(reference[0], tmp_path / "changed")
    before = times(tmp_path / "changed" / "stages")
    expected = set(will_run(case, tmp_path / "changed", UNTIMED, setting, **more))
    changed = run(case, tmp_path / "changed", UNTIMED, setting, **more)
    after = times(tmp_path / "changed" / "stages")
    assert {name.split("-")[1] for name in after if "/" not in name and after[name] != before.get(name)} == expected
    fresh = run(case, tmp_path / "fresh", UNTIMED, setting, **more)
    assert content(tmp_path / "changed" / "model") == content(tmp_path / "fresh" / "model")
    assert changed is not None
    assert fresh is not None
    assert without_times(changed) == without_times(fresh)


def without_times(report: Report) -> Any:
    plain = report.model_dump(mode="json")
    for part in (*plain["rows"], *plain["stages"], *plain["training"]):
        for key in ("seconds", "peak_memory_bytes", "tokens_per_second", "latency"):
            part.pop(key, None)
    return plain


# killed and resumed -------------------------------------------------------------------------------------------


def killing(name: str, work: Callable[[chain.Work, Any, Path], list[str]]) -> Any:
    """Within the block stage `name` does `work`, which gets the stage's own work first."""
    chosen = (
        replace(item, work=lambda workspace, place, own=item.work: work(own, workspace, place))
        if item.name == name
        else item
        for item in pipeline.STAGES
    )
    return patch.object(pipeline, "STAGES", tuple(chosen))


def at_start(own: chain.Work, workspace: Any, place: Path) -> list[str]:
    raise Killed


def at_end(own: chain.Work, workspace: Any, place: Path) -> list[str]:
    own(workspace, place)
    raise Killed


def at_rename(number: int) -> Callable[[chain.Work, Any, Path], list[str]]:
    """Before the stage renames its file of this number, counted from 1."""

    def work(own: chain.Work, workspace: Any, place: Path) -> list[str]:
        done, rename = 0, os.replace

        def stop(*names: Any) -> None:
            nonlocal done
            done += 1
            if done == number:
                raise Killed
            rename(*names)

        with patch("os.replace", stop):
            own(workspace, place)
        raise AssertionError(f"there are only {done} files")

    return work


@pytest.mark.parametrize("where", ["start", "middle", "end"])
@pytest.mark.parametrize("name", STAGES[:-1])
def test_a_killed_run_goes_on_to_the_same_bytes(
    case: Case, reference: tuple[Path, Counter[str]], tmp_path: Path, name: str, where: str
):
    folder, renames = reference
    middle = at_rename(renames[name] // 2 + 1)
    with killing(name, {"start": at_start, "middle": middle, "end": at_end}[where]), pytest.raises(Killed):
        run(case, tmp_path / "out", UNTIMED)
    number = STAGES.index(name) + 1
    left = sorted(place.name for place in (tmp_path / "out" / "stages").iterdir())
    assert left[-1] == f"{FOLDERS[name]}.partial"
    assert len(left) == number
    todo = will_run(case, tmp_path / "out", UNTIMED)
    assert list(todo) == STAGES[number - 1 : -1]
    assert todo[name] == "goes on"

    done = times(tmp_path / "out" / "stages" / "01-layers")
    report = run(case, tmp_path / "out", UNTIMED)
    assert content(tmp_path / "out" / "model") == content(folder / "model")
    assert tensors_of(tmp_path / "out") == tensors_of(folder)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert number == 1 or times(tmp_path / "out" / "stages" / "01-layers") == done
    assert report is not None
    notes = next(row.notes for row in report.stages if row.name == name)
    assert any("went on after an interruption" in note for note in notes)


def tensors_of(folder: Path) -> dict[str, bytes]:
    """All files of the stages that hold no times."""
    timed = ("stage.json", "seconds.json", "curve-plan.json", "seconds-plan.json")
    return {name: data for name, data in content(folder / "stages").items() if not name.endswith(timed)}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The training steps that are taken."""
    taken: list[int] = []
    step = loop._Training.step

    def counted(self: Any, number: int, recorder: Any) -> Any:
        taken.append(number)
        return step(self, number, recorder)

    monkeypatch.setattr(loop._Training, "step", counted)
    return taken


@pytest.mark.parametrize(("stop", "resumed"), [(1, 0), (2, 2), (3, 2), (5, 4)])
@pytest.mark.parametrize("train", ["factors", "factors+bias+norm"])
def test_a_recovery_killed_in_a_step_goes_on_at_the_last_save(
    case: Case,
    tmp_path: Path,
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    stop: int,
    resumed: int,
):
    settings = (
        UNTIMED,
        f"recovery.train={train}",
        "recovery.tau.schedule=linear",
        "evaluate=[]",
        "baselines=[]",
    )
    reference = case.folder / f"reference-{train}"
    if not reference.exists():
        run(case, reference, *settings)
    steps.clear()
    counted = loop._Training.step

    def killed(self: Any, number: int, recorder: Any) -> Any:
        if number == stop:
            raise Killed
        return counted(self, number, recorder)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Training, "step", killed)
        with pytest.raises(Killed):
            run(case, tmp_path / "out", *settings)
    assert steps == list(range(stop))
    steps.clear()
    report = run(case, tmp_path / "out", *settings)
    assert steps == list(range(resumed, 6))
    assert content(tmp_path / "out" / "model") == content(reference / "model")
    assert report is not None
    assert [point.step for point in report.training] == list(range(6))


@pytest.mark.parametrize(
    ("name", "file"), [("recovery", "lora_lrd-plan.safetensors"), ("evaluation", "measurements.json")]
)
def test_a_stage_killed_at_any_of_its_files_goes_on_to_the_same_result(
    case: Case,
    reference: tuple[Path, Counter[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    file: str,
):
    monkeypatch.setattr(evaluate_run, "SAVE_EVERY", 2)
    settings = (UNTIMED, "evaluation.batch=2")
    number = STAGES.index(name) + 1
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    shutil.copytree(reference[0], begun)
    for later in STAGES[number - 1 : -1]:
        shutil.rmtree(begun / "stages" / FOLDERS[later])
    shutil.copytree(begun, whole)
    run(case, whole, *settings, until=name)
    kills = 0
    while True:
        shutil.copytree(begun, tmp_path / "out")
        try:
            with killing(name, at_rename(kills + 1)), pytest.raises(Killed):
                run(case, tmp_path / "out", *settings, until=name)
        except AssertionError:
            break
        kills += 1
        run(case, tmp_path / "out", *settings, until=name)
        place = Path("stages") / FOLDERS[name] / file
        assert (tmp_path / "out" / place).read_bytes() == (whole / place).read_bytes()
        shutil.rmtree(tmp_path / "out")
    assert kills >= 4


def test_what_was_left_for_another_recipe_is_discarded(case: Case, tmp_path: Path, steps: list[int]):
    with killing("recovery", at_end), pytest.raises(Killed):
        run(case, tmp_path / "out", UNTIMED)
    partial = tmp_path / "out" / "stages" / "08-recovery.partial"
    (partial / "state-0000004").mkdir()
    (partial / "of-the-former").touch()
    steps.clear()
    other = (UNTIMED, "recovery.learning_rate=5.0e-3")
    run(case, tmp_path / "out", *other)
    assert steps == list(range(6))
    assert not list((tmp_path / "out").rglob("of-the-former"))
    run(case, tmp_path / "fresh", *other)
    assert content(tmp_path / "out" / "model") == content(tmp_path / "fresh" / "model")


def test_a_redone_model_stands_until_the_next_one_is_whole(case: Case, finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "out")
    with killing("model", at_start), pytest.raises(Killed):
        run(case, tmp_path / "out", redo=["model"])
    assert content(tmp_path / "out" / "model") == content(finished / "model")


def half_removed(folder: Path) -> None:
    """A kill while a folder is removed: half of its files are gone."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files[: -(-len(files) // 2)]:
        file.unlink()
    raise Killed


def weights(folder: Path) -> dict[str, bytes]:
    return {file: data for file, data in content(folder).items() if file.endswith(".safetensors")}


@pytest.mark.parametrize("redo", [True, False], ids=["asked for again", "plain"])
@pytest.mark.parametrize("name", ["spectra", "recovery", "model"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_kill_while_a_folder_takes_the_place_of_the_former_leaves_none_half(
    case: Case, reference: tuple[Path, Counter[str]], tmp_path: Path, name: str, at: int, redo: bool
):
    """At the renaming of the former one, at that of the new one, while the former one is removed."""
    out, rename, remove = tmp_path / "out", os.replace, shutil.rmtree
    shutil.copytree(reference[0], out)
    place = out / "model" if name == "model" else out / "stages" / FOLDERS[name]
    renames: list[Path] = []

    def stop(source: Any, target: Any) -> None:
        if place in (Path(source), Path(target)):
            renames.append(Path(target))
            if len(renames) == at:
                raise Killed
        rename(source, target)

    def removed(folder: Path, **how: Any) -> None:
        former = folder.parent == place.parent and folder.name.startswith(place.name) and at == 3
        half_removed(folder) if former and folder.exists() else remove(folder, **how)

    with patch("os.replace", stop), patch("shutil.rmtree", removed), pytest.raises(Killed):
        run(case, out, UNTIMED, redo=[name])
    held = [*place.parent.glob(f"{place.name}*"), out / "stages" / f"{FOLDERS['model']}.partial" / "model"]
    assert any(weights(folder) == weights(reference[0] / place.relative_to(out)) for folder in held)
    run(case, out, UNTIMED, redo=[name] if redo else [])
    assert content(out / "model") == content(reference[0] / "model")
    assert tensors_of(out) == tensors_of(reference[0])
    assert {place.name for place in (out / "stages").iterdir()} == {
        place.name for place in (reference[0] / "stages").iterdir()
    }
    assert {file.name for file in out.iterdir()} == {file.name for file in reference[0].iterdir()}


@pytest.mark.parametrize("again", [True, False], ids=["the same command", "without --redo"])
def test_an_interrupted_redo_goes_on(
    case: Case, reference: tuple[Path, Counter[str]], tmp_path: Path, steps: list[int], again: bool
):
    out, redo = tmp_path / "out", ["statistics"]
    shutil.copytree(reference[0], out)
    with killing("recovery", at_start), pytest.raises(Killed):
        run(case, out, UNTIMED, redo=redo)
    done = {name: times(out / "stages" / FOLDERS[name]) for name in STAGES[1 : STAGES.index("recovery")]}
    work = opened(case, out, UNTIMED)
    todo = pipeline.plan_of_work(work, redo=redo if again else ())
    assert [name for name, reason in todo.items() if reason] == ["recovery", "evaluation", "model"]
    report = run(case, out, UNTIMED, redo=redo if again else [])
    assert all(times(out / "stages" / FOLDERS[name]) == before for name, before in done.items())
    assert steps == list(range(6))
    assert report == build.report(opened(case, out, UNTIMED))
    assert content(out / "model") == content(reference[0] / "model")
    assert sorted(place.name for place in (out / "stages").iterdir()) == [FOLDERS[name] for name in STAGES[:-1]]
    assert will_run(case, out, UNTIMED) == {}
    todo = pipeline.plan_of_work(opened(case, out, UNTIMED), redo=redo)  # another one begins
    assert [name for name, reason in todo.items() if reason] == STAGES[1:-1]


def test_what_a_redo_did_not_come_to_is_made_by_the_next_run(
    case: Case, reference: tuple[Path, Counter[str]], tmp_path: Path
):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    for _ in range(2):  # each time anew: the first one ended as it was asked to
        before = times(out / "stages")
        run(case, out, UNTIMED, redo=["spectra"], until="ranks")
        after = times(out / "stages")
        assert {name for name in after if "/" not in name and after[name] != before.get(name)} - {"redo.json"} == {
            FOLDERS["spectra"],
            FOLDERS["ranks"],
        }
        assert list(will_run(case, out, UNTIMED)) == STAGES[STAGES.index("factors") : -1]
    run(case, out, UNTIMED)
    assert will_run(case, out, UNTIMED) == {}
    assert content(out / "model") == content(reference[0] / "model")


def test_a_redo_takes_nothing_that_was_begun_before_it(
    case: Case, reference: tuple[Path, Counter[str]], tmp_path: Path, steps: list[int]
):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    shutil.rmtree(out / "stages" / FOLDERS["recovery"])
    with killing("recovery", at_end), pytest.raises(Killed):
        run(case, out, UNTIMED)
    steps.clear()
    run(case, out, UNTIMED, redo=["spectra"])
    assert steps == list(range(6))
    assert content(out / "model") == content(reference[0] / "model")


@pytest.mark.slow
def test_a_recovery_killed_by_the_system_goes_on_to_the_same_bytes(case: Case, tmp_path: Path):
    arguments = [sys.executable, "-m", "lrcompress", *map(str, case.arguments(tmp_path / "killed"))]
    arguments += ["--set", "recovery.steps=400", "--set", "recovery.save_every=5", "--set", UNTIMED]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "stages").glob("08-recovery.partial/state-0*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    resumed = subprocess.run(arguments, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "recovery: goes on" in resumed.stderr
    assert "statistics" not in resumed.stderr
    whole = [str(tmp_path / "whole") if word == str(tmp_path / "killed") else word for word in arguments]
    subprocess.run(whole, check=True, capture_output=True)
    assert content(tmp_path / "killed" / "model") == content(tmp_path / "whole" / "model")


@pytest.mark.slow
def test_a_run_killed_by_the_system_in_each_stage_ends_with_the_same_bytes(case: Case, tmp_path: Path):
    arguments = [sys.executable, "-m", "lrcompress", *map(str, case.arguments(tmp_path / "killed"))]
    for name in STAGES:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = tmp_path / "killed" / "stages" / FOLDERS[name]
        deadline = time.monotonic() + 120
        while not (begun.exists() or begun.with_name(f"{begun.name}.partial").exists()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, check=True, capture_output=True)
    whole = [str(tmp_path / "whole") if word == str(tmp_path / "killed") else word for word in arguments]
    subprocess.run(whole, check=True, capture_output=True)
    assert content(tmp_path / "killed" / "model") == content(tmp_path / "whole" / "model")


# what lies on disk, and what the report says of it --------------------------------------------------------------


def test_stages_are_safetensors_and_json(finished: Path):
    files = [file for file in (finished / "stages").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with safe_open(file, framework="pt") as tensors:
                list(tensors.keys())


def test_only_what_is_documented_lies_in_the_run_folder(finished: Path):
    assert {place.name for place in finished.iterdir()} == {
        "recipe.yaml",
        "environment.json",
        "run.json",
        "stages",
        "model",
        "report.json",
        "report.md",
        "report.html",
    }
    assert [place.name for place in sorted((finished / "stages").iterdir())] == [FOLDERS[name] for name in STAGES]


def test_the_reports_sizes_are_those_on_disk(case: Case, finished: Path):
    report = Report.model_validate_json((finished / "report.json").read_text())
    result, dense = report.rows[-1], report.rows[0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    assert result.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert result.file_bytes == (finished / "model" / "model.safetensors").stat().st_size
    assert dense.file_bytes == (case.model / "model.safetensors").stat().st_size
    assert result.target_parameters == sum(layer.kept_parameters for layer in report.layers)
    work = opened(case, finished)
    for row, spec in zip(report.rows[1:], work.rows, strict=True):
        assert (row.name, row.ranks) == (spec.name, spec.ranks)
        with swapped(work.model, work.modules(spec)):
            assert row.parameters == sum(parameter.numel() for parameter in work.model.parameters())


def perplexity(model: Any, file: Path) -> float:
    """As the report defines it, for windows of 32."""
    examples = windows(read_rows(DataSource(path=str(file))), tiny_tokenizer(), 32, None, None)
    total, count = 0.0, 0
    for batch in examples.batches(1):
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    return exp(total / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_was_measured_is_what_was_saved(case: Case, tmp_path: Path, dtype: torch.dtype):
    tiny_model("gpt2").to(dtype).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    settings = (UNTIMED, "evaluate=[perplexity]", "recovery.train=factors+bias+norm", "recovery.tau=1.0")
    report = run(Case(tmp_path / "gpt2", case.recipe), tmp_path / "out", *settings)
    assert report is not None
    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    trained = load_file(tmp_path / "out" / "stages" / "08-recovery" / "lora_lrd-plan.safetensors")
    for name, tensor in trained.items():
        layer, _, part = name.rpartition(".")
        own = {"A": "A.weight", "B": "B.weight", "bias": "B.bias"}[part]
        assert torch.equal(saved[f"{layer}.{own}"], tensor)
    norms = load_file(tmp_path / "out" / "stages" / "08-recovery" / "others-plan.safetensors")
    assert "transformer.ln_f.weight" in norms
    assert all(torch.equal(saved[name], tensor) for name, tensor in norms.items())
    original = load_file(tmp_path / "gpt2" / "model.safetensors")
    assert not torch.equal(saved["transformer.ln_f.weight"], original["transformer.ln_f.weight"])
    assert torch.equal(saved["transformer.wte.weight"], original["transformer.wte.weight"])

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    measured = report.rows[-1].metrics["token_perplexity"]
    assert measured.value == pytest.approx(perplexity(loaded, case.folder / "test.txt"), rel=1e-5)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", dtype=torch.float32)
    assert report.rows[0].metrics["token_perplexity"].value == pytest.approx(
        perplexity(dense, case.folder / "test.txt"), rel=1e-5
    )


def test_a_schedule_that_does_not_end_at_1_is_reported_before_and_after(case: Case, tmp_path: Path):
    settings = ["method={kind: svd}", "ranks={kind: uniform, keep_parameters: 0.5}", "recovery.tau=0.1"]
    settings += ["recovery.start=lora", "recovery.scaling=source", "recovery.loss={kind: task}"]
    report = run(case, tmp_path / "out", UNTIMED, *settings)
    assert report is not None
    *others, result = report.rows
    assert all(row.before_replacement is None for row in others)
    assert result.before_replacement is not None
    assert set(result.before_replacement) == set(result.metrics)
    assert result.before_replacement["kl"].value < 0.5 * result.metrics["kl"].value
    assert any("before replacement" in note for note in report.notes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    after = perplexity(loaded, case.folder / "test.txt")
    assert result.metrics["token_perplexity"].value == pytest.approx(after, rel=1e-5)


def test_before_replacement_the_model_is_the_one_that_was_trained(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ids, logits = torch.arange(32)[None], []
    recover, measure = recovery_stage.recover, stages.measure_rows

    def watched(model: Any, *args: Any, progress: Any, **more: Any) -> Any:
        def note(step: int, point: Any) -> None:
            progress(step, point)
            if step == 6:  # the last one
                with torch.no_grad():
                    logits.append(model(input_ids=ids).logits)

        return recover(model, *args, progress=note, **more)

    def measured(model: Any, rows: Any, *args: Any, **more: Any) -> Any:
        for row in (stages.BEFORE, "lora_lrd-plan"):
            with torch.no_grad(), swapped(model, rows[row]):
                logits.append(model(input_ids=ids).logits)
        return measure(model, rows, *args, **more)

    monkeypatch.setattr(recovery_stage, "recover", watched)
    monkeypatch.setattr(stages, "measure_rows", measured)
    settings = ["recovery.tau={schedule: linear, start: 0.1, end: 0.5}", "recovery.train=factors+bias+norm"]
    run(case, tmp_path / "out", UNTIMED, "baselines=[]", "recovery.learning_rate=0.02", *settings, until="evaluation")
    trained, before, after = logits
    assert torch.allclose(before, trained, atol=1e-4)
    assert not torch.allclose(after, trained, atol=1e-2)


def test_a_report_names_only_the_stages_of_its_recipe(case: Case, finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "out")
    report = run(case, tmp_path / "out", "recovery=null", "evaluate=[]", UNTIMED)
    assert report is not None
    assert [row.name for row in report.stages] == [
        "layers",
        "statistics",
        "spectra",
        "ranks",
        "factors",
        "refit",
        "model",
    ]
    assert report.rows[-1].name == "refit"
    assert report.training == []
    assert all(not row.metrics and not row.latency for row in report.rows)


VIEWS = ("report.json", "report.md", "report.html")
QUICK = ("recovery=null", "refit=null", "baselines=[]", "evaluate=[perplexity]")


@pytest.fixture(scope="module")
def quick(case: Case) -> Path:
    """A whole run without training; tests leave it as it is."""
    folder = case.folder / "quick"
    run(case, folder, *QUICK)
    return folder


def check_report(case: Case, folder: Path, *settings: str) -> None:
    """What the command returns and what lies in the folder is what the stages say."""
    found, wanted = run(case, folder, *settings), build.report(opened(case, folder, *settings))
    assert found == wanted
    assert Report.model_validate_json((folder / "report.json").read_text()) == wanted
    assert (folder / "report.md").read_text() == build.to_markdown(wanted)
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["evaluation", "timing"])
@pytest.mark.parametrize("how", ["changed", "asked for", "killed"])
def test_a_report_is_of_the_stages_however_they_were_made(
    case: Case, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
):
    shutil.copytree(quick, tmp_path / "out")
    setting = f"data.test.path={tmp_path}/test.txt"
    shutil.copy(case.folder / "test.txt", tmp_path / "test.txt")
    run(case, tmp_path / "out", *QUICK, setting)
    before = (tmp_path / "out" / "report.json").read_text()
    if how == "changed":
        write_txt(tmp_path / "test.txt", 30, seed=9)
        run(case, tmp_path / "out", *QUICK, setting, until=name)
    elif how == "asked for":
        run(case, tmp_path / "out", *QUICK, setting, redo=[name], until=name)
    else:
        with monkeypatch.context() as patched:
            patched.setattr(build, "to_markdown", lambda report: raising(Killed()))
            with pytest.raises(Killed):
                run(case, tmp_path / "out", *QUICK, setting, redo=[name])
    assert (tmp_path / "out" / "report.json").read_text() == before
    check_report(case, tmp_path / "out", *QUICK, setting)
    assert (how, name) == ("changed", "timing") or (tmp_path / "out" / "report.json").read_text() != before


def raising(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_disk_that_fills_up_at_a_report_leaves_none_or_all_of_it(
    case: Case, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    shutil.copytree(quick, tmp_path / "out")
    for name in VIEWS:
        (tmp_path / "out" / name).unlink()
    write, done = Path.write_text, []

    def full(self: Path, *text: Any, **how: Any) -> int:
        done.append(self)
        count = sum(place.name.startswith("report.") for place in done)
        return raising(OSError("No space left on device")) if count == number else write(self, *text, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            run(case, tmp_path / "out", *QUICK)
    assert not [name for name in VIEWS if (tmp_path / "out" / name).exists()]
    check_report(case, tmp_path / "out", *QUICK)


@pytest.mark.parametrize("name", VIEWS)
def test_a_part_of_the_report_that_is_gone_is_written_again(case: Case, quick: Path, tmp_path: Path, name: str):
    shutil.copytree(quick, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    check_report(case, tmp_path / "out", *QUICK)


@pytest.mark.parametrize("content", [b"", b"no JSON", b"\xff", b"[]", b"{}", "new key", "new version"])
def test_a_report_that_cannot_be_read_is_made_again(case: Case, quick: Path, tmp_path: Path, content: bytes | str):
    shutil.copytree(quick, tmp_path / "out")
    value = json.loads((quick / "report.json").read_text())
    if content == "new key":
        value["rows"][0]["beauty"] = 1
    elif content == "new version":
        value["schema_version"] = 2
    written = content if isinstance(content, bytes) else json.dumps(value).encode()
    (tmp_path / "out" / "report.json").write_bytes(written)
    check_report(case, tmp_path / "out", *QUICK)
    assert (tmp_path / "out" / "report.json").read_text() == (quick / "report.json").read_text()


@pytest.mark.parametrize("recorded", [True, False], ids=["", "by an earlier version"])
def test_a_report_that_is_made_again_says_where_the_latency_was_measured(
    case: Case, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
):
    shutil.copytree(quick, tmp_path / "out")
    if not recorded:
        for file in (tmp_path / "out" / "stages").glob("*/stage.json"):
            value = json.loads(file.read_text())
            del value["environment"]
            file.write_text(json.dumps(value))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    run(case, tmp_path / "out", *QUICK)
    assert (tmp_path / "out" / "report.json").read_text() == (quick / "report.json").read_text()
    (tmp_path / "out" / "report.json").unlink()
    check_report(case, tmp_path / "out", *QUICK)
    threads = json.loads((tmp_path / "out" / "report.json").read_text())["environment"]["threads"]
    assert (threads == 77) != recorded  # not recorded: nothing better is known


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("license: 1.0", "1.0"),
        ("license: []", None),
        ("language: en", None),
        ("license: mit\nmodel-index: [3]", "mit"),
        ("tags: [a", None),
        ("a card of prose", None),
        ("license: caf\xe9", None),
    ],
)
def test_whatever_the_base_models_card_says_a_run_ends_with_a_report(
    case: Case, tmp_path: Path, header: str, licence: str | list[str] | None
):
    shutil.copytree(case.model, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "README.md").write_bytes(f"---\n{header}\n---\ntext\n".encode("latin-1"))
    quick = ["evaluate=[]", "recovery=null", "refit=null", "baselines=[]", UNTIMED]
    report = run(Case(tmp_path / "gpt2", case.recipe), tmp_path / "out", *quick)
    assert report is not None
    assert report.model.license == (", ".join(licence) if isinstance(licence, list) else licence)
    card = (tmp_path / "out" / "model" / "README.md").read_text().split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(card).get("license") == licence
    unreadable = header in ("tags: [a", "a card of prose", "license: caf\xe9")
    assert any("card of the base model cannot be read" in note for note in report.notes) == unreadable


def test_a_run_without_data_that_it_needs_not(case: Case, tmp_path: Path):
    settings = [
        "data=null",
        "method=svd",
        "ranks={kind: energy, share: 0.7}",
        "refit=null",
        "recovery=null",
        "baselines=[]",
    ]
    report = run(case, tmp_path / "out", UNTIMED, "evaluate=[]", *settings)
    assert report is not None
    assert [row.name for row in report.rows] == ["dense", "svd"]
