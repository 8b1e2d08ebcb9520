"""The bed `mlp-digits`: a 64-128-128-10 network of the sources' first step, on scikit-learn's digits."""

import copy
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcompress
from lrcompress.evaluate.scorer import Scorer
from lrcompress.lowrank import AbstractLowRank
from lrcompress.tasks import UserTask, default_forward

Rows = tuple[Tensor, Tensor]


def measure(recipe: dict[str, Any], seed: int, splits: tuple[str, ...]) -> dict[str, Any]:
    """Compress the network by a recipe, and score it."""
    dense, data = trained()
    model = copy.deepcopy(dense)
    train = data["train"]
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    batches = [(train[0][rows], train[1][rows]) for rows in order.split(64)]
    done = lrcompress.compress(model, batches, loss=loss, recipe=recipe, seed=seed)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AbstractLowRank)}
    task = UserTask(default_forward, loss, lambda batch: batch[1])
    scorers = {split: Scorer(dense, [data[split]], task) for split in splits}
    return {
        "parameters": done.plan.kept_parameters,
        "dense_parameters": done.plan.dense_parameters,
        "tokens": {"calibration": len(train[0])}
        | ({"recovery": recipe["recovery"]["steps"] * 64} if recipe["recovery"] else {}),
        "dense": {split: asdict(scorer.score({})) for split, scorer in scorers.items()},
        "scores": {split: asdict(scorer.score(layers)) for split, scorer in scorers.items()},
    }


def loss(outputs: Tensor, batch: Rows) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(outputs, batch[1])


@cache
def trained() -> tuple[nn.Module, dict[str, Rows]]:
    """The dense network after 1,500 steps of Adam, and its data: 400 rows held out, half of them for choices."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # the extra `bench`

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = {"validation": order[:200], "test": order[200:400], "train": order[400:]}
    data = {name: (x[rows], y[rows]) for name, rows in parts.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        rows = torch.randint(len(data["train"][0]), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(data["train"][0][rows]), data["train"][1][rows]).backward()
        optimizer.step()
    return model.eval(), data
