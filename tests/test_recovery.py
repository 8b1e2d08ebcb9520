"""LoRA-LRD's layer, its schedules, its teacher, and a training that can be killed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import PAD, tiny_model
from torch import Tensor, nn

from lrcompress.artifacts import Factors, Layer
from lrcompress.errors import NumericalError
from lrcompress.layers import Targets, find_layers, read_weight
from lrcompress.linalg import Roots, diagonal_root, psd_root, truncate, weighted_svd
from lrcompress.lowrank import put_factors
from lrcompress.recovery import Loss, Recovered, Recovery, Tau, before_replacement, recover, whitening
from lrcompress.recovery.blended import BlendedLinear, lora_start
from lrcompress.recovery.loop import blended
from lrcompress.recovery.state import clear_states
from lrcompress.recovery.whitening import Coordinates
from lrcompress.seeds import generator
from lrcompress.tasks import AbstractTask, CausalLM, SequenceClassification, UserTask

TASKS: dict[str, AbstractTask] = {"gpt2": CausalLM(), "llama": CausalLM(), "bert": SequenceClassification()}
SCHEDULES = ["theseus", "linear", "cosine", "constant"]
RANK = 4

every_model = pytest.mark.parametrize("name", TASKS)


class Sequences:
    """Random token sequences, every third one padded; notes which ones were asked for."""

    def __init__(self, count: int = 8, *, causal: bool = True) -> None:
        draw = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 256, (count, 10), generator=draw)
        self.mask = torch.ones_like(self.ids)
        self.mask[::3, 7:] = 0
        self.ids[self.mask == 0] = PAD
        self.labels = self.ids.masked_fill(self.mask == 0, -100) if causal else torch.arange(count) % 2
        self.seen: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        self.seen.append(list(indices))
        i = list(indices)
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


def data_for(name: str, count: int = 8) -> Sequences:
    return Sequences(count, causal=isinstance(TASKS[name], CausalLM))


def start_of(model: nn.Module, layers: dict[str, Layer], rank: int = RANK) -> dict[str, Factors]:
    found = {}
    for name in layers:
        module = model.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach()
        found[name] = truncate(weighted_svd(read_weight(module).detach(), Roots()), rank, bias)
    return found


def prepared(name: str, rank: int = RANK) -> tuple[nn.Module, dict[str, Layer], dict[str, Factors], Sequences]:
    model = tiny_model(name)
    layers = find_layers(model, Targets())
    if name != "llama":
        for n in layers:  # biases of new models are 0
            nn.init.normal_(model.get_submodule(n).bias, std=0.3)
    return model, layers, start_of(model, layers, rank), data_for(name)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def replaced(name: str, recovered: Recovered, model: nn.Module) -> nn.Module:
    """A copy of the dense model with what the recovery learned in its place."""
    copy = tiny_model(name)
    copy.load_state_dict(model.state_dict())
    put_factors(copy, recovered.factors)
    for n, value in recovered.others.items():
        copy.get_parameter(n).data = value
    return copy


def settings(steps: int = 6, **changes: Any) -> Recovery:
    return Recovery.model_validate({"steps": steps, "batch": 4, "learning_rate": 3e-3} | changes)


def kl(
    model: nn.Module, dense: nn.Module, batch: dict[str, Tensor], task: AbstractTask, temperature: float = 1
) -> float:
    p, q = (task.scored(logits(m, batch), batch).logits.double() / temperature for m in (dense, model))
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


def curvature(layers: Mapping[str, Layer], ratio: float = 1e3) -> Callable[[str], Coordinates]:
    """Coordinates of random moments whose eigenvalues span `ratio`², as calibration data give them."""

    def moment(size: int) -> Tensor:
        draw = torch.Generator().manual_seed(size)
        rows = torch.randn(4 * size, size, generator=draw) * torch.logspace(0, -math.log10(ratio), size)
        return (rows.T @ rows).double()

    def coordinates(name: str) -> Coordinates:
        layer = layers[name]
        left = psd_root(moment(layer.out_features), damping=1e-3, side="left")
        return Coordinates.of(Roots(left, psd_root(moment(layer.in_features), damping=1e-4, side="right")))

    return coordinates


# the coordinates


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("directions", [128, 5])
@pytest.mark.parametrize("sides", ["both", "right", "diagonal"])
def test_whitened_factors_are_the_same_pair(
    sides: str, directions: int, components: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whitening, "DIRECTIONS", directions)
    layer = Layer("layer", "linear", 24, 40, False, None, "other")
    both = curvature({"layer": layer})("layer")
    roots = {
        "both": both,
        "right": Coordinates(None, both.right),
        "diagonal": Coordinates.of(Roots(diagonal_root(torch.rand(40), damping=1e-2))),
    }
    start = Factors(torch.randn(6, 24), torch.randn(40, 6), torch.randn(40))
    other = whitening.Whitening(roots[sides])
    there = other.into(start, components=components)
    A, B = other.back(there.A, there.B)
    assert torch.allclose(B @ A, start.B @ start.A, atol=2e-4)
    assert there.bias is start.bias
    gram, outer = there.A @ there.A.T, there.B.T @ there.B
    assert torch.allclose(gram, outer, atol=1e-4 * gram.max().item())  # balanced
    sizes = (gram.diagonal() if not components else gram.diagonal().sqrt()) / gram.diagonal().sum()
    product = other.weighted(start.A, start.B)
    singular = torch.linalg.svdvals(product[1] @ product[0])[:6]
    assert torch.allclose(sizes / sizes.sum(), singular / singular.sum(), atol=1e-4)


@pytest.mark.parametrize("sides", ["both", "left", "diagonal", "none"])
def test_coordinates_are_what_was_written(sides: str, tmp_path: Path) -> None:
    both = curvature({"layer": Layer("layer", "linear", 24, 40, False, None, "other")})("layer")
    diagonal = Coordinates.of(Roots(diagonal_root(torch.rand(40), damping=1e-2)))
    found = {"both": both, "left": Coordinates(both.left), "diagonal": diagonal, "none": Coordinates()}[sides]
    found.write(tmp_path / "file")
    read = Coordinates.read(tmp_path / "file")
    for one, other in ((found.left, read.left), (found.right, read.right)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.scale, other.scale)
            assert one.rest == other.rest
            assert (one.vectors is None) == (other.vectors is None)
            assert one.vectors is None or torch.equal(one.vectors, other.vectors)


def test_a_component_that_is_nothing_can_learn() -> None:
    start = Factors(torch.randn(3, 8), torch.randn(6, 3) * torch.tensor([1.0, 1.0, 0.0]), None)
    other = whitening.Whitening(Coordinates())
    there = other.into(start, components=True)
    A, B = other.back(there.A + 1e-3, there.B + 1e-3)
    assert torch.linalg.matrix_rank(B @ A, atol=1e-6) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_moment_is_the_identity_where_its_directions_are_told_apart(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whitening, "DAMPING", 0.0)
    moment = torch.diag(torch.logspace(0, -4, 20)).double()
    moment[0, 1] = moment[1, 0] = 0.3
    found = whitening.Whitening(Coordinates.of(Roots(**{side: psd_root(moment, damping=0.0, side=side)})))
    scaling = getattr(found, side)
    half = scaling.solve((moment / moment.diagonal().mean()).float())
    assert torch.allclose(scaling.solve(half.T), torch.eye(20), atol=1e-3)


def test_directions_beyond_the_first_share_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "DIRECTIONS", 2)
    root = psd_root(torch.diag(torch.tensor([16.0, 4.0, 2.0, 1.0, 1.0])), damping=0.0, side="right")
    scaling = whitening.Whitening(Coordinates.of(Roots(right=root))).right
    assert scaling is not None
    mean = torch.tensor([16.0, 4.0, 4 / 3, 4 / 3, 4 / 3])
    assert torch.allclose(scaling.times(torch.eye(5)), torch.diag((mean / 4.8 + whitening.DAMPING).sqrt()), atol=1e-5)


def test_whitened_training_is_the_plain_one_where_the_roots_are_the_identity() -> None:
    model, layers, start, data = prepared("gpt2")
    args = (model, layers, start, data)
    plain = recover(*args, settings(5, whiten=False), TASKS["gpt2"], seed=0, coordinates=curvature(layers))
    same = recover(*args, settings(5, components=False), TASKS["gpt2"], seed=0, coordinates=lambda name: Coordinates())
    other = recover(*args, settings(5), TASKS["gpt2"], seed=0, coordinates=curvature(layers))
    for name, pair in plain.factors.items():
        assert torch.allclose(same.factors[name].B @ same.factors[name].A, pair.B @ pair.A, atol=1e-4)
        assert not torch.allclose(other.factors[name].B @ other.factors[name].A, pair.B @ pair.A, atol=1e-4)


def test_whitening_reaches_what_plain_coordinates_leave_behind() -> None:
    """A layer whose inputs span a decade, from a start that is wrong in all directions alike, as outputs see it."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, 16)
    x = torch.randn(256, 16, generator=draw) * scales
    A, B = torch.randn(8, 16, generator=draw) / scales, torch.randn(12, 8, generator=draw)
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    model[0].weight.data = B @ A
    start = {"0": Factors(A + 0.5 * torch.randn(8, 16, generator=draw) / scales, B.clone(), None)}
    root = psd_root((x.T @ x).double(), damping=1e-4, side="right")

    def there(name: str) -> Coordinates:
        return Coordinates.of(Roots(right=root))

    task = UserTask(lambda m, b: m(b), lambda y, b: (y - b @ (B @ A).T).square().mean())

    def left(whiten: bool, rate: float) -> float:
        changes = {"batch": 32, "whiten": whiten, "loss": {"kind": "task"}, "learning_rate": rate}
        recovery = settings(60, components=False, gradient_clip=1e3, **changes)
        layers = find_layers(model, Targets())
        found = recover(model, layers, start, Rows(x), recovery, task, seed=0, coordinates=there)
        pair = found.factors["0"]
        return float((x @ (pair.B @ pair.A - B @ A).T).square().mean())

    rates = (1e-2, 3e-2, 1e-1, 3e-1)
    assert min(left(True, rate) for rate in rates) < 0.7 * min(left(False, rate) for rate in rates)


