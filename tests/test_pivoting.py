"""The pivoted layout is the same function in R² numbers fewer: against the plain product, on disk, in a run."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, factorise, tiny_batch, tiny_model
from runs import causal_case, cli

import lrcompress
from lrcompress import pivoting, stages
from lrcompress.artifacts import Factors, Layout, Pivoted, read_factors, write_factors
from lrcompress.checkpoint import load_module, save_module
from lrcompress.errors import ModelError, NumericalError
from lrcompress.hf import merge, saved_ranks, write_model
from lrcompress.layers import Targets, find_layers, read_weight, write_weight
from lrcompress.linalg import Roots, psd_root
from lrcompress.lowrank import LowRankLinear, PivotedLinear, low_rank_module, pivoted_in, put_module, ranks_of
from lrcompress.pivoting import BOUND, laid_out, pivot, pivot_condition
from lrcompress.recovery.whitening import Coordinates
from lrcompress.sizes import model_size


def pair(out: int, size: int, rank: int, *, seed: int = 0, decay: float = 3.0, bias: bool = True) -> Factors:
    """Factors whose directions fall over `decay` decades."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, size, generator=generator)
    B = torch.randn(out, rank, generator=generator) * torch.logspace(0, -decay, rank)
    return Factors(A, B, torch.randn(out, generator=generator) if bias else None)


def pivoted_model(name: str) -> tuple[transformers.PreTrainedModel, dict[str, int]]:
    model = tiny_model(name)
    ranks = factorise(model)
    for layer in ranks:
        module = model.get_submodule(layer)
        put_module(model, layer, low_rank_module(pivot(module.pair()), device="cpu", dtype=torch.float32))
    return model, ranks


@given(
    shape=st.tuples(st.integers(2, 40), st.integers(1, 40)), share=st.floats(0, 1), seed=st.integers(0, 99),
    decay=st.sampled_from([0.0, 3.0, 8.0]),
)  # fmt: skip
def test_the_product_is_the_same_and_the_pivots_are_bounded(
    shape: tuple[int, int], share: float, seed: int, decay: float
) -> None:
    out, size = shape
    rank = max(1, min(round(share * min(out, size)), out - 1, size))
    plain = pair(out, size, rank, seed=seed, decay=decay)
    found = pivot(plain)
    product = plain.B.double() @ plain.A.double()
    same = found.factors()
    assert torch.allclose(same.B @ same.A, product, rtol=0, atol=1e-10 * product.abs().max().item())
    assert found.rest.abs().max() <= BOUND + 1e-9
    assert sorted(found.place.tolist()) == list(range(out))
    assert found.rows.numel() + found.rest.numel() == rank * (size + out - rank)
    assert pivot_condition(found.rest) <= (1 + BOUND**2 * rank * (out - rank)) ** 0.5 + 1e-9


