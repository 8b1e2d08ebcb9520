"""Every checkpoint loads with trust_remote_code where lrcompress is not installed, with the same logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from contract import FORBIDDEN
from models import TINY, factorise, tiny_batch, tiny_model, tiny_wavlm

from lrcompress.hf import REMOTE_CODE, write_model
from lrcompress.lowrank import low_rank_module, put_module, ranks_of
from lrcompress.pivoting import pivot


def save(name: str, folder: Path, *, pivoted: bool = False, int8: bool = False) -> transformers.PreTrainedModel:
    return save_model(tiny_model(name), folder, pivoted=pivoted, int8=int8)


def save_model(
    model: transformers.PreTrainedModel, folder: Path, *, pivoted: bool = False, int8: bool = False
) -> transformers.PreTrainedModel:
    ranks = factorise(model)
    for layer in ranks if pivoted or int8 else ():
        pair = model.get_submodule(layer).pair()
        stored = pivot(pair) if pivoted else pair
        put_module(model, layer, low_rank_module(stored, device="cpu", dtype=torch.float32, int8=int8))
    write_model(model, ranks, folder, provenance={})
    return model


def elsewhere(code: str, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN + code], capture_output=True, text=True, check=False,
        env={"HF_MODULES_CACHE": str(home), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


CASES = {
    "gpt2": {}, "bert": {"pivoted": True}, "llama-tied": {"int8": True}, "t5": {"pivoted": True, "int8": True},
}  # fmt: skip


@pytest.mark.slow
def test_without_the_package_all_layouts_load_save_and_load_again(tmp_path: Path):
    """In one process, since each start of transformers takes seconds."""
    code = """
import torch, transformers
def near(logits, wanted):  # sums may run in another order where tensors lie otherwise in memory
    return torch.allclose(logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
"""
    for name, how in CASES.items():
        model = save(name, tmp_path / name, **how)
        with torch.no_grad():
            torch.save((tiny_batch(name), model(**tiny_batch(name)).logits), tmp_path / f"{name}.pt")
        code += f"""
load = transformers.{TINY[name].auto_class}.from_pretrained
batch, wanted = torch.load({str(tmp_path / name) + ".pt"!r}, weights_only=False)
model = load({str(tmp_path / name)!r}, trust_remote_code=True).eval()
assert near(model(**batch).logits, wanted), ({name!r}, (model(**batch).logits - wanted).abs().max())
model.save_pretrained({str(tmp_path / name) + "-again"!r})
again = load({str(tmp_path / name) + "-again"!r}, trust_remote_code=True).eval()
assert near(again(**batch).logits, wanted), {name!r}
half = load({str(tmp_path / name)!r}, trust_remote_code=True, dtype=torch.bfloat16)
assert half(**batch).logits.dtype == torch.bfloat16
"""
    sound = torch.randn(2, 400)
    for i, how in enumerate(({}, {"pivoted": True}, {"pivoted": True, "int8": True})):
        model, folder = save_model(tiny_wavlm(), tmp_path / f"wavlm-{i}", **how), tmp_path / f"wavlm-{i}"
        torch.save((sound, model(sound).last_hidden_state), tmp_path / f"wavlm-{i}.pt")
        code += f"""
sound, wanted = torch.load({str(tmp_path / f"wavlm-{i}.pt")!r})
model = transformers.AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
error = (model(sound).last_hidden_state - wanted).abs().max()
assert error < 1e-4 * wanted.abs().max(), f"a model that computes with its layers' weights: {{error}} off"
model(sound).last_hidden_state.square().sum().backward()
query = model.encoder.layers[0].attention.q_proj
assert query.weight.shape == (32, 32)
assert {bool(how.get("int8"))} or all(p.grad.abs().sum() > 0 for n, p in query.named_parameters() if n != "bias")
"""
    code += f"""
base = transformers.AutoModel.from_pretrained({str(tmp_path / "bert")!r}, trust_remote_code=True)
assert any(type(m).__name__ == "PivotedLinear" for m in base.modules())
import json, pathlib
from safetensors.torch import load_file, save_file
weights = pathlib.Path({str(tmp_path / "bert")!r}) / "model.safetensors"
tensors = load_file(weights)
del tensors[next(key for key in tensors if key.endswith(".rest.weight"))]
save_file(tensors, weights, metadata={{"format": "pt"}})
try:
    transformers.AutoModelForSequenceClassification.from_pretrained(weights.parent, trust_remote_code=True)
except ValueError as error:
    print(error)
file = pathlib.Path({str(tmp_path / "gpt2")!r}) / "config.json"
config = json.loads(file.read_text())
config["quantization_config"]["format_version"] = 99
file.write_text(json.dumps(config))
try:
    transformers.AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=True)
except ValueError as error:
    print(error)
"""
    said = elsewhere(code, tmp_path / "modules")
    assert "rest.weight was not in the checkpoint" in said
    assert "format_version is 99" in said


@pytest.mark.parametrize("flag", [False, True])
def test_with_the_package_its_own_loader_is_taken(flag: bool, tmp_path: Path):
    model = save("gpt2", tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=flag)
    assert ranks_of(loaded) == ranks_of(model)
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert ("auto_map" in config) == (tmp_path / "again" / REMOTE_CODE.name).exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch("gpt2")).logits, model(**tiny_batch("gpt2")).logits)


def test_the_code_is_the_same_in_every_checkpoint_and_stands_alone(tmp_path: Path):
    save("gpt2", tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.py"))
    assert [file.name for file in files] == ["deferred.py", REMOTE_CODE.name]
    for file in files:
        text = file.read_text()
        assert text == REMOTE_CODE.with_name(file.name).read_text()
        assert "import lrcompress" not in text
        assert "from lrcompress" not in text
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_lrcompress.GPT2LMHeadModel"
