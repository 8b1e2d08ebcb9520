"""Rank selectors keep their promises for any layers and spectra, against brute force where it is possible."""

import itertools
import math
import re
from typing import get_args

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from world import World

from lrcompress.artifacts import Layer, RankPlan
from lrcompress.errors import RecipeError
from lrcompress.ranks import (
    AbstractSelector,
    Budget,
    Energy,
    Fixed,
    Frontier,
    RandomSearch,
    RankLoss,
    Selector,
    Subspace,
    Target,
    Uniform,
)  # fmt: skip
from lrcompress.ranks.base import check_reachable
from lrcompress.ranks.bounds import Bounds
from lrcompress.ranks.context import AbstractContext

Spectra = dict[str, Tensor]


def layer(name: str, out_features: int, in_features: int) -> Layer:
    return Layer(name, "linear", in_features, out_features, True, 0, "mlp")


def case(*sizes: tuple[int, int], seed: int = 0, decay: float = 0.8) -> tuple[dict[str, Layer], Spectra]:
    generator = torch.Generator().manual_seed(seed)
    layers = {f"layer{i}": layer(f"layer{i}", *size) for i, size in enumerate(sizes)}
    values = {}
    for i, (name, one) in enumerate(layers.items()):
        count = min(one.in_features, one.out_features)
        scale = (1 + i) * decay ** torch.arange(count)
        values[name] = (torch.rand(count, generator=generator) * scale).double().sort(descending=True).values
    return layers, values


sizes = st.lists(st.tuples(st.integers(1, 48), st.integers(1, 48)), min_size=1, max_size=4)
cases = st.builds(
    lambda shapes, seed, decay: case(*shapes, seed=seed, decay=decay),
    sizes,
    st.integers(0, 999),
    st.sampled_from([0.3, 0.8, 1.0]),
)
steps = st.sampled_from([1, 2, 3, 8, 16])
keeps = st.floats(0.02, 1.0)


def cost(plan_ranks: dict[str, int], layers: dict[str, Layer]) -> int:
    """Counted anew: r(I + O) where a layer is factorised, I·O where it is not."""
    return sum(
        plan_ranks[name] * (one.in_features + one.out_features)
        if name in plan_ranks
        else one.in_features * one.out_features
        for name, one in layers.items()
    )


REASONS = (
    "no layer would become smaller",
    "smallest ranks",
    "too small to compare",
    "above its ceiling",
    "no size keeps",
    "φ of A",
)


def select(
    selector: AbstractSelector, layers: dict[str, Layer], values: Spectra, context: AbstractContext | None = None
) -> RankPlan | None:
    """The plan; None where the selector refuses for one of its stated reasons."""
    try:
        return selector.select(layers, values, context or World(layers, values))
    except RecipeError as error:
        if any(reason in str(error) for reason in REASONS):
            return None
        raise


@st.composite
def selectors(draw: st.DrawFn) -> AbstractSelector:
    step, keep = draw(steps), draw(keeps)
    searched = {"keep_parameters": keep, "round_to": step, "trials": 4}
    make = {
        Uniform: lambda: Uniform(keep_parameters=keep, round_to=step),
        Budget: lambda: Budget(keep_parameters=keep, round_to=step),
        Energy: lambda: draw(
            st.sampled_from([Energy(share=min(keep, 0.99), round_to=step), Energy(keep_parameters=keep, round_to=step)])
        ),
        Fixed: lambda: Fixed(rank=1),
        RankLoss: lambda: RankLoss(keep_parameters=keep, round_to=step, curve="optimum"),
        RandomSearch: lambda: RandomSearch(**searched, start=draw(st.sampled_from(["uniform", "budget"]))),
        Subspace: lambda: Subspace(keep_parameters=keep, round_to=step, unclear="uniform"),
        Target: lambda: Target(rise=keep, metric="kl", round_to=step, precision=0.1),
        Frontier: lambda: Frontier(keep_parameters=(keep, keep / 2), choose=keep, round_to=step),
    }
    assert set(make) == set(get_args(get_args(Selector)[0])), "a selector of the union without a case here"
    return draw(st.sampled_from(list(make.values())))()


