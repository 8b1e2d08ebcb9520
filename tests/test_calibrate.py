"""Statistics against dense sums made by hand: inputs caught by hooks, gradients by autograd, the same draws."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PAD, tiny_model
from torch import Tensor, nn

from lrcompress.artifacts import Layer, LayerStatistics
from lrcompress.calibrate import collect, passes
from lrcompress.errors import NumericalError
from lrcompress.layers import Targets, find_layers
from lrcompress.methods import Statistic
from lrcompress.tasks import AbstractTask, CausalLM, SequenceClassification, UserTask, default_forward, fisher_probe

ALL: tuple[Statistic, ...] = (
    "input_moment",
    "input_abs_sum",
    "weighted_input_moment",
    "grad_moment",
    "fisher_by_output",
    "fisher_by_input",
)
TASKS: dict[str, AbstractTask] = {
    "gpt2": CausalLM(),
    "llama": CausalLM(),
    "opt": CausalLM(),
    "bert": SequenceClassification(),
    "distilbert": SequenceClassification(),
}


def batch_of(
    lengths: Iterable[int], *, width: int | None = None, seed: int = 0, causal: bool = False
) -> dict[str, Tensor]:
    """Sequences of these lengths, padded at the end to `width`."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 256, (length,), generator=generator) for length in lengths]
    width = width or max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"labels": ids.masked_fill(mask == 0, -100)} if causal else batch


def oracle(
    model: nn.Module, layers: dict[str, Layer], batches: list[dict[str, Tensor]], task: AbstractTask, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Every sum from the loss's own gradients, one token at a time, in float64."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, dict[str, Any]] = {
        name: {"tokens": 0}
        | {
            "input_moment": torch.zeros(layer.in_features, layer.in_features).double(),
            "input_abs_sum": torch.zeros(layer.in_features).double(),
            "weighted_input_moment": torch.zeros(layer.in_features, layer.in_features).double(),
            "grad_moment": torch.zeros(layer.out_features, layer.out_features).double(),
            "fisher_by_output": torch.zeros(layer.out_features).double(),
            "fisher_by_input": torch.zeros(layer.in_features).double(),
        }
        for name, layer in layers.items()
    }
    for batch in batches:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def catch(module: nn.Module, inputs: Any, output: Tensor, *, name: str, seen: Any = seen) -> None:
            seen[name] = (inputs[0].detach(), output)

        hooks = [
            model.get_submodule(n).register_forward_hook(lambda m, i, o, n=n, c=catch: c(m, i, o, name=n))
            for n in layers
        ]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        for hook in hooks:
            hook.remove()
        rows = task.scored(logits, batch)
        each = (fisher_probe(rows.logits.detach().softmax(-1), generator) * rows.logits).sum(-1)
        grads = torch.autograd.grad(each.sum(), [output for _, output in seen.values()], retain_graph=True)
        for (name, (x, _)), g in zip(seen.items(), grads, strict=True):
            total = sums[name]
            x, g = x.double().flatten(0, -2), g.double().flatten(0, -2)  # OPT's mlp sees [tokens, features]
            real = batch["attention_mask"].bool().flatten()
            total["tokens"] += int(real.sum())
            for one_x, one_g in zip(x[real], g[real], strict=True):
                total["input_moment"] += torch.outer(one_x, one_x)
                total["input_abs_sum"] += one_x.abs()
                total["weighted_input_moment"] += one_g.square().sum() * torch.outer(one_x, one_x)
                total["grad_moment"] += torch.outer(one_g, one_g)
        # Fisher of the weights themselves, a sequence at a time: not from x and g at all
        for i in range(len(batch["input_ids"])):
            weights = [model.get_submodule(n).weight for n in layers]
            ours = each[rows.sequence == i].sum()
            for (n, layer), g in zip(
                layers.items(), torch.autograd.grad(ours, weights, retain_graph=True), strict=True
            ):
                g = g.T if layer.kind == "conv1d" else g
                sums[n]["fisher_by_output"] += g.double().square().sum(1)
                sums[n]["fisher_by_input"] += g.double().square().sum(0)
    return sums


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=2e-6 * float(wanted.abs().max()))


