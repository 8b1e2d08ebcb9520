"""The run around a selector: scores against direct computation, and nothing that is done twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_model
from torch import Tensor, nn

from lrcompress.artifacts import RankPlan, Score, Spectrum
from lrcompress.errors import NumericalError, RecipeError
from lrcompress.evaluate import scorer as scorers
from lrcompress.evaluate.scorer import Scorer
from lrcompress.layers import Targets, bias_of, find_layers, read_weight
from lrcompress.linalg import Roots, relative_error, truncate, weighted_svd
from lrcompress.lowrank import put_factors
from lrcompress.progress import Display
from lrcompress.ranks.base import make_plan
from lrcompress.ranks.context import LearningRun
from lrcompress.recovery import recover
from lrcompress.recovery.settings import Learning, Recovery
from lrcompress.recovery.whitening import Coordinates
from lrcompress.selection import Bench, Memory, Pairs, Subject
from lrcompress.tasks import CausalLM, SequenceClassification, UserTask, default_forward


def batches(name: str, count: int = 3) -> list[dict[str, Tensor]]:
    """With labels: the next tokens of a causal LM, a class of the others."""
    found = []
    for seed in range(count):
        batch = tiny_batch(name, seed=seed)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append(batch | {"labels": labels if name == "gpt2" else torch.tensor([seed % 2, 1])})
    return found


class Data:
    """Training data of one batch a step."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Any) -> dict[str, Tensor]:
        return self.items[indices[0]]


@pytest.fixture
def subject(name: str) -> Subject:
    model = tiny_model(name)
    layers = find_layers(model, Targets())
    spectra = {key: weighted_svd(read_weight(model.get_submodule(key)).detach(), Roots(), 14) for key in layers}
    items = batches(name)

    def cut(layer: str, rank: int) -> Spectrum:
        one = spectra[layer]
        return replace(one, out_basis=one.out_basis[:, :rank], in_basis=one.in_basis[:rank])

    return Subject(
        load=lambda: model,
        layers=layers,
        task=CausalLM() if name == "gpt2" else SequenceClassification(),
        spectrum=cut,
        coordinates=lambda layer: Coordinates(),
        training=lambda length: Data(items),
        validation=lambda: items,
        recovery=Recovery(steps=50, batch=1, learning_rate=1e-2),
        seed=0,
    )


def bench(subject: Subject, memory: Memory | None = None, pairs: Pairs | None = None) -> Bench:
    return Bench(subject, memory or Memory(), pairs or Pairs(), Display(quiet=True))


def plan_of(subject: Subject, rank: int = 5) -> RankPlan:
    return make_plan(subject.layers, dict.fromkeys(subject.layers, rank))


