"""The command line: one command makes a model and a report; what cannot be done is said in seconds."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from models import save_tiny
from runs import Case, Outcome, causal_case, classifier_case, cli, content, times
from safetensors.torch import load_file, save_file

from lrcompress import pipeline, recovery_stage, source, stages
from lrcompress.cli import main
from lrcompress.lowrank import ranks_of
from lrcompress.report import Report

STAGES = ["layers", "statistics", "spectra", "ranks", "factors", "recovery", "evaluation", "model", "timing"]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return causal_case(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return classifier_case(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def finished(causal: Case) -> tuple[Path, Outcome]:
    """A whole run, the check in a fresh process included; tests leave it as it is."""
    folder = causal.folder / "finished"
    return folder, cli(*causal.arguments(folder))


@pytest.fixture(scope="module")
def finished_classifier(classifier: Case) -> tuple[Path, Outcome]:
    folder = classifier.folder / "finished"
    return folder, cli(*classifier.arguments(folder))


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fresh process, which takes seconds."""
    monkeypatch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model's weights is a failure."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(source, "load_model", load)


# a whole run --------------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_folder_on_stdout(finished: tuple[Path, Outcome]):
    folder, outcome = finished
    assert outcome.code == 0, outcome.err
    assert outcome.last_line == str(folder)
    assert "Traceback" not in outcome.err


def test_stderr_names_each_stage_and_stdout_has_the_table(finished: tuple[Path, Outcome]):
    _, outcome = finished
    lines = outcome.err.splitlines()
    assert [name for name in STAGES if f"{name}: first time" in lines] == STAGES
    for row in ("dense", "svd", "svd_llm", "kron", "lora_lrd"):
        assert row in outcome.out
    assert "first time" not in outcome.out


def test_only_our_own_bars_are_shown(finished: tuple[Path, Outcome]):
    assert "Loading weights" not in finished[1].err
    assert "Writing model shards" not in finished[1].err