@given(out=st.integers(2, 40), size=st.integers(2, 40), seed=st.integers(0, 50))
def test_outputs_in_float32_differ_by_rounding(out: int, size: int, seed: int) -> None:
    rank = max(1, min(out, size) // 2)
    plain = pair(out, size, rank, seed=seed)
    x = torch.randn(3, 5, size)
    exact = x.double() @ (plain.B.double() @ plain.A.double()).T + plain.bias.double()
    layer = PivotedLinear.of(pivot(plain), device="cpu", dtype=torch.float32)
    assert (layer(x).double() - exact).norm() <= 1e-5 * exact.norm()
    assert (layer.out_features, layer.in_features, layer.rank) == (out, size, rank)


def test_directions_that_are_zero_do_no_harm() -> None:
    plain = pair(12, 9, 4)
    plain.B[:, 2:] = 0
    same = pivot(plain).factors()
    assert torch.allclose(same.B @ same.A, (plain.B @ plain.A).double(), atol=1e-6)


def test_a_full_rank_leaves_nothing_to_pivot() -> None:
    with pytest.raises(NumericalError, match="rank 6 of 6"):
        pivot(pair(6, 9, 6))


def lost(stored: Factors | Pivoted, exact: Factors) -> float:
    """Relative error of the product."""
    product, same = exact.B.double() @ exact.A.double(), stored.factors()
    return ((same.B.double() @ same.A.double() - product).norm() / product.norm()).item()


def numbers(stored: Factors | Pivoted) -> int:
    """That a checkpoint holds for it, without bias and order."""
    return sum(value.numel() for name, value in vars(stored).items() if name not in ("bias", "place"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_of_a_smaller_rank_where_pivoting_would_cost_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, steep = pair(96, 96, 24), pair(96, 96, 24, decay=12)
    kept = laid_out(flat, "pivoted", dtype)
    assert isinstance(kept, Pivoted)
    assert kept.rows.dtype == kept.rest.dtype == kept.bias.dtype == dtype
    assert lost(kept, flat) <= pivoting.LARGEST_LOSS * lost(laid_out(flat, "plain", dtype), flat)
    monkeypatch.setattr(pivoting, "LARGEST_LOSS", 0.5)
    cut = laid_out(steep, "pivoted", dtype)
    assert isinstance(cut, Factors)
    assert cut.A.shape == (24 * (192 - 24) // 192, 96)
    assert isinstance(laid_out(pair(96, 96, 24, decay=0), "pivoted", dtype), Pivoted)  # an eighth of it is worth more
    assert isinstance(laid_out(pair(96, 96, 1, decay=0), "pivoted", dtype), Pivoted)  # nothing would be left


@given(
    out=st.integers(3, 40), size=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99),
    decay=st.sampled_from([0.0, 2.0, 4.0, 8.0]), dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    int8=st.booleans(),
)  # fmt: skip
def test_a_layer_never_holds_more_numbers_and_is_the_nearer_of_two(
    out: int, size: int, share: float, seed: int, decay: float, dtype: torch.dtype, int8: bool
) -> None:
    rank = max(1, min(round(share * min(out, size)), out - 1, size))
    exact = pair(out, size, rank, seed=seed, decay=decay)
    whole = laid_out(exact, "pivoted", torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pivoting, "LARGEST_LOSS", 1e9)
        pivoted = laid_out(exact, "pivoted", dtype, int8=int8)
        patch.setattr(pivoting, "LARGEST_LOSS", 0.0)
        patch.setattr(pivoting, "HARMLESS", 0.0)
        found = laid_out(exact, "pivoted", dtype, int8=int8)
        most = numbers(whole)
        assert numbers(found) <= most == numbers(pivoted)
        assert lost(found, exact) <= lost(pivoted, exact)
        again = laid_out(found.factors(), "pivoted", dtype, int8=int8, most=most)
        assert numbers(again) <= most
        if isinstance(found, Factors):  # what has been cut to its size is left alone
            assert again.factors().A.shape == found.A.shape
            assert lost(again, found) <= (0.01 if int8 else 0)


def test_what_counts_in_the_coordinates_of_the_training_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivoting, "LARGEST_LOSS", 0.0)
    exact = pair(40, 40, 12, decay=6)
    weak = exact.A[-1] / exact.A[-1].norm()  # what the least direction reads
    inputs = torch.eye(40) + 1e8 * torch.outer(weak, weak)
    coordinates = Coordinates.of(Roots(right=psd_root(inputs, damping=1e-9, side="right")))
    at_hand = laid_out(exact, "pivoted", torch.bfloat16, coordinates=lambda: coordinates)
    nowhere = laid_out(exact, "pivoted", torch.bfloat16)
    assert isinstance(nowhere, Factors)

    def seen(stored: Factors | Pivoted) -> float:
        same, wanted = stored.factors(), exact.B.double() @ (exact.A.double() @ weak.double())
        return ((same.B.double() @ (same.A.double() @ weak.double()) - wanted).norm() / wanted.norm()).item()

    assert numbers(at_hand) <= 12 * (80 - 12)
    assert seen(at_hand) < seen(nowhere)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_factors_that_were_rounded_before_are_pivoted_too(dtype: torch.dtype) -> None:
    """As plain factors they lose nothing more, which is no reason to keep R² numbers that others were given."""
    kept, int8 = (torch.float32, True) if dtype == torch.int8 else (dtype, False)
    rounded = laid_out(pair(96, 96, 24), "plain", kept, int8=int8).factors()
    assert torch.equal(laid_out(rounded, "plain", kept, int8=int8).factors().A, rounded.A)
    assert isinstance(laid_out(rounded, "pivoted", kept, int8=int8), Pivoted)


def test_too_large_for_the_dtype() -> None:
    plain = pair(8, 8, 3)
    plain.A.mul_(1e9)
    for layout in ("plain", "pivoted"):
        with pytest.raises(NumericalError, match="float16"):
            laid_out(plain, layout, torch.float16)


def test_layers_cost_what_their_tensors_hold() -> None:
    model = tiny_model("bert")
    dense = sum(p.numel() for p in model.parameters())
    layers = {n: replace(layer, layout="pivoted") for n, layer in find_layers(model, Targets()).items()}
    ranks = {n: layer.max_rank - 3 for n, layer in layers.items()}
    compact = model_size(model, layers, ranks, torch.float32)
    kept = sum(layer.cost(ranks[n]) for n, layer in layers.items())
    assert dense - compact.parameters == sum(layer.dense_parameters for layer in layers.values()) - kept
    one = next(iter(layers.values()))
    assert one.cost(one.max_rank) < one.dense_parameters == one.cost(one.max_rank + 1)
    assert one.cost(round(one.rank_of(0.5))) == pytest.approx(0.5 * one.dense_parameters, rel=0.05)
    assert one.break_even == min(one.in_features, one.out_features)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "bert", "t5"])
