"""What the Hub, or its cache, has of a model or a data set, and why it has not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lrcompress.errors import ModelError

_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


def answers(repo: str, kind: Literal["model", "dataset"], revision: str | None = None) -> bool:
    """Ask once and briefly, since loading from a Hub that is not there retries for half a minute.

    True also where it answers that there is no such repository: loading will say what is wrong with the name.
    """
    try:
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # whatever the client's HTTP library raises where there is no connection
        return False
    return True


@dataclass(frozen=True)
class Cached:
    """A commit of a model, of which the cache has config.json at least."""

    folder: Path
    """its files in the cache"""
    reached: bool
    """whether the Hub answers, so that the other files can be had too"""

    @property
    def commit(self) -> str:
        """Its hash."""
        return self.folder.name


def find(repo: str, revision: str | None) -> Cached:
    """A model at a branch, tag or commit; where the Hub does not answer, as the cache knows it.

    Raises ModelError that says why it cannot be had.
    """
    reached = answers(repo, "model", revision)
    try:
        file = hf_hub_download(repo, "config.json", revision=revision, local_files_only=not reached)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        got, do = _why(repo, revision, error, reached=reached)
        raise ModelError(
            f"no model `{repo if revision is None else f'{repo}@{revision}'}`",
            got=f"no such folder (from {Path.cwd()}), and {got}",
            allowed="demo, a local folder with a config.json, or a Hub id (id or id@revision)", do=do,
        ) from error  # fmt: skip
    return Cached(Path(file).parent, reached)


def card_file(repo: str, commit: str) -> Path | None:
    """README.md of a model at a commit; None if it has none, or it cannot be had."""
    try:
        return Path(hf_hub_download(repo, "README.md", revision=commit))
    except (EntryNotFoundError, HfHubHTTPError):
        return None


def _why(repo: str, revision: str | None, error: Exception, *, reached: bool) -> tuple[str, str]:
    """What came of asking, and what to do."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the client looks into its cache after any answer but a clear no
    page, token = f"{constants.ENDPOINT}/{repo}", get_token()
    match error:
        case HFValidationError():
            return "it is no name on the Hub", "correct it: a name on the Hub is user/name, or one word"
        case GatedRepoError():
            who = "the token was not given access" if token else "there is no token"
            return f"on the Hub it is gated, and {who}", f"ask for access at {page}; then {_LOG_IN}"
        case RepositoryNotFoundError():
            who = "the token may not read it" if token else "there is no token"
            do = f"log in as somebody who may read it: {_LOG_IN}" if token else _LOG_IN
            return f"the Hub has no such repository, or it is private and {who}", f"correct the name, or {do}"
        case RevisionNotFoundError():
            return f"on the Hub it has no branch, tag or commit `{revision}`", f"name one of those listed at {page}"
        case LocalEntryNotFoundError():
            silent = f"the Hub ({constants.ENDPOINT}) does not answer"
            do = "check the network and HF_ENDPOINT"
            if constants.HF_HUB_OFFLINE:
                silent, do = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
            elif reached:
                silent = f"the Hub ({constants.ENDPOINT}) stopped answering"
            return f"{silent}, and it is not in the cache {constants.HF_HUB_CACHE}", f"correct the name, or {do}"
        case EntryNotFoundError():
            return "its repository on the Hub has no config.json", f"name a transformers model; its files are at {page}"
        case HfHubHTTPError() if error.response.status_code == 401:
            return "the Hub does not know the token", f"{_LOG_IN} again, or log out"
        case _:
            return f"the Hub refuses: {str(error).strip().splitlines()[0]}", "try again later"


@contextmanager
def offline() -> Iterator[None]:
    """Within the block data sets come from the cache at once: `datasets` has no argument for it."""
    from datasets import config

    former = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = former