def test_the_model_folder_holds_all_that_from_pretrained_needs(finished: tuple[Path, Outcome]):
    model = finished[0] / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lrcompress"
    assert config["quantization_config"]["format_version"] == 1
    names = {file.name for file in model.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    card = (model / "README.md").read_text()
    assert "import lrcompress" in card
    plan = json.loads((finished[0] / "stages" / "05-ranks" / "ranks.json").read_text())["plan"]["ranks"]
    assert config["quantization_config"]["ranks"] == plan
    assert ranks_of(transformers.AutoModelForCausalLM.from_pretrained(model)) == plan


def test_the_report_has_every_row_and_metric(finished: tuple[Path, Outcome]):
    folder, _ = finished
    report = Report.model_validate_json((folder / "report.json").read_text())
    assert [(row.name, row.ranks) for row in report.rows] == [
        ("dense", None),
        ("svd", "uniform"),
        ("svd_llm", "uniform"),
        ("svd_llm", "plan"),
        ("kron", "plan"),
        ("lora_lrd", "plan"),
    ]
    assert [row.trained_steps for row in report.rows] == [0, 0, 0, 0, 0, 6]
    for row in report.rows:
        assert set(row.metrics) == {"token_perplexity", "kl", "agreement"}
        assert [(item.batch, item.phase) for item in row.latency] == [(1, "prefill"), (1, "decode")]
        assert row.device
        assert row.peak_memory_bytes
        assert (row.seconds is None) == (row.name == "dense")
    assert report.rows[0].metrics["kl"].value == 0
    assert report.rows[0].metrics["agreement"].value == 1
    assert all(row.metrics["kl"].value > 0 for row in report.rows[1:])
    assert all(row.parameters < report.rows[0].parameters for row in report.rows[1:])
    assert [stage.name for stage in report.stages] == STAGES
    assert [point.step for point in report.training] == list(range(6))
    assert set(report.definitions) == {"token_perplexity", "kl", "agreement"}
    assert report.recipe["recovery"]["gradient_clip"] == 1.0  # type: ignore[index,call-overload]


def test_the_report_comes_in_three_forms(finished: tuple[Path, Outcome]):
    assert "lora_lrd" in (finished[0] / "report.md").read_text()
    assert (finished[0] / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_the_resolved_recipe_is_stored(finished: tuple[Path, Outcome]):
    stored = yaml.safe_load((finished[0] / "recipe.yaml").read_text())
    assert stored["recovery"]["steps"] == 6
    assert stored["recovery"]["tau"]["schedule"] == "constant"
    assert json.loads((finished[0] / "environment.json").read_text())["seed"] == 0


def test_a_classifier_runs_to_its_report(finished_classifier: tuple[Path, Outcome]):
    folder, outcome = finished_classifier
    assert outcome.code == 0, outcome.err
    assert outcome.last_line == str(folder)
    report = Report.model_validate_json((folder / "report.json").read_text())
    assert [(row.name, row.ranks) for row in report.rows] == [
        ("dense", None),
        ("fwsvd", "uniform"),
        ("kron", "plan"),
        ("lora_lrd", "plan"),
    ]
    for row in report.rows:
        assert set(row.metrics) == {"accuracy", "kl", "agreement"}
        assert row.metrics["accuracy"].count == 40
        assert [(item.batch, item.phase) for item in row.latency] == [(1, "forward")]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert sum(p.numel() for p in loaded.parameters()) == report.rows[-1].parameters
    assert (folder / "model" / "tokenizer.json").exists()


def test_a_finished_run_does_nothing(causal: Case, finished: tuple[Path, Outcome]):
    folder, _ = finished
    before = times(folder / "stages") | {f"model/{k}": v for k, v in times(folder / "model").items()}
    report = (folder / "report.json").read_bytes()
    outcome = cli(*causal.arguments(folder))
    assert outcome.code == 0, outcome.err
    assert outcome.last_line == str(folder)
    assert times(folder / "stages") | {f"model/{k}": v for k, v in times(folder / "model").items()} == before
    assert (folder / "report.json").read_bytes() == report
    assert not any(name in outcome.err for name in STAGES)


# options ------------------------------------------------------------------------------------------------------


def test_until_stops_after_a_stage_and_the_rest_can_follow(causal: Case, tmp_path: Path):
    outcome = cli(*causal.arguments(tmp_path / "out", "--until", "ranks"))
    assert outcome.code == 0, outcome.err
    assert outcome.last_line == str(tmp_path / "out")
    assert [f.name for f in sorted((tmp_path / "out" / "stages").iterdir())] == [
        "01-layers",
        "02-statistics",
        "03-spectra",
        "05-ranks",
    ]
    assert not (tmp_path / "out" / "report.json").exists()
    before = times(tmp_path / "out" / "stages" / "02-statistics")
    outcome = cli(*causal.arguments(tmp_path / "out", "--until", "factors"))
    assert outcome.code == 0
    assert outcome.err.splitlines()[0] == "factors: first time"
    assert times(tmp_path / "out" / "stages" / "02-statistics") == before


def test_redo_runs_a_stage_and_those_after_it(
    causal: Case, finished: tuple[Path, Outcome], tmp_path: Path, unverified: None
):
    shutil.copytree(finished[0], tmp_path / "out")
    before = times(tmp_path / "out" / "stages")
    outcome = cli(*causal.arguments(tmp_path / "out", "--redo", "evaluation"))
    assert outcome.code == 0, outcome.err
    after = times(tmp_path / "out" / "stages")
    changed = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    assert changed == {"09-evaluation", "10-model", "11-timing"}
    assert "evaluation: asked for" in outcome.err
    assert content(tmp_path / "out" / "model") == content(finished[0] / "model")


def test_a_dry_run_reads_no_weights_and_writes_nothing(causal: Case, tmp_path: Path, no_weights: None):
    model = tmp_path / "model"
    shutil.copytree(causal.model, model)
    (model / "model.safetensors").unlink()
    arguments = Case(model, causal.recipe).arguments(tmp_path / "out", "--dry-run")
    outcome = cli(*arguments, "--set", "ranks={kind: uniform, keep_parameters: 0.5}")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "out").exists()
    rank = 32 * 96 // 2 // (32 + 96)
    assert [line.split()[-1] for line in outcome.out.splitlines() if "c_attn" in line] == [str(rank)] * 2
    stage_lines = [line.split()[1] for line in outcome.out.splitlines() if line.startswith("stage ")]
    assert stage_lines == [f"{name}:" for name in STAGES]
    assert "before" in outcome.out
    assert "after" in outcome.out
    assert "disk " in outcome.out
    assert "--dry-run" not in outcome.err


def test_a_dry_run_does_not_guess_ranks_that_come_from_data(causal: Case, tmp_path: Path, no_weights: None):
    outcome = cli(*causal.arguments(tmp_path / "out", "--dry-run"))
    assert "from data" in outcome.out
    assert "at most" in outcome.out


def test_a_dry_run_of_a_finished_run_says_that_all_is_done(causal: Case, finished: tuple[Path, Outcome]):
    outcome = cli(*causal.arguments(finished[0], "--dry-run", "--set", "timing.repeats=4"))
    lines = [line.split(maxsplit=1)[1] for line in outcome.out.splitlines() if line.startswith("stage ")]
    assert lines == [*(f"{name}: up to date" for name in STAGES[:-1]), "timing: changed: timing"]


def test_settings_reach_the_run(causal: Case, tmp_path: Path):
    settings = ("--set", "ranks.keep_parameters=0.2", "--set", "targets.groups=[mlp]", "--seed", "3")
    outcome = cli(*causal.arguments(tmp_path / "out", *settings, "--set", "ranks.kind=budget", "--until", "ranks"))
    assert outcome.code == 0, outcome.err
    plan = json.loads((tmp_path / "out" / "stages" / "05-ranks" / "ranks.json").read_text())["plan"]
    assert plan["kept_parameters"] <= 0.2 * plan["dense_parameters"]
    assert all(".mlp." in name for name in plan["ranks"])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 3


def test_quiet_prints_only_the_folder(causal: Case, tmp_path: Path, unverified: None):
    outcome = cli(*causal.arguments(tmp_path / "out", "-q"))
    assert outcome.code == 0
    assert outcome.out == f"{tmp_path / 'out'}\n"
    assert outcome.err == ""


def test_notes_are_shown_when_asked_and_progress_is_logged_without_a_terminal(causal: Case, tmp_path: Path):
    outcome = cli(*causal.arguments(tmp_path / "out", "-v", "--until", "recovery"))
    lines = outcome.err.splitlines()
    assert any(line.startswith("  16 sequences of") for line in lines)
    bar = next(line for line in lines if line.startswith("  recovery 6/6"))
    assert "loss " in bar
    assert "τ 1.00" in bar
    assert "tok/s" in bar


def test_the_folder_has_a_default_name(causal: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("run", causal.model, "--recipe", causal.recipe, "--until", "layers")
    assert outcome.last_line == "runs/gpt2-recipe"
    assert (tmp_path / "runs" / "gpt2-recipe" / "stages" / "01-layers").is_dir()


def test_the_model_may_be_spelled_in_another_way(causal: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cli(*causal.arguments(tmp_path / "out", "--until", "layers")).code == 0
    monkeypatch.chdir(causal.folder)
    outcome = cli("run", "gpt2/", "--recipe", causal.recipe, "--output", tmp_path / "out", "--until", "layers")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_and_version_are_fast_answers(arguments: list[str]):
    outcome = cli(*arguments)
    assert outcome.code == 0
    assert "lrcompress" in outcome.out


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "gpt2"], ["run", "gpt2", "--recipe", "x", "--sed", "3"]])
def test_wrong_arguments_are_exit_2(arguments: list[str]):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


