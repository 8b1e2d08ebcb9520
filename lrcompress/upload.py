"""Puts a compressed model on the Hub: weights, tokenizer, card, report and recipe in one commit."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of whichever HTTP library the client uses
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from lrcompress.errors import HubError
from lrcompress.registration import METHOD

if TYPE_CHECKING:
    from lrcompress.report import Report

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
"""Files at the top of a repository that a push may take away: shards of an earlier one."""
FOREIGN = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.onnx")


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    """of the repository, at the revision that was pushed to"""
    commit: str
    changed: bool
    """False if the repository already held exactly this"""


def push(
    folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> Pushed:
    """Upload a run folder or a model folder to `user/name` on the Hub, in one commit on a branch (default: main).

    Files that are there already are not sent again, so an unchanged push does nothing and one that was cut goes on.
    Shards of an earlier push are taken away; all other files stay. The repository is made if there is none
    (`private` then). Raises HubError for a folder without a compressed model, a repository that holds another model,
    and where the Hub refuses or does not answer; the folder is not changed.
    """
    folder = Path(folder)
    files = files_to_push(folder, repo)
    later = f"the result is safe in {folder}; push it with: lrcompress push {folder} {repo}"
    with _explained(repo, later):
        api = check(repo)
        known = _foreign(api, repo, revision)
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision).sha
        stale = [name for name in known if name not in files and _is_weights(name)]
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(
            repo, operations, commit_message=message or "Model compressed by lrcompress", revision=revision
        )
    at = "" if revision is None else f"/tree/{revision}"
    return Pushed(f"{api.endpoint}/{repo}{at}", str(done.oid), done.oid != before)


def files_to_push(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """Name in the repository → file, or its content. Raises HubError if the folder holds no compressed model.

    Of a run folder the model, its report and its recipe, without the places on this machine. A report that lies
    beside the model, but is of another one (of other ranks, from another commit, of another program), or from
    before a stage ran again, is left out.
    """
    model = next((place for place in (folder / "model", folder) if (place / "config.json").is_file()), None)
    config = {} if model is None else json.loads((model / "config.json").read_text(encoding="utf-8"))
    if model is None or not _ours(config):
        raise HubError(
            "the folder holds no compressed model",
            got=f"no config.json in {folder}" if model is None else f"a config.json of another model in {model}",
            allowed="the folder of a finished run, or its model folder", do="run lrcompress to the end, then push",
        )  # fmt: skip
    files: dict[str, Path | bytes] = {
        path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()
    }
    for file in (folder / "report.json", model.parent / "report.json"):
        if file.is_file() and (found := _report_files(file, config["quantization_config"])):
            files |= found
            break
    if "README.md" in files:
        from lrcompress.report.card import FOLDER

        card = (model / "README.md").read_text(encoding="utf-8")
        files["README.md"] = card.replace(FOLDER, repo).encode()
    return files


def check_name(repo: str) -> None:
    """Raise HubError unless it is a name of the form `user/name`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError("the repository's name is none", got=str(error), allowed="user/name", do="correct it") from error
    if repo.count("/") != 1:
        raise HubError(
            "the repository's name is incomplete", got=repo, allowed="user/name", do="put your name before it"
        )


def check(repo: str) -> HfApi:
    """The client, after asking whether it may write there. Raises HubError for a bad name, or a token that may not."""
    check_name(repo)
    if get_token() is None:
        raise HubError(
            "there is no token for the Hub", got="neither a login nor HF_TOKEN", allowed="a token that may write",
            do="run `hf auth login`, or set HF_TOKEN",
        )  # fmt: skip
    api, owner = HfApi(), repo.split("/")[0]
    with _explained(repo):
        me = api.whoami()
    names = [me["name"], *(org["name"] for org in me.get("orgs", ()))]
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(
            "the token may only read", got=f"the token of {me['name']}", allowed="a token that may write",
            do="make one at https://huggingface.co/settings/tokens and log in with it",
        )  # fmt: skip
    if owner not in names:
        raise HubError(
            f"the token may not write to `{owner}`", got=f"the token of {me['name']}", allowed=", ".join(names),
            do="name a repository of yours, or log in as somebody else",
        )  # fmt: skip
    return api


def _foreign(api: HfApi, repo: str, revision: str | None) -> list[str]:
    """Files that are at the revision now. Raises HubError if they are a model that we did not make."""
    if not api.repo_exists(repo):
        return []
    at = revision if revision is not None and api.revision_exists(repo, revision) else None
    names = api.list_repo_files(repo, revision=at)
    if not any(fnmatchcase(name, pattern) for name in names for pattern in FOREIGN):
        return names
    if "config.json" in names:
        config = Path(api.hf_hub_download(repo, "config.json", revision=at)).read_text(encoding="utf-8")
        if _ours(json.loads(config)):
            return names
    raise HubError(
        f"`{repo}` holds another model, which a push would overwrite", got=", ".join(names[:6]),
        allowed="a new repository, or one that lrcompress pushed to", do="choose another name",
    )  # fmt: skip


def _is_weights(name: str) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in WEIGHTS)


def _ours(config: Mapping[str, object]) -> bool:
    section = config.get("quantization_config")
    return isinstance(section, Mapping) and section.get("quant_method") == METHOD


def _report_files(file: Path, section: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """What is pushed of a report; {} if it is not of the model whose config.json has this section, or out of date."""
    from pydantic import ValidationError

    from lrcompress.report import Report, shareable, to_html
    from lrcompress.report.markdown import recipe_text

    try:
        report = shareable(Report.model_validate_json(file.read_bytes()))
    except ValidationError:  # of another program
        return {}
    ranks = {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
    origin = section.get("provenance", {}).get("base_revision")
    if (ranks, report.model.revision) != (section.get("ranks"), origin) or _outdated(report, file.parent / "stages"):
        return {}
    return {
        "report.json": (json.dumps(report.model_dump(mode="json"), indent=1) + "\n").encode(),
        "report.html": to_html(report).encode(),
        "recipe.yaml": recipe_text(report).encode(),
    }


def _outdated(report: "Report", stages: Path) -> bool:
    """Whether a stage that lies beside the report has run again since."""
    seconds = {row.name: row.seconds for row in report.stages}
    done = {record.parent.name.partition("-")[2]: record for record in stages.glob("*/stage.json")}
    return any(json.loads(done[name].read_text())["seconds"] != seconds[name] for name in done.keys() & seconds.keys())


@contextmanager
def _explained(repo: str, later: str = "") -> Iterator[None]:
    """The client's errors in our words, and what can be done later."""

    def do(text: str) -> str:
        return f"{text}; {later}" if later else text

    try:
        yield
    except HubError as error:
        if not later:
            raise
        raise HubError(error.what, got=error.got, allowed=error.allowed, do=do(error.do)) from error
    except OfflineModeIsEnabled as error:
        raise HubError("the Hub cannot be asked: HF_HUB_OFFLINE is set", do=do("unset it")) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or str(error).splitlines()[0]
        what, text = {
            401: ("the Hub does not know the token", "run `hf auth login` again"),
            403: ("the Hub refuses to write", f"ask for the right to write to {repo}"),
        }.get(status, ("the Hub refuses", "try again"))
        raise HubError(what, got=f"{status}: {said}", do=do(text)) from error
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # the client wraps what an upload raises
        if not isinstance(cause, (HTTPError, OSError)):
            raise
        got = f"{type(cause).__name__}: {cause}"
        raise HubError("the Hub does not answer, or the connection broke", got=got, do=do("try again")) from error
