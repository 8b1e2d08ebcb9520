"""Run the committed cases and keep their reports: `python benchmarks/measure.py CASE...` → results/CASE.json.

Cases other than `demo` read models and data below the folder that LRCOMPRESS_SHARED names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lrcompress
from lrcompress.progress import Display

HERE = Path(__file__).parent
MODELS = {"minilm_sst2": "models/minilm-sst2", "minilm_sst2_seed": "models/minilm-sst2"}


def measure(case: str, runs: Path, seed: int) -> dict[str, object]:
    """Run one case from nothing, and return its report with the commit that made it."""
    if case == "demo":
        report = lrcompress.run("demo", "demo", runs / case, seed=seed, display=Display())
    else:
        place = Path(os.environ["LRCOMPRESS_SHARED"])
        recipe = lrcompress.Recipe.model_validate(_with_paths(HERE / f"{case}.yaml", place))
        report = lrcompress.run(str(place / MODELS[case]), recipe, runs / case, seed=seed, display=Display())
    assert report is not None
    text = json.dumps(report.model_dump(mode="json"))
    # results say nothing of the machine's folders
    value = json.loads(text if case == "demo" else text.replace(f"{os.environ['LRCOMPRESS_SHARED']}/", ""))
    value["model"]["id"] = Path(value["model"]["id"]).name
    return {"command": f"python benchmarks/measure.py {case} --seed {seed}", "commit": _commit(), **value}


def _with_paths(file: Path, place: Path) -> dict[str, object]:
    import yaml

    recipe = yaml.safe_load(file.read_text())
    for source in recipe["data"].values():
        source["path"] = str(place / source["path"])
    return recipe


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure the cases that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=[*MODELS, "demo"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as runs:
            value = measure(case, Path(runs), arguments.seed)
        name = case if arguments.seed == 0 else f"{case}-seed{arguments.seed}"
        (HERE / "results" / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
        for row in value["rows"]:  # type: ignore[attr-defined]
            print(case, row["name"], row["ranks"], row["metrics"], file=sys.stderr)


if __name__ == "__main__":
    main()
