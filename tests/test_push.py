"""Pushing to a Hub with the real client, and what is refused, cut, or already there; and loading from it again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_server import READ_TOKEN, TOKEN, Hub, Repo, serving
from models import factorise, tiny_model
from runs import causal_case, cli
from test_report import language_report

from lrcompress.hf import saved_ranks, write_model
from lrcompress.report import LayerRow, Report, shareable
from lrcompress.upload import files_to_push

REPO = "user/small"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as a run leaves it."""
    small = tiny_model("gpt2")
    ranks = factorise(small)
    write_model(small, ranks, tmp_path / "model", provenance={}, card='load("path/to/this/folder")\n')
    return tmp_path / "model"


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}


def push(hub: Hub, *arguments: object, token: str | None = TOKEN, **more: str) -> subprocess.CompletedProcess[str]:
    """`lrcompress push` in a process of its own: the client reads its environment once."""
    known = clean_environment()
    known |= hub.environment(token) | {"HF_HOME": "/nonexistent"} | more
    command = [sys.executable, "-m", "lrcompress", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=known, check=False)


def python(hub: Hub, code: str, home: Path, **more: str) -> str:
    known = clean_environment()
    known |= hub.environment() | {"HF_HOME": str(home)} | more
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=known, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_commit_then_nothing_then_only_what_changed(hub: Hub, model: Path, tmp_path: Path):
    done = push(hub, model, REPO, "--private", "--message", "first", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    repo = hub.repos[REPO]
    assert repo.private
    commits = repo.branches["main"]
    assert [commit.message for commit in commits] == ["initial", "first"]
    assert set(commits[-1].files) == {path.name for path in model.iterdir()}
    assert commits[-1].files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert b'load("user/small")' in commits[-1].files["README.md"]
    again = push(hub, model, REPO, HF_HOME=str(tmp_path / "home"))
    assert again.returncode == 0, again.stderr
    assert "unchanged" in again.stderr
    assert len(commits) == 2
    assert len(hub.uploads) == 1
    commits[-1].files["model-00001-of-00002.safetensors"] = b"a shard of an earlier push"
    commits[-1].files["notes.txt"] = b"the user's own"
    (model / "generation_config.json").write_text("{}")
    third = push(hub, model, REPO, "--revision", "tried", HF_HOME=str(tmp_path / "home"))
    assert third.returncode == 0, third.stderr
    assert f"{hub.url}/{REPO}/tree/tried" in third.stderr
    assert len(repo.branches["main"]) == 2
    files = repo.branches["tried"][-1].files
    assert files["generation_config.json"] == b"{}"
    assert "model-00001-of-00002.safetensors" not in files
    assert files["notes.txt"] == b"the user's own"
    assert len(hub.uploads) == 1
    load = f"""
import lrcompress
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({REPO!r}, revision="tried")
print(sum(type(m).__name__ == "LowRankLinear" for m in model.modules()))
"""
    assert int(python(hub, load, tmp_path / "home")) > 0


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no token": ({"token": None}, "hf auth login"),
    "unknown token": ({"token": "hf_stranger"}, "does not know the token"),
    "a token that may only read": ({"token": READ_TOKEN}, "may only read"),
    "somebody else's name": ({"repo": "other/small"}, "may not write to `other`"),
    "half a name": ({"repo": "small"}, "user/name"),
    "no name at all": ({"repo": "user/a b"}, "user/name"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    "nobody there": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "does not answer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_says_what_to_do(case: str, hub: Hub, model: Path):
    more, text = dict(REFUSALS[case][0]), REFUSALS[case][1]
    done = push(hub, model, more.pop("repo", REPO), **more)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(token in done.stderr for token in (TOKEN, READ_TOKEN, "hf_stranger"))
    assert not hub.repos


def test_another_model_is_not_overwritten(hub: Hub, model: Path, tmp_path: Path):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].branches["main"][-1].files |= {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"}
    done = push(hub, model, REPO, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert "holds another model" in done.stderr
    assert len(hub.repos[REPO].branches["main"]) == 1


def test_a_folder_without_a_compressed_model_is_refused(hub: Hub, tmp_path: Path):
    for content in (None, '{"model_type": "gpt2"}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        done = push(hub, tmp_path, REPO)
        assert done.returncode == 2
        assert "no compressed model" in done.stderr


def write_report(folder: Path, ranks: Mapping[str, int | None], revision: str | None = None) -> None:
    """Of a run with these ranks of layers."""
    rows = [LayerRow(name=n, out_features=32, in_features=32, rank=r, kept_parameters=1) for n, r in ranks.items()]
    report = language_report()
    info = report.model.model_copy(update={"revision": revision})
    report = report.model_copy(update={"layers": rows, "model": info})
    (folder / "report.json").write_text(report.model_dump_json())


def test_only_the_report_of_this_model_goes_with_it(model: Path, tmp_path: Path):
    ranks, report = saved_ranks(model), {"report.json", "report.html", "recipe.yaml"}
    assert ranks is not None
    first = next(iter(ranks))
    for foreign in (ranks | {first: ranks[first] + 1}, ranks | {first: None}, {}):
        write_report(tmp_path, foreign)
        for folder in (model, tmp_path):
            assert not report & set(files_to_push(folder, REPO))
    for text in ('{"passed": 3}', "no JSON"):
        (tmp_path / "report.json").write_text(text)
        assert not report & set(files_to_push(model, REPO))
    write_report(tmp_path, ranks, revision="1" * 40)  # the same ranks, of another commit
    assert not report & set(files_to_push(model, REPO))
    write_report(tmp_path, ranks | {"dense": None})
    for folder in (model, tmp_path):
        assert report <= set(files_to_push(folder, REPO))
    stage = next(one for one in language_report().stages if one.name == "evaluation")
    record = tmp_path / "stages" / "09-evaluation" / "stage.json"
    record.parent.mkdir(parents=True)
    for seconds in (stage.seconds, stage.seconds + 1):  # it ran again, and the report was not made again
        record.write_text(json.dumps({"seconds": seconds}))
        assert (report <= set(files_to_push(tmp_path, REPO))) == (seconds == stage.seconds)


@pytest.mark.slow
def test_a_connection_that_breaks_leaves_a_push_that_goes_on(hub: Hub, model: Path, tmp_path: Path):
    hub.cut_uploads = 1000
    done = push(hub, model, REPO, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    assert "the connection broke" in done.stderr
    assert f"lrcompress push {model} {REPO}" in done.stderr
    assert len(hub.repos[REPO].branches["main"]) == 1
    hub.cut_uploads = 1  # the client tries again by itself
    done = push(hub, model, REPO, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repos[REPO].branches["main"][-1].files


@pytest.mark.slow
def test_a_run_is_pushed_without_the_places_of_this_machine(hub: Hub, tmp_path: Path):
    case = causal_case(tmp_path)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1"}
    known = clean_environment() | hub.environment() | home
    command = [sys.executable, "-m", "lrcompress", *map(str, case.arguments(tmp_path / "run", "--push", REPO))]
    done = subprocess.run(command, capture_output=True, text=True, env=known, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(tmp_path / "run"))
    files = hub.repos[REPO].branches["main"][-1].files
    assert {"config.json", "model.safetensors", "README.md", "report.json", "report.html", "recipe.yaml"} <= set(files)
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name
    Report.model_validate_json(files["report.json"])
    listed = push(hub, tmp_path / "run", REPO, "--dry-run", token=None)
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == set(files)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert str(tmp_path) in json.dumps(report)
    assert str(tmp_path) not in shareable(Report.model_validate(report)).model_dump_json()


def test_a_run_that_could_not_be_pushed_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lrcompress.upload.get_token", lambda: None)
    case = causal_case(tmp_path)
    done = cli(*case.arguments(tmp_path / "run", "--push", REPO))
    assert done.code == 2
    assert "no token" in done.err
    assert not (tmp_path / "run").exists()
    done = cli(*case.arguments(tmp_path / "run", "--push", REPO, "--until", "ranks"))
    assert done.code == 2