# the layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [None, 2.5])
@pytest.mark.parametrize("tau", [0.1, 0.6, 1.0])
def test_layer_is_the_blend_that_is_written_down(bias: bool, gain: float | None, tau: float) -> None:
    dense = nn.Linear(6, 9, bias=bias)
    start = Factors(torch.randn(3, 6).double(), torch.randn(9, 3).double(), None)
    layer = BlendedLinear(dense, start, gain=gain)
    layer.tau = tau
    x, W, BA = torch.randn(2, 5, 6).double(), dense.weight.double(), start.B @ start.A
    b = dense.bias.double() if bias else 0.0
    layer = layer.double()
    scale = tau if gain is None else gain
    wanted = {
        "blend": x @ ((1 - tau) * W + scale * BA).T + b,
        "dense": x @ W.T + b,
        "factored": x @ (scale / tau * BA).T + b,
    }
    for branch, y in wanted.items():
        layer.branch = branch
        assert torch.allclose(layer(x), y, atol=1e-6), branch
    last = layer.replacement()
    assert torch.allclose(
        x @ (last.B @ last.A).T + (0 if last.bias is None else last.bias), wanted["factored"], atol=1e-6
    )
    # taking W with probability 1−τ and the factors otherwise is the blend in expectation
    assert torch.allclose((1 - tau) * wanted["dense"] + tau * wanted["factored"], wanted["blend"], atol=1e-9)


