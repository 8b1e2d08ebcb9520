"""A real fine-tuned classifier and real sentences: the quality that the method promises."""

from pathlib import Path

import pytest
import yaml

import lrcompress

RECIPE = Path(__file__).parent.parent / "benchmarks" / "minilm_sst2.yaml"


@pytest.mark.slow
def test_minilm_keeps_its_accuracy_at_15_percent(shared: Path, tmp_path: Path):
    recipe = yaml.safe_load(RECIPE.read_text())
    for source in recipe["data"].values():
        source["path"] = str(shared / source["path"])
    recipe |= {"baselines": [], "timing": None}
    report = lrcompress.run(str(shared / "models/minilm-sst2"), recipe, tmp_path / "run")
    assert report is not None
    dense, closed, learned = report.rows
    assert dense.metrics["accuracy"].value == pytest.approx(0.8666, abs=0.001)
    assert learned.target_parameters <= 0.15 * dense.target_parameters
    assert closed.metrics["kl"].value <= 0.105
    assert closed.metrics["accuracy"].value >= 0.835
    assert learned.metrics["kl"].value <= 0.065
    assert learned.metrics["accuracy"].value >= 0.85
    spent = {stage.name: stage.seconds for stage in report.stages}
    assert spent["statistics"] + spent["spectra"] + spent["ranks"] + spent["factors"] <= 180
    assert max(stage.peak_memory_bytes or 0 for stage in report.stages) <= 4 << 30
