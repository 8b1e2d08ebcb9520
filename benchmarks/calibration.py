"""How many sequences the calibration needs: `python benchmarks/calibration.py BED`.

Closed forms from a few sequences of the training data and from many, scored on validation data. The refit is taken as
it is, better or not. Writes results/calibration_BED.json as it goes on; what is there is not measured again.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.beds import HERE, check_recipe, commit, without_places
from benchmarks.cell import calibration_tokens
from benchmarks.experiments import beds, overlay, recipe_of
from lrcompress import build, pipeline
from lrcompress import recipe as recipes
from lrcompress.artifacts import read_json
from lrcompress.evaluate.scorer import Scorer
from lrcompress.progress import Display
from lrcompress.workspace import RowSpec

KEEPS = {"demo": 0.4, "minilm-sst2": 0.15}
COUNTS = {"demo": (64, 128, 256, 512, 1024, 2048), "minilm-sst2": (320, 640, 1280, 2560, 5120, 6919)}
SEEDS = (0,)
ROWS = {"svd_llm": RowSpec("svd_llm", "uniform"), "kron": RowSpec("kron", "plan"), "refit": RowSpec("refit", "plan")}
"""What is scored, and how a run calls it."""
STAGES = ("statistics", "refit")
"""Those whose time depends on how many sequences there are."""


def measure(name: str, file: Path) -> None:
    """Every number of sequences with every seed that has no row yet."""
    bed = beds()[name]
    value: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    done = {(row["sequences"], row["seed"]) for row in value["rows"]}
    own = {"baselines": ["svd_llm"], "refit": {"check": 0}}
    plain = recipes.resolve(overlay(recipe_of(bed, "closed-refit-pivoted", KEEPS[name]), own))[1]
    check_recipe(value, plain, file)
    value |= {"command": f"python benchmarks/calibration.py {name}", "bed": name, "keep": KEEPS[name],
              "recipe": plain.model_dump(mode="json")}  # fmt: skip
    for seed, count in ((seed, count) for seed in SEEDS for count in COUNTS[name] if (count, seed) not in done):
        settings = plain.calibration.model_copy(update={"sequences": count})
        recipe = plain.model_copy(update={"calibration": settings})
        with tempfile.TemporaryDirectory() as folder:
            work = pipeline.open_workspace(bed.model_path(), recipe, folder, seed=seed, display=Display(quiet=True))
            pipeline.execute(work, until="refit")
            scorer = Scorer(work.model, list(work.scoring_examples().batches(recipe.evaluation.batch)), work.task)
            scores = {key: scorer.score(work.modules(row)) for key, row in ROWS.items()}
            row = {
                "sequences": count, "tokens": calibration_tokens(work), "seed": seed, "commit": commit(),
                "kl": {key: score.kl for key, score in scores.items()},
                "seconds": {stage: read_json(work.stage(stage) / "stage.json")["seconds"] for stage in STAGES},
            }  # fmt: skip
            value["environment"] = build.environment(work).model_dump()
        value["rows"].append(row)
        file.write_text(without_places(json.dumps(value, indent=1)) + "\n")
        print(name, seed, count, ", ".join(f"{key} {kl:.4f}" for key, kl in row["kl"].items()), flush=True)


def main() -> None:
    """Measure one bed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bed", choices=list(KEEPS))
    name = parser.parse_args().bed
    measure(name, HERE / "results" / f"calibration_{name}.json")


if __name__ == "__main__":
    main()
