"""Pulling a dense model from a Hub with the real client: by branch and commit, from the cache, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from contract import FORBIDDEN
from hub_server import READ_TOKEN, TOKEN, Commit, Hub, Repo, serving
from huggingface_hub import ModelCard
from models import save_tiny, tiny_batch
from runs import causal_case

from lrcompress.hf import saved_ranks
from lrcompress.report import Report

MODEL, GATED, PRIVATE, EMPTY, STRANGE = "user/tiny", "user/gated", "user/private", "user/empty", "user/strange"
SMALL = "user/small"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A tiny GPT-2 on two branches, the same gated and private, and two repositories without a usable model."""
    folder = save_tiny("gpt2", tmp_path_factory.mktemp("model"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["README.md"] = b"---\nlicense: cc-by-4.0\n---\n"
    with serving() as server:
        for name, repo in {MODEL: Repo(), GATED: Repo(gated=True), PRIVATE: Repo(private=True)}.items():
            server.repos[name] = repo
            repo.branches["main"].append(Commit("1" * 40, "a model", files))
        server.repos[MODEL].branches["tried"] = [Commit("2" * 40, "the same", files)]
        server.repos[EMPTY] = Repo()
        server.repos[STRANGE] = Repo()
        server.repos[STRANGE].branches["main"].append(Commit("3" * 40, "new", {"config.json": b'{"model_type": "x9"}'}))
        yield server


def client(hub: Hub, home: Path, *command: object, token: str | None = TOKEN, **more: str) -> str:
    """What a process prints that has only this token; it reads its environment once."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    known |= hub.environment(token) | {"HF_HOME": str(home), "HF_DATASETS_OFFLINE": "1"} | more
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=known, check=False)
    assert done.returncode == 0, done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in (TOKEN, READ_TOKEN))
    return done.stdout


OPENED = """
import json, os, sys, time
from lrcompress.errors import ModelError
from lrcompress.source import identity, load_model, load_processor, open_source
import torch
found = {}
for name, token in json.loads(sys.argv[1]).items():
    text = name.split(" ")[0]
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    started = time.monotonic()
    try:
        source = open_source(text)
        if name.endswith("config only"):
            continue
        load_processor(source, "AutoTokenizer")
        parameters = load_model(source, "causal-lm", torch.device("cpu"), torch.float32).num_parameters()
        found[name] = {"revision": source.revision, "identity": identity(source), "parameters": parameters}
    except ModelError as error:
        found[name] = {"error": str(error)}
    found[name]["seconds"] = time.monotonic() - started
print(json.dumps(found))
"""
"""Model (with a remark) → token: each is opened and loaded, or the message is given."""


def opened(hub: Hub, home: Path, asked: dict[str, str | None], **more: str) -> dict[str, dict[str, Any]]:
    return json.loads(client(hub, home, "-c", OPENED, json.dumps(asked), token=None, **more))


CAME = {MODEL: "1" * 40, f"{MODEL}@tried": "2" * 40, f"{MODEL}@{'1' * 40}": "1" * 40, PRIVATE: "1" * 40}
REFUSED: dict[str, tuple[str | None, list[str]]] = {
    "user/absent with a token": (
        TOKEN,
        ["no such repository", "or it is private", "token may not", "correct the name"],
    ),
    "user/absent without": (None, ["no such repository", "or it is private", "no token", "hf auth login", "HF_TOKEN"]),
    f"{MODEL}@nosuch": (TOKEN, ["no branch, tag or commit `nosuch`", f"/{MODEL}"]),
    f"{MODEL}@{'9' * 40}": (None, [f"no branch, tag or commit `{'9' * 40}`"]),
    f"{PRIVATE} without": (None, ["or it is private", "no token", "hf auth login"]),
    f"{PRIVATE} of another": (READ_TOKEN, ["or it is private", "the token may not read"]),
    f"{GATED} without": (None, ["is gated", "no token", f"/{GATED}", "hf auth login"]),
    f"{GATED} of another": (READ_TOKEN, ["is gated", "ask for access", f"/{GATED}"]),
    f"{MODEL} expired": ("hf_expired", ["does not know the token", "hf auth login", "HF_TOKEN"]),
    EMPTY: (TOKEN, ["no config.json", "transformers model"]),
    STRANGE: (TOKEN, ["x9", "transformers"]),
    "user/ten@": (TOKEN, ["no such repository"]),
    "a/b/c": (TOKEN, ["no name on the Hub", "user/name"]),
}
WITHOUT_HUB = {
    "HF_ENDPOINT": (NOWHERE, ["does not answer", NOWHERE]),
    "HF_HUB_OFFLINE": ("1", ["HF_HUB_OFFLINE is set"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client's cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answered(hub: Hub, home: Path) -> dict[str, dict[str, Any]]:
    """What became of each, first those that are refused: the client takes what it has rather than say no."""
    asked = {name: token for name, (token, _) in REFUSED.items()} | dict.fromkeys(
        [*CAME, f"{GATED} config only"], TOKEN
    )
    return opened(hub, home, asked)


def test_branches_and_commits_come_as_their_commit(answered: dict[str, dict[str, Any]]):
    for name, commit in CAME.items():
        assert answered[name].get("revision") == commit, answered[name]
        assert answered[name]["identity"].endswith(f"@{commit}")


def test_what_the_hub_refuses_says_what_happened_and_what_to_do(answered: dict[str, dict[str, Any]]):
    for name, (_, parts) in REFUSED.items():
        message = answered[name].get("error", "loaded")
        assert all(part in message for part in (*parts, "got: ", "allowed: ", "do: ")), (name, message)
        assert len(message.splitlines()) == 4, (name, message)


@pytest.mark.parametrize("key", ["HF_ENDPOINT", pytest.param("HF_HUB_OFFLINE", marks=pytest.mark.slow)])
def test_without_the_hub_the_cache_will_do(key: str, hub: Hub, home: Path, answered: dict[str, dict[str, Any]]):
    value, parts = WITHOUT_HUB[key]
    found = opened(hub, home, dict.fromkeys([*CAME, "user/absent", GATED], TOKEN), **{key: value})
    lacking = found.pop(GATED)["error"]
    assert all(part in lacking for part in ("no tokenizer", "cache may lack files", key)), lacking
    message = found.pop("user/absent")["error"]
    assert all(part in message for part in (*parts, f"not in the cache {home}", "do: ", key)), message
    for name, one in found.items():
        assert {k: v for k, v in one.items() if k != "seconds"} == {
            k: v for k, v in answered[name].items() if k != "seconds"
        }
        assert one["seconds"] < 20, "it waited for a Hub that is not there"


@pytest.mark.slow
def test_run_from_the_hub_push_pull_and_merge(hub: Hub, tmp_path: Path):
    case, run = causal_case(tmp_path), tmp_path / "run"
    arguments = ["--recipe", case.recipe, "--output", run, "--push", SMALL, "--set", "timing=null"]
    client(hub, tmp_path / "home", "-m", "lrcompress", "run", f"{MODEL}@tried", *arguments)
    report = Report.model_validate_json((run / "report.json").read_text())
    assert (report.model.id, report.model.revision) == (MODEL, "2" * 40)
    card = hub.repos[SMALL].branches["main"][-1].files["README.md"].decode()
    said = ModelCard(card).data.to_dict()
    assert (said["base_model"], said["base_model_revision"], said["license"]) == (MODEL, "2" * 40, "cc-by-4.0")
    pulled = tmp_path / "pulled"
    client(
        hub,
        tmp_path / "home",
        "-c",
        f"""
import lrcompress, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({SMALL!r})
AutoTokenizer.from_pretrained({SMALL!r})
ids = torch.tensor({tiny_batch("gpt2")["input_ids"][:1].tolist()})
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
assert lrcompress.saved_ranks(model.config) == lrcompress.saved_ranks(snapshot_download({SMALL!r}))
lrcompress.merge(model)
model.save_pretrained({str(pulled)!r})
""",
    )
    client(
        hub,
        tmp_path / "elsewhere",
        "-c",
        FORBIDDEN
        + f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({SMALL!r}, trust_remote_code=True)
ids = torch.tensor({tiny_batch("gpt2")["input_ids"][:1].tolist()})
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "elsewhere.pt")!r})
""",
    )
    ids = tiny_batch("gpt2")["input_ids"][:1]
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
        assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)
        assert torch.allclose(torch.load(tmp_path / "elsewhere.pt"), wanted, atol=1e-4)
        merged = transformers.AutoModelForCausalLM.from_pretrained(pulled)
        assert saved_ranks(pulled) is None
        assert torch.allclose(merged(ids).logits, wanted, atol=1e-4)
