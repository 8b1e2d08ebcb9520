"""Families that the command line's tests leave out: compress, save, load in a fresh process, equal outputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_tiny, tiny_model, write_txt
from safetensors.torch import load_file, save_file
from torch import nn

import lrcompress
from lrcompress.verify import check_in_fresh_process

METHOD = {"method": "kron", "ranks": {"kind": "budget", "keep_parameters": 0.5}}
DISTILL = {"steps": 4, "batch": 4, "length": 32, "learning_rate": 1e-3}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_causal_family_runs_to_a_model_that_loads(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / family)
    train, test = write_txt(tmp_path / "train.txt", 120), write_txt(tmp_path / "test.txt", 30, seed=1)
    recipe = {
        **METHOD,
        "data": {"train": {"path": str(train)}, "test": {"path": str(test)}},
        "calibration": {"sequences": 16, "length": 32},
        "recovery": DISTILL,
        "evaluate": ["perplexity", "divergence"],
        "evaluation": {"length": 32},
    }
    report = lrcompress.run(str(model), recipe, tmp_path / "run")
    assert report is not None
    # the run itself compares the written model with the one in memory, in a fresh process
    assert "fresh process; largest difference of a logit 0.0e+00" in str(report.stages)
    dense, result = report.rows[0], report.rows[-1]
    assert result.target_parameters <= 0.5 * dense.target_parameters
    ranks = json.loads((tmp_path / "run/model/config.json").read_text())["quantization_config"]["ranks"]
    tensors = load_file(tmp_path / "run/model/model.safetensors")
    assert all(tensors[f"{name}.A.weight"].shape[0] == rank for name, rank in ranks.items())
    assert sum(tensor.numel() for tensor in tensors.values()) == result.parameters


def test_vit_is_compressed_from_python(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"pixel_values": torch.randn(8, 3, 16, 16, generator=generator), "labels": torch.arange(8) % 2}
        for _ in range(4)
    ]
    model = tiny_model("vit")
    dense = sum(parameter.numel() for parameter in model.parameters())
    done = lrcompress.compress(
        model,
        batches,
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
        recipe={**METHOD, "targets": {"groups": ["all"]}, "recovery": DISTILL},
    )
    assert sum(parameter.numel() for parameter in model.parameters()) < dense
    assert len(done.training) == DISTILL["steps"]
    model.save_pretrained(tmp_path / "vit")
    batch = {"pixel_values": batches[0]["pixel_values"]}
    difference = check_in_fresh_process(
        tmp_path / "vit", model, batch, auto_class="AutoModelForImageClassification", tolerance=1e-5
    )
    assert difference <= 1e-5


def test_mlp_is_compressed_from_python_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    inputs = torch.randn(4, 32, 64, generator=generator)
    batches = [(x, torch.randint(10, (32,), generator=generator)) for x in inputs]
    done = lrcompress.compress(
        model,
        batches,
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch[1]),
        recipe={**METHOD, "targets": {"include": ["2"]}, "recovery": {**DISTILL, "loss": {"kind": "task"}}},
    )
    assert list(done.plan.ranks) == ["2"]
    lrcompress.save_module(model, tmp_path / "mlp")
    save_file({"x": inputs[0], "y": model(inputs[0]).detach()}, tmp_path / "case.safetensors")
    child = (
        "import sys, torch, lrcompress\n"
        "from torch import nn\n"
        "from safetensors.torch import load_file\n"
        "model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))\n"
        "lrcompress.load_module(model, __import__('pathlib').Path(sys.argv[1]))\n"
        "case = load_file(sys.argv[2])\n"
        "assert torch.equal(model(case['x']), case['y'])\n"
    )
    subprocess.run([sys.executable, "-c", child, str(tmp_path / "mlp"), str(tmp_path / "case.safetensors")], check=True)
