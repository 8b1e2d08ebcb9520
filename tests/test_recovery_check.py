"""A training is kept where it brings the factors nearer to the dense model on validation data, and only there."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_txt
from runs import Case, cli, validated_case
from torch import nn

import lrcompress
from lrcompress import stages


def checked_run(folder: Path, *settings: str) -> tuple[dict[str, Any], str]:
    """Report and card of a tiny run with validation data."""
    case = validated_case(folder)
    more = [part for setting in ("timing=null", "baselines=[]", *settings) for part in ("--set", setting)]
    done = cli(*case.arguments(folder / "run", *more))
    assert done.code == 0, done.err
    report = json.loads((folder / "run/report.json").read_text())
    return report, (folder / "run/model/README.md").read_text()


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("train", ["factors", "factors+bias+norm"])
def test_a_training_that_harms_is_dropped_and_said_so(train: str, tmp_path: Path) -> None:
    report, card = checked_run(tmp_path, "recovery.learning_rate=0.5", f"recovery.train={train}")
    start, result = report["rows"][-2:]
    assert (start["name"], result["name"], result["trained_steps"]) == ("kron", "lora_lrd", 0)
    assert result["metrics"] == start["metrics"]
    assert any("was dropped" in note for note in report["notes"])
    assert any("before the training" in note for stage in report["stages"] for note in stage["notes"])
    assert "did not help on validation data, and was dropped" in card
    assert len(report["training"]) == 6


@pytest.mark.usefixtures("unverified")
def test_a_dropped_training_has_no_numbers_before_replacement(tmp_path: Path) -> None:
    report, _ = checked_run(tmp_path, "recovery.learning_rate=0.5", "recovery.tau=0.5")
    result = report["rows"][-1]
    assert (result["trained_steps"], result.get("before_replacement")) == (0, None)
    assert not any("before replacement" in note for note in report["notes"])


@pytest.mark.usefixtures("unverified")
def test_a_refit_that_no_training_starts_from_stays_where_the_training_is_dropped(tmp_path: Path) -> None:
    report, card = checked_run(tmp_path, "recovery.learning_rate=0.5", "refit={check: 8, start_below: 0}")
    closed, refitted, result = report["rows"][-3:]
    assert (closed["name"], refitted["name"], result["trained_steps"]) == ("kron", "refit", 0)
    assert refitted["metrics"] != closed["metrics"]
    assert (result["metrics"], result["start"]) == (refitted["metrics"], "refit")
    assert "solved again layer by layer" in card


@pytest.mark.usefixtures("unverified")
def test_a_training_is_kept_where_it_helps_or_nobody_asks(tmp_path: Path) -> None:
    for number, settings in enumerate((["recovery.steps=40"], ["recovery.learning_rate=0.5", "recovery.check=0"])):
        (tmp_path / str(number)).mkdir()
        report, card = checked_run(tmp_path / str(number), *settings)
        start, result = report["rows"][-2:]
        assert result["trained_steps"] == report["recipe"]["recovery"]["steps"]
        assert result["metrics"] != start["metrics"]
        assert (result["metrics"]["kl"]["value"] < start["metrics"]["kl"]["value"]) == (number == 0)
        assert "were trained for" in card


@pytest.mark.usefixtures("unverified")
def test_other_validation_data_check_the_training_again(tmp_path: Path) -> None:
    checked_run(tmp_path)
    before = (tmp_path / "run/stages/08-recovery/stage.json").stat().st_mtime_ns
    case = Case(tmp_path / "gpt2", tmp_path / "recipe.yaml")
    arguments = case.arguments(tmp_path / "run", "--set", "timing=null", "--set", "baselines=[]")
    assert cli(*arguments).code == 0
    assert (tmp_path / "run/stages/08-recovery/stage.json").stat().st_mtime_ns == before
    write_txt(tmp_path / "validation.txt", 50, seed=5)
    assert cli(*arguments).code == 0
    assert (tmp_path / "run/stages/08-recovery/stage.json").stat().st_mtime_ns > before


def test_validation_data_that_cannot_check_are_refused_before_any_work(tmp_path: Path) -> None:
    case = validated_case(tmp_path)
    (tmp_path / "validation.txt").write_text("shorter than a window")
    arguments = case.arguments(tmp_path / "run", "--set", "timing=null")
    done = cli(*arguments)
    assert done.code == 2
    assert f"{tmp_path}/validation.txt is shorter than one window" in done.err
    assert not (tmp_path / "run").exists()
    assert cli(*arguments, "--set", "recovery.check=0", "--until", "layers").code == 0  # then nobody reads them


@pytest.mark.parametrize("train", ["factors", "factors+bias+norm"])
def test_a_module_is_not_harmed_either(train: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 64, 12, generator=generator)
    batches = [(x, torch.randint(5, (64,), generator=generator)) for x in inputs]
    dense = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 5))
    outputs = []
    for rate, validation in ((0.5, batches[2:]), (0.5, []), (1e-12, [])):
        model = copy.deepcopy(dense)
        lrcompress.compress(
            model, batches[:2], loss=lambda y, b: nn.functional.cross_entropy(y, b[1]), validation=validation,
            recipe={"targets": {"include": ["0"]}, "ranks": {"kind": "fixed", "rank": 3},
                    "recovery": {"steps": 4, "learning_rate": rate, "train": train}},
        )  # fmt: skip
        outputs.append(model(batches[2][0]).detach())
    checked, harmed, untrained = outputs
    assert torch.allclose(checked, untrained, atol=1e-5)
    assert not torch.allclose(harmed, untrained, atol=1e-2)


def test_a_module_keeps_norms_that_help() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(x, torch.randint(5, (64,), generator=generator)) for x in torch.randn(2, 64, 12, generator=generator)]
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 5))
    found = []
    for validation in (batches, []):
        model = copy.deepcopy(dense)
        lrcompress.compress(
            model, batches, loss=lambda y, b: nn.functional.cross_entropy(y, b[1]), validation=validation,
            recipe={"targets": {"include": ["0"]}, "ranks": {"kind": "fixed", "rank": 3},
                    "recovery": {"steps": 40, "learning_rate": 1e-2, "train": "factors+bias+norm",
                                 "loss": {"hidden": 0}}},
        )  # fmt: skip
        found.append(model[1].weight.detach())
    assert torch.equal(*found)
    assert not torch.allclose(found[0], dense[1].weight, atol=1e-3)


def test_the_refit_of_a_module_stays_where_its_training_is_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 256, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    batches = [(x, torch.randint(5, (256,), generator=generator)) for x in inputs]
    dense = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5))
    for parameter in dense.parameters():  # outputs large enough for a harm to be seen
        parameter.data *= 2
    outputs = []
    for refit, recovery in (
        ({"start_below": 0}, {"steps": 4, "learning_rate": 0.5}),
        ({"start_below": 0}, None),
        (None, None),
    ):
        model = copy.deepcopy(dense)
        lrcompress.compress(
            model, batches[:2], loss=lambda y, b: nn.functional.cross_entropy(y, b[1]), validation=batches[2:],
            recipe={"targets": {"include": ["0", "2"]}, "ranks": {"kind": "fixed", "rank": 3},
                    "refit": refit, "recovery": recovery},
        )  # fmt: skip
        outputs.append(model(batches[2][0]).detach())
    dropped, refitted, closed = outputs
    assert torch.allclose(dropped, refitted, atol=1e-5)
    assert not torch.allclose(refitted, closed, atol=1e-2)
