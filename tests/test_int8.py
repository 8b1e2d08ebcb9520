"""Factors in 8 bits: near to what they round, in a quarter of float32's bytes, saved and loaded as they are."""

import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, factorise, tiny_batch, tiny_model
from runs import causal_case, cli
from safetensors import safe_open

import lrcompress
from lrcompress.checkpoint import load_module, save_module
from lrcompress.errors import ModelError
from lrcompress.hf import merge, write_model
from lrcompress.int8 import LARGEST, Int8Linear, rounded
from lrcompress.lowrank import AbstractLowRank, is_int8, low_rank_module, put_module, ranks_of, to_int8
from lrcompress.pivoting import laid_out, pivot

HALVES = [torch.bfloat16, torch.float16]


def int8_model(name: str, *, pivoted: bool = False) -> tuple[transformers.PreTrainedModel, dict[str, int]]:
    model = tiny_model(name)
    ranks = factorise(model)
    for layer in ranks:
        module = model.get_submodule(layer)
        assert isinstance(module, AbstractLowRank)
        stored = pivot(module.pair()) if pivoted else module.pair()
        put_module(model, layer, low_rank_module(stored, device="cpu", dtype=torch.float32, int8=True))
    return model, ranks


@given(out=st.integers(1, 12), size=st.integers(1, 12), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1, 1e4]))
def test_rounding_is_within_half_a_step_of_each_channel_and_rounds_once(out: int, size: int, seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator) * torch.logspace(0, 3, out)[:, None] * scale
    weight[0] = 0
    found = rounded(weight)
    step = weight.abs().amax(1) / LARGEST
    assert ((weight - found).abs() <= 0.5001 * step[:, None]).all()
    assert torch.allclose(rounded(found), found, rtol=1e-6, atol=0)
    linear = torch.nn.Linear(size, out)
    linear.weight.data = found
    layer = Int8Linear.of(linear)
    assert torch.allclose(layer.dense_weight(), found, rtol=1e-6, atol=0)
    x = torch.randn(3, size, generator=generator)
    assert torch.allclose(layer(x), linear(x), rtol=1e-4, atol=1e-4 * float(weight.abs().amax()))


@given(
    dtype=st.sampled_from(HALVES), seed=st.integers(0, 99), scale=st.sampled_from([1e-8, 1e-6, 1e-4, 1e-2, 1, 1e2])
)  # fmt: skip
def test_scales_are_numbers_of_the_dtype_that_they_are_stored_in(dtype: torch.dtype, seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 9, generator=generator) * torch.logspace(0, 2, 16)[:, None] * scale
    weight[0] = 0
    linear = torch.nn.Linear(9, 16)
    linear.weight.data = weight
    layer = Int8Linear.of(linear, dtype)
    assert torch.equal(layer.dense_weight(), rounded(weight, dtype))
    assert torch.equal(layer.to(dtype).float().dense_weight(), rounded(weight, dtype))  # nothing was lost on the way
    step = layer.scale[:, None]
    assert ((weight - rounded(weight, dtype)).abs() <= 0.5001 * step).all()
    nearest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of two numbers next to 0
    assert (step[1:] <= (1 + torch.finfo(dtype).eps) * weight.abs().amax(1)[1:, None] / LARGEST + nearest).all()


@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1, 1e-4])
def test_a_layer_is_the_same_in_every_dtype_that_it_is_computed_in(dtype: torch.dtype, pivoted: bool, size: float):
    plain = tiny_pair()
    plain.A.mul_(size)
    stored = laid_out(plain, "pivoted" if pivoted else "plain", dtype, int8=True)
    measured = low_rank_module(stored, device="cpu", dtype=torch.float32, int8=True, scales=dtype)
    saved = low_rank_module(stored, device="cpu", dtype=dtype, int8=True)
    assert {value.dtype for value in saved.parameters()} == {torch.int8, dtype}
    for key, value in saved.named_parameters():
        assert torch.equal(value.to(measured.get_parameter(key)), measured.get_parameter(key)), key


