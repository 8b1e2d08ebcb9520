"""Run the committed cases and keep their reports: `python benchmarks/measure.py CASE...` → results/CASE.json.

Cases other than `demo` read models and data below the folder that LRCOMPRESS_SHARED names.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from beds import HERE, SHARED_MODELS, bed, commit, without_places

import lrcompress
from lrcompress.progress import Display


def measure(case: str, runs: Path, seed: int) -> dict[str, object]:
    """Run one case from nothing, and return its report with the commit that made it."""
    model, recipe = bed(case)
    report = lrcompress.run(model, recipe, runs / case, seed=seed, display=Display())
    assert report is not None
    value = json.loads(without_places(json.dumps(report.model_dump(mode="json"))))
    value["model"]["id"] = Path(value["model"]["id"]).name
    return {"command": f"python benchmarks/measure.py {case} --seed {seed}", "commit": commit(), **value}


def main() -> None:
    """Measure the cases that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=[*SHARED_MODELS, "demo"])
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
