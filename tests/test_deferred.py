"""The weight of a low-rank layer is multiplied only when its values are used, and then it is the product."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from models import tiny_batch, tiny_model, tiny_wavlm
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lrcompress.artifacts import Factors
from lrcompress.hf import merge
from lrcompress.layers import Targets, bias_of, find_layers, read_weight
from lrcompress.linalg import Roots, truncate, weighted_svd
from lrcompress.lowrank import AbstractLowRank, low_rank_module, put_factors
from lrcompress.pivoting import pivot

IN, OUT, RANK = 10, 14, 4

kinds = pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
layouts = pytest.mark.parametrize("layout", ["plain", "pivoted"])


def products(call: Callable[[], Any], *shapes: tuple[int, ...]) -> int:
    """How many matrix products of these shapes a call makes, wherever they come from."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    made = [event.input_shapes for event in found.events() if event.name in ("aten::mm", "aten::bmm")]
    return sum((left[-2], right[-1]) in shapes for left, right in made)


def layer_of(layout: str, int8: bool = False, dtype: torch.dtype = torch.float32) -> AbstractLowRank:
    torch.manual_seed(0)
    pair = Factors(torch.randn(RANK, IN), torch.randn(OUT, RANK), torch.randn(OUT))
    return low_rank_module(pivot(pair) if layout == "pivoted" else pair, device="cpu", dtype=dtype, int8=int8)


def product(layer: AbstractLowRank) -> Tensor:
    pair = layer.pair()
    return pair.B @ pair.A


@layouts
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_known_before_costs_no_product(layout: str, int8: bool, dtype: torch.dtype) -> None:
    layer = layer_of(layout, int8, dtype)

    def ask() -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert (weight.shape, weight.size(0), weight.ndim, len(weight)) == ((OUT, IN), OUT, 2, OUT)
        assert (weight.dtype, weight.device, weight.is_floating_point()) == (dtype, torch.device("cpu"), True)
        assert (weight.numel(), weight.is_cuda, weight.is_leaf) == (OUT * IN, False, int8)
        assert weight.requires_grad == (not int8)
        with torch.no_grad():
            assert not layer.weight.requires_grad

    def use() -> None:
        weight = layer.weight
        assert torch.equal(weight + weight, 2 * product(layer))

    assert products(ask, (OUT, IN)) == 0
    assert products(use, (OUT, IN)) == 2


def saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


USES: dict[str, Callable[[Tensor], Any]] = {
    "clone": torch.clone,
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "transposed": lambda w: w.T,
    "sliced": lambda w: w[2:5, ::2],
    "chunked": lambda w: torch.cat(w.chunk(2)),
    "cast": lambda w: w.to(torch.float64),
    "half": lambda w: w.bfloat16(),
    "times": lambda w: 3 * w + w,
    "linear": lambda w: F.linear(torch.ones(3, IN), w),
    "conv": lambda w: F.conv2d(torch.ones(1, IN, 2, 2), w[:, :, None, None]),
    "stacked": lambda w: torch.stack([w, w]),
    "summed": lambda w: torch.tensor(w.sum().item()),
    "norm": lambda w: w.norm(dim=1),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "numpy-itself": lambda w: torch.from_numpy(w.numpy(force=True)),
    "list": lambda w: torch.tensor(w.tolist()),
    "deepcopy": lambda w: copy.deepcopy(w.detach()),
    "saved": lambda w: saved(w.detach()),
    "parameter": lambda w: nn.Parameter(w.detach()),
    "contiguous": lambda w: w.contiguous(),
    "memory": lambda w: torch.tensor(w.data_ptr() == w.untyped_storage().data_ptr()),
}