@pytest.mark.parametrize(("name", "pivoted"), [("gpt2", True), ("llama-tied", False), ("bert", True), ("t5", False)])
def test_checkpoints_load_with_equal_logits_and_merge(name: str, pivoted: bool, tmp_path):
    model, ranks = int8_model(name, pivoted=pivoted)
    write_model(model, ranks, tmp_path / "model", provenance={})
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["dtype"]) == (3, "int8")
    layer = next(iter(ranks))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        kinds = {key.removeprefix(f"{layer}."): file.get_tensor(key).dtype for key in file.keys() if layer in key}
    assert [kinds[f"{key}.weight"] for key in (("rows", "rest") if pivoted else ("A", "B"))] == [torch.int8] * 2
    auto = getattr(transformers, TINY[name].auto_class)
    loaded = auto.from_pretrained(tmp_path / "model").eval()
    half = auto.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    assert is_int8(loaded)
    with torch.no_grad():
        wanted = model(**tiny_batch(name)).logits
        assert torch.equal(loaded(**tiny_batch(name)).logits, wanted)
        logits = half(**tiny_batch(name)).logits
        assert logits.dtype == torch.bfloat16
        assert torch.allclose(logits.float(), wanted, atol=0.1 * float(wanted.abs().max()))
        assert half.get_submodule(layer).get_parameter(f"{'rows' if pivoted else 'A'}.weight").dtype == torch.int8
        loaded.save_pretrained(tmp_path / "again")
        merge(loaded)
        assert not ranks_of(loaded)
        assert torch.allclose(loaded(**tiny_batch(name)).logits, wanted, atol=1e-4)
    files = [tmp_path / folder / "model.safetensors" for folder in ("model", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(dtype="int4"), "dtype is unknown"),
        (lambda s: s.update(format_version=2), "format_version"),
        (lambda s: s.update(format_version=4), "upgrade lrcompress"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(change, message, tmp_path):
    model, ranks = int8_model("gpt2")
    write_model(model, ranks, tmp_path / "model", provenance={})
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_the_rest_of_a_model_is_trained_beside_factors_in_8_bits():
    model, _ = int8_model("gpt2")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny_batch("gpt2")).logits.square().mean().backward()
    optimizer.step()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert "transformer.wte.weight" in changed
    assert not any(key.endswith((".scale", "A.weight", "B.weight")) for key in changed)


def test_a_plain_module_is_compressed_saved_and_loaded(tmp_path):
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))

    x, wanted = torch.randn(64, 24), []
    batches = [(x[i : i + 16], torch.randint(0, 10, (16,))) for i in range(0, 64, 16)]
    models = {}
    for dtype in ("model", "int8"):
        recipe = {"dtype": dtype, "ranks": {"kind": "budget", "keep_parameters": 0.6}, "recovery": None}
        models[dtype] = make()
        loss = lambda y, b: torch.nn.functional.cross_entropy(y, b[1])  # noqa: E731
        lrcompress.compress(models[dtype], batches, loss=loss, recipe=recipe)
        wanted.append(models[dtype](x).detach())
    model = models["int8"]
    assert is_int8(model)
    assert not is_int8(models["model"])
    assert torch.allclose(wanted[1], wanted[0], atol=0.05 * float(wanted[0].abs().max()))
    save_module(model, tmp_path / "module")
    again = make()
    load_module(again, tmp_path / "module")
    assert torch.equal(again(x), model(x))


def test_a_run_reports_the_bytes_of_the_file_that_it_wrote(tmp_path):
    case = causal_case(tmp_path)
    done = cli(
        "run", case.model, "--recipe", case.recipe, "--output", tmp_path / "run", "--set", "dtype=int8",
        "--set", "baselines=[]", "--set", "layout=pivoted",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    file = tmp_path / "run" / "model" / "model.safetensors"
    assert report["rows"][-1]["file_bytes"] == file.stat().st_size
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert is_int8(loaded)
    assert "int8" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_model_in_half_precision_is_saved_as_it_was_measured(dtype: torch.dtype, layout: str, tmp_path):
    case = causal_case(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype)
    model.save_pretrained(case.model)
    done = cli(
        "run", case.model, "--recipe", case.recipe, "--output", tmp_path / "run", "--set", "dtype=int8",
        "--set", "baselines=[]", "--set", f"layout={layout}", "--set", "refit={check: 0}",
        "--set", "recovery.train=factors+bias", "--set", "recovery.check=0", "--set", "timing=null",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model"]["dtype"] == str(dtype).removeprefix("torch.")
    file = tmp_path / "run" / "model" / "model.safetensors"
    assert report["rows"][-1]["file_bytes"] == file.stat().st_size
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert is_int8(loaded)
    assert {value.dtype for value in loaded.parameters()} == {torch.int8, dtype}


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_module_in_half_precision_gets_the_nearest_numbers_on_its_grid(dtype: torch.dtype, layout: str, tmp_path):
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10)).to(dtype)

    x = torch.randn(64, 24).to(dtype)
    batches = [(x[i : i + 16], torch.randint(0, 10, (16,))) for i in range(0, 64, 16)]
    loss = lambda y, b: torch.nn.functional.cross_entropy(y.float(), b[1])  # noqa: E731
    ranks = {"kind": "uniform", "keep_parameters": 0.6}
    recipe = {"dtype": "int8", "layout": layout, "method": "svd", "ranks": ranks, "recovery": None}
    model = make()
    done = lrcompress.compress(model, batches, loss=loss, recipe=recipe)
    save_module(model, tmp_path / "module")
    again = make()
    load_module(again, tmp_path / "module")
    assert torch.equal(again(x), model(x))
    for name, pair in done.factors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AbstractLowRank)
        assert {value.dtype for value in layer.parameters()} == {torch.int8, dtype}
        for key in ("rows", "rest") if layer.layout == "pivoted" else ("A", "B"):
            stored = getattr(layer.float(), key)
            exact = getattr(pivot(pair), key) if layer.layout == "pivoted" else getattr(pair, key)
            assert ((stored.dense_weight() - exact).abs() <= 0.5001 * stored.scale[:, None]).all(), (name, key)


def test_an_unknown_dtype_is_refused_before_any_work(tmp_path):
    case = causal_case(tmp_path)
    done = cli("run", case.model, "--recipe", case.recipe, "--output", tmp_path / "run", "--set", "dtype=int4")
    assert done.code != 0
    assert "`dtype`" in done.err
    assert "'model' or 'int8'" in done.err
    assert not (tmp_path / "run").exists()


def test_layers_on_the_meta_device_take_the_same_shapes():
    layer = low_rank_module(pivot(tiny_pair()), device="cpu", dtype=torch.float32)
    to_int8(layer)
    assert layer.shapes() == {key: tuple(value.shape) for key, value in layer.named_parameters()}


def tiny_pair() -> lrcompress.artifacts.Factors:
    return lrcompress.artifacts.Factors(torch.randn(3, 8), torch.randn(6, 3), torch.randn(6))
