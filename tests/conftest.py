"""Offline and deterministic, whatever the machine."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes, and for those that they start
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the models and data that the slow tests read: LRCOMPRESS_SHARED."""
    folder = os.environ.get("LRCOMPRESS_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LRCOMPRESS_SHARED names no folder with models/ and data/")
    return Path(folder)