def direct(dense: nn.Module, model: nn.Module, name: str) -> Score:
    """KL, loss and accuracy over all predictions at once."""
    kl, loss, right = [], [], []
    for batch in batches(name):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p, q = (one(**inputs).logits for one in (dense, model))
        labels = batch["labels"]
        if name == "gpt2":
            p, q, labels = p[:, :-1].flatten(0, 1), q[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            p, q, labels = (one[labels != -100] for one in (p, q, labels))
        kl.append(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1))
        loss.append(F.cross_entropy(q, labels, reduction="none"))
        right.append((q.argmax(-1) == labels).float())
    return Score(*(float(torch.cat(one).mean()) for one in (kl, loss, right)))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_score_is_that_of_the_model_with_the_factors_in_it(name: str, subject: Subject) -> None:
    plan, dense, model = plan_of(subject), tiny_model(name), tiny_model(name)
    put_factors(
        model,
        {
            layer: truncate(subject.spectrum(layer, rank), rank, bias_of(dense.get_submodule(layer)))
            for layer, rank in plan.ranks.items()
        },
    )
    found, wanted = bench(subject).score(plan), direct(dense, model, name)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-3, abs=1e-7)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.accuracy == pytest.approx(wanted.accuracy)
    dense_score = bench(subject).dense_score()
    assert dense_score.kl == pytest.approx(0, abs=1e-6)
    assert dense_score.loss == pytest.approx(direct(dense, dense, name).loss, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_score_after_a_recovery_is_better_and_leaves_the_model_alone(name: str, subject: Subject) -> None:
    before = {key: value.clone() for key, value in subject.load().state_dict().items()}
    one, plan = bench(subject), plan_of(subject, 3)
    assert one.score(plan, steps=40).kl < 0.7 * one.score(plan).kl
    assert all(torch.equal(value, before[key]) for key, value in subject.load().state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_score_after_a_recovery_is_that_of_all_that_was_trained(name: str, subject: Subject) -> None:
    settings = Recovery(steps=20, batch=1, learning_rate=1e-2, train="factors+bias+norm")
    one, plan = bench(replace(subject, recovery=settings)), plan_of(subject, 3)
    found = one.score(plan, steps=20)
    dense, model = tiny_model(name), tiny_model(name)
    start = {
        layer: truncate(subject.spectrum(layer, rank), rank, bias_of(dense.get_submodule(layer)))
        for layer, rank in plan.ranks.items()
    }
    trained = recover(
        subject.load(), subject.layers, start, subject.training(0), settings, subject.task, seed=subject.seed,
        coordinates=subject.coordinates,
    )  # fmt: skip
    put_factors(model, trained.factors)
    old = direct(dense, model, name)
    for key, value in trained.others.items():
        model.get_parameter(key).data = value
    wanted = direct(dense, model, name)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-3)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert abs(old.kl - wanted.kl) > 0.05 * wanted.kl  # the norms matter


@pytest.mark.parametrize("name", ["bert"])
def test_equal_plans_are_scored_once_also_in_another_process(name: str, subject: Subject, tmp_path: Path) -> None:
    plan, other = plan_of(subject), plan_of(subject, 4)
    first = bench(subject, Memory(tmp_path / "scores.json"))
    scores = [first.score(plan), first.score(other), first.dense_score()]
    calls = []

    def refused() -> list[Any]:
        calls.append(1)
        raise AssertionError("scored again")

    again = bench(replace(subject, validation=refused), Memory(tmp_path / "scores.json"))
    turned = replace(plan, ranks=dict(reversed(plan.ranks.items())))
    assert [again.score(turned), again.score(other), again.dense_score()] == scores
    assert not calls
    with pytest.raises(AssertionError):
        again.score(plan, steps=1)  # another thing


@pytest.mark.parametrize("name", ["gpt2"])
@pytest.mark.parametrize("start", ["lora", "method"])
def test_learned_pairs_are_kept_and_learned_once(name: str, start: Any, subject: Subject, tmp_path: Path) -> None:
    run = LearningRun(dict.fromkeys(subject.layers, 4), Learning(start=start, steps=3, batch=1), 7)
    pairs = bench(subject, pairs=Pairs(tmp_path)).learned(run)
    assert {pair.A.shape[0] for pair in pairs.values()} == {4}
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]  # no training state is left
    again = bench(replace(subject, training=lambda length: pytest.fail("learned again")), pairs=Pairs(tmp_path))
    assert set(again.learned(run)) == set(subject.layers)
    assert "nowhere" not in again.learned(run)
    for layer, pair in again.learned(run).items():
        assert torch.equal(pair.A, pairs[layer].A)
        assert torch.equal(pair.B, pairs[layer].B)
    in_memory = bench(subject).learned(run)
    assert all(torch.equal(pair.A, in_memory[layer].A) for layer, pair in pairs.items())
    other = bench(subject).learned(replace(run, seed=8))
    if start == "lora":
        assert not any(torch.equal(pair.A, other[layer].A) for layer, pair in pairs.items())
    else:  # the start is nearly the weight
        errors = [relative_error(bench(subject).weight(layer), pair) for layer, pair in pairs.items()]
        assert max(errors) < 1


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_run_that_was_killed_goes_on_at_its_last_save(
    name: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LearningRun(dict.fromkeys(subject.layers, 4), Learning(steps=120, batch=1), 0)
    whole = bench(subject).learned(run)
    taken: list[int] = []

    class Killed(BaseException):
        pass

    class Dying(Data):
        def batch(self, indices: Any) -> dict[str, Tensor]:
            taken.append(1)
            if len(taken) == 80:
                raise Killed
            return super().batch(indices)

    with pytest.raises(Killed):
        bench(replace(subject, training=lambda length: Dying(batches(name))), pairs=Pairs(tmp_path)).learned(run)
    taken.clear()
    went_on = bench(replace(subject, training=lambda length: Dying(batches(name))), pairs=Pairs(tmp_path)).learned(run)
    assert len(taken) == 70  # 50 were saved
    assert all(torch.equal(pair.B, whole[layer].B) for layer, pair in went_on.items())


@pytest.mark.parametrize("name", ["bert"])
def test_dense_logits_are_held_only_as_far_as_memory_is_given(
    name: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(subject)
    held = bench(subject).score(plan)
    monkeypatch.setattr(scorers, "CACHE_BYTES", 20)
    assert bench(subject).score(plan) == held


@pytest.mark.parametrize("name", ["bert"])
def test_an_output_that_is_not_finite_is_no_score(name: str, subject: Subject) -> None:
    one = Scorer(subject.load(), batches(name), subject.task)
    layer = next(iter(subject.layers))
    broken = nn.Linear(32, 32)
    broken.weight.data.fill_(torch.nan)
    with pytest.raises(NumericalError, match="not finite"):
        one.score({layer: broken})


def test_a_plain_module_is_scored_by_its_own_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    data = [(torch.randn(4, 6), torch.randn(4, 1)), (torch.randn(2, 6), torch.randn(2, 1))]
    task = UserTask(default_forward, lambda outputs, batch: F.mse_loss(outputs, batch[1]))
    found = Scorer(model, data, task).score({})
    whole = [torch.cat(part) for part in zip(*data, strict=True)]
    assert found.loss == pytest.approx(F.mse_loss(model(whole[0]), whole[1]).item(), rel=1e-6)
    assert found.kl is None
    assert found.accuracy is None
    with pytest.raises(RecipeError, match=r"`kl` cannot be measured(?s:.)*no classes(?s:.)*allowed: loss"):
        found.cost("kl")


def test_bars_are_taken_away_at_the_end() -> None:
    class Counting(Display):
        open = 0

        def bar(self, what: str, total: int) -> Any:
            return _Bar(self)

    class _Bar:
        def __init__(self, display: Counting) -> None:
            self.display = display

        def __enter__(self) -> Any:
            self.display.open += 1
            return lambda amount=1, figures="": None

        def __exit__(self, *_: object) -> None:
            self.display.open -= 1

    display = Counting(quiet=True)
    subject = Subject(nn.Identity, {}, CausalLM(), None, None, None, None, None, 0)  # type: ignore[arg-type]
    one = Bench(subject, Memory(), Pairs(held={}), display)
    one.progress("trials", 1, 3)
    one.progress("finalists", 1, 3)
    assert display.open == 2
    one.progress("trials", 3, 3)
    assert display.open == 0