@every_model
def test_dense_branch_is_the_dense_model_and_tau_one_is_the_factored_one(name: str) -> None:
    model, _, start, data = prepared(name)
    batch = data.batch(range(4))
    dense = logits(model, batch)
    factored = logits(replaced(name, Recovered(start, {}, []), model), batch)
    assert not torch.allclose(dense, factored, atol=1e-2)
    with blended(model, start, settings(), 0) as pairs:
        for pair in pairs.values():
            pair.branch, pair.tau = "dense", 1e-3
        as_dense = logits(model, batch)
        for pair in pairs.values():
            pair.branch, pair.tau = "factored", 0.3
        as_factored = logits(model, batch)
        for pair in pairs.values():
            pair.branch, pair.tau = "blend", 1.0
        at_one = logits(model, batch)
        for pair in pairs.values():
            pair.tau = 1e-9
        near_zero = logits(model, batch)
    if name == "gpt2":  # Conv1D multiplies in another order
        assert torch.allclose(as_dense, dense, atol=1e-5)
    else:
        assert torch.equal(as_dense, dense)
    assert torch.allclose(near_zero, dense, atol=1e-4)
    assert torch.allclose(at_one, factored, atol=1e-4)
    assert torch.allclose(as_factored, factored, atol=1e-4)
    assert torch.equal(logits(model, batch), dense)


# schedules


@given(
    schedule=st.sampled_from(SCHEDULES),
    start=st.floats(0.01, 1),
    end=st.floats(0.01, 1),
    until=st.floats(0.01, 1),
    steps=st.integers(1, 200),
)
def test_tau_goes_from_start_to_end_without_turning_back(schedule, start, end, until, steps) -> None:
    tau = Tau(schedule=schedule, start=start, end=end, until=until)
    values = [tau.at(step, steps) for step in range(steps)]
    assert values[0] == start
    assert tau.final(steps) == values[-1]
    assert all(min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12 for value in values)
    if schedule == "constant":
        assert set(values) == {start}
        return
    rise = [b - a for a, b in pairwise(values)]
    assert all(step * (end - start) >= -1e-12 for step in rise)
    for step in range(steps):
        if step >= max(until * steps, 1):
            assert values[step] == pytest.approx(end)


