"""What a step of the recovery costs beside a plain one (τ = 1, plain coordinates): `python benchmarks/step_cost.py`.

Short trainings of the same factors take turns, so that all meet the same noise; each step's seconds are compared with
the median of the plain ones in the same round. Writes results/step_cost_BED.json.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.beds import HERE, commit, write_result
from benchmarks.experiments import beds, recipe_of
from lrcompress import build, pipeline, stages
from lrcompress import recipe as recipes
from lrcompress.progress import Display
from lrcompress.recovery import Recovery, recover
from lrcompress.workspace import RowSpec, Workspace

PLAIN = "τ = 1, plain coordinates"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "τ = 1, whitened": {"whiten": True},
    "τ = 1, whitened, components scaled": {"whiten": True, "components": True},
    "theseus, whitened": {"whiten": True, "tau": {"schedule": "theseus"}},
    "linear, whitened": {"whiten": True, "tau": {"schedule": "linear"}},
    "τ = 1, plain coordinates, task loss": {"loss": {"kind": "task"}},
}


def measure(name: str, keep: float, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of every variant, and its ratio to a plain one, each the median over rounds."""
    bed = beds()[name]
    recipe = recipes.resolve(recipe_of(bed, "kron", keep, bed.rates[0]))[1]
    with tempfile.TemporaryDirectory() as folder:
        work = pipeline.open_workspace(bed.model_path(), recipe, folder, seed=0, display=Display(quiet=True))
        pipeline.execute(work, until="factors")
        return {
            "bed": name, "keep": keep, "rounds": rounds, "steps": steps, "rows": compared(work, rounds, steps),
            "commit": commit(), "command": f"python benchmarks/step_cost.py {name}",
            "environment": build.environment(work).model_dump(), "recipe": work.recipe.model_dump(mode="json"),
        }  # fmt: skip


def compared(work: Workspace, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each variant, from the closed-form factors of a run folder; the work's recipe has a recovery."""
    seconds: dict[str, list[float]] = {key: [] for key in VARIANTS}
    base = work.recipe.recovery
    assert base is not None
    common = base.model_dump() | {"whiten": False, "components": False, "rounds": (), "tau": 1.0}
    start = {layer: pair.factors() for layer, pair in work.factors(RowSpec(work.recipe.method.kind, "plan")).items()}
    coordinates = stages.method_coordinates(work)
    found = {layer: coordinates(layer) for layer in start}
    for _ in range(rounds):
        for key, changes in VARIANTS.items():
            settings = Recovery.model_validate(common | changes | {"steps": steps})
            curve = recover(
                work.model, work.layers, start, work.training_examples(base.length), settings, work.task,
                seed=0, coordinates=found.__getitem__,
            ).curve  # fmt: skip
            seconds[key].append(median(point["seconds"] for point in curve[1:]))
    return [
        {
            "variant": key,
            "seconds": median(values),
            "ratio": median(value / plain for value, plain in zip(values, seconds[PLAIN], strict=True)),
        }
        for key, values in seconds.items()
    ]


def main() -> None:
    """Measure one bed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bed", nargs="?", default="demo", choices=["demo", "minilm-sst2"])
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    file = HERE / "results" / f"step_cost_{arguments.bed}.json"
    found = measure(arguments.bed, arguments.keep, arguments.rounds, arguments.steps)
    write_result(file, found)


if __name__ == "__main__":
    main()