def assert_equal(found: dict[str, LayerStatistics], wanted: dict[str, dict[str, Tensor]]) -> None:
    assert set(found) == set(wanted)
    for name, sums in wanted.items():
        for key in ALL:
            assert close(getattr(found[name], key), sums[key]), (name, key)
            assert float(sums[key].abs().max()) > 0, (name, key)


def task_batches(name: str) -> list[dict[str, Tensor]]:
    causal = isinstance(TASKS[name], CausalLM)
    return [batch_of((9, 5, 7), seed=1, causal=causal), batch_of((6, 6), seed=2, causal=causal)]


@pytest.mark.parametrize("name", TASKS)
def test_sums_equal_those_made_by_hand(name: str) -> None:
    model, task, batches = tiny_model(name), TASKS[name], task_batches(name)
    layers = find_layers(model, Targets())
    if name == "bert":
        layers |= find_layers(model, Targets(include=("pooler.dense", "classifier")))
        heads = {n: layers.pop(n) for n in ("bert.pooler.dense", "classifier")}  # inputs without token dimension
        collect(model, heads, batches, ALL, task, seed=3)
    found, dropped = collect(model, layers, batches, ALL, task, seed=3)
    wanted = oracle(model, layers, batches, task, 3)
    assert dropped == 0
    assert_equal(found, wanted)
    for n, one in found.items():
        assert (one.tokens, one.sequences) == (wanted[n]["tokens"], 5)
        assert one.grad_moment.dtype == torch.float64


def test_layers_behind_the_pooling_see_sequences() -> None:
    model, batch = tiny_model("bert"), batch_of((4, 7, 5))
    layers = find_layers(model, Targets(include=("classifier",)))
    one = collect(model, layers, [batch], ALL, SequenceClassification(), seed=0)[0]["classifier"]
    inputs = []
    hook = model.classifier.register_forward_hook(lambda m, i, o: inputs.append(i[0].detach()))
    logits = model(**batch).logits.detach()
    hook.remove()
    generator = torch.Generator().manual_seed(0)
    g = fisher_probe(logits.softmax(-1), generator)
    assert one.tokens == one.sequences == 3
    assert close(one.input_moment, inputs[0].double().T @ inputs[0].double())
    assert close(one.grad_moment, g.double().T @ g.double())
    squared = torch.einsum("so,si->oi", g.square(), inputs[0].square()).double()
    assert close(one.fisher_by_output, squared.sum(1))
    assert close(one.fisher_by_input, squared.sum(0))