@pytest.mark.parametrize("use", USES)
@layouts
@kinds
@pytest.mark.parametrize("grad", [False, True])
def test_every_use_is_one_of_the_product(use: str, layout: str, int8: bool, grad: bool) -> None:
    layer = layer_of(layout, int8)
    with torch.set_grad_enabled(grad):
        found, wanted = USES[use](layer.weight), USES[use](product(layer))
    assert torch.equal(found, wanted)
    assert found.requires_grad == wanted.requires_grad
    assert repr(layer.weight.detach()) == repr(product(layer).detach())


@layouts
@kinds
def test_a_layer_without_memory_has_a_weight_without(layout: str, int8: bool) -> None:
    weight = layer_of(layout, int8).to("meta").weight
    assert (weight.shape, weight.device.type) == ((OUT, IN), "meta")
    assert (weight + 1).is_meta


@layouts
def test_numbers_with_a_gradient_are_not_given_to_numpy(layout: str) -> None:
    weight = layer_of(layout).weight
    for one in (weight, weight, product(layer_of(layout))):
        with pytest.raises(RuntimeError, match="requires grad"):
            one.numpy()
    assert not weight.detach().requires_grad


class Times(torch.autograd.Function):
    """A kernel that is given a weight as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ x


GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "view": lambda x, w: F.conv2d(x[:, :, None, None], w.unsqueeze(-1).unsqueeze(-1)).tanh(),
    "twice": lambda x, w: (x @ w.T).relu() @ w,
    "kernel": lambda x, w: Times.apply(x, w),  # type: ignore[return-value]
}


@pytest.mark.parametrize("use", GRADS)
@layouts
def test_a_gradient_reaches_the_factors(use: str, layout: str) -> None:
    grads = []
    for weight_of in (lambda layer: layer.weight, product):
        layer = layer_of(layout)
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1), requires_grad=True)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):  # the second step sees what the first one changed
            optimizer.zero_grad()
            loss = GRADS[use](x, weight_of(layer)).square().mean()
            loss.backward()
            optimizer.step()
        grads.append([loss, x.grad, *(half.weight.grad for half in layer.halves())])
    for found, wanted in zip(*grads, strict=True):
        assert torch.equal(found, wanted)


@layouts
def test_frozen_halves_and_second_derivatives(layout: str) -> None:
    layer = layer_of(layout)
    first, second = (half.get_parameter("weight") for half in layer.halves())
    found, wanted = [], []
    for weight, into in ((layer.weight, found), (product(layer), wanted)):
        (slope,) = torch.autograd.grad(weight.pow(3).sum(), first, create_graph=True)
        into += [slope, *torch.autograd.grad(slope.square().sum(), (first, second))]
    assert all(map(torch.equal, found, wanted))
    first.requires_grad_(False)
    layer.weight.sum().backward()
    assert first.grad is None
    assert second.grad is not None
    second.requires_grad_(False)
    assert not layer.weight.requires_grad


@layouts
def test_a_factor_that_was_changed_under_a_gradient_is_an_error(layout: str) -> None:
    layer = layer_of(layout)
    loss = layer.weight.square().sum()
    with torch.no_grad():
        layer.halves()[0].get_parameter("weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@layouts
def test_transforms_and_autocast_take_it(layout: str) -> None:
    layer = layer_of(layout)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(Read(layer), {f"layer.{n}": p for n, p in parameters.items()}, (x,)).sum()

    x = torch.randn(3, IN)
    found = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    loss(parameters, x).backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad)
            assert torch.allclose(each[name].sum(0), parameter.grad, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == torch.float32  # as a dense layer's
        values = layer.weight[:]
    assert torch.equal(values, product(layer))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, layer.weight).dtype == torch.bfloat16


class Read(nn.Module):
    """Uses the values of a layer's weight."""

    def __init__(self, layer: AbstractLowRank) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def factors_of(model: nn.Module, rank: int = 5) -> dict[str, Factors]:
    return {
        name: truncate(weighted_svd(read_weight(layer).detach(), Roots()), rank, bias_of(layer))
        for name in find_layers(model, Targets())
        for layer in [model.get_submodule(name)]
    }


