"""The pages with results say what the committed results say, and every result says where it is from."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_tables_are_those_of_the_results():
    import table

    text = table.BENCHMARKS.read_text()
    assert table.updated(text) == text


def test_every_result_has_its_place_in_a_page():
    pages = (ROOT / "README.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()
    for file in RESULTS:
        command = json.loads(file.read_text())["command"]
        assert command in pages, file.name


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_result_says_how_it_was_made(file: Path):
    value = json.loads(file.read_text())
    script = re.match(r"python (benchmarks/\w+\.py)", value["command"])
    assert script
    assert (ROOT / script[1]).is_file()
    assert value["environment"]["torch"]
    assert "/" not in str(value.get("model", {}).get("id", "")) or not str(value["model"]["id"]).startswith("/")
    assert not re.search(r'"/(home|root|work|tmp)/', file.read_text())


def test_pictures_that_a_page_shows_are_there():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert shown
    assert all((ROOT / "benchmarks" / name).is_file() for name in shown)
