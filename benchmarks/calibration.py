"""How many sequences the calibration needs: `python benchmarks/calibration.py BED`.

Closed forms from a few sequences of the training data and from many, scored on validation data. The refit is taken as
it is, better or not. Writes results/calibration_BED.json as it goes on; what is there is not measured again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cell import calibration_tokens
from benchmarks.experiments import beds, overlay, recipe_of
from benchmarks.study import Study, arguments
from lrcompress import recipe as recipes
from lrcompress.workspace import RowSpec

KEEPS = {"demo": 0.4, "minilm-sst2": 0.15}
COUNTS = {"demo": (64, 128, 256, 512, 1024, 2048), "minilm-sst2": (320, 640, 1280, 2560, 5120, 6919)}
SEEDS = (0,)
ROWS = {"svd_llm": RowSpec("svd_llm", "uniform"), "kron": RowSpec("kron", "plan"), "refit": RowSpec("refit", "plan")}
"""What is scored, and how a run calls it."""
STAGES = ("statistics", "refit")
"""Those whose time depends on how many sequences there are."""


def measure(name: str) -> None:
    """Every number of sequences with every seed that has no row yet."""
    own = {"baselines": ["svd_llm"], "refit": {"check": 0}}
    plain = recipes.resolve(overlay(recipe_of(beds()[name], "closed-refit-pivoted", KEEPS[name]), own))[1]
    study = Study("calibration", name, plain, keep=KEEPS[name])
    for seed in SEEDS:
        for count in (count for count in COUNTS[name] if not study.has(sequences=count, seed=seed)):
            settings = plain.calibration.model_copy(update={"sequences": count})
            recipe = plain.model_copy(update={"calibration": settings})
            with study.opened(recipe, seed, "refit") as (work, scorer):
                scores = {key: scorer.score(work.modules(row)) for key, row in ROWS.items()}
                seconds = {stage: work.record(stage)["seconds"] for stage in STAGES}
                study.add(
                    work, sequences=count, tokens=calibration_tokens(work), seed=seed,
                    kl={key: score.kl for key, score in scores.items()}, seconds=seconds,
                )  # fmt: skip


if __name__ == "__main__":
    measure(arguments(__doc__, list(KEEPS)).parse_args().bed)
