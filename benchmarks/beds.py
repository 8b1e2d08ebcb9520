"""The models and data that benchmarks run on, and what every result says of its machine."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lrcompress.recipe import Recipe, parse

HERE = Path(__file__).parent
SHARED_MODELS = {"minilm_sst2": "models/minilm-sst2"}
"""Case → model below the folder that LRCOMPRESS_SHARED names; its recipe is <case>.yaml here"""


def bed(case: str) -> tuple[str, "str | dict[str, Any]"]:
    """Model and recipe of a case: `demo` is built in, the others read below LRCOMPRESS_SHARED."""
    if case == "demo":
        return "demo", "demo"
    place = Path(os.environ["LRCOMPRESS_SHARED"])
    recipe = yaml.safe_load((HERE / f"{case}.yaml").read_text())
    for source in recipe["data"].values():
        source["path"] = str(place / source["path"])
    return str(place / SHARED_MODELS[case]), recipe


def without_places(text: str) -> str:
    """A result says nothing of the machine's folders."""
    place = os.environ.get("LRCOMPRESS_SHARED")
    return text.replace(f"{place}/", "") if place else text


def write_result(file: Path, value: Mapping[str, Any]) -> None:
    """Write a result so that a stop in between leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".partial")
    aside.write_text(without_places(json.dumps(value, indent=1)) + "\n")
    aside.replace(file)


def check_recipe(found: Mapping[str, Any], recipe: Recipe, file: Path) -> None:
    """Refuse to add rows to results of another recipe; settings that are newer than those have their defaults."""
    today = parse(json.loads(without_places(json.dumps(recipe.model_dump(mode="json")))))
    if "recipe" in found and parse(found["recipe"]) != today:
        raise SystemExit(f"{file} was measured by another recipe than today's: move it away, and measure all anew")


def commit() -> str:
    """The commit that a result was made by, marked if anything but results was changed since.

    A copy that has not its whole history is told by LRCOMPRESS_COMMIT.
    """
    if told := os.environ.get("LRCOMPRESS_COMMIT"):
        return told

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=HERE.parent, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("describe", "--always") + ("-dirty" if changed else "")) or "unknown"
