"""Registers the loader of compressed checkpoints with transformers, as soon as transformers' own registry is there.

Importing lrcompress must not cost the seconds that importing transformers takes, and a program that imports both, in
whatever order, must be able to load. So the import of the registry is watched, in the way of PEP 302's finders.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

METHOD = "lrcompress"
"""`quant_method` in config.json, by which transformers finds our loader."""

REGISTRY = "transformers.quantizers.auto"
LOADER = "lrcompress.hf"


def register_when_needed() -> None:
    """Register now if transformers' registry is imported already, else right after it is."""
    if REGISTRY in sys.modules:
        import_module(LOADER)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds nothing but the registry, once, and leaves it to the finder that would have found it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's spec, with a loader that registers ours after it."""
        if fullname != REGISTRY:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Another loader, and ours after it; all else is the other one's."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other loader does, then register."""
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        # importing our loader asks for the registry, whose module is whole by now, though still marked as being made
        import_module(LOADER)