# bad input ----------------------------------------------------------------------------------------------------

BAD_SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["recovery.stpes=3"], ["recovery.stpes", "nearest: steps"]),
    "keep_parameters": (["ranks={kind: uniform, keep_parameters: 1.5}"], ["ranks.keep_parameters", "1.5"]),
    "keep_parameters 0": (["ranks={kind: budget, keep_parameters: 0}"], ["ranks.keep_parameters", "got 0"]),
    "keep too little": (
        ["ranks={kind: budget, keep_parameters: 0.001}"],
        ["ranks.keep_parameters", "at least"],
    ),
    "pattern": (
        ["targets.include=[attn.c_atn]"],
        ["attn.c_atn", "this model has 9 candidate layers", "attn.c_attn"],
    ),
    "excluded pattern": (["targets.exclude=[nothing.*]"], ["nothing.*", "attn.c_attn"]),
    "all excluded": (["targets.exclude=['*']"], ["no layer is left", "attn.c_attn"]),
    "missing file": (["data.test.path=no/such.txt"], ["no such data file", "no/such.txt"]),
    "empty file": (["data.train.path={empty}"], ["empty.txt", "is empty"]),
    "no such column": (["data.test={path: {jsonl}, text: body}"], ["no column `body`", "text, label"]),
    "short text": (["data.test={path: {short}}"], ["short.txt is shorter than one window", "at least 32"]),
    "short training text": (["data.train={path: {short}}"], ["short.txt is shorter than one window"]),
    "unreachable data set": (["data.train={path: nobody/nothing}"], ["nobody/nothing", "Hub", "network"]),
    "no training data": (["data=null"], ["data.train"]),
    "no data to measure on": (["data={train: {path: {text}}}"], ["data.test"]),
    "tied target": (["targets.include=[lm_head]"], ["lm_head", "transformer.wte", "tie"]),
    "rank": (["ranks={kind: fixed, rank: 99}"], ["above the layer's", "got: 99", "at most 32"]),
    "rank of a pattern": (["ranks={kind: fixed, patterns: {'*.c_fc': 99}}"], ["c_fc", "got: 99"]),
    "tau 0": (["recovery.tau.start=0"], ["recovery.tau.start", "got 0"]),
    "tau above 1": (["recovery.tau=1.5"], ["recovery.tau", "got 1.5"]),
    "long prompt": (["timing.prompt=200"], ["timing.prompt", "at most 128"]),
    "long windows": (["recovery.length=200"], ["length", "got: 200", "at most 128"]),
    "one-sided budget": (["method=svd"], ["ranks.kind `budget`", "uniform"]),
}


