"""`compress` on any module: what it returns, that it shrinks and learns, and what it refuses."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import LABELS, factorise, tiny_batch, tiny_model
from torch import Tensor, nn

import lrcompress
from lrcompress import Compressed, LowRankLinear, compress, load_module, save_module
from lrcompress.errors import DataError, LayerError, NumericalError, RecipeError
from lrcompress.lowrank import ranks_of
from lrcompress.methods import Method

KINDS = ["svd", "fwsvd", "asvd", "svd_llm", "kron"]


class Mlp(nn.Module):
    """[B, 16] → [B, 5]."""

    def __init__(self, *, outputs: int = 5, squeeze: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 24), nn.ReLU(inplace=True), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, outputs)
        )
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) if self.squeeze else self.net(x)


def mlp(seed: int = 0, **sizes: Any) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(**sizes).eval()


def batches(count: int = 6, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 16, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def recipe(keep: float = 0.5, recovery: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"ranks": {"kind": "uniform", "keep_parameters": keep}, "recovery": recovery, "method": "svd"} | changes


TRAIN = {"steps": 40, "learning_rate": 1e-2}


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def kl(model: nn.Module, dense: nn.Module, data: list[Any]) -> float:
    x = torch.cat([batch[0] for batch in data])
    with torch.no_grad():
        p, q = dense(x).log_softmax(-1), model(x).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_gets_smaller_by_exactly_what_the_plan_says(kind: str) -> None:
    model, before = mlp(), numbers(mlp())
    result = compress(model, batches(), loss=cross_entropy, recipe=recipe(method=kind))
    assert isinstance(result, Compressed)
    assert result.model is model
    assert set(result.plan.ranks) == set(result.factors) == set(ranks_of(model))
    assert ranks_of(model) == result.plan.ranks
    assert result.plan.dense_parameters == 16 * 24 + 24 * 24 + 24 * 5
    assert before - numbers(model) == result.plan.dense_parameters - result.plan.kept_parameters > 0
    assert result.plan.kept_parameters <= 0.5 * result.plan.dense_parameters
    assert result.training == []
    for name, pair in result.factors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        assert torch.allclose(layer.weight, (pair.B @ pair.A).float(), atol=1e-6)
        assert torch.equal(layer.bias, mlp().get_submodule(name).bias)


@pytest.mark.parametrize("changes", [{}, {"layout": "pivoted"}, {"dtype": "int8"}])
def test_a_merged_module_has_linears_and_the_same_outputs(changes: dict[str, Any]) -> None:
    model, data = mlp(), batches()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    lrcompress.compress(model, data, loss=cross_entropy, recipe=recipe(**changes))
    with torch.no_grad():
        before = model(data[0][0])
        lrcompress.merge(model)
        assert [(name, type(module)) for name, module in model.named_modules()] == kinds
        assert torch.allclose(model(data[0][0]), before, atol=1e-5 * before.abs().max().item())


def test_a_transformers_model_within_a_module_is_merged_into_its_own_kinds() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = tiny_model("gpt2"), nn.Linear(3, 3)

    model = Wrapped()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    factorise(model)
    batch = tiny_batch("gpt2")
    with torch.no_grad():
        before = model.inner(**batch).logits
        lrcompress.merge(model)
        assert [(name, type(module)) for name, module in model.named_modules()] == kinds
        assert torch.allclose(model.inner(**batch).logits, before, atol=1e-4 * before.abs().max().item())


def test_a_layer_whose_weight_is_used_without_a_call_is_refused() -> None:
    class Uncalled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(F.linear(F.relu(self.first(x)), self.second.weight, self.second.bias)))

    model = Uncalled()
    with pytest.raises(NumericalError, match=r"second saw no token.*targets.exclude: \[second\]"):
        lrcompress.compress(model, batches(), loss=cross_entropy, recipe=recipe(method="kron"))
    lrcompress.compress(
        model, batches(), loss=cross_entropy, recipe=recipe(method="kron", targets={"exclude": ["second"]})
    )
    assert type(model.second) is nn.Linear


def test_kinds_cover_the_union() -> None:
    union = Method.__origin__.__args__
    assert {method.model_fields["kind"].default for method in union} == set(KINDS)


def test_plain_svd_is_the_best_approximation_of_each_weight() -> None:
    model, dense = mlp(), mlp()
    result = compress(model, batches(), loss=cross_entropy, recipe=recipe())
    for name, rank in result.plan.ranks.items():
        u, s, vt = torch.linalg.svd(dense.get_submodule(name).weight)
        assert torch.allclose(model.get_submodule(name).weight, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "kron"])
@pytest.mark.parametrize("recovery", [{}, {"train": "factors+bias+norm"}, {"tau": 1.0}], ids=str)
def test_recovery_brings_an_mlp_nearer_to_the_dense_one(method: str, recovery: dict[str, Any]) -> None:
    closed, learned = mlp(), mlp()
    data = batches(2)
    compress(closed, data, loss=cross_entropy, recipe=recipe(method=method))
    result = compress(learned, data, loss=cross_entropy, recipe=recipe(recovery=TRAIN | recovery, method=method))
    assert kl(learned, mlp(), data) < 0.7 * kl(closed, mlp(), data)
    assert len(result.training) == 40
    assert {"step", "loss", "tau", "kl", "seconds"} <= set(result.training[0])
    assert [point["step"] for point in result.training] == list(range(40))


def test_the_default_recipe_is_lora_lrd_on_kron() -> None:
    model = mlp()
    result = compress(model, batches(), loss=cross_entropy, recipe={"recovery": {"steps": 5}})
    assert result.plan.kept_parameters <= 0.5 * result.plan.dense_parameters
    assert len(result.training) == 5
    assert torch.isfinite(model(batches()[0][0])).all()


@pytest.mark.parametrize("recovery", [None, TRAIN | {"tau": 1.0, "train": "factors+bias"}], ids=["closed", "trained"])
def test_a_model_in_bfloat16_stays_in_bfloat16(recovery: dict[str, Any] | None) -> None:
    model = mlp().bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches(2)]
    result = compress(model, data, loss=cross_entropy, recipe=recipe(recovery=recovery, method="kron"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(data[0][0])).all()
    assert recovery is None or result.training[-1]["kl"] < result.training[0]["kl"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision_are_trained(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 5)).to(dtype)
    before = model[1].weight.detach().clone()
    train = {"steps": 100, "learning_rate": 1e-4, "train": "factors+bias+norm"}
    data = [(x.to(dtype), y) for x, y in batches(2)]
    compress(model, data, loss=lambda y, b: cross_entropy(y.float(), b), recipe=recipe(recovery=train))
    assert model[1].weight.dtype == dtype
    assert not torch.equal(model[1].weight, before)


class Mixed(nn.Module):
    """Tokens [B, T] → [B, 5]; an embedding in one dtype, layers in another."""

    def __init__(self, embedding: torch.dtype, last: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 16, dtype=embedding)
        self.net = mlp().net[:4]
        self.head = nn.Linear(24, 5, dtype=last)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net(self.embed(x).to(self.net[0].weight.dtype).mean(1))
        return self.head(hidden.to(self.head.weight.dtype))


TOKENS = [(torch.randint(16, (8, 4)), torch.randint(5, (8,))) for _ in range(6)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recovery": TRAIN | {"train": "factors+bias"}},
        {"refit": {}, "recovery": TRAIN},
        {"layout": "pivoted"},
        {"dtype": "int8"},
        {"ranks": {"kind": "random_search", "keep_parameters": 0.5, "trials": 3, "finalists": 2, "recovery_steps": 2},
         "recovery": TRAIN},
        {"method": "kron", "ranks": {"kind": "budget", "keep_parameters": 0.4},
         "recovery": TRAIN | {"tau": 1.0, "rounds_above": 0, "rounds": [{"size": 1.5, "steps": 0.5}]}},
    ],
    ids=lambda changes: "-".join(changes) or "closed",
)  # fmt: skip
def test_a_layer_has_its_own_dtype_whatever_the_first_parameter_has(changes: dict[str, Any]) -> None:
    """An embedding in bfloat16 is one in float32 with the same values: the factors are the same bit by bit."""
    models = [Mixed(torch.bfloat16), Mixed(torch.float32)]
    models[0].load_state_dict(models[1].state_dict())
    models[1].embed.bfloat16().float()
    states = []
    for model in models:
        compress(model, TOKENS, loss=cross_entropy, recipe=recipe(**changes), validation=TOKENS[:2])
        states.append({name: value for name, value in model.state_dict().items() if "embed" not in name})
    assert ranks_of(models[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("validation", [TOKENS[:2], []], ids=["checked", "unchecked"])
def test_layers_of_two_dtypes_keep_them(validation: list[Any]) -> None:
    model = Mixed(torch.float16, torch.bfloat16)
    loss = lambda y, b: cross_entropy(y.float(), b)  # noqa: E731
    result = compress(model, TOKENS, loss=loss, recipe=recipe(recovery=TRAIN, refit={}), validation=validation)
    assert {name: model.get_submodule(name).A.weight.dtype for name in result.plan.ranks} == {
        "net.0": torch.float32, "net.2": torch.float32, "head": torch.bfloat16,
    }  # fmt: skip
    assert torch.isfinite(model(TOKENS[0][0])).all()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("analyses", [False, True])
def test_training_modes_stay(kept: bool, fails: bool, analyses: bool) -> None:
    """Of each module by itself: a caller may have frozen some."""
    torch.manual_seed(0)
    model = nn.Sequential(mlp().net, nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 5))).train(kept)
    model[0].train(not kept)
    model[2][0].train(not kept)
    modes = {name: module.training for name, module in model.named_modules()}

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch) * (torch.nan if fails else 1.0)

    with pytest.raises(NumericalError) if fails else nullcontext():
        if analyses:
            settings = {"analysis": {"trials": 1, "learning": {"steps": 2}}}
            lrcompress.analyze_module(model, batches(), loss=loss, recipe=settings, validation=batches(1))
        else:
            compress(model, batches(), loss=loss, recipe=recipe(recovery=TRAIN))
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in modes} == modes
    parts = after.keys() - modes.keys()
    assert bool(parts) == (not fails and not analyses)
    assert all(after[name] == after[name.rpartition(".")[0]] for name in parts)


def test_a_step_of_the_recovery_is_one_batch() -> None:
    data, seen = batches(6), []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(float(batch[0][0, 0]))
        return cross_entropy(outputs, batch)

    train = {"steps": 6, "batch": 3, "tau": 1.0, "loss": {"kind": "task"}}
    compress(mlp(), data, loss=loss, recipe=recipe(recovery=train))
    assert sorted(seen[-6:]) == sorted(float(x[0, 0]) for x, _ in data)


def test_same_seed_same_factors() -> None:
    found = [compress(mlp(), batches(), loss=cross_entropy, recipe=recipe(recovery=TRAIN), seed=s) for s in (1, 1, 2)]
    name = next(iter(found[0].factors))
    assert torch.equal(found[0].factors[name].A, found[1].factors[name].A)
    assert not torch.equal(found[0].factors[name].A, found[2].factors[name].A)


class Vision:
    """Dicts of pixels and labels."""

    data: ClassVar = [
        tiny_batch("vit", seed=i) | {"labels": torch.tensor([i % LABELS, (i + 1) % LABELS])} for i in range(4)
    ]

    @staticmethod
    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"])


@pytest.mark.parametrize("method", ["kron", "fwsvd", "svd_llm"])
def test_a_vision_transformer_of_pixel_values(tmp_path: Path, method: str) -> None:
    model, dense = tiny_model("vit"), tiny_model("vit")
    train = {"steps": 12, "learning_rate": 3e-3, "train": "factors+bias+norm"}
    result = compress(model, Vision.data, loss=Vision.loss, recipe=recipe(0.6, train, method=method))
    assert set(result.plan.ranks) == {n for n, m in dense.named_modules() if isinstance(m, nn.Linear)} - {"classifier"}
    assert all("hidden" in point for point in result.training)
    model.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert ranks_of(again) == result.plan.ranks
    with torch.no_grad():
        pixels = Vision.data[0]["pixel_values"]
        assert torch.equal(again(pixels).logits, model.eval()(pixels).logits)
        assert not torch.allclose(model(pixels).logits, dense(pixels).logits, atol=1e-4)
    trained = [n for n, _ in model.named_parameters() if "layernorm" in n]
    assert any(not torch.equal(model.get_parameter(n), dense.get_parameter(n)) for n in trained)


def test_a_language_model_is_told_its_ranks(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    data = [tiny_batch("gpt2", seed=i) for i in range(3)]

    def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    compress(model, data, loss=loss, recipe=recipe(method="kron", ranks={"kind": "budget", "keep_parameters": 0.5}))
    model.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, model.eval()(**data[0]).logits)


@pytest.mark.parametrize("squeeze", [True, False], ids=["[B]", "[B, 1]"])
@pytest.mark.parametrize("method", ["svd", "svd_llm", "fwsvd", "kron"])
def test_regression_with_its_own_loss(method: str, squeeze: bool) -> None:
    model, dense = mlp(outputs=1, squeeze=squeeze), mlp(outputs=1, squeeze=squeeze)
    x = batches(1, 32)[0][0]
    with torch.no_grad():
        data = [(x, dense(x))]
    train = TRAIN | {"loss": {"kind": "task"}}

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        # plus a constant: at the dense model's own outputs all gradients would be 0
        return (outputs - batch[1] + 0.1).square().mean()

    result = compress(model, data, loss=loss, recipe=recipe(recovery=train, method=method))
    assert model(x).shape == ((32,) if squeeze else (32, 1))
    assert result.training[-1]["loss"] < result.training[0]["loss"]


@pytest.mark.parametrize("squeeze", [True, False], ids=["[B]", "[B, 1]"])
def test_distillation_of_one_output_is_refused(squeeze: bool) -> None:
    model = mlp(outputs=1, squeeze=squeeze)
    with pytest.raises(RecipeError, match=r"at least two classes(?s:.)*recovery\.loss to \{kind: task\}"):
        compress(model, batches(), loss=lambda y, b: y.mean(), recipe=recipe(recovery=TRAIN))
    assert not ranks_of(model)  # untouched


def test_no_batches_are_refused() -> None:
    for none in ([], iter(())):
        with pytest.raises(DataError, match="there are no batches"):
            compress(mlp(), none, loss=cross_entropy, recipe=recipe())


def test_outputs_that_do_not_fit_the_batch_are_refused() -> None:
    with pytest.raises(DataError, match=r"got: 1 outputs of 8 inputs(?s:.)*pass `forward`"):
        compress(mlp(), batches(), loss=cross_entropy, recipe=recipe(), forward=lambda m, b: m(b[0])[:1])


@pytest.mark.parametrize(
    ("loss", "value"),
    [(lambda y, b: y.mean() * float("nan"), "nan"), (lambda y, b: F.cross_entropy(y, b[1], reduction="none"), r"\[")],
)
def test_a_loss_that_is_no_finite_number_is_refused(loss: Any, value: str) -> None:
    with pytest.raises(NumericalError, match=f"loss of the first batch is {value}(?s:.)*one finite number"):
        compress(mlp(), batches(), loss=loss, recipe=recipe())


def test_layers_and_recipes_are_checked_first() -> None:
    with pytest.raises(LayerError, match="no layer matched"):
        compress(mlp(), batches(), loss=cross_entropy, recipe=recipe(targets={"include": ["nett.0"]}))
    with pytest.raises(RecipeError, match="method"):
        compress(mlp(), batches(), loss=cross_entropy, recipe=recipe(method="svdd"))
    with pytest.raises(RecipeError, match="no recipe `none_such`"):
        compress(mlp(), batches(), loss=cross_entropy, recipe="none_such")


def test_forward_takes_the_right_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return second, self.inner(first)

    model = Pair()
    data = [{"first": x, "second": x, "y": y} for x, y in batches()]
    result = compress(
        model, data, loss=lambda out, b: F.cross_entropy(out, b["y"]), recipe=recipe(method="kron"),
        forward=lambda m, b: m(b["first"], b["second"])[1],
    )  # fmt: skip
    assert set(result.plan.ranks) == {"inner.net.0", "inner.net.2", "inner.net.4"} - set(result.plan.notes)


def test_a_module_is_saved_and_loaded(tmp_path: Path) -> None:
    model = mlp()
    compress(model, batches(), loss=cross_entropy, recipe=recipe(recovery=TRAIN))
    save_module(model, tmp_path / "out")
    fresh = mlp(seed=9)
    load_module(fresh, tmp_path / "out")
    x = batches()[0][0]
    assert ranks_of(fresh) == ranks_of(model)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_tensors_alone_are_batches() -> None:
    data = [x for x, _ in batches()]
    result = compress(mlp(), data, loss=lambda y, b: y.logsumexp(-1).mean(), recipe=recipe(method="svd_llm"))
    assert result.plan.ranks


def test_public_names_are_there() -> None:
    for name in lrcompress.__all__:
        assert getattr(lrcompress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        lrcompress.compres  # noqa: B018
