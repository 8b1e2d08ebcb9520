"""The errors that a caller can act on; each says what, what was got, what is allowed, and what to do."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used; the command line answers with exit code 2."""

    def __init__(self, what: str, *, got: object = None, allowed: object = None, do: str = "") -> None:
        self.what, self.got, self.allowed, self.do = what, got, allowed, do
        parts = [what]
        if got is not None:
            parts.append(f"got: {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if do:
            parts.append(f"do: {do}")
        super().__init__("\n  ".join(parts))


class RecipeError(InputError):
    """A recipe, or a command-line setting that overrides it, is wrong."""


class LayerError(InputError):
    """The chosen layers cannot be compressed."""


class ModelError(InputError):
    """The model cannot be found, read, or used."""


class DataError(InputError):
    """A data set cannot be found, read, or used."""


class OutputError(InputError):
    """The output folder cannot be used."""


class HubError(InputError):
    """The Hub refuses, or does not answer."""


class NumericalError(RuntimeError):
    """A computation gave numbers that cannot be right; the message names the layer or the step."""


class StageError(RuntimeError):
    """A stage found that what it made is wrong, or that the run folder is damaged."""


def check_empty(folder: Path, what: str, *, name: str = "another folder") -> None:
    """Raise OutputError where a folder holds anything, or is a file: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{what} is not empty", got=folder, allowed="a folder that does not exist, or an empty one",
            do=f"name {name}, or move this one away",
        )  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """`name`'s closest known names as a phrase for an error, nearest first; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"nearest: {', '.join(close)}" if close else ""
