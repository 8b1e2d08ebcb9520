"""What `--redo` asked for and is not done yet, on disk: an interrupted redo goes on, and nothing old is mixed with new.

The file lies among the stages while a redo is at work, or has left stages that are out of date.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypedDict

from lrcompress.artifacts import read_json, write_json
from lrcompress.workspace import Workspace


class _Redo(TypedDict):
    asked: list[str]
    """what the redo that is at work was asked for; [] if none is"""
    left: list[str]


def left(work: Workspace, chain: Sequence[str], redo: Collection[str] = ()) -> list[str]:
    """The finished stages that are to be done again, in the order of the chain.

    `chain`: the stages that the recipe wants. `redo`: what is asked for now; those of a redo that is at work are not
    asked for again.
    """
    found = _read(work)
    again = set(found["left"])
    if _begins(found, redo):
        again |= {name for name in _from_first(chain, redo) if work.finished(name)}
    return [name for name in work.order if name in again]


def stale(work: Workspace, chain: Sequence[str], redo: Collection[str]) -> list[str]:
    """The stages whose unfinished work a redo that begins cannot use: it was made from what is to be done again."""
    if not _begins(_read(work), redo):
        return []
    return [name for name in _from_first(chain, redo) if work.finished(name) or name not in redo]


def begin(work: Workspace, chain: Sequence[str], redo: Collection[str]) -> None:
    """Write down what is to be done again, unless a redo of the same is at work."""
    if _begins(_read(work), redo):
        work.stages.mkdir(parents=True, exist_ok=True)
        write_json(_file(work), _Redo(asked=sorted(redo), left=left(work, chain, redo)))


def done(work: Workspace, name: str) -> None:
    """A stage was done again."""
    found = _read(work)
    if name in found["left"]:
        found["left"].remove(name)
        write_json(_file(work), found)


def end(work: Workspace) -> None:
    """The run came to its end, or as far as it was asked to: the same `--redo` begins anew."""
    found = _read(work)
    if not found["left"]:
        _file(work).unlink(missing_ok=True)
    elif found["asked"]:
        write_json(_file(work), _Redo(asked=[], left=found["left"]))


def _begins(found: _Redo, redo: Collection[str]) -> bool:
    return bool(redo) and found["asked"] != sorted(redo)


def _from_first(chain: Sequence[str], redo: Collection[str]) -> list[str]:
    first = next((number for number, name in enumerate(chain) if name in redo), len(chain))
    return list(chain[first:])


def _file(work: Workspace) -> Path:
    return work.stages / "redo.json"


def _read(work: Workspace) -> _Redo:
    return read_json(_file(work)) if _file(work).exists() else _Redo(asked=[], left=[])
