"""`python -m benchmarks families`: what each model family can do, tried on tiny random models of tests/models.py.

One row a family, one column a capability of tests/contract.py. vLLM's column is what tests/test_vllm.py says, by an
interpreter that has vLLM (`--vllm PYTHON`).
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.beds import commit, write_result
from lrcompress.build import environment_of

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "families.json"
TEXT_IN_LOGITS_OUT = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "ForMaskedLM")


def measure(vllm_python: str | None) -> dict[str, Any]:
    """Family → capability → "" or what it found ("ok": true), or the reason why not."""
    sys.path.insert(0, str(ROOT / "tests"))
    import contract  # pyright: ignore[reportMissingImports]  of the tests
    import models  # pyright: ignore[reportMissingImports]
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: dict[str, dict[str, Any]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        remote = contract.remote_load(contract.FAMILIES, folder)
        for family in contract.FAMILIES:
            row = {key: _try(partial(do, family)) for key, do in contract.PLAIN.items()}
            for key, do in contract.IN_A_FOLDER.items():
                row[key] = _try(partial(do, family, folder / key))
            row["remote load"] = {"ok": not remote[family], "text": remote[family]}
            kind = type(models.tiny_model(family)).__name__
            if kind.endswith(TEXT_IN_LOGITS_OUT) and family not in contract.MIXTURES:
                row["ONNX"] = _try(partial(contract.onnx, family, folder / "onnx"))
            rows[family] = row
    found = {"rows": rows, "seconds": time.perf_counter() - began}
    if vllm_python is not None:
        found["vllm"] = _vllm(vllm_python)
    facts = {"commit": commit(), "command": "python -m benchmarks families --vllm PYTHON"}
    return found | facts | {"environment": environment_of(torch.device("cpu"), 0).model_dump()}


def _try(capability: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "text": capability()}
    except Exception as error:
        return {"ok": False, "text": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _vllm(python: str) -> dict[str, Any]:
    """Outcomes of tests/test_vllm.py by family."""
    command = [python, "-m", "pytest", "-n", "0", "-q", "-rA", "-m", "slow", "tests/test_vllm.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    outcomes: dict[str, dict[str, int]] = {}
    ran = re.findall(r"^(PASSED|FAILED) \S+test_logits_are_those_of_transformers\[(\w+)", done.stdout, re.M)
    for outcome, family in ran:
        counts = outcomes.setdefault(family, {"PASSED": 0, "FAILED": 0})
        counts[outcome] += 1
    version = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('vllm'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {"version": version.stdout.strip(), "outcomes": outcomes, "last": done.stdout.strip().splitlines()[-1]}


def write(vllm_python: str | None) -> None:
    """Measure, and write the result; `python -m benchmarks table` makes the table of it."""
    write_result(RESULT, measure(vllm_python))