@given(selector=selectors(), problem=cases)
@settings(max_examples=60, deadline=None)
def test_a_plan_counts_right_shrinks_each_layer_it_names_and_is_reproducible(selector, problem) -> None:
    layers, values = problem
    plan = select(selector, layers, values)
    assume(plan is not None)
    assert plan.dense_parameters == sum(one.in_features * one.out_features for one in layers.values())
    assert plan.kept_parameters == cost(plan.ranks, layers) < plan.dense_parameters
    for name, rank in plan.ranks.items():
        one = layers[name]
        assert 1 <= rank
        assert rank * (one.in_features + one.out_features) < one.in_features * one.out_features
    assert set(plan.ranks) | set(plan.notes) == set(layers)
    assert not set(plan.ranks) & set(plan.notes)
    assert all("stays dense" in note for note in plan.notes.values())
    assert select(selector, layers, values) == plan
    turned = select(selector, dict(reversed(layers.items())), values)
    assert turned is None or turned.kept_parameters <= plan.dense_parameters


SMALL_SHARES = case((20, 20), (64, 64))  # half of the small layer is rank 5, one step of 8 is its least


@given(selector=selectors(), problem=cases)
@example(selector=Uniform(keep_parameters=0.5, round_to=8), problem=SMALL_SHARES)
@example(selector=Budget(keep_parameters=0.3, round_to=8), problem=case((20, 20), (64, 64), decay=1.0))
@settings(max_examples=60, deadline=None)
def test_ranks_are_multiples_where_a_multiple_shrinks(selector, problem) -> None:
    layers, values = problem
    plan = select(selector, layers, values)
    assume(plan is not None)
    for name, rank in plan.ranks.items():
        assert rank % selector.round_to == 0 or (rank == 1 and layers[name].max_rank < selector.round_to)


@given(kind=st.sampled_from([Uniform, Budget, Energy]), keep=keeps, step=steps, problem=cases)
@example(kind=Uniform, keep=0.1, step=1, problem=case((8, 8), (100, 100)))  # the small layer needs more than its share
@example(kind=Uniform, keep=0.5, step=8, problem=case((20, 20), (64, 64)))
@example(kind=Uniform, keep=0.6, step=1, problem=case((1, 30), (30, 30)))  # a layer that no rank shrinks
@settings(max_examples=100, deadline=None)
def test_budget_is_never_exceeded(kind, keep, step, problem) -> None:
    layers, values = problem
    plan = select(kind(keep_parameters=keep, round_to=step), layers, values)
    assume(plan is not None)
    assert plan.kept_parameters <= keep * plan.dense_parameters + 1e-3


@given(kind=st.sampled_from([Uniform, Budget, Energy]), problem=cases, step=steps)
@settings(max_examples=60, deadline=None)
def test_an_unreachable_budget_names_the_least_that_is_reachable(kind, problem, step) -> None:
    layers, values = problem
    with pytest.raises(RecipeError) as refused:
        kind(keep_parameters=1e-9, round_to=step).select(layers, values)
    least_rank = {name: step if step <= one.max_rank else 1 for name, one in layers.items()}
    ranks = {name: rank for name, rank in least_rank.items() if rank <= layers[name].max_rank}
    least = cost(ranks, layers)
    assert f"{least:,} parameters" in str(refused.value)
    share = float(re.search(r"at least ([0-9.]+) ", str(refused.value))[1])
    plan = select(kind(keep_parameters=share, round_to=step), layers, values)  # following the advice works
    if ranks:
        assert plan is not None
        assert plan.kept_parameters <= math.ceil(share * plan.dense_parameters)


@given(kind=st.sampled_from([Uniform, Budget, Energy]), problem=cases, step=steps, keep=keeps)
@settings(max_examples=60, deadline=None)
def test_what_a_plan_kept_can_be_asked_for_again(kind, problem, step, keep) -> None:
    """Baselines get the size of another plan: the share kept/dense must not be refused for a rounding error."""
    layers, values = problem
    plan = select(kind(keep_parameters=keep, round_to=step), layers, values)
    assume(plan is not None)
    again = Uniform(keep_parameters=plan.kept_parameters / plan.dense_parameters, round_to=step).select(layers, {})
    assert again.kept_parameters <= plan.kept_parameters


