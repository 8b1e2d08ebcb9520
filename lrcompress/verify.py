"""Check that a written model loads in a process of its own and gives the logits that it gave in memory.

`python -m lrcompress.verify JOB.json` is that process: it imports the package, and with it the loader, as a
user does. Nothing but files passes between the two.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lrcompress.artifacts import read_json, read_tensors, write_json, write_tensors
from lrcompress.errors import StageError
from lrcompress.experts import unfuse

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def check_in_fresh_process(
    folder: Path, model: PreTrainedModel, batch: Mapping[str, Tensor], *, auto_class: str, tolerance: float
) -> float:
    """Largest difference between the model's logits and those of `folder` loaded elsewhere, in float32.

    `auto_class` names the transformers class to load with. The child uses the model's device, dtype,
    attention implementation and thread count. Raises StageError with the child's message if it fails,
    and if the difference is beyond `tolerance` or no number.
    """
    job = {
        "folder": str(folder.resolve()),
        "auto_class": auto_class,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="lrcompress-verify-") as name:
        place = Path(name)
        write_tensors(place / "batch.safetensors", batch)
        write_tensors(place / "expected.safetensors", {"logits": _logits(model, batch)})
        write_json(place / "job.json", job)
        # the parent's own search path: the child must find the same packages wherever they were installed
        environment = os.environ | _OFFLINE | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        command = [sys.executable, "-m", "lrcompress.verify", str(place / "job.json")]
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise StageError(f"the model in {folder} does not load in a fresh process:\n{_last_lines(done.stderr)}")
        difference = float(done.stdout.split()[-1])
    if not difference <= tolerance:
        raise StageError(
            f"the model in {folder} gives other logits in a fresh process than in memory: "
            f"largest difference {difference:.3g}, allowed {tolerance:.3g}"
        )
    return difference


def main(job_file: Path) -> None:
    """The child: load, compare, print the largest difference."""
    job = read_json(job_file)
    torch.set_num_threads(job["threads"])
    model = getattr(transformers, job["auto_class"]).from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
    )
    unfuse(model)  # as in memory: two ways to add up experts may round to another routing
    logits = _logits(model.to(job["device"]), read_tensors(job_file.with_name("batch.safetensors")))
    expected = read_tensors(job_file.with_name("expected.safetensors"))["logits"]
    if logits.shape != expected.shape:
        raise StageError(f"logits {list(logits.shape)} in place of {list(expected.shape)}")
    print((logits - expected).abs().max().item())


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    # float32 on the CPU; a model without a head gives its first output
    training = model.training
    try:
        with torch.no_grad():
            output: Any = model.eval()(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    finally:
        model.train(training)
    return output.get("logits", output[0]).float().cpu()


def _last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