def test_checkpoints_load_with_equal_logits_and_merge(name: str, tmp_path) -> None:
    model, ranks = pivoted_model(name)
    write_model(model, ranks, tmp_path / "model", provenance={"method": "kron"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert config["pivoted"] == sorted(ranks)
    assert saved_ranks(tmp_path / "model") == dict(sorted(ranks.items()))
    loaded = getattr(transformers, TINY[name].auto_class).from_pretrained(tmp_path / "model").eval()
    assert pivoted_in(loaded) == sorted(ranks)
    with torch.no_grad():
        wanted = model(**tiny_batch(name)).logits
        assert torch.equal(loaded(**tiny_batch(name)).logits, wanted)
        half = getattr(transformers, TINY[name].auto_class).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
        assert next(iter(half.parameters())).dtype == torch.bfloat16
        loaded.save_pretrained(tmp_path / "again")
        merge(loaded)
        assert not ranks_of(loaded)
        assert torch.allclose(loaded(**tiny_batch(name)).logits, wanted, atol=1e-4)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(pivoted=["nowhere"]), "without a rank"),
        (lambda s: s.update(format_version=1), "format_version"),
        (lambda s: s.update(pivoted=[], format_version=2), "not in the checkpoint"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(change, message, tmp_path) -> None:
    model, ranks = pivoted_model("gpt2")
    write_model(model, ranks, tmp_path / "model", provenance={})
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_step_of_training_changes_every_number_that_is_stored() -> None:
    model, ranks = pivoted_model("gpt2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tiny_batch("gpt2")).logits.square().mean().backward()
    optimizer.step()
    for name in ranks:
        layer = model.get_submodule(name)
        for key, value in layer.named_parameters():
            assert not torch.equal(value, before[f"{name}.{key}"]), (name, key)


def test_a_plain_module_is_compressed_saved_and_loaded(tmp_path) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))

    model, x = make(), torch.randn(64, 24)
    batches = [(x[i : i + 16], torch.randint(0, 10, (16,))) for i in range(0, 64, 16)]
    recipe = {"layout": "pivoted", "ranks": {"kind": "budget", "keep_parameters": 0.6}, "recovery": None}
    done = lrcompress.compress(
        model, batches, loss=lambda y, b: torch.nn.functional.cross_entropy(y, b[1]), recipe=recipe
    )
    kept = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("bias"))
    assert kept == done.plan.kept_parameters <= 0.6 * (24 * 24 + 240)
    assert pivoted_in(model)
    save_module(model, tmp_path / "module")
    again = make()
    load_module(again, tmp_path / "module")
    assert torch.equal(again(x), model(x))