def test_probes_have_the_fisher_information_as_second_moment() -> None:
    """Exactly, over all signs of three classes; and with less spread than sampled labels where the model is sure."""
    p = torch.tensor([0.9, 0.07, 0.03])
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # [8, 3]
    drawn = p.sqrt() * signs
    v = drawn - p * drawn.sum(-1, keepdim=True)
    assert torch.allclose(v.T @ v / 8, torch.diag(p) - torch.outer(p, p), atol=1e-6)
    probes = fisher_probe(p.expand(4000, 3), torch.Generator().manual_seed(0))
    assert all(any(torch.allclose(row, one) for one in v) for row in probes[:50])
    assert torch.allclose(probes.T @ probes / 4000, torch.diag(p) - torch.outer(p, p), atol=0.01)
    labels = torch.multinomial(p, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    sampled = F.one_hot(labels, 3) - p
    assert probes.square().sum(-1).std() < 0.5 * sampled.square().sum(-1).std()


@pytest.mark.parametrize("name", TASKS)
def test_padding_does_not_count(name: str) -> None:
    model, task = tiny_model(name), TASKS[name]
    causal = isinstance(task, CausalLM)
    layers = find_layers(model, Targets())
    short, long = ([batch_of((5, 8, 3), width=width, causal=causal)] for width in (8, 21))
    some, _ = collect(model, layers, short, ALL, task, seed=0)
    others, _ = collect(model, layers, long, ALL, task, seed=0)
    for n in layers:
        assert some[n].tokens == others[n].tokens == 16
        for key in ALL:
            assert close(getattr(some[n], key), getattr(others[n], key)), (n, key)


def test_one_needs_only_what_is_asked_for() -> None:
    model = tiny_model("bert")
    layers = find_layers(model, Targets(include=("query",)))
    every, _ = collect(model, layers, [batch_of((5, 6))], ALL, SequenceClassification(), seed=0)
    for key in ALL:
        alone, _ = collect(model, layers, [batch_of((5, 6))], (key,), SequenceClassification(), seed=0)
        for n, one in alone.items():
            assert torch.equal(getattr(one, key), getattr(every[n], key))
            assert [other for other in ALL if getattr(one, other) is not None] == [key]


def test_several_passes_give_what_one_gives() -> None:
    model, task, batches = tiny_model("gpt2"), CausalLM(), task_batches("gpt2")
    layers = find_layers(model, Targets())
    whole, _ = collect(model, layers, batches, ALL, task, seed=5)
    held = {
        n: 8 * (2 * one.in_features**2 + 2 * one.in_features + one.out_features**2 + one.out_features)
        for n, one in layers.items()
    }
    for limit, groups in ((1, len(layers)), (max(held.values()) * 2, None), (sum(held.values()), 1)):
        parts = passes(layers, ALL, limit)
        assert [n for part in parts for n in part] == list(layers)
        assert groups is None or len(parts) == groups
        for part in parts:
            assert len(part) == 1 or sum(held[n] for n in part) <= limit
            found, _ = collect(model, {n: layers[n] for n in part}, batches, ALL, task, seed=5)
            for n, one in found.items():
                for key in ALL:
                    # a chosen layer starts the graph where it stands, which changes the order of sums at most
                    assert close(getattr(one, key), getattr(whole[n], key)), (n, key)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("bert")
    flags = [i % 3 != 0 for i, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    before = {n: value.clone() for n, value in model.state_dict().items()}
    layers, batches = find_layers(model, Targets()), [batch_of((5, 6))]

    def check() -> None:
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())

    collect(model, layers, batches, ALL, SequenceClassification(), seed=0)
    check()

    def broken() -> Iterable[dict[str, Tensor]]:
        yield batches[0]
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        collect(model, layers, broken(), ALL, SequenceClassification(), seed=0)
    check()


def test_progress_counts_sequences() -> None:
    model, seen = tiny_model("bert"), []
    layers = find_layers(model, Targets(include=("query",)))
    collect(
        model, layers, [batch_of((5, 6)), batch_of((3,))], ["input_moment"], SequenceClassification(), seed=0,
        advance=seen.append,
    )  # fmt: skip
    assert seen == [2, 1]


class InPlace(nn.Module):
    """Changes its layers' outputs in place, or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu, self.inplace = nn.ReLU(inplace=inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        z = self.second(y)
        z = z.add_(y).mul_(0.5) if self.inplace else (z + y) * 0.5
        return self.third(z)


def user_task() -> UserTask:
    return UserTask(default_forward, lambda outputs, batch: F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten()))


@pytest.mark.parametrize("chosen", [("first",), ("second",), ("first", "second", "third")])
def test_changes_in_place_after_a_layer_do_not_matter(chosen: tuple[str, ...]) -> None:
    plain, changing = InPlace(False), InPlace(True)
    changing.load_state_dict(plain.state_dict())
    batches = [(torch.randn(4, 5, 6), torch.randint(0, 3, (4, 5)))]
    found = [
        collect(m, find_layers(m, Targets(include=chosen)), batches, ALL, user_task(), seed=0)[0]
        for m in (plain, changing)
    ]
    for n in chosen:
        for key in ALL:
            assert close(getattr(found[1][n], key), getattr(found[0][n], key)), (n, key)
            assert getattr(found[1][n], key).abs().max() > 0


def test_fisher_of_any_module_equals_autograd_of_each_sequence() -> None:
    """A caller's mean loss: the gradient of a sequence is that of its own loss alone."""
    model, task = InPlace(False), user_task()
    x, y = torch.randn(4, 5, 6), torch.randint(0, 3, (4, 5))
    layers = find_layers(model, Targets())
    found, _ = collect(model, layers, [(x, y)], ("fisher_by_output", "fisher_by_input"), task, seed=0)
    wanted = {n: torch.zeros(layer.out_features, layer.in_features) for n, layer in layers.items()}
    for i in range(4):
        model.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        for n in layers:
            wanted[n] += model.get_submodule(n).weight.grad.square()
    for n in layers:
        assert close(found[n].fisher_by_output, wanted[n].sum(1).double()), n
        assert close(found[n].fisher_by_input, wanted[n].sum(0).double()), n


def with_bad_rows(bad: int, count: int = 20) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 5, 6, generator=generator), torch.randint(0, 3, (count, 5), generator=generator)
    x[:bad, :, 2] = torch.tensor([float("nan"), float("inf")]).repeat(count)[:bad, None]
    return InPlace(False), [(x[i : i + 5], y[i : i + 5]) for i in range(0, count, 5)]


