"""What every model family must be able to do, each as a function that raises where it can't.

`tests/test_families.py` asks it of all of `models.TINY`; `python -m benchmarks families` makes the table of it.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from models import TINY, tiny_batch, tiny_model
from torch import Tensor

import lrcompress
from lrcompress.api import Compressed
from lrcompress.experts import unfuse
from lrcompress.hf import write_model
from lrcompress.layers import Targets, find_layers
from lrcompress.lowrank import ranks_of
from lrcompress.recovery.blended import BlendedLinear

KEEP = 0.5
RECIPE = {"method": "kron", "ranks": {"kind": "budget", "keep_parameters": KEEP}, "layout": "pivoted"}
MIXTURES = ("mixtral", "qwen3_moe")
FAMILIES = tuple(name for name in TINY if name not in ("gpt2-classifier", "llama-tied"))


def output(model: transformers.PreTrainedModel, name: str) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        return first(model(**tiny_batch(name)))


def first(found: Any) -> Tensor:
    return found.logits if "logits" in found else found.last_hidden_state


def near(found: Tensor, wanted: Tensor) -> None:
    difference = (found - wanted).abs().max().item()
    assert difference <= 1e-5 * max(wanted.abs().max().item(), 1.0), f"outputs differ by {difference:.1e}"


def targets(name: str) -> str:
    """Attention and MLP layers are found, apart from each other, and no head is among them."""
    model = tiny_model(name)
    unfuse(model)  # as whoever loads a model for compression does
    attention, mlp, both = (find_layers(model, Targets(groups=(group,))) for group in ("attention", "mlp", "all"))
    assert attention
    assert mlp
    assert attention.keys().isdisjoint(mlp)
    assert attention.keys() | mlp.keys() == both.keys()
    assert all(layer.block is not None for layer in both.values())
    assert model.get_output_embeddings() not in [model.get_submodule(layer) for layer in both]
    return f"{len(attention)} + {len(mlp)}"


def compressed(name: str, *, steps: int = 0) -> tuple[transformers.PreTrainedModel, Compressed]:
    """A family's model, compressed by its own batches; its loss is the distance from random targets."""
    model = tiny_model(name)
    batches = [tiny_batch(name, seed=seed) for seed in range(4)]

    def loss(found: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        classes = torch.arange(found[..., 0].numel()) % found.shape[-1]
        return torch.nn.functional.cross_entropy(found.flatten(0, -2), classes)

    recovery = {"steps": steps, "learning_rate": 1e-3} if steps else None
    done = lrcompress.compress(
        model, batches, loss=loss, forward=lambda model, batch: first(model(**batch)),
        recipe={**RECIPE, "recovery": recovery},
    )  # fmt: skip
    return model, done


def closed_form(name: str) -> str:
    """The budget is kept, and the output is finite and another than the dense one."""
    dense = tiny_model(name)
    model, done = compressed(name)
    assert done.plan.kept_parameters <= KEEP * done.plan.dense_parameters
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    found = output(model, name)
    assert found.isfinite().all()
    assert not torch.equal(found, output(dense, name))
    return f"{len(ranks_of(model))} layers"


def recovery(name: str) -> str:
    """Training goes through every block, and changes what the closed form gave."""
    before, _ = compressed(name)
    model, done = compressed(name, steps=4)
    losses = [point["loss"] for point in done.training]
    assert len(losses) == 4
    assert not any(isinstance(module, BlendedLinear) for module in model.modules())
    assert all(torch.tensor(losses).isfinite())
    assert not torch.equal(output(model, name), output(before, name))
    return f"loss {losses[0]:.3g} → {losses[-1]:.3g}"


def saved(name: str, folder: Path) -> Tensor:
    """Write a compressed model, with its output beside it for another process to read; returns the output."""
    model, _ = compressed(name)
    write_model(model, ranks_of(model), folder / name, provenance={})
    wanted = output(model, name)
    torch.save((tiny_batch(name), wanted), folder / f"{name}.pt")
    return wanted


def native_load(name: str, folder: Path) -> str:
    """`from_pretrained` gives the model that was saved, and what that saves in turn."""
    wanted = saved(name, folder)
    load = getattr(transformers, TINY[name].auto_class).from_pretrained
    again = load(folder / name).eval()
    near(output(again, name), wanted)
    again.save_pretrained(folder / f"{name}-again")
    near(output(load(folder / f"{name}-again").eval(), name), wanted)
    return ""


def merge(name: str, folder: Path) -> str:
    """Multiplied out, the model has the layers of the original, and stock transformers loads it."""
    model, _ = compressed(name)
    wanted = output(model, name)
    lrcompress.merge(model)
    assert [*model.state_dict()] == [*tiny_model(name).state_dict()]
    model.save_pretrained(folder / name)
    assert "quantization_config" not in json.loads((folder / name / "config.json").read_text())
    again = getattr(transformers, TINY[name].auto_class).from_pretrained(folder / name)
    near(output(again.eval(), name), wanted)
    return ""


FORBIDDEN = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lrcompress":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
"""The beginning of a program for which lrcompress is as if it were not installed."""

_ELSEWHERE = """
import json, torch, transformers
folder, found = sys.argv[1], {}
for name, auto_class in json.loads(sys.argv[2]).items():
    try:
        batch, wanted = torch.load(f"{folder}/{name}.pt", weights_only=True)
        model = getattr(transformers, auto_class).from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
        with torch.no_grad():
            output = model(**batch)
        got = output.logits if "logits" in output else output.last_hidden_state
        difference = (got - wanted).abs().max().item()
        found[name] = "" if difference <= 1e-5 * max(wanted.abs().max().item(), 1.0) else f"differs by {difference:.1e}"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def remote_load(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """What is wrong with each family's model where lrcompress is not installed, "" if nothing; all in one process."""
    for name in names:
        saved(name, folder)
    kinds = json.dumps({name: TINY[name].auto_class for name in names})
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN + _ELSEWHERE, str(folder), kinds], capture_output=True, text=True, check=False,
        env={"HF_MODULES_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin",
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def onnx(name: str, folder: Path) -> str:
    """The graph gives the same in onnxruntime, at any batch size and length."""
    saved(name, folder)
    lrcompress.export(folder / name, "onnx")
    return ""


PLAIN: dict[str, Callable[[str], str]] = {"targets": targets, "closed form": closed_form, "recovery": recovery}
IN_A_FOLDER: dict[str, Callable[[str, Path], str]] = {"native load": native_load, "merge": merge}