def test_factors_of_both_layouts_in_one_file(tmp_path) -> None:
    both = {"a.b": pair(7, 5, 2), "c": pivot(pair(7, 5, 2, bias=False))}
    write_factors(tmp_path / "f.safetensors", both)
    found = read_factors(tmp_path / "f.safetensors")
    assert {name: type(one) for name, one in found.items()} == {"a.b": Factors, "c": Pivoted}
    assert torch.equal(found["c"].place, both["c"].place)
    assert found["c"].bias is None
    assert isinstance(low_rank_module(found["a.b"], device="cpu", dtype=torch.float32), LowRankLinear)


def test_a_run_keeps_its_budget_at_larger_ranks_and_says_how_well_conditioned(tmp_path) -> None:
    case = causal_case(tmp_path)
    for layout in ("plain", "pivoted"):
        done = cli(
            "run", case.model, "--recipe", case.recipe, "--output", tmp_path / layout,
            "--set", f"layout={layout}", "--set", "ranks={kind: uniform, keep_parameters: 0.6}",
            "--set", "timing=null", "--set", "baselines=[]", "--set", "recovery=null",
        )  # fmt: skip
        assert done.code == 0, done.err
    plain, pivoted = (json.loads((tmp_path / key / "report.json").read_text()) for key in ("plain", "pivoted"))
    last = pivoted["rows"][-1]
    dense = pivoted["rows"][0]["target_parameters"]
    assert last["target_parameters"] <= 0.6 * dense
    for one, other in zip(pivoted["layers"], plain["layers"], strict=True):
        assert one["rank"] > other["rank"]
    assert all(layer["pivot_condition"] >= 1 for layer in pivoted["layers"] if layer["rank"])
    assert all(layer["pivot_condition"] is None for layer in plain["layers"])
    assert "pivot condition" in (tmp_path / "pivoted" / "report.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pivoted" / "model")
    assert sum(p.numel() for p in model.parameters()) == last["parameters"]
    assert (tmp_path / "pivoted" / "model" / "model.safetensors").stat().st_size == last["file_bytes"]


def steep(model: torch.nn.Module) -> torch.nn.Module:
    """With weights of a few strong directions, so that a smaller rank loses less than rounding does. Changes it."""
    for name in find_layers(model, Targets()):
        layer = model.get_submodule(name)
        u, s, vt = torch.linalg.svd(read_weight(layer).detach(), full_matrices=False)
        write_weight(layer, u * (s[0] * torch.logspace(0, -9, len(s))) @ vt)
    return model