def test_linear_and_cosine_at_half_way() -> None:
    for schedule in ("linear", "cosine", "theseus"):
        tau = Tau(schedule=schedule, start=0.2, end=0.8, until=0.5)
        assert tau.at(25, 100) == pytest.approx(0.5)
    assert Tau(schedule="linear", start=0.1, end=1, until=1).at(10, 100) == pytest.approx(0.19)
    assert Tau(schedule="cosine", start=0.1, end=1, until=1).at(10, 100) == pytest.approx(
        0.1 + 0.9 * 0.0244717, rel=1e-4
    )


def test_a_number_is_a_constant_tau() -> None:
    assert Recovery.model_validate({"tau": 0.1}).tau == Tau(schedule="constant", start=0.1)
    for bad in (0, 1.1, -1):
        with pytest.raises(ValueError, match="start"):
            Recovery.model_validate({"tau": bad})


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_learning_rate_warms_up_and_decays(steps: int, warmup: float) -> None:
    recovery = Recovery(steps=steps, warmup=warmup, learning_rate=2.0)
    rates = [recovery.rate(step) for step in range(steps)]
    assert all(0 < rate <= 2.0 + 1e-12 for rate in rates)
    warm = next((i for i in range(steps) if i >= warmup * steps), steps)
    assert all(a < b for a, b in pairwise(rates[:warm]))
    assert all(a > b for a, b in pairwise(rates[warm:]))
    if 0 < warmup < 1:
        assert max(rates) >= 2.0 * (1 - 1 / max(steps - warmup * steps, 1)) - 1e-9 or warm == steps
    if warmup == 0:
        assert rates[0] == 2.0
    if warmup <= 0.5 and steps >= 10:
        assert rates[-1] <= 2.0 / (steps * (1 - warmup)) * 1.01


class Mlp(nn.Module):
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(8, 8) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x).tanh()
        return x


