"""Rounds: each size is cut from the model that the one before it trained, and the last one has the budget."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import tiny_model
from runs import cli, content, validated_case
from torch import Tensor, nn

import lrcompress
from lrcompress import chain, pipeline, recovery_stage, stages
from lrcompress.artifacts import Factors, RankPlan, kept_parameters
from lrcompress.errors import RecipeError
from lrcompress.layers import Targets, find_layers, read_weight
from lrcompress.linalg import Roots, truncate, weighted_svd
from lrcompress.ranks import Budget
from lrcompress.recipe import parse
from lrcompress.recovery import Recovered, Recovery, loop
from lrcompress.recovery.rounds import Learned, Spectra, product, through_rounds
from lrcompress.recovery.whitening import Coordinates

ROUNDS = [{"size": 2.0, "steps": 0.34}, {"size": 1.5, "steps": 0.34}]


# the settings -------------------------------------------------------------------------------------------------


@example(keep=0.3, steps=1, rounds=[(1.5, 0.3), (2.0, 0.3)])
@given(
    keep=st.floats(0.01, 1),
    steps=st.integers(1, 400),
    rounds=st.lists(st.tuples(st.floats(1.01, 4), st.floats(0.01, 0.3)), max_size=3, unique_by=lambda one: one[0]),
)
def test_spans_divide_the_steps_and_fall_to_the_budget(keep: float, steps: int, rounds: Any) -> None:
    falling = [{"size": size, "steps": share} for size, share in sorted(rounds, reverse=True)]
    spans = Recovery.model_validate({"steps": steps, "rounds": falling}).spans(keep)
    assert [step for _, span in spans for step in span] == list(range(steps))
    shares = [share for share, _ in spans]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == keep
    assert all(share < 1 for share in shares[:-1])
    assert all(len(span) > 0 for _, span in spans)


@pytest.mark.parametrize(
    ("recovery", "words"),
    [
        ({"rounds": [{"size": 1.5, "steps": 0.3}, {"size": 2, "steps": 0.3}]}, "must fall in size, got [1.5, 2.0]"),
        ({"rounds": [{"size": 2, "steps": 0.5}, {"size": 1.5, "steps": 0.5}]}, "leave steps for the last size"),
        ({"rounds": [{"size": 1.0, "steps": 0.5}]}, "greater than 1"),
        ({"rounds": ROUNDS, "tau": 0.5}, "tau 1.0"),
        ({"rounds": ROUNDS, "tau": {"schedule": "linear"}}, "tau 1.0"),
        ({"rounds": ROUNDS, "start": "lora"}, "start `method`"),
        (
            {"rounds": ROUNDS, "train": "factors+bias+norm"},
            "factors+bias`; for anything else set recovery.rounds to []",
        ),
    ],
)
def test_what_rounds_cannot_do_is_refused(recovery: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse({"recovery": recovery})
    assert words in str(caught.value)


def test_rounds_need_ranks_that_follow_from_a_size() -> None:
    parse({"recovery": {"rounds": ROUNDS}, "ranks": {"kind": "frontier", "keep_parameters": [0.5, 0.3], "choose": 0.3}})
    with pytest.raises(RecipeError, match="got `fixed`"):
        parse({"recovery": {"rounds": ROUNDS}, "ranks": {"kind": "fixed", "rank": 3}})
    frontier = {"kind": "frontier", "keep_parameters": [0.5, 0.3], "choose": 0.3, "allocation": "uniform"}
    with pytest.raises(RecipeError, match="method `svd` has none"):
        parse({"recovery": {"rounds": ROUNDS}, "ranks": frontier, "method": "svd"})


# from size to size --------------------------------------------------------------------------------------------


def test_each_round_is_cut_from_what_the_one_before_learned() -> None:
    model = tiny_model("gpt2")
    layers = find_layers(model, Targets())
    budget = Budget(keep_parameters=0.2)

    def spectra_of(weights: Mapping[str, Tensor]) -> Spectra:
        found = {name: weighted_svd(weight, Roots()) for name, weight in weights.items()}
        values = {name: spectrum.values for name, spectrum in found.items()}
        return Spectra(values, lambda name, rank: truncate(found[name], rank), lambda name: Coordinates())

    dense = {name: read_weight(model.get_submodule(name)).detach() for name in layers}
    met: list[tuple[int, range, int]] = []
    learned: list[Learned] = []

    def train(number: int, start: Learned, steps: range, coordinates: Any) -> Recovered:
        ranks = {name: len(pair.A) for name, pair in start.items()}
        met.append((number, steps, kept_parameters(layers, ranks)))
        before = dense if not learned else {n: product(model.get_submodule(n), learned[-1].get(n)) for n in layers}
        for name, pair in start.items():  # the best of its rank of the model that was there
            best = truncate(weighted_svd(before[name], Roots()), ranks[name])
            assert torch.allclose(pair.B @ pair.A, best.B @ best.A, atol=1e-5)
        found = {name: Factors(pair.A, 1.1 * pair.B, None) for name, pair in start.items()}
        learned.append(found)
        return Recovered(found, {}, [{"step": step} for step in steps])

    def again(number: int, pairs: Learned) -> Spectra:
        return spectra_of({name: product(model.get_submodule(name), pairs.get(name)) for name in layers})

    result = through_rounds(
        Recovery.model_validate({"steps": 100, "rounds": ROUNDS}), 0.2, spectra_of(dense),
        select=lambda share, values: budget.at(share, layers, values), train=train, again=again,
    )  # fmt: skip
    assert [(number, steps) for number, steps, _ in met] == [(0, range(34)), (1, range(34, 68)), (2, range(68, 100))]
    whole = sum(layer.dense_parameters for layer in layers.values())
    assert all(0.95 * share < kept / whole <= share for share, (_, _, kept) in zip((0.4, 0.3, 0.2), met, strict=True))
    assert [point["step"] for point in result.recovered.curve] == list(range(100))
    assert result.recovered.factors == learned[-1]
    assert result.plan.ranks == {name: len(pair.A) for name, pair in learned[-1].items()}


# runs ---------------------------------------------------------------------------------------------------------

SETTINGS = (
    "timing=null", "baselines=[]", "ranks={kind: budget, keep_parameters: 0.3}", "recovery.steps=30",
    "recovery.learning_rate=0.003", "recovery.save_every=4", "recovery.rounds_above=0",
    f"recovery.rounds={json.dumps(ROUNDS)}",
)  # fmt: skip


def options(*settings: str) -> list[str]:
    return [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)


def test_a_run_in_rounds_has_its_budget_and_loads(tmp_path: Path) -> None:
    case = validated_case(tmp_path)
    done = cli(*case.arguments(tmp_path / "run", *options()))
    assert done.code == 0, done.err  # the written model was loaded in a fresh process
    report = json.loads((tmp_path / "run/report.json").read_text())
    dense, closed, result = report["rows"]
    assert result["target_parameters"] <= 0.3 * dense["target_parameters"]
    assert result["target_parameters"] == sum(layer["kept_parameters"] for layer in report["layers"])
    assert result["metrics"]["kl"]["value"] < closed["metrics"]["kl"]["value"]
    assert [point["step"] for point in report["training"]] == list(range(30))
    notes = next(stage["notes"] for stage in report["stages"] if stage["name"] == "recovery")
    spans = "10 steps at a share of 0.6, 10 steps at a share of 0.45, 10 steps at a share of 0.3"
    assert any(note.startswith("rounds") and note.endswith(spans) for note in notes)
    ranks = {name: len(pair.A) for name, pair in _saved(tmp_path / "run").items()}
    plans = plans_of(tmp_path / "run")
    assert ranks == {layer["name"]: layer["rank"] for layer in report["layers"] if layer["rank"]}
    assert ranks != plans["plan"]["ranks"]  # they went where the compressed model misses them
    assert not list((tmp_path / "run/stages").glob("08-recovery/round-*"))


def plans_of(folder: Path) -> Any:
    return json.loads((folder / "stages/05-ranks/ranks.json").read_text())


def _thrice(work: Any) -> Any:
    """The same, until its third call."""
    calls: list[int] = []

    def counted(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        work(*given)

    return counted


def _saved(folder: Path) -> dict[str, Factors]:
    from lrcompress.artifacts import read_factors

    found = read_factors(folder / "stages/08-recovery/lora_lrd-plan.safetensors")
    return {name: pair.factors() for name, pair in found.items()}


@pytest.mark.usefixtures("unverified")
def test_between_rounds_a_share_of_the_sequences_says_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, collect, calibrated = validated_case(tmp_path), stages.collect, []

    def counted(*given: Any, **more: Any) -> Any:
        calibrated.append(0)

        def advance(sequences: int) -> None:
            calibrated[-1] += sequences

        return collect(*given, **more | {"advance": advance})

    monkeypatch.setattr(stages, "collect", counted)
    done = cli(*case.arguments(tmp_path / "run", *options("recovery.rounds_calibration=0.3")))
    assert done.code == 0, done.err
    whole, *between = calibrated
    assert between == [math.ceil(0.3 * whole)] * 2


@pytest.mark.usefixtures("unverified")
def test_a_killed_round_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = validated_case(tmp_path)
    arguments = case.arguments(tmp_path / "killed", *options())
    whole = cli(*case.arguments(tmp_path / "whole", *options()))
    assert whole.code == 0, whole.err
    step, steps = loop._Training.step, []
    decompose, decomposed = recovery_stage.decompose, []
    monkeypatch.setattr(
        recovery_stage, "decompose", lambda *given: decomposed.append(given[0].stem) or decompose(*given)
    )
    for stop in (6, 10, 17, 27):  # in each of the three, and when the first spectra are there

        def killed(self: Any, number: int, recorder: Any, stop: int = stop) -> Any:
            if number == stop:
                raise KeyboardInterrupt
            steps.append(number)
            return step(self, number, recorder)

        monkeypatch.setattr(loop._Training, "step", killed)
        assert cli(*arguments).code == 130
        if stop == 6:  # and at the third of the first spectra
            with monkeypatch.context() as patched:
                patched.setattr(loop._Training, "step", step)
                patched.setattr(recovery_stage, "decompose", _thrice(decompose))
                assert cli(*arguments).code == 130
    monkeypatch.setattr(loop._Training, "step", step)
    done = cli(*arguments)
    assert done.code == 0, done.err
    # of the second round one step again, of the third three
    assert steps == [*range(6), *range(10, 17), *range(16, 27)]
    assert len(decomposed) == 2 * len(plans_of(tmp_path / "whole")["plan"]["ranks"]) - 2
    assert content(tmp_path / "killed/model") == content(tmp_path / "whole/model")


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("near", ["refit={check: 8, start_below: 1000}", "recovery.rounds_above=1"])
def test_where_the_training_starts_near_there_are_no_rounds(near: str, tmp_path: Path) -> None:
    case = validated_case(tmp_path)
    more = options(near)
    assert cli(*case.arguments(tmp_path / "run", *more)).code == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    notes = next(stage["notes"] for stage in report["stages"] if stage["name"] == "recovery")
    assert any(note.startswith("no rounds") for note in notes)
    plans = plans_of(tmp_path / "run")
    assert {n: len(p.A) for n, p in _saved(tmp_path / "run").items()} == plans["plan"]["ranks"]


@pytest.mark.usefixtures("unverified")
def test_rounds_that_harm_are_dropped_with_their_ranks(tmp_path: Path) -> None:
    case = validated_case(tmp_path)
    assert cli(*case.arguments(tmp_path / "run", *options("recovery.learning_rate=0.9"))).code == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["rows"][-1]["trained_steps"] == 0
    assert report["rows"][-1]["metrics"] == report["rows"][-2]["metrics"]
    plans = plans_of(tmp_path / "run")
    assert {n: len(p.A) for n, p in _saved(tmp_path / "run").items()} == plans["plan"]["ranks"]


@pytest.mark.parametrize("rounds", [True, False])
def test_what_may_change_the_ranks_is_timed_again(rounds: bool, tmp_path: Path) -> None:
    case = validated_case(tmp_path)
    timing = next(stage for stage in pipeline.STAGES if stage.name == "timing")
    marks = set()
    for name in ("validation", "test"):
        data = f"data.validation={{path: {tmp_path}/{name}.txt}}"
        more = [*SETTINGS[2:], data, *([] if rounds else ["recovery.rounds=[]"])]
        work = pipeline.open_workspace(str(case.model), case.recipe, tmp_path / "run", settings=more)
        marks.add(chain.fingerprint(work, timing))
    assert len(marks) == (2 if rounds else 1)


def test_a_module_goes_through_rounds_too() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(64, 24, generator=generator), torch.randint(5, (64,), generator=generator)) for _ in "abc"]
    dense = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    for module in dense[::2]:
        module.weight.data *= 3

    def compressed(
        rounds: list[dict[str, float]], above: float, share: float = 1.0
    ) -> tuple[RankPlan, nn.Module, list[Any]]:
        model = copy.deepcopy(dense)
        result = lrcompress.compress(
            model, batches, loss=lambda y, b: nn.functional.cross_entropy(y, b[1]),
            recipe={"targets": {"include": ["0", "2"]}, "ranks": {"kind": "budget", "keep_parameters": 0.3},
                    "recovery": {"steps": 60, "learning_rate": 0.01, "rounds": rounds, "rounds_above": above,
                                 "rounds_calibration": share, "loss": {"hidden": 0}}},
        )  # fmt: skip
        return result.plan, model, result.training

    def far(model: nn.Module) -> float:
        x = torch.cat([x for x, _ in batches])
        with torch.no_grad():
            p, q = dense(x).log_softmax(-1), model(x).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    plan, model, curve = compressed(ROUNDS, 0.0)
    assert len(curve) == 60
    assert {name: module.rank for name, module in model.named_modules() if name in plan.ranks} == plan.ranks
    assert sum(rank * 48 for rank in plan.ranks.values()) <= 0.3 * 2 * 24 * 24
    untrained = copy.deepcopy(dense)
    lrcompress.compress(
        untrained, batches, loss=lambda y, b: nn.functional.cross_entropy(y, b[1]),
        recipe={"targets": {"include": ["0", "2"]}, "ranks": {"kind": "budget", "keep_parameters": 0.3},
                "recovery": None},
    )  # fmt: skip
    assert far(model) < 0.8 * far(untrained)
    assert far(compressed(ROUNDS, 0.0, 0.3)[1]) != far(model)  # one of the three batches between rounds
    near, plain = compressed(ROUNDS, 1.0)[1], compressed([], 0.0)[1]
    assert far(near) == far(plain) != far(model)