def t5(int8: bool, layout: str = "plain") -> t.PreTrainedModel:
    model = tiny_model("t5")
    pairs = factors_of(model)
    stored = {name: pivot(pair) for name, pair in pairs.items()} if layout == "pivoted" else pairs
    put_factors(model, stored, int8=int8)
    return model


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@layouts
@kinds
def test_a_model_that_asks_for_a_dtype_multiplies_no_weight(layout: str, int8: bool) -> None:
    model, batch = t5(int8, layout), tiny_batch("t5")
    shapes = {tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, AbstractLowRank)}
    assert batch["input_ids"].numel() not in {size for shape in shapes for size in shape}
    assert products(lambda: logits(model, batch), *shapes) == 0
    found = logits(model, batch)
    merge(model)
    assert torch.allclose(found, logits(model, batch), atol=1e-4)


@pytest.mark.parametrize(("layout", "int8"), [("plain", False), ("pivoted", True)])
def test_it_is_compiled_exported_and_traced(layout: str, int8: bool) -> None:
    model, batch = t5(int8, layout), tiny_batch("t5")
    wanted = logits(model, batch)
    torch.compiler.reset()
    assert torch.allclose(logits(torch.compile(model, backend="aot_eager", fullgraph=True), batch), wanted, atol=1e-5)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
            return self.model(
                input_ids=ids, attention_mask=mask, decoder_input_ids=targets, use_cache=False
            ).logits  # fmt: skip

    inputs = (batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"])
    with torch.no_grad():
        for strict in (False, True):
            program = torch.export.export(Logits().eval(), inputs, strict=strict)
            assert torch.allclose(program.module()(*inputs), wanted, atol=1e-5)
        traced = torch.jit.trace(Logits().eval(), inputs, check_trace=False)
        assert torch.allclose(traced(*inputs), wanted, atol=1e-5)


@layouts
def test_a_compiled_use_of_the_values_is_the_same(layout: str) -> None:
    read, x = Read(layer_of(layout)), torch.randn(3, IN)
    torch.compiler.reset()
    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    grads = []
    for module in (compiled, read):
        read.zero_grad()
        module(x).square().sum().backward()
        grads.append([half.weight.grad.clone() for half in read.layer.halves()])
    assert torch.allclose(compiled(x), read(x))
    assert all(map(torch.allclose, *grads))


@layouts
def test_scales_of_eight_bits_learn_through_the_values(layout: str) -> None:
    """`from_pretrained` lets every parameter learn that can."""
    layer, x = layer_of(layout, int8=True), torch.randn(3, IN)
    scales = [parameter.requires_grad_() for name, parameter in layer.named_parameters() if name.endswith("scale")]
    found, wanted = (
        torch.autograd.grad(F.linear(x, weight).square().sum(), scales) for weight in (layer.weight, product(layer))
    )
    assert len(scales) == 2
    assert all(map(torch.allclose, found, wanted))


def test_a_model_that_uses_the_values_computes_and_learns_with_them() -> None:
    """WavLM's attention takes the weights of its projections, and calls only the last of them."""
    model, sound = tiny_wavlm(), torch.randn(2, 400)
    put_factors(model, factors_of(model))
    dense = copy.deepcopy(model)
    merge(dense)
    with torch.no_grad():
        found, wanted = (one(sound).last_hidden_state for one in (model, dense))
    assert torch.allclose(found, wanted, atol=1e-4)
    weights = torch.randn(found.shape)
    for one in (model, dense):
        (one(sound).last_hidden_state * weights).sum().backward()
    for name in find_layers(dense, Targets()):
        A, B = (half.weight for half in model.get_submodule(name).halves())
        grad = dense.get_submodule(name).weight.grad
        if grad is not None:
            wanted = B.T @ grad
            assert torch.allclose(A.grad, wanted, atol=1e-3 * wanted.abs().max().item()), name
            assert A.grad.abs().sum() > 0
