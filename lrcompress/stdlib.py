"""The Python standard library of this machine as text, split by module name: the data of the built-in example."""

import sysconfig
import tokenize
from pathlib import Path

SPLITS = ("train", "validation", "test")

HELD_OUT: dict[str, tuple[str, ...]] = {
    "validation": ("configparser", "fileinput", "gettext", "shlex", "statistics", "tempfile", "zipapp"),
    "test": (
        "bisect", "calendar", "cmd", "copy", "csv", "fnmatch", "fractions", "getopt", "glob", "heapq",
        "netrc", "queue", "sched", "shelve", "string", "textwrap",
    ),
}  # fmt: skip
"""Modules that the demo model never saw."""

_GENERATED = ("encodings", "pydoc_data", "site-packages", "dist-packages", "__phello__", "config-")
_TESTS = ("test", "tests", "idle_test")


def module_files(split: str) -> list[Path]:
    """Source files of a split, sorted by path.

    The library's own tests are left out, and tables that a program wrote (codecs, the text of `help()`, build
    settings).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    return [file for file in sorted(root.rglob("*.py")) if _belongs(file.relative_to(root), split)]


def read_modules(split: str) -> list[str]:
    """Rows of a split, one string a file, decoded as the interpreter would; unreadable files are left out."""
    texts = []
    for file in module_files(split):
        try:
            with tokenize.open(file) as stream:
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError):  # lib2to3 has shipped files that are broken on purpose
            continue
        if text.strip():
            texts.append(text)
    return texts


def _belongs(path: Path, split: str) -> bool:
    if any(part.startswith(_GENERATED) for part in path.parts) or path.name.startswith("_sysconfigdata"):
        return False
    if any(part in _TESTS for part in path.parts[:-1]):
        return False
    module = path.parts[0].removesuffix(".py")
    if split != "train":
        return module in HELD_OUT[split]
    return not any(module in modules for modules in HELD_OUT.values())
