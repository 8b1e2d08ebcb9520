"""The training state on disk: safetensors and JSON, written aside and renamed."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompress.artifacts import read_json, read_tensors, write_json, write_tensors


def save_state(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    curve: list[dict[str, Any]],
) -> None:
    """Parameters, the optimizer's tensors and the curve after `step` steps; older states are removed.

    Data order, τ and every random choice follow from the seed and the step, so they need no state.
    """
    aside = folder / "state.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {f"parameter/{name}": parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
    write_tensors(aside / "tensors.safetensors", tensors)
    write_json(aside / "curve.json", curve)
    os.replace(aside, folder / f"state-{step:07d}")
    for old in _states(folder)[:-1]:
        shutil.rmtree(old)


def load_state(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """Put the latest state back; returns the step to go on with and the curve so far. Changes both arguments."""
    states = _states(folder)
    if not states:
        return 0, []
    tensors = read_tensors(states[-1] / "tensors.safetensors")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"parameter/{name}"])
        prefix = f"optimizer/{name}/"
        entries = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if entries:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in entries.items()
            }
    return int(states[-1].name.removeprefix("state-")), read_json(states[-1] / "curve.json")


def clear_states(folder: Path) -> None:
    """Remove all states, once the result is written."""
    for state in _states(folder):
        shutil.rmtree(state)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*"))
