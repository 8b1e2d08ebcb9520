"""Metrics against hand-written loops over the same text; sums that survive a kill."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import factorise, tiny_model
from torch import Tensor, nn

from lrcompress.artifacts import Measurement
from lrcompress.data import Sentences, Windows
from lrcompress.errors import NumericalError
from lrcompress.evaluate import Accuracy, Divergence, Perplexity
from lrcompress.evaluate import run as runner
from lrcompress.evaluate.base import Sums
from lrcompress.evaluate.run import measure_rows
from lrcompress.lowrank import LowRankLinear
from lrcompress.tasks import CausalLM, SequenceClassification


def text(count: int = 101, *, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def sentences(count: int = 23) -> Sentences:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    return Sentences(ids, [i % 2 for i in range(count)], 256)


def rows_of(name: str) -> tuple[nn.Module, dict[str, dict[str, nn.Module]]]:
    """A dense model and the rows dense and small."""
    model, small = tiny_model(name), tiny_model(name)
    factorise(small)
    return model, {"dense": {}, "small": {n: m for n, m in small.named_modules() if isinstance(m, LowRankLinear)}}


def by_name(found: list[Measurement]) -> dict[str, Measurement]:
    return {one.name: one for one in found}


@given(length=st.integers(2, 20), stride=st.none() | st.integers(1, 30), extra=st.integers(0, 80))
@settings(max_examples=150, deadline=None)
def test_every_token_but_the_first_is_scored_exactly_once(length: int, stride: int | None, extra: int) -> None:
    ids = torch.arange(length + extra)
    windows = Windows(ids, length, stride)
    scored: list[int] = []
    for batch in windows.batches(3):
        assert batch["input_ids"].shape[1] == length
        task_view = CausalLM().scored(F.one_hot(batch["input_ids"], len(ids)).float(), batch)
        scored += task_view.targets.tolist()
        before = task_view.logits.argmax(-1)
        assert (before + 1 == task_view.targets).all()  # predicted from the position before
        for row in batch["input_ids"].tolist():
            assert row == list(range(row[0], row[0] + length))
    assert scored == list(range(1, len(ids)))
    if stride is not None and stride < length - 1:
        starts = torch.tensor(windows.starts)
        assert (
            starts.diff() <= stride
        ).all()  # at least length − stride tokens stand before all but the first window's


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 5), (101, None), (30, 29), (30, 1000)])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_perplexity_is_that_of_a_plain_loop(
    tmp_path: Path, name: str, length: int, stride: int | None, batch_size
) -> None:
    model, rows = rows_of(name)
    ids, step = text(), min(stride or length, length - 1)
    found = measure_rows(
        model, rows, Windows(ids, length, stride), [Perplexity()], CausalLM(), batch_size=batch_size,
        state=tmp_path / "state.json",
    )  # fmt: skip
    losses: list[float] = []
    done = 1  # tokens that have been scored, or never are
    begin = 0
    while done < len(ids):
        begin = min(begin, len(ids) - length)
        window = ids[begin : begin + length]
        with torch.no_grad():
            log_p = model(window[None]).logits[0].log_softmax(-1)
        for i in range(done - begin, length):
            losses.append(-float(log_p[i - 1, window[i]]))
        done, begin = begin + length, begin + step
    (dense,) = found["dense"]
    assert dense.name == "token_perplexity"
    assert dense.count == len(losses) == len(ids) - 1
    assert dense.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert not dense.higher_is_better
    assert found["small"][0].value != pytest.approx(dense.value, rel=1e-3)


def test_perplexitys_standard_error_takes_windows_as_units() -> None:
    generator = torch.Generator().manual_seed(0)
    values, sequence = torch.rand(50, generator=generator) * 3, torch.arange(50) // 10
    measured = Perplexity().measurement("token_perplexity", Sums.of(values, sequence))
    means = values.view(5, 10).double().mean(1)
    error = float((means - means.mean()).square().sum().sqrt() / 5)  # windows of one size: of the mean of their means
    assert measured.value == pytest.approx(math.exp(float(values.double().mean())), rel=1e-9)
    assert measured.stderr == pytest.approx(measured.value * error, rel=1e-9)
    assert Perplexity().measurement("x", Sums(1e6, 1.0)).value < math.inf


@given(values=st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=40), cut=st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_sums_add_up_over_batches(values: list[tuple[float, int]], cut: int) -> None:
    """Cut between sequences, two batches have the sums of one."""
    values = sorted(values, key=lambda pair: pair[1])
    numbers, sequence = torch.tensor([v for v, _ in values]).double(), torch.tensor([s for _, s in values])
    whole = Sums.of(numbers, sequence)
    edge = sequence < min(cut, 5)
    parts = Sums.of(numbers[edge], sequence[edge]) + Sums.of(numbers[~edge], sequence[~edge])
    assert vars(parts) == pytest.approx(vars(whole), abs=1e-9)
    assert whole.mean == pytest.approx(float(numbers.mean()), abs=1e-9)
    residual = torch.zeros(5).double().index_add_(0, sequence, numbers - numbers.mean())
    assert whole.stderr == pytest.approx(float(residual.square().sum().sqrt()) / len(values), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_accuracy_and_its_standard_error(tmp_path: Path, batch_size: int) -> None:
    model, rows = rows_of("bert")
    data = sentences()
    found = measure_rows(
        model, rows, data, [Accuracy()], SequenceClassification(), batch_size=batch_size, state=tmp_path / "s.json"
    )
    right = []
    for ids, label in zip(data.ids, data.labels, strict=True):
        with torch.no_grad():
            right.append(int(model(torch.tensor([ids])).logits.argmax()) == label)
    (accuracy,) = found["dense"]
    p, n = sum(right) / len(right), len(right)
    assert 0 < p < 1
    assert accuracy.value == pytest.approx(p)
    assert accuracy.stderr == pytest.approx(math.sqrt(p * (1 - p) / n))
    assert accuracy.count == n
    assert accuracy.higher_is_better


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_divergence_of_the_model_from_itself_is_nothing(tmp_path: Path, name: str) -> None:
    model, rows = rows_of(name)
    same = tiny_model(name)
    linears = {n: m for n, m in same.named_modules() if n in rows["small"]}
    task, data = (CausalLM(), Windows(text(), 20)) if name == "gpt2" else (SequenceClassification(), sentences())
    found = measure_rows(
        model, {"dense": {}, "copy": linears, "small": rows["small"]}, data, [Divergence()], task, batch_size=4,
        state=tmp_path / "state.json",
    )  # fmt: skip
    for row in ("dense", "copy"):
        measured = by_name(found[row])
        assert measured["kl"].value == 0
        assert measured["agreement"].value == 1
        assert measured["agreement"].higher_is_better
        assert not measured["kl"].higher_is_better
    assert by_name(found["small"])["kl"].value > 1e-3


def test_divergence_is_kl_of_dense_and_compressed_in_that_order(tmp_path: Path) -> None:
    model, rows = rows_of("bert")
    data = sentences()
    found = by_name(
        measure_rows(
            model, rows, data, [Divergence()], SequenceClassification(), batch_size=4, state=tmp_path / "state.json"
        )["small"]
    )
    small = tiny_model("bert")
    factorise(small)
    total, agree = 0.0, 0
    for ids in data.ids:
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0].double().softmax(-1) for m in (model, small))
        total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
        agree += int(p.argmax() == q.argmax())
    assert found["kl"].value == pytest.approx(total / len(data), rel=1e-4)
    assert found["agreement"].value == pytest.approx(agree / len(data))
    assert found["kl"].count == len(data)


def test_rows_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model, rows = rows_of("gpt2")
    modules = dict(model.named_modules())
    measure_rows(model, rows, Windows(text(), 20), [Perplexity()], CausalLM(), batch_size=4, state=tmp_path / "s.json")
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("killed", [1, 2, 3, 5])
def test_interrupted_and_resumed_gives_the_same_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    monkeypatch.setattr(runner, "SAVE_EVERY", 2)
    model, rows = rows_of("gpt2")
    evaluators = [Perplexity(), Divergence(), Accuracy()]
    calls: list[int] = []

    def measure(state: Path, stop: int | None) -> Mapping[str, list[Measurement]]:
        def advance(sequences: int) -> None:
            calls.append(sequences)
            if stop is not None and len(calls) == stop + 1:  # the first call tells how much was there already
                raise KeyboardInterrupt

        calls.clear()
        return measure_rows(
            model, rows, Windows(text(), 10), evaluators, CausalLM(), batch_size=2, state=state, advance=advance
        )

    whole = measure(tmp_path / "whole.json", None)
    assert calls == [0, 2, 2, 2, 2, 2, 2]
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "state.json", killed)
    resumed = measure(tmp_path / "state.json", None)
    done = killed - killed % 2
    assert calls == [2 * done, *[2] * (6 - done)]
    assert resumed == whole  # to the last bit


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_name_the_row_and_are_never_left_out(tmp_path: Path, bad: float) -> None:
    model, rows = rows_of("bert")
    broken = next(iter(rows["small"].values()))
    with torch.no_grad():
        broken.B.weight.fill_(bad)
    data = sentences(4)
    modules = dict(model.named_modules())
    with pytest.raises(NumericalError, match=r"row small: .* not finite"):
        measure_rows(model, rows, data, [Accuracy()], SequenceClassification(), batch_size=2, state=tmp_path / "s.json")
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("evaluator", [Perplexity(), Accuracy(), Divergence()], ids=lambda one: one.kind)
def test_every_metric_is_defined_in_a_sentence(evaluator) -> None:
    scored = CausalLM().scored(torch.randn(1, 4, 7), {"labels": torch.arange(4)[None]})
    assert set(evaluator.values(scored, scored)) == set(evaluator.definitions)
