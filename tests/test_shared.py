"""A real fine-tuned classifier and real sentences: the quality that the method promises."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import times

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import lrcompress  # noqa: E402
from benchmarks import experiments  # noqa: E402  the folder is no installed package
from lrcompress.recipe import load, parse, shipped_recipes  # noqa: E402

RECIPE = ROOT / "benchmarks" / "minilm_sst2.yaml"


def read_recipe(shared: Path) -> dict[str, Any]:
    recipe = yaml.safe_load(RECIPE.read_text())
    for source in recipe["data"].values():
        source["path"] = str(shared / source["path"])
    return recipe


@pytest.mark.slow
def test_minilm_keeps_its_accuracy_at_15_percent(shared: Path, tmp_path: Path):
    """The experiment `minilm-sst2/rounds`, which is what the shipped recipes do: without and with training."""
    bed = experiments.beds()["minilm-sst2"]
    recipe = experiments.recipe_of(bed, "rounds", 0.15, 3e-5) | {"evaluate": ["accuracy", "divergence"]}
    shipped = load(shipped_recipes()["encoder_sst2"]).model_dump(mode="json")
    measured = parse(recipe).model_dump(mode="json")
    for key in ("refit", "layout", "recovery", "method", "calibration"):
        same = measured[key] | {"save_every": 50, "check": 256} if key == "recovery" else measured[key]
        assert shipped[key] == same, key
    report = lrcompress.run(str(shared / "models/minilm-sst2"), recipe, tmp_path / "run")
    assert report is not None
    dense, _, closed, learned = report.rows
    assert dense.metrics["accuracy"].value == pytest.approx(0.8666, abs=0.001)
    assert learned.target_parameters <= 0.15 * dense.target_parameters * 1.0001
    assert closed.metrics["kl"].value <= 0.04
    assert closed.metrics["accuracy"].value >= 0.855
    assert learned.metrics["kl"].value <= 0.03
    assert learned.metrics["accuracy"].value >= 0.858
    assert max(stage.peak_memory_bytes or 0 for stage in report.stages) <= 8 << 30


@pytest.mark.slow
def test_plans_of_minilm_are_scored_within_seconds_and_spectra_are_cut_again(shared: Path, tmp_path: Path):
    """A hundred plans on 500 validation sentences take at most ten minutes; another size needs no new spectra."""
    search = {"kind": "random_search", "keep_parameters": 0.15, "trials": 10, "examples": 500}
    recipe = read_recipe(shared) | {"baselines": [], "timing": None, "recovery": None, "ranks": search}
    model = str(shared / "models/minilm-sst2")
    lrcompress.run(model, recipe, tmp_path / "run", until="ranks")
    stages = tmp_path / "run" / "stages"
    assert json.loads((stages / "05-ranks" / "stage.json").read_text())["seconds"] <= 60
    trials = json.loads((stages / "05-ranks" / "selection.json").read_text())["record"]["trials"]
    scores = [row["kl"] for row in trials["table"]]
    assert scores[trials["chosen"]] == min(scores) <= scores[0] < 0.2
    spectra = times(stages / "03-spectra")
    again = recipe | {"ranks": {"kind": "budget", "keep_parameters": 0.3}}
    lrcompress.run(model, again, tmp_path / "run", until="ranks")
    assert json.loads((stages / "05-ranks" / "stage.json").read_text())["seconds"] <= 5
    assert times(stages / "03-spectra") == spectra
