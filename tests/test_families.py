"""Every family keeps the contract; a module that is no transformers model is compressed and loads too."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from models import TINY, save_tiny, tiny_batch, tiny_model, write_txt
from safetensors.torch import save_file
from torch import nn

import lrcompress
from lrcompress import calibrate, stages
from lrcompress.calibrate import collect, mean_of, siblings
from lrcompress.errors import NumericalError
from lrcompress.experts import Experts, fuse, regrouped, unfuse
from lrcompress.layers import Targets, find_layers
from lrcompress.lowrank import LowRankLinear, swapped
from lrcompress.tasks import CausalLM

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


def shunned(name: str = "mixtral") -> Any:
    """A mixture whose first expert of the first block gets no token."""
    model = tiny_model(name)
    gate = model.get_submodule("model.layers.0.mlp.gate")
    gate.register_forward_hook(lambda module, inputs, found: (found[0], found[1], found[2].clamp(min=1)))
    return model


def statistics(model: Any, names: Sequence[str], **more: Any) -> dict[str, Any]:
    layers = {name: layer for name, layer in find_layers(model, Targets()).items() if name in names}
    task = CausalLM()
    batches = [tiny_batch("mixtral", seed=seed) for seed in range(2)]
    batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    needs = ("input_moment", "grad_moment", "fisher_by_output")
    return collect(model, layers, batches, needs, task, seed=0, **more)[0]


def test_an_expert_without_a_token_gets_the_mean_of_its_siblings() -> None:
    model = shunned()
    unfuse(model)
    names = [f"model.layers.0.mlp.experts.up.{i}" for i in range(4)]
    found = statistics(model, names)
    assert names[0] not in found
    unseen = mean_of(names[0], (found[other] for other in siblings(names[0], names, names[:1])))
    for key in ("input_moment", "grad_moment", "fisher_by_output"):
        wanted = sum(getattr(found[name], key) for name in names[1:]) / 3
        assert torch.allclose(getattr(unseen, key), wanted)
    assert statistics(model, names[:1]) == {}  # alone in a pass, and no gradient to take
    with pytest.raises(NumericalError, match="nor did an expert like it"):
        mean_of(names[0], [])


def test_statistics_of_experts_leave_padding_out_and_do_not_depend_on_the_batch() -> None:
    model = tiny_model("mixtral")
    unfuse(model)
    names = [f"model.layers.0.mlp.experts.up.{i}" for i in range(4)]
    found = statistics(model, names)
    real = sum(int(tiny_batch("mixtral", seed=seed)["attention_mask"].sum()) for seed in range(2))
    assert sum(one.tokens for one in found.values()) == 2 * real  # two experts a token


def test_a_run_of_a_mixture_with_a_pass_for_each_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "MOMENT_BYTES", 1)
    monkeypatch.setattr(stages, "passes", lambda layers, needs: calibrate.passes(layers, needs, 1))
    monkeypatch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)
    text = {"path": str(write_txt(tmp_path / "a.txt", 60))}
    recipe = {
        **METHOD, "data": {"train": text, "test": text}, "calibration": {"sequences": 4, "length": 16},
        "targets": {"groups": ["mlp"]}, "layout": "pivoted", "recovery": {**DISTILL, "length": 16},
        "evaluate": ["divergence"], "evaluation": {"length": 32},
        "timing": {"batches": [1], "prompt": 8, "generate": 2, "repeats": 3, "warmup": 0},
    }  # fmt: skip
    report = lrcompress.run(str(save_tiny("mixtral", tmp_path / "mixtral")), recipe, tmp_path / "run")
    assert report is not None
    assert all(row.latency for row in report.rows)
    assert report.rows[-1].target_parameters <= 0.5 * report.rows[0].target_parameters


def test_rows_of_a_half_precision_mixture_are_regrouped_in_its_dtype() -> None:
    model, fused = tiny_model("mixtral"), tiny_model("mixtral").to(torch.bfloat16)
    unfuse(model)
    name = "model.layers.0.mlp.experts.up.1"
    layer = LowRankLinear(32, 96, 4, bias=False, dtype=torch.bfloat16)
    modules = regrouped(model, {name: layer}, torch.bfloat16)
    assert modules.keys() == {"model.layers.0.mlp.experts"}
    with swapped(fused, modules):
        assert fused(**tiny_batch("mixtral")).logits.dtype == torch.bfloat16


def test_adapters_reach_one_matrix_of_all_experts() -> None:
    model, _ = contract.compressed("mixtral")
    found = lrcompress.lora_targets(model, "experts.up")
    assert {name.partition(".experts.")[2].partition(".")[0] for name in found} == {"up"}
    holders = {name.rpartition(".")[0] if name[-1].isalpha() else name for name in found}
    assert len(holders) == 8  # two blocks of four


def test_an_error_leaves_the_callers_mixture_as_it_was() -> None:
    model = tiny_model("mixtral").requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NumericalError):
        lrcompress.compress(
            model, [tiny_batch("mixtral")], loss=lambda logits, batch: logits.mean() * float("nan"), recipe=METHOD
        )
    assert model.state_dict().keys() == state.keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())


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
