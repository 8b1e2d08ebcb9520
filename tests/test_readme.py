"""README says what is: its commands are those that CI runs, its table is that of the committed results."""

import re
from pathlib import Path

import lrcompress
from lrcompress.recipe import parse, shipped_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_test_command_is_the_one_that_ci_runs():
    assert blocks("bash")[1].strip() in (ROOT / ".ci" / "run").read_text()


def test_the_demo_command_runs_what_ci_runs():
    setup, _, demo = blocks("bash")[0].strip().rpartition(" && ")
    assert blocks("bash")[1].startswith(setup)
    assert f"{demo} --output" in (ROOT / ".ci" / "run").read_text()


def test_the_recipe_shown_is_a_recipe():
    import yaml

    assert parse(yaml.safe_load(blocks("yaml")[0])).ranks.kind == "budget"


def test_each_shipped_recipe_is_named():
    assert all(f"`{name}`" in README for name in shipped_recipes())


def test_it_is_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_public_names_exist():
    assert all(hasattr(lrcompress, name) for name in lrcompress.__all__)