@pytest.mark.parametrize("more", [["recovery=null"], ["refit={check: 0}", "recovery.check=0"]], ids=["closed", "all"])
def test_a_run_in_which_pivoting_costs_precision_keeps_its_budget(more: list[str], tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pivoting, "LARGEST_LOSS", 0.0)
    case = causal_case(tmp_path)
    model = steep(transformers.AutoModelForCausalLM.from_pretrained(case.model))
    model.to(torch.bfloat16).save_pretrained(case.model)
    settings = ["layout=pivoted", "method=svd", "ranks={kind: uniform, keep_parameters: 0.9}", "timing=null", *more]
    done = cli(
        *case.arguments(tmp_path / "run"), *(part for setting in settings for part in ("--set", setting)),
        "--set", "baselines=[asvd]",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    dense, *rows = report["rows"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    plain = sorted(set(ranks_of(loaded)) - set(pivoted_in(loaded)))
    assert plain
    held = 0
    for name in ranks_of(loaded):
        held += sum(value.numel() for key, value in loaded.get_submodule(name).named_parameters() if "bias" not in key)
    assert rows[-1]["target_parameters"] == held == sum(layer["kept_parameters"] for layer in report["layers"])
    assert rows[-1]["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert rows[-1]["file_bytes"] == (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert all(row["target_parameters"] <= 0.9 * dense["target_parameters"] for row in rows)
    assert {layer["name"]: layer["rank"] for layer in report["layers"]} == ranks_of(loaded)
    assert saved_ranks(tmp_path / "run" / "model") == dict(sorted(ranks_of(loaded).items()))
    plans = json.loads((next((tmp_path / "run" / "stages").glob("*-ranks")) / "ranks.json").read_text())
    for name, rank in plans["plan"]["ranks"].items():
        layer = loaded.get_submodule(name)
        most = rank * (layer.in_features + layer.out_features - rank)
        assert layer.rank == (most // (layer.in_features + layer.out_features) if name in plain else rank)
    note = f"smaller rank that as many numbers allow, since pivoting would cost precision in bfloat16: {plain[0]}"
    assert any(note in text for text in report["notes"])
    assert any(note in text for stage in report["stages"] for text in stage["notes"])


@pytest.mark.parametrize("recovery", [None, {"steps": 4, "loss": {"kind": "task"}}], ids=["closed", "trained"])
def test_a_module_in_which_pivoting_costs_precision_has_the_ranks_of_its_plan(recovery, monkeypatch) -> None:
    monkeypatch.setattr(pivoting, "LARGEST_LOSS", 0.0)
    torch.manual_seed(0)
    model = steep(torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10)))
    x = torch.randn(64, 24)
    batches = [(x[i : i + 16], torch.randint(0, 10, (16,))) for i in range(0, 64, 16)]
    ranks = {"kind": "uniform", "keep_parameters": 0.8}
    recipe = {"layout": "pivoted", "dtype": "int8", "method": "svd", "ranks": ranks, "recovery": recovery}
    done = lrcompress.compress(
        model, batches, loss=lambda y, b: torch.nn.functional.cross_entropy(y, b[1]), recipe=recipe
    )
    assert set(pivoted_in(model)) < set(done.plan.ranks)
    assert ranks_of(model) == done.plan.ranks == {name: len(one.A) for name, one in done.factors.items()}
    kept = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
    assert kept == done.plan.kept_parameters <= 0.8 * done.plan.dense_parameters


def test_rows_of_equal_ranks_in_other_layouts_are_timed_apart(tmp_path, monkeypatch) -> None:
    case, seen = causal_case(tmp_path), []
    layers = len(find_layers(tiny_model("gpt2"), Targets()))

    def first_row_plain(factors: Factors, layout: Layout, dtype: torch.dtype, **more: Any) -> Factors | Pivoted:
        seen.append(layout)
        return laid_out(factors, "plain" if len(seen) <= layers else layout, dtype, **more)

    monkeypatch.setattr(stages, "laid_out", first_row_plain)
    settings = [
        "layout=pivoted",
        "ranks={kind: uniform, keep_parameters: 0.5}",
        "recovery=null",
        "baselines=[svd, fwsvd]",
    ]
    done = cli(*case.arguments(tmp_path / "run"), *(part for setting in settings for part in ("--set", setting)))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    plain, pivoted, result = report["rows"][1:]
    assert plain["target_parameters"] > pivoted["target_parameters"] == result["target_parameters"]
    assert plain["latency"] != pivoted["latency"] == result["latency"]
    assert plain["peak_memory_bytes"] != pivoted["peak_memory_bytes"] == result["peak_memory_bytes"]
