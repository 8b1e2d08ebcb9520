"""Every family keeps the contract; a module that is no transformers model is compressed and loads too."""

import subprocess
import sys
from pathlib import Path

import contract
import pytest
import torch
from models import TINY, tiny_batch, tiny_model
from safetensors.torch import save_file
from torch import nn

import lrcompress
from lrcompress.experts import Experts, fuse, unfuse

METHOD = {"method": "kron", "ranks": {"kind": "budget", "keep_parameters": 0.5}}
DISTILL = {"steps": 4, "batch": 4, "length": 32, "learning_rate": 1e-3}


@pytest.mark.parametrize("name", contract.FAMILIES)
@pytest.mark.parametrize("capability", contract.PLAIN)
def test_a_family_keeps_the_contract(name: str, capability: str) -> None:
    contract.PLAIN[capability](name)


@pytest.mark.parametrize("name", contract.FAMILIES)
@pytest.mark.parametrize("capability", contract.IN_A_FOLDER)
def test_a_family_keeps_the_contract_on_disk(name: str, capability: str, tmp_path: Path) -> None:
    contract.IN_A_FOLDER[capability](name, tmp_path)


def test_all_families_load_where_lrcompress_is_not_installed(tmp_path: Path) -> None:
    assert contract.remote_load(contract.FAMILIES, tmp_path) == dict.fromkeys(contract.FAMILIES, "")


@pytest.mark.parametrize("name", contract.MIXTURES)
def test_experts_as_linears_compute_what_they_did_and_go_back(name: str) -> None:
    model, batch = tiny_model(name), tiny_batch(name)
    wanted, state = model(**batch).logits, {key: value.clone() for key, value in model.state_dict().items()}
    unfuse(model)
    assert sum(isinstance(module, Experts) for module in model.modules()) == 2
    assert torch.allclose(model(**batch).logits, wanted, atol=1e-6)
    fuse(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**batch).logits, wanted)


@pytest.mark.parametrize("name", contract.MIXTURES)
def test_experts_have_ranks_of_their_own_and_untouched_ones_stay_fused(name: str, tmp_path: Path) -> None:
    model, _ = contract.compressed(name)
    ranks = {layer: rank for layer, rank in contract.ranks_of(model).items() if ".experts." in layer}
    assert len(set(ranks.values())) > 1
    wanted = contract.output(model, name)
    lrcompress.write_model(model, contract.ranks_of(model), tmp_path / "all", provenance={})
    again = getattr(contract.transformers, TINY[name].auto_class).from_pretrained(tmp_path / "all").eval()
    contract.near(contract.output(again, name), wanted)
    attention = tiny_model(name)
    lrcompress.compress(
        attention, [tiny_batch(name)], loss=lambda logits, batch: logits.square().mean(),
        recipe={**METHOD, "targets": {"groups": ["attention"]}, "recovery": None},
    )  # fmt: skip
    assert not any(isinstance(module, Experts) for module in attention.modules())
    assert any(key.endswith("gate_up_proj") for key in attention.state_dict())


def test_an_expert_without_a_token_gets_its_siblings_statistics() -> None:
    model = tiny_model("mixtral")
    unfuse(model)
    gate = model.get_submodule("model.layers.0.mlp.gate")
    gate.weight.data[0] = 0.0
    gate.weight.data[0, 0] = -1e6  # no token is routed to the first expert
    experts = model.get_submodule("model.layers.0.mlp.experts")
    seen: list[int] = []
    experts.up[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = embedding[:, 0].abs() + 1
    done = lrcompress.compress(
        model, [tiny_batch("mixtral")], loss=lambda logits, batch: logits.square().mean(),
        recipe={**METHOD, "targets": {"include": ["layers.0.mlp.experts.up.*"]}, "recovery": None},
    )  # fmt: skip
    assert not seen
    assert "model.layers.0.mlp.experts.up.0" in done.factors


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