@pytest.mark.parametrize("item", BAD_SETTINGS)
def test_bad_settings_are_refused_before_any_work(causal: Case, tmp_path: Path, no_weights: None, item: str):
    settings, parts = BAD_SETTINGS[item]
    files = {name: tmp_path / file for name, file in [("empty", "empty.txt"), ("short", "short.txt")]}
    files["empty"].touch()
    files["short"].write_text("too short")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n')
    files |= {"jsonl": tmp_path / "a.jsonl", "text": causal.folder / "train.txt"}
    options: list[object] = []
    for setting in settings:
        for name, file in files.items():
            setting = setting.replace(f"{{{name}}}", str(file))
        options += ["--set", setting]
    refused(cli(*causal.arguments(tmp_path / "out", *options)), parts)
    assert not (tmp_path / "out").exists()


def refused(outcome: Outcome, parts: list[str]) -> None:
    """Exit code 2 and a message of what, got or allowed, and what to do; no traceback."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.startswith("error: ")
    assert "\n  do: " in outcome.err
    assert "\n  got: " in outcome.err or "\n  allowed: " in outcome.err
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["good\t1", "bad\t7"], ["label", "row 1", "'7'", "0, 1, LABEL_0, LABEL_1"]),
        (["good\tpositive"], ["label", "'positive'", "LABEL_1"]),
        (["good"], ["no column `1`", "label"]),
        (["\t1", " \t0"], ["no row with text"]),
    ],
)
def test_bad_labels_are_refused_before_any_work(
    classifier: Case, tmp_path: Path, no_weights: None, rows: list[str], parts: list[str]
):
    (tmp_path / "test.tsv").write_text("\n".join(rows) + "\n")
    setting = f"data.test={{path: {tmp_path}/test.tsv, text: 0, label: 1}}"
    refused(cli(*classifier.arguments(tmp_path / "out", "--set", setting)), parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_label_is_refused_before_any_work(classifier: Case, tmp_path: Path, no_weights: None, split: str):
    settings = ["--set", f"data.{split}.label=null", "--set", "recovery.loss.task=0.5"]
    refused(cli(*classifier.arguments(tmp_path / "out", *settings)), ["label", f"data.{split}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--until", "statistic"], ["--until", "statistic", "nearest: statistics"]),
        (["--redo", "train"], ["--redo", "train", "recovery"]),
        (["--device", "tpu"], ["tpu", "auto, cpu, cuda, cuda:N"]),
        (["--device", "cuda"], ["the device is not there", "cuda", "--device cpu"]),
        (["--device", "cuda:7"], ["the device is not there", "cuda:7"]),
        (["--set", "ranks.keep_parameters"], ["--set ranks.keep_parameters", "key.path=value"]),
    ],
)
def test_bad_options_are_refused_before_any_work(
    causal: Case,
    tmp_path: Path,
    no_weights: None,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    parts: list[str],
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(cli(*causal.arguments(tmp_path / "out", *options)), parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["atn_only", "missing/recipe.yaml"])
def test_an_unknown_recipe_is_refused(causal: Case, tmp_path: Path, recipe: str):
    outcome = cli("run", causal.model, "--recipe", recipe, "--output", tmp_path / "out")
    refused(outcome, [recipe, "attn_only, demo"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody/no-such-model", "HF_HUB_OFFLINE"),
        ("nobody/model@main", "HF_HUB_OFFLINE"),
        ("no-such-folder/", "no name on the Hub"),
        ("not a model!", "no name on the Hub"),
    ],
)
def test_an_unknown_model_is_refused_for_both_places(causal: Case, tmp_path: Path, name: str, why: str):
    outcome = cli("run", name, "--recipe", causal.recipe, "--output", tmp_path / "out")
    refused(outcome, [name, "no such folder", why])
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused(causal: Case, tmp_path: Path):
    (tmp_path / "model").mkdir()
    outcome = cli("run", tmp_path / "model", "--recipe", causal.recipe, "--output", tmp_path / "out")
    refused(outcome, ["without a usable config.json", str(tmp_path / "model")])


def test_a_model_without_a_tokenizer_is_refused_before_any_work(causal: Case, tmp_path: Path, no_weights: None):
    shutil.copytree(causal.model, tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    outcome = cli(*Case(tmp_path / "model", causal.recipe).arguments(tmp_path / "out"))
    refused(outcome, ["tokenizer"])
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_is_refused(causal: Case, finished: tuple[Path, Outcome], tmp_path: Path):
    outcome = cli(*Case(finished[0] / "model", causal.recipe).arguments(tmp_path / "out"))
    refused(outcome, ["already compressed", "a dense model"])
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_than_the_task_is_refused(classifier: Case, tmp_path: Path):
    save_tiny("gpt2", tmp_path / "model")
    case = Case(tmp_path / "model", classifier.recipe)
    outcome = cli(*case.arguments(tmp_path / "out", "--set", "task=sequence-classification", "-q"))
    refused(outcome, ["score.weight", "sequence-classification"])
    assert not (tmp_path / "out" / "model").exists()


def test_a_model_without_any_class_for_the_task_is_refused(causal: Case, tmp_path: Path):
    save_tiny("vit", tmp_path / "model")
    case = Case(tmp_path / "model", causal.recipe)
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["ViTForMaskedImageModeling"]}))
    refused(cli(*case.arguments(tmp_path / "out")), ["task", "ViTForMaskedImageModeling"])
    refused(cli(*case.arguments(tmp_path / "out", "--set", "task=causal-lm")), ["causal-lm", "vit"])


def test_weights_that_are_not_numbers_are_refused(causal: Case, tmp_path: Path):
    shutil.copytree(causal.model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    outcome = cli(*Case(tmp_path / "model", causal.recipe).arguments(tmp_path / "out", "-q"))
    refused(outcome, ["not finite", "transformer.h.1.mlp.c_fc.weight"])
    assert not (tmp_path / "out" / "model").exists()


def test_weights_that_are_missing_are_refused(causal: Case, tmp_path: Path):
    shutil.copytree(causal.model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    outcome = cli(*Case(tmp_path / "model", causal.recipe).arguments(tmp_path / "out", "-q"))
    refused(outcome, ["transformer.h.1.mlp.c_fc.weight"])


# the output folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [{"thesis.txt": "mine"}, {"run.json": "[1, 2]"}, {"run.json": "not json"}])
def test_a_folder_that_holds_something_else_is_left_alone(
    causal: Case, tmp_path: Path, no_weights: None, files: dict[str, str]
):
    (tmp_path / "out").mkdir()
    for name, text in files.items():
        (tmp_path / "out" / name).write_text(text)
    before = content(tmp_path / "out")
    refused(cli(*causal.arguments(tmp_path / "out")), ["holds something else", "--output"])
    assert content(tmp_path / "out") == before


def test_a_file_is_no_output_folder(causal: Case, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    refused(cli(*causal.arguments(tmp_path / "out")), ["output is a file", "--output"])
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_of_another_model_is_left_alone(causal: Case, finished: tuple[Path, Outcome], tmp_path: Path):
    save_tiny("llama", tmp_path / "llama")
    before = times(finished[0])
    outcome = cli(*Case(tmp_path / "llama", causal.recipe).arguments(finished[0]))
    refused(outcome, ["run of another model", str(causal.model), "--output"])
    assert times(finished[0]) == before


def test_bad_input_leaves_a_finished_run_alone(causal: Case, finished: tuple[Path, Outcome], no_weights: None):
    before = times(finished[0])
    for setting in ("ranks.keep_parameter=3", "data.train.path=no/such.txt", "ranks={kind: fixed, rank: 99}"):
        assert cli(*causal.arguments(finished[0], "--set", setting)).code == 2
    assert times(finished[0]) == before


def test_a_folder_whose_first_file_was_half_written_is_ours(causal: Case, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json.partial").write_text("{")
    assert cli(*causal.arguments(tmp_path / "out", "--until", "layers")).code == 0


# the disk -----------------------------------------------------------------------------------------------------


def test_a_disk_too_full_is_refused_before_any_work(
    causal: Case, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=100, used=90, free=10))
    refused(cli(*causal.arguments(tmp_path / "out")), ["disk is too full", "10 bytes free", "bytes"])
    assert not (tmp_path / "out").exists()


def test_what_a_run_has_written_counts_as_room_for_it(
    causal: Case, finished: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "stages" / "11-timing")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=0, free=10**6))
    outcome = cli(*causal.arguments(tmp_path / "out", "-q"))
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")],
)
def test_a_disk_that_fills_up_is_exit_2_and_the_run_goes_on_afterwards(
    causal: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def write(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_factors", write)
        outcome = cli(*causal.arguments(tmp_path / "out", "-v"))
    assert outcome.code == 2
    assert "the disk is full" in outcome.err
    assert "do: " in outcome.err
    assert "Traceback" not in outcome.err
    outcome = cli(*causal.arguments(tmp_path / "out", "--until", "factors"))
    assert outcome.code == 0
    assert "factors: goes on" in outcome.err
    assert "statistics" not in outcome.err


# interruption and failure -------------------------------------------------------------------------------------


def raising(error: BaseException) -> Any:
    def work(*_: Any, **__: Any) -> None:
        raise error

    return work


def test_ctrl_c_is_exit_130_with_how_to_go_on(causal: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for options in ([], ["-q"], ["-v"]):
        with monkeypatch.context() as patch:
            patch.setattr(recovery_stage, "recover", raising(KeyboardInterrupt()))
            outcome = cli(*causal.arguments(tmp_path / "out", *options))
        assert outcome.code == 130
        assert "the same command goes on" in outcome.err
        assert "Traceback" not in outcome.err
        assert not outcome.out
    outcome = cli(*causal.arguments(tmp_path / "out", "--until", "recovery"))
    assert outcome.code == 0
    assert "recovery: goes on" in outcome.err


def test_ctrl_c_before_the_first_stage_is_exit_130_too(causal: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "open_workspace", raising(KeyboardInterrupt()))
    outcome = cli(*causal.arguments(tmp_path / "out"))
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recovery_stage, "recover", raising(RuntimeError("out of luck")))
    return


def test_a_failing_stage_is_exit_1_without_a_traceback(causal: Case, tmp_path: Path, failing: None):
    outcome = cli(*causal.arguments(tmp_path / "out"))
    assert outcome.code == 1
    assert "RuntimeError: out of luck" in outcome.err
    assert "-v" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_failing_stage_has_its_traceback_with_verbose(causal: Case, tmp_path: Path, failing: None):
    outcome = cli(*causal.arguments(tmp_path / "out", "-v"))
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "RuntimeError: out of luck" in outcome.err


def test_bad_input_has_no_traceback_with_verbose(causal: Case, tmp_path: Path):
    refused(cli(*causal.arguments(tmp_path / "out", "-v", "--set", "recovery.stpes=3")), ["recovery.stpes"])


def test_a_loss_that_is_no_number_stops_with_the_step(causal: Case, tmp_path: Path):
    outcome = cli(*causal.arguments(tmp_path / "out", "--set", "recovery.learning_rate=1.0e+30", "-q"))
    assert outcome.code == 1
    assert "NumericalError: recovery: the " in outcome.err
    assert "of step" in outcome.err
    assert not (tmp_path / "out" / "model").exists()


def test_main_is_the_script():
    scripts = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    assert f'lrcompress = "{main.__module__}:{main.__name__}"' in scripts
