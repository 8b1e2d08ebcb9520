"""Random generators that follow from names: no state to save, the same numbers wherever a run goes on."""

import hashlib

import torch


def uniform(count: int, seed: int, *name: object) -> list[float]:
    """Numbers in [0, 1) for one purpose."""
    return torch.rand(count, generator=generator(seed, *name), dtype=torch.float64).tolist()


def generator(seed: int, *name: object) -> torch.Generator:
    """A CPU generator for one purpose, from the run's seed and the purpose's name (and step, epoch, layer)."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (1 << 63))
