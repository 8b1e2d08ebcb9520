"""Do the errors of layers add up? `python benchmarks/cross_terms.py BED`.

The curvature of `kron` counts each layer's error as if all others were dense. Here parts of a block are replaced by
their closed form one by one and in pairs: what a pair costs beyond the sum of its two is the cross term of their
errors. KL to the dense model on a part of the validation data, summed over blocks, each taken alone; and of the whole
model. Writes results/cross_terms_BED.json as it goes on; what is there is not measured again.
"""

import copy
import sys
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.experiments import beds, recipe_of
from benchmarks.study import Study, arguments
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors
from lrcompress.layers import block_names, read_weight
from lrcompress.recovery.rounds import product
from lrcompress.workspace import RowSpec

KEEPS = {"demo": (0.4, 0.2), "minilm-sst2": (0.3, 0.15)}
SEEDS = (0,)
SEQUENCES = {"demo": 24, "minilm-sst2": 400}
"""How many are scored, at least"""
Part = tuple[str, int, int]
"""A layer's place within its block, and which of so many equal groups of its outputs"""
PARTS: dict[str, dict[str, Part]] = {
    "demo": {
        "q": ("attn.c_attn", 0, 3), "k": ("attn.c_attn", 1, 3), "v": ("attn.c_attn", 2, 3),
        "o": ("attn.c_proj", 0, 1), "up": ("mlp.c_fc", 0, 1), "down": ("mlp.c_proj", 0, 1),
    },
    "minilm-sst2": {
        "q": ("attention.self.query", 0, 1), "k": ("attention.self.key", 0, 1), "v": ("attention.self.value", 0, 1),
        "o": ("attention.output.dense", 0, 1), "up": ("intermediate.dense", 0, 1), "down": ("output.dense", 0, 1),
    },
}  # fmt: skip
WHOLE = "the whole model"
"""All parts of all blocks at once"""
GROUPS = ("q", "k", "v", "o", "up", "down", "q k", "v o", "up down", "q k v o", "q k v o up down", WHOLE)


def replaced(model: nn.Module, block: str, parts: Sequence[Part], pairs: Mapping[str, Factors]) -> dict[str, nn.Module]:
    """The block's layers with these parts of their weights from B·A; a layer that the budget left dense stays."""
    found: dict[str, nn.Module] = {}
    for place, group, groups in parts:
        name = f"{block}.{place}"
        found.setdefault(name, copy.deepcopy(model.get_submodule(name)))
        weight = read_weight(found[name])  # [O, I], a view of a Conv1D's
        rows = slice(group * len(weight) // groups, (group + 1) * len(weight) // groups)
        with torch.no_grad():
            weight[rows] = product(model.get_submodule(name), pairs.get(name))[rows].to(weight)
    return found


def measure(name: str) -> None:
    """Every group of parts at every size that has no row yet."""
    parts = PARTS[name]
    recipe = recipes.resolve(recipe_of(beds()[name], "closed-kron", KEEPS[name][0]))[1]
    study = Study("cross_terms", name, recipe)
    for seed in SEEDS:
        for keep in KEEPS[name]:
            todo = [group for group in GROUPS if not study.has(parts=group, keep=keep, seed=seed)]
            if not todo:
                continue
            sized = recipes.resolve(recipe_of(beds()[name], "closed-kron", keep))[1]
            with study.opened(sized, seed, "factors", SEQUENCES[name]) as (work, scorer):
                closed = work.factors(RowSpec("kron", "plan"))
                pairs = {layer: pair.factors() for layer, pair in closed.items()}
                blocks = block_names(work.layers.values())
                for group in todo:
                    chosen = [*parts.values()] if group == WHOLE else [parts[key] for key in group.split()]
                    layers = [replaced(work.model, block, chosen, pairs) for block in blocks]
                    layers = [dict(ChainMap(*layers))] if group == WHOLE else layers
                    kls = [scorer.score(one).kl for one in layers]
                    study.add(work, parts=group, keep=keep, seed=seed, kl=kls)


if __name__ == "__main__":
    measure(arguments(__doc__, list(KEEPS)).parse_args().bed)
