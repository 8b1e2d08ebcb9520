"""Whether the Hub can be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


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
