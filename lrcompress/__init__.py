"""lrcompress makes a pretrained model smaller by low rank.

Importing the package registers the loader of compressed checkpoints with transformers (at once, or when transformers
is imported).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from lrcompress.registration import register_when_needed

register_when_needed()

if TYPE_CHECKING:
    from lrcompress.adapters import lora_targets
    from lrcompress.api import Compressed, LayerFindings, analyze_module, compress
    from lrcompress.checkpoint import load_module, save_module
    from lrcompress.exporting import export
    from lrcompress.hf import merge, saved_ranks, write_model
    from lrcompress.lowrank import LowRankLinear
    from lrcompress.pipeline import analyze, run
    from lrcompress.recipe import Recipe
    from lrcompress.upload import push

_HOMES = {
    "Compressed": "lrcompress.api",
    "LayerFindings": "lrcompress.api",
    "analyze": "lrcompress.pipeline",
    "analyze_module": "lrcompress.api",
    "LowRankLinear": "lrcompress.lowrank",
    "Recipe": "lrcompress.recipe",
    "compress": "lrcompress.api",
    "export": "lrcompress.exporting",
    "load_module": "lrcompress.checkpoint",
    "lora_targets": "lrcompress.adapters",
    "merge": "lrcompress.hf",
    "push": "lrcompress.upload",
    "run": "lrcompress.pipeline",
    "save_module": "lrcompress.checkpoint",
    "saved_ranks": "lrcompress.hf",
    "write_model": "lrcompress.hf",
}

__all__ = [
    "Compressed", "LayerFindings", "LowRankLinear", "Recipe", "analyze", "analyze_module", "compress", "export",
    "load_module", "lora_targets", "merge", "push", "run", "save_module", "saved_ranks", "write_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: loading a checkpoint needs none of the tool."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lrcompress' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