class Rows:
    """One batch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.x[list(indices)]


def squared(outputs: Tensor, batch: Tensor) -> Tensor:
    return outputs.square().mean()


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_theseus_draws_each_layer_by_itself_with_probability_tau(tau: float) -> None:
    model = Mlp()
    layers = find_layers(model, Targets())
    chosen: list[list[bool]] = []

    def note(step: int, point: Any) -> None:
        assert point["tau"] == tau
        chosen.append([model.get_submodule(name).branch == "factored" for name in layers])

    steps, n = 300, len(layers)
    recovery = settings(steps, tau={"start": tau, "end": tau}, loss={"kind": "task"}, learning_rate=1e-6)
    task = UserTask(lambda m, b: m(b), squared)
    recover(model, layers, start_of(model, layers, 2), Rows(torch.randn(4, 8)), recovery, task, seed=3, progress=note)
    drawn = torch.tensor(chosen).double()
    assert drawn.any(dim=1).all()  # a step without any factors would train nothing
    # an empty draw, (1−τ)ⁿ, is mended by one layer
    wanted = tau + (1 - tau) ** n / n
    assert torch.allclose(drawn.mean(0), torch.tensor(wanted).double(), atol=4 * (0.25 / steps) ** 0.5 * (tau < 1))
    if tau == 0.5:
        together = torch.corrcoef(drawn.T) - torch.eye(n)
        assert together.abs().max() < 0.25  # drawn independently
        assert len({tuple(row) for row in chosen}) > 40  # of 63


# training


@pytest.mark.parametrize("schedule", SCHEDULES)
@every_model
def test_training_learns_a_batch_by_heart(name: str, schedule: str) -> None:
    model, layers, start, data = prepared(name)
    data = data_for(name, 4)
    task, batch = TASKS[name], data.batch(range(4))
    constant = {"start": 1.0} if schedule == "constant" else {"start": 0.3}
    recovery = settings(30, tau={"schedule": schedule, **constant}, learning_rate=1e-2)
    result = recover(model, layers, start, data, recovery, task, seed=0)
    before = kl(replaced(name, Recovered(start, {}, []), model), model, batch, task)
    after = kl(replaced(name, result, model), model, batch, task)
    assert after < 0.5 * before
    assert [point["step"] for point in result.curve] == list(range(30))
    assert all(point["tau"] == recovery.tau.at(point["step"], 30) for point in result.curve)
    if schedule == "constant":
        assert result.curve[-1]["loss"] < 0.5 * result.curve[0]["loss"]


def test_task_loss_learns_the_labels() -> None:
    model, layers, start, data = prepared("bert")
    recovery = settings(40, tau=1.0, loss={"kind": "task"}, batch=8, learning_rate=1e-2)
    result = recover(model, layers, start, data, recovery, TASKS["bert"], seed=0)
    assert result.curve[-1]["loss"] < 0.3 * result.curve[0]["loss"]
    batch = data.batch(range(8))
    assert torch.equal(logits(replaced("bert", result, model), batch).argmax(-1), batch["labels"])


def test_loss_is_the_distillation_that_is_written_down() -> None:
    model, layers, start, data = prepared("bert")
    loss = {"temperature": 3.0, "hidden": 0.7, "task": 0.4}
    recovery = settings(1, tau=1.0, loss=loss, batch=8)
    (point,) = recover(model, layers, start, data, recovery, TASKS["bert"], seed=0).curve
    student, batch = replaced("bert", Recovered(start, {}, []), model), data.batch(range(8))
    divergence = 9 * kl(student, model, batch, TASKS["bert"], temperature=3)
    real, errors = batch["attention_mask"].bool(), []
    with torch.no_grad():
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "output_hidden_states": True,
        }
        ours, theirs = (m(**inputs).hidden_states[1:] for m in (student, model))
        for a, b in zip(ours, theirs, strict=True):
            errors.append(float((a - b)[real].square().sum() / b[real].square().sum()))
        cross = float(F.cross_entropy(student(**inputs).logits, batch["labels"]))
    hidden = sum(errors) / len(errors)
    assert point["kl"] == pytest.approx(divergence, rel=1e-3)
    assert point["hidden"] == pytest.approx(hidden, rel=1e-3)
    assert point["loss"] == pytest.approx(divergence + 0.7 * hidden + 0.4 * cross, rel=1e-3)


@pytest.mark.parametrize("schedule", ["theseus", "linear"])
@every_model
def test_the_teacher_stays_the_untouched_dense_model(name: str, schedule: str) -> None:
    model, layers, start, _ = prepared(name)
    data, scoring = data_for(name, 4), TASKS[name]
    inputs = {key: data.batch(range(4))[key] for key in ("input_ids", "attention_mask")}
    dense, teachers, students = model(**inputs).logits.detach(), [], []

    class Watched(type(scoring)):
        def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            found = super().logits(model, batch)
            order = [(batch["input_ids"] == row).all(1).nonzero()[0, 0] for row in inputs["input_ids"]]
            (students if torch.is_grad_enabled() else teachers).append(found.detach()[torch.stack(order)])
            return found

    recovery = settings(8, train="factors+bias+norm", tau={"schedule": schedule}, learning_rate=3e-2)
    result = recover(model, layers, start, data, recovery, Watched(), seed=0)
    assert len(teachers) == len(students) == 8
    for teacher in teachers:
        assert torch.allclose(teacher, dense, atol=1e-5)
    assert not torch.allclose(students[-1], dense, atol=0.05)
    assert all(not torch.equal(value, model.get_parameter(n)) for n, value in result.others.items())


def test_model_is_left_as_it_was() -> None:
    for fails in (False, True):
        model, layers, start, data = prepared("gpt2")
        flags = [i % 2 == 0 for i, _ in enumerate(model.parameters())]
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        before, modules = {n: v.clone() for n, v in model.state_dict().items()}, dict(model.named_modules())
        parameters = dict(model.named_parameters())

        def note(step: int, point: Any, fails: bool = fails) -> None:
            if fails and step == 3:
                raise KeyboardInterrupt

        recovery = settings(5, train="factors+bias+norm", learning_rate=1e-2)
        if fails:
            with pytest.raises(KeyboardInterrupt):
                recover(model, layers, start, data, recovery, TASKS["gpt2"], seed=0, progress=note)
        else:
            recover(model, layers, start, data, recovery, TASKS["gpt2"], seed=0, progress=note)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[n], v) for n, v in before.items())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())
        assert all(model.get_submodule(n) is m for n, m in modules.items())
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("train", ["factors", "factors+bias", "factors+bias+norm"])
@every_model
def test_only_what_train_says_is_trained(name: str, train: str) -> None:
    model, layers, start, data = prepared(name)
    trained: set[str] = set()

    def note(step: int, point: Any) -> None:
        trained.update(n for n, p in model.named_parameters() if p.requires_grad)

    result = recover(
        model, layers, start, data, settings(3, train=train, tau=0.5), TASKS[name], seed=0, progress=note
    )  # fmt: skip
    norms = {n for n, _ in model.named_parameters() if "ln_" in n or "norm" in n.lower()}
    assert norms
    biases = {n for n in layers if model.get_submodule(n).bias is not None}
    wanted = {f"{n}.{half}" for n in layers for half in "AB"}
    wanted |= {f"{n}.bias" for n in biases} if train != "factors" else set()
    wanted |= norms if train.endswith("norm") else set()
    assert trained == wanted
    assert set(result.others) == (norms if train.endswith("norm") else set())
    for n, pair in result.factors.items():
        assert not torch.allclose(pair.B.double() @ pair.A.double(), start[n].B @ start[n].A, atol=1e-4)
        assert (pair.bias is None) == (n not in biases)
        if n in biases:
            assert torch.equal(pair.bias, model.get_submodule(n).bias) == (train == "factors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision_learn_as_those_in_float32(dtype: torch.dtype) -> None:
    """Steps that are far below the spacing of the dtype add up."""
    recovery, found = settings(24, train="factors+bias+norm", learning_rate=1e-4), []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        model, layers, start, data = prepared("gpt2")
        model.to(dtype).to(kind)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        result = recover(model, layers, start, data, recovery, TASKS["gpt2"], seed=0)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert {value.dtype for value in result.others.values()} == {torch.float32}
        found.append(torch.cat([value - before[n].float() for n, value in result.others.items()]))
    assert F.cosine_similarity(*found, dim=0) > 0.99
    assert 0.9 < found[1].norm() / found[0].norm() < 1.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["linear", "theseus"])
def test_a_start_with_another_bias_is_trained_in_half_precision(schedule: str, dtype: torch.dtype) -> None:
    model, layers, start, data = prepared("gpt2")
    model.to(dtype)
    start = {n: replace(pair, bias=None if pair.bias is None else pair.bias + 0.1) for n, pair in start.items()}
    result = recover(model, layers, start, data, settings(3, tau={"schedule": schedule}), TASKS["gpt2"], seed=0)
    assert all(point["loss"] > 0 for point in result.curve)


@pytest.mark.parametrize("train", ["factors", "factors+bias"])
@pytest.mark.parametrize("moved", [0.0, 0.1], ids=["dense-bias", "other-bias"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tau": {"schedule": "linear", "start": 0.1, "end": 0.5}},
        {"tau": {"schedule": "theseus", "start": 0.1, "end": 0.5}},
        {"tau": 0.3, "scaling": "source", "alpha": 2.0},
        {"tau": 0.1, "scaling": "source", "start": "lora"},
    ],
    ids=["linear", "theseus", "source", "lora"],
)
def test_before_replacement_the_layers_are_those_that_were_trained(
    changes: dict[str, Any], moved: float, train: str
) -> None:
    model, layers, start, data = prepared("gpt2")
    start = {n: replace(pair, bias=None if pair.bias is None else pair.bias + moved) for n, pair in start.items()}
    recovery, trained = settings(6, train=train, learning_rate=3e-2, **changes), {}
    x = {n: torch.randn(4, layer.in_features) for n, layer in layers.items()}

    def note(step: int, point: Any) -> None:
        for n in layers:
            layer = model.get_submodule(n)
            assert isinstance(layer, BlendedLinear)
            with torch.no_grad():
                outputs, branch = {}, layer.branch
                for layer.branch in ("blend", "dense", "factored"):
                    outputs[layer.branch] = layer(x[n])
                layer.branch = branch
            drawn = (1 - layer.tau) * outputs["dense"] + layer.tau * outputs["factored"]
            trained[n] = drawn if recovery.tau.schedule == "theseus" else outputs["blend"]

    args = (model, layers, start, data, recovery, TASKS["gpt2"])
    learned = recover(*args, seed=0, coordinates=curvature(layers), progress=note).factors
    found = before_replacement(model, start, learned, recovery)
    assert found.keys() == layers.keys()
    for n, layer in found.items():
        assert torch.allclose(layer(x[n]), trained[n], atol=1e-5)


# the source's recipe


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("begin", ["lora", "method"])
def test_source_scaling_before_and_after_replacement(alpha: float | None, begin: str) -> None:
    model, layers, start, data = prepared("bert")
    tau, gain = 0.1, (alpha or RANK) / RANK
    during: dict[str, Tensor] = {}
    x = torch.randn(3, 48)

    def note(step: int, point: Any) -> None:
        for n, layer in layers.items():
            blend = model.get_submodule(n)
            with torch.no_grad():
                during[n] = blend(x[:, : layer.in_features])
                BA = blend.B @ blend.A
                W = layers_weight[n]
                wanted = x[:, : layer.in_features] @ ((1 - tau) * W + gain * BA).T + blend.bias
                during[f"{n}.BA"] = BA.clone()
            assert torch.allclose(during[n], wanted, atol=1e-5)

    layers_weight = {n: read_weight(model.get_submodule(n)).detach().clone() for n in layers}
    recovery = settings(4, start=begin, scaling="source", alpha=alpha, tau=tau, loss={"kind": "task"})
    result = recover(model, layers, start, data, recovery, TASKS["bert"], seed=0, progress=note)
    for n, pair in result.factors.items():
        assert torch.allclose(pair.B @ pair.A, gain / tau * during[f"{n}.BA"], atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_source_scaling_starts_at_the_methods_factors(alpha: float | None) -> None:
    """The pair stands for τ·W: an untrained one replaces W by its approximation, whatever α is."""
    model, layers, start, data = prepared("bert")
    recovery = settings(1, scaling="source", alpha=alpha, tau=0.1, learning_rate=1e-12)
    result = recover(model, layers, start, data, recovery, TASKS["bert"], seed=0)
    for n, pair in result.factors.items():
        assert torch.allclose((pair.B @ pair.A).double(), start[n].B @ start[n].A, atol=1e-5)


def test_lora_start_is_loras() -> None:
    reference = nn.Linear(50, 20, bias=False)
    nn.init.kaiming_uniform_(reference.weight, a=5**0.5)  # as loralib and PEFT do
    reference.requires_grad_(False)
    start = lora_start(20, 50, 9, generator(0, "lora", "x"))
    assert start.B.shape == (9, 20)
    assert not start.B.any()
    assert start.A.shape == (20, 50)
    assert float(start.A.std()) == pytest.approx(float(reference.weight.std()), rel=0.1)
    assert 0.95 / 50**0.5 < float(start.A.abs().max()) <= 1 / 50**0.5
    model, layers, factors, _ = prepared("bert")
    with blended(model, factors, settings(start="lora"), 7) as pairs:
        first = {n: pair.A.detach().clone() for n, pair in pairs.items()}
        assert all(not pair.B.any() for pair in pairs.values())
    with blended(model, factors, settings(start="lora"), 7) as pairs:
        assert all(torch.equal(pair.A, first[n]) for n, pair in pairs.items())
    same = [n for n in layers if first[n].shape == (RANK, 32)]
    assert not torch.equal(first[same[0]], first[same[1]])


# determinism, data order, and the state


def assert_same(one: Recovered, other: Recovered) -> None:
    for n, pair in one.factors.items():
        assert torch.equal(pair.A, other.factors[n].A), n
        assert torch.equal(pair.B, other.factors[n].B), n
        assert pair.bias is None or torch.equal(pair.bias, other.factors[n].bias), n
    assert all(torch.equal(value, other.others[n]) for n, value in one.others.items())
    drop = {"seconds", "tokens_per_second"}
    strip = [[{k: v for k, v in point.items() if k not in drop} for point in r.curve] for r in (one, other)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("killed", [4, 6, 8, 10])
@pytest.mark.parametrize(
    ("schedule", "dtype"), [("theseus", torch.float32), ("linear", torch.float32), ("linear", torch.bfloat16)]
)
def test_killed_and_resumed_is_the_same_bit_by_bit(
    tmp_path: Path, schedule: str, dtype: torch.dtype, killed: int
) -> None:
    """Saved after 3, 6 and 9 of 10 steps; killed after 4, 6, 8, and once more when all are done."""
    recovery = settings(10, save_every=3, train="factors+bias+norm", tau={"schedule": schedule}, weight_decay=0.1)
    model, layers, start, data = prepared("gpt2")
    model.to(dtype)
    args = (model, layers, start, data, recovery, TASKS["gpt2"])
    coordinates = curvature(layers)
    whole = recover(*args, seed=5, coordinates=coordinates)

    def kill(step: int, point: Any) -> None:
        if step == killed and not resumed:
            raise KeyboardInterrupt

    resumed: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        recover(*args, seed=5, coordinates=coordinates, state=tmp_path, progress=kill)
    # a state half written when the process died
    (tmp_path / "state.partial").mkdir(exist_ok=True)
    (tmp_path / "state.partial" / "curve.json").write_text("[")
    saved = killed - killed % 3 if killed % 3 else killed - 3  # the save comes after the call that was interrupted
    assert [folder.name for folder in tmp_path.glob("state-*")] == [f"state-{saved:07d}"]
    result = recover(
        *args, seed=5, coordinates=coordinates, state=tmp_path, progress=lambda step, point: resumed.append(step)
    )
    assert resumed == [saved, *range(saved + 1, 11)]
    assert_same(result, whole)
    clear_states(tmp_path)
    assert not list(tmp_path.glob("state-*"))


def test_a_part_of_the_steps_is_that_part_of_the_training(tmp_path: Path) -> None:
    recovery = settings(10, save_every=3)
    model, layers, start, data = prepared("gpt2")
    args = (model, layers, start, data, recovery, TASKS["gpt2"])
    seen: list[int] = []
    whole = recover(*args, seed=5, steps=range(4, 9), progress=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3, 4, 5]
    assert [point["step"] for point in whole.curve] == [4, 5, 6, 7, 8]
    # the fifth step's data and rate: what a training of ten steps does there to the same factors
    first = recover(*args, seed=5, steps=range(4, 5))
    assert first.curve[0]["loss"] == whole.curve[0]["loss"] != recover(*args, seed=5, steps=range(1)).curve[0]["loss"]

    def kill(step: int, _: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(*args, seed=5, steps=range(4, 9), state=tmp_path, progress=kill)
    assert [folder.name for folder in tmp_path.glob("state-*")] == ["state-0000006"]
    assert_same(recover(*args, seed=5, steps=range(4, 9), state=tmp_path), whole)


def test_randomness_follows_from_the_seed_alone() -> None:
    model, layers, start, data = prepared("llama")
    args = (model, layers, start, data, settings(5), TASKS["llama"])
    first = recover(*args, seed=1)
    torch.manual_seed(99)
    assert_same(recover(*args, seed=1), first)
    name = next(iter(layers))
    assert not torch.equal(recover(*args, seed=2).factors[name].A, first.factors[name].A)


def test_every_sequence_is_seen_once_an_epoch() -> None:
    model, layers, start, _ = prepared("bert")
    data = data_for("bert", 8)
    recover(model, layers, start, data, settings(6, batch=3), TASKS["bert"], seed=0)
    assert [len(indices) for indices in data.seen] == [3] * 6
    for epoch in (data.seen[:2], data.seen[2:4], data.seen[4:]):  # two of 8 are left out of each
        assert len({i for indices in epoch for i in indices}) == 6
    assert data.seen[:2] != data.seen[2:4]
    data = data_for("bert", 4)
    recover(model, layers, start, data, settings(2, batch=16), TASKS["bert"], seed=0)
    assert [sorted(indices) for indices in data.seen] == [[0, 1, 2, 3]] * 2


# numbers that cannot be right


@pytest.mark.parametrize(
    ("name", "layer"),
    [("gpt2", "transformer.h.1.attn.c_proj"), ("opt", "model.decoder.layers.1.self_attn.q_proj")],
)
def test_non_finite_loss_names_step_and_layer(name: str, layer: str) -> None:
    model = tiny_model(name)
    layers = find_layers(model, Targets())
    start = start_of(model, layers)
    start[layer] = Factors(start[layer].A, start[layer].B * float("inf"), start[layer].bias)
    with pytest.raises(NumericalError, match=f"loss of step 0 is nan; .*non-finite output is {layer}"):
        recover(model, layers, start, Sequences(), settings(3, tau=1.0), CausalLM(), seed=0)


def test_non_finite_loss_names_the_step_it_came_at() -> None:
    model, x = Mlp(3), torch.randn(8, 8)
    layers = find_layers(model, Targets())
    bad = torch.randperm(8, generator=generator(0, "epoch", 0))[5]  # seen at step 5
    x[bad] = float("nan")
    recovery = settings(8, batch=1, tau=1.0, loss={"kind": "task"})
    task = UserTask(lambda m, b: m(b), squared)
    with pytest.raises(NumericalError, match=r"loss of step 5 is nan; the first layer .* is net\.0"):
        recover(model, layers, start_of(model, layers, 2), Rows(x), recovery, task, seed=0)


def test_non_finite_gradient_names_step_and_parameter() -> None:
    model = Mlp(3)
    layers = find_layers(model, Targets())
    task = UserTask(lambda m, b: m(b), lambda y, b: (y - y.detach()).abs().sqrt().mean())  # 0, with slope ∞
    recovery = settings(2, tau=1.0, loss={"kind": "task"})
    with pytest.raises(NumericalError, match=r"gradient of step 0 is not finite, first at net\.0\.A"):
        recover(model, layers, start_of(model, layers, 2), Rows(torch.randn(8, 8)), recovery, task, seed=0)


def test_an_mlp_compares_the_replaced_layers_themselves() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    layers = find_layers(model, Targets(include=("0",)))
    start = start_of(model, layers, 2)
    x = torch.randn(16, 8)
    recovery = settings(40, tau=1.0, batch=16, learning_rate=1e-2, loss=Loss(hidden=0.5))
    result = recover(model, layers, start, Rows(x), recovery, UserTask(lambda m, b: m(b), squared), seed=0)
    hidden = F.linear(x, (start["0"].B @ start["0"].A).float(), model[0].bias)
    with torch.no_grad():
        dense = model[0](x)
        wanted = (hidden - dense).square().sum() / dense.square().sum()
    assert result.curve[0]["hidden"] == pytest.approx(float(wanted), rel=1e-3)
    assert result.curve[-1]["hidden"] < result.curve[0]["hidden"]