def test_a_share_that_is_a_whole_number_of_parameters_is_that_number() -> None:
    layers, _ = case((9, 11), (7, 13))
    dense = 9 * 11 + 7 * 13
    for count in range(20 + 20, dense + 1):  # some of count / dense · dense come out below count
        assert check_reachable(layers, count / dense, Bounds.of(layers, 1, 1)) == count


@given(problem=cases, keeps=st.lists(keeps, min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_budget_keeps_no_less_gain_for_more_parameters(problem, keeps) -> None:
    layers, values = problem
    gained = []
    for keep in sorted(keeps):
        plan = select(Budget(keep_parameters=keep), layers, values)
        if plan is not None:
            gained.append((gain(plan.ranks, layers, values), plan.kept_parameters))
    for (less, _), (more, _) in itertools.pairwise(gained):
        top = max(float(one[0]) ** 2 for one in values.values())
        assert more >= less - top  # up to the last direction


def gain(ranks: dict[str, int], layers: dict[str, Layer], values: Spectra) -> float:
    """Squared values that stay, all of a dense layer's."""
    return sum(float(one[: ranks.get(name, len(one))].square().sum()) for name, one in values.items())


def brute_force(layers: dict[str, Layer], values: Spectra, budget: float, *, dense: bool) -> float:
    """The largest gain of any choice of ranks (and dense layers) within the budget."""
    options = [[*range(1, one.max_rank + 1), *([None] if dense or not one.max_rank else [])] for one in layers.values()]
    best = -1.0
    for choice in itertools.product(*options):
        ranks = {name: rank for name, rank in zip(layers, choice, strict=True) if rank is not None}
        if cost(ranks, layers) <= budget:
            best = max(best, gain(ranks, layers, values))
    return best


@given(
    sizes=st.lists(st.tuples(st.integers(6, 14), st.integers(6, 14)), min_size=2, max_size=3),
    keep=st.floats(0.3, 0.95),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_budget_is_the_optimum_up_to_the_last_direction(sizes, keep, seed) -> None:
    layers, values = case(*sizes, seed=seed)
    plan = select(Budget(keep_parameters=keep), layers, values)
    assume(plan is not None)
    best = brute_force(layers, values, keep * plan.dense_parameters, dense=False)
    # what is left over could not hold one more direction, and would have gained less than the best that is out
    out = [values[name][rank] for name, rank in plan.ranks.items() if rank < len(values[name])]
    last = max((float(value) ** 2 for value in out), default=0.0)
    widest = max(one.in_features + one.out_features for one in layers.values())
    narrowest = min(one.in_features + one.out_features for one in layers.values())
    assert gain(plan.ranks, layers, values) >= best - last * widest / narrowest - 1e-9


def test_budget_finds_the_brute_force_optimum_where_directions_cost_the_same() -> None:
    for seed in range(20):
        layers, values = case((12, 10), (10, 12), (11, 11), seed=seed)
        for keep in (0.4, 0.55, 0.7):
            plan = Budget(keep_parameters=keep).select(layers, values)
            if plan.notes:
                continue  # a dense layer's last directions come in one piece
            best = brute_force(layers, values, keep * plan.dense_parameters, dense=False)
            assert gain(plan.ranks, layers, values) == pytest.approx(best, rel=1e-12)


def test_budget_compares_squares_per_parameter() -> None:
    """σ² / (I + O) is 1/20 and 9/80; by σ, or without the cost, the order would be another."""
    layers = {"narrow": layer("narrow", 10, 10), "wide": layer("wide", 40, 40)}
    few, more = (torch.arange(10) < 4).float(), (torch.arange(40) < 12).float()
    values = {"narrow": few, "wide": 3 * more}
    plan = Budget(keep_parameters=0.5).select(layers, values)  # 850: one direction for narrow, the rest for wide
    assert plan.ranks == {"narrow": 2, "wide": 10}  # what is left, 30, holds one more of narrow
    values = {"narrow": few, "wide": 1.5 * more}  # 1/20 and 1/36
    assert Budget(keep_parameters=0.3).select(layers, values).ranks == {"wide": 5}


def test_budget_gives_the_ranks_to_the_layer_that_matters() -> None:
    layers, values = case((32, 32), (32, 32))
    values = {"layer0": values["layer0"], "layer1": 100 * values["layer0"]}
    plan = Budget(keep_parameters=0.5).select(layers, values)
    assert plan.ranks["layer0"] < plan.ranks.get("layer1", 32)


@given(problem=cases, share=st.floats(0.05, 0.99))
@settings(max_examples=40, deadline=None)
def test_energy_reaches_its_share_with_the_least_rank(problem, share) -> None:
    layers, values = problem
    plan = select(Energy(share=share), layers, values)
    assume(plan is not None)
    for name, rank in plan.ranks.items():
        squares = values[name].square()
        assert float(squares[:rank].sum()) >= share * float(squares.sum()) * (1 - 1e-12)
        assert float(squares[: rank - 1].sum()) < share * float(squares.sum()) * (1 + 1e-12)
    for name in plan.notes:  # dense because it needs more than the break-even rank
        squares = values[name].square()
        assert float(squares[: layers[name].max_rank].sum()) < share * float(squares.sum()) * (1 + 1e-12)


def test_energy_rounds_up_so_that_the_share_is_reached() -> None:
    layers = {"a": layer("a", 64, 64)}
    values = {"a": torch.ones(64)}
    assert Energy(share=0.25).select(layers, values).ranks == {"a": 16}
    assert Energy(share=0.26, round_to=8).select(layers, values).ranks == {"a": 24}


def test_layer_at_break_even_stays_dense_and_says_so() -> None:
    layers = {"a": layer("a", 16, 16), "b": layer("b", 16, 16)}
    plan = Fixed(patterns={"a": 7, "b": 8}).select(layers, {})  # 8·32 = 16·16: no smaller
    assert plan.ranks == {"a": 7}
    assert plan.notes == {"b": "stays dense: factors of rank 8 would not be smaller"}
    assert plan.kept_parameters == 7 * 32 + 256


def test_nothing_that_shrinks_is_an_error() -> None:
    layers, values = case((16, 16), (8, 8))
    for selector in (Fixed(rank=8), Energy(share=0.999999), Uniform(keep_parameters=1), Budget(keep_parameters=1)):
        with pytest.raises(RecipeError, match="no layer would become smaller"):
            selector.select(layers, {name: torch.ones_like(one) for name, one in values.items()})


def test_fixed_takes_the_first_pattern_that_fits() -> None:
    layers = {name: layer(name, 64, 64) for name in ("h.0.attn.q", "h.0.mlp.up", "h.1.attn.q")}
    plan = Fixed(patterns={"h.1.*": 5, "attn.q": 6}).select(layers, {})
    assert plan.ranks == {"h.0.attn.q": 6, "h.1.attn.q": 5}
    assert plan.notes == {"h.0.mlp.up": "stays dense"}
    assert Fixed(rank=4, patterns={"up": 7}).select(layers, {}).ranks == dict(zip(layers, (4, 7, 4), strict=True))


def test_fixed_refuses_what_cannot_be_meant() -> None:
    layers = {"h.0.attn.q": layer("h.0.attn.q", 12, 20)}
    with pytest.raises(
        RecipeError, match=r"rank of h\.0\.attn\.q is above(?s:.)*got: 13(?s:.)*at most 12; only up to 7"
    ):
        Fixed(rank=13).select(layers, {})
    with pytest.raises(RecipeError, match=r"`attn\.k` matches no target layer(?s:.)*h\.0\.attn\.q"):
        Fixed(rank=2, patterns={"attn.k": 3}).select(layers, {})
    with pytest.raises(ValueError, match="give `rank` or `patterns`"):
        Fixed()
    with pytest.raises(ValueError, match="at least 1"):
        Fixed(patterns={"q": 0})


def test_uniform_gives_each_layer_its_share() -> None:
    layers = {"a": layer("a", 768, 768), "b": layer("b", 3072, 768), "c": layer("c", 768, 3072)}
    plan = Uniform(keep_parameters=0.5).select(layers, {})
    for name, exact in {"a": 192, "b": 307.2, "c": 307.2}.items():
        assert abs(plan.ranks[name] - exact) <= 1
    assert plan.kept_parameters <= 0.5 * plan.dense_parameters < plan.kept_parameters + 768 + 768
    rounded = Uniform(keep_parameters=0.5, round_to=8).select(layers, {})
    for name, exact in {"a": 192, "b": 307.2, "c": 307.2}.items():
        assert rounded.ranks[name] % 8 == 0
        assert abs(rounded.ranks[name] - exact) <= 8