@pytest.mark.parametrize("bad", [1, 2])
def test_non_finite_sequences_add_nothing_and_are_counted(bad: int) -> None:
    model, batches = with_bad_rows(bad)
    layers = find_layers(model, Targets())
    found, dropped = collect(model, layers, batches, ALL, user_task(), seed=0)
    clean = [(batches[0][0][bad:], batches[0][1][bad:]), *batches[1:]]
    wanted, none = collect(model, layers, clean, ("input_moment", "input_abs_sum"), user_task(), seed=0)
    assert (dropped, none) == (bad, 0)
    for n in layers:
        assert found[n].sequences == wanted[n].sequences == 20 - bad
        for key in ALL:
            assert torch.isfinite(getattr(found[n], key)).all(), (n, key)
        for key in ("input_moment", "input_abs_sum"):
            assert close(getattr(found[n], key), getattr(wanted[n], key)), (n, key)
        assert found[n].grad_moment.abs().max() > 0


def test_too_many_non_finite_sequences_are_fatal() -> None:
    model, batches = with_bad_rows(3)
    with pytest.raises(NumericalError, match="3 of 20 calibration sequences have non-finite outputs"):
        collect(model, find_layers(model, Targets()), batches, ["input_moment"], user_task(), seed=0)


def test_a_transformer_with_a_broken_token_drops_only_its_sequences() -> None:
    model, task = tiny_model("bert"), SequenceClassification()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[255] = float("nan")
    good, bad = batch_of([6] * 11, seed=1), batch_of([6], seed=2)
    good["input_ids"].clamp_(max=254)
    bad["input_ids"][0, 3] = 255
    both = {key: torch.cat([bad[key], good[key]]) for key in good}
    layers = find_layers(model, Targets(include=("layer.1.*",)))  # behind an attention: all its rows are broken
    found, dropped = collect(model, layers, [both], ALL, task, seed=4)
    wanted, _ = collect(model, layers, [good], ALL, task, seed=4)
    assert dropped == 1
    for n in layers:
        for key in ALL:
            assert close(getattr(found[n], key), getattr(wanted[n], key)), (n, key)


def test_a_layer_that_is_never_called_is_named() -> None:
    model = InPlace(False)
    model.unused = nn.Linear(3, 3)
    with pytest.raises(NumericalError, match="layer unused saw no token"):
        collect(model, find_layers(model, Targets()), with_bad_rows(0)[1], ["input_moment"], user_task(), seed=0)


def test_regression_without_a_class_dimension() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1), nn.Flatten(0))
    task = UserTask(default_forward, lambda outputs, batch: (outputs - batch[1]).square().mean())
    x, y = torch.randn(7, 6), torch.randn(7)
    found, _ = collect(model, find_layers(model, Targets()), [(x, y)], ALL, task, seed=0)
    g = 2 * (model(x) - y).detach()
    assert close(found["1"].grad_moment, g.double().square().sum().reshape(1, 1))
