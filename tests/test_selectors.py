"""What each searching or learning selector finds in a world whose answer is known, and what it refuses."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_ranks import case, cost, layer, select
from torch import Tensor
from world import World

from lrcompress.artifacts import Factors, Layer
from lrcompress.errors import RecipeError
from lrcompress.ranks import Budget, Energy, Fixed, Frontier, RandomSearch, RankLoss, Subspace, Target, Uniform
from lrcompress.ranks.bounds import Bounds
from lrcompress.ranks.context import LearningRun
from lrcompress.ranks.rank_loss import elbow, tried_rank
from lrcompress.seeds import generator

SHAPES = ((40, 40), (64, 32), (32, 64))


def spiked(counts: Mapping[str, int], layers: Mapping[str, Layer], floor: float = 0.01) -> dict[str, Tensor]:
    """Spectra of as many ones as each layer needs, and a low floor."""
    values = {}
    for name, one in layers.items():
        size = min(one.in_features, one.out_features)
        values[name] = torch.where(torch.arange(size) < counts[name], 1.0, floor).double()
        values[name] *= 1 + 1e-6 * torch.arange(size, 0, -1)
    return values


# bounds -----------------------------------------------------------------------------------------------------------


@given(
    keep=st.floats(0.2, 0.9), step=st.sampled_from([1, 4]), low=st.integers(1, 12), high=st.integers(12, 30),
    pin=st.integers(1, 32), seed=st.integers(0, 20),
)  # fmt: skip
def test_floors_ceilings_and_pins_hold_within_the_budget(keep, step, low, high, pin, seed) -> None:
    layers, values = case(*SHAPES, seed=seed)
    selector = Budget(
        keep_parameters=keep, round_to=step, floor={"layer0": low}, ceiling={"layer1": high}, pinned={"layer2": pin}
    )
    plan = select(selector, layers, values)
    assume(plan is not None)
    assert plan.kept_parameters == cost(plan.ranks, layers) <= keep * plan.dense_parameters
    assert plan.ranks.get("layer0", 40) >= low
    assert plan.ranks["layer1"] <= high if high <= layers["layer1"].max_rank else True
    assert plan.ranks.get("layer2", 32) == (pin if pin <= layers["layer2"].max_rank else 32)


def test_a_layer_pinned_dense_stays_dense_and_counts() -> None:
    layers, values = case(*SHAPES)
    plan = Budget(keep_parameters=0.6, pinned={"layer1": "dense"}).select(layers, values)
    assert "layer1" in plan.notes
    assert plan.kept_parameters <= 0.6 * plan.dense_parameters
    with pytest.raises(RecipeError, match="smallest ranks need"):
        Budget(keep_parameters=0.2, pinned={"*": "dense"}).select(layers, values)


def test_the_first_pattern_that_fits_counts() -> None:
    layers = {name: layer(name, 40, 40) for name in ("h.0.q", "h.1.q")}
    bounds = Bounds.of(layers, 1, 1, floor={"h.1.*": 7, "q": 3})
    assert bounds.least == {"h.0.q": 3, "h.1.q": 7}


@pytest.mark.parametrize("selector", [Uniform, Energy, Budget])
@given(least=st.integers(1, 24), keep=st.floats(0.1, 0.95), step=st.sampled_from([1, 8]))
def test_no_layer_gets_less_than_the_minimum_rank(selector: Any, least: int, keep: float, step: int) -> None:
    layers, values = case((40, 40), (64, 32), (10, 50))
    try:
        plan = selector(keep_parameters=keep, min_rank=least, round_to=step).select(layers, values)
    except RecipeError:
        return
    assert all(rank >= least for rank in plan.ranks.values())
    assert plan.kept_parameters <= keep * plan.dense_parameters
    if least > layers["layer2"].max_rank:
        assert "layer2" in plan.notes  # it would not shrink at that rank


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"floor": {"nowhere": 3}}, r"ranks.floor: `nowhere` matches no target layer"),
        ({"pinned": {"layer0": 99}}, r"rank of layer0 is above the layer's(?s:.)*got: 99"),
        ({"floor": {"layer0": 12}, "ceiling": {"layer0": 5}}, r"least rank of layer0 is above its ceiling"),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(keys: dict[str, Any], message: str) -> None:
    layers, values = case(*SHAPES)
    with pytest.raises(RecipeError, match=message):
        Budget(keep_parameters=0.5, **keys).select(layers, values)


def test_ranks_below_1_are_refused() -> None:
    with pytest.raises(ValidationError, match="ceiling: ranks must be at least 1"):
        Budget(keep_parameters=0.5, ceiling={"*": 0})
    with pytest.raises(ValidationError, match="min_rank is 9"):
        Fixed(rank=5, min_rank=9)


# energy -----------------------------------------------------------------------------------------------------------


@given(keep=st.floats(0.1, 0.9), seed=st.integers(0, 30))
def test_energy_within_a_budget_gives_each_layer_the_same_share_up_to_a_direction(keep: float, seed: int) -> None:
    layers, values = case(*SHAPES, seed=seed, decay=0.9)
    world = World(layers, values)
    try:
        plan = Energy(keep_parameters=keep).select(layers, values, world)
    except RecipeError:
        return
    shares = {name: values[name].square().cumsum(0) / values[name].square().sum() for name in layers}
    reached = [shares[name][rank - 1].item() for name, rank in plan.ranks.items()]
    # at most one step above the common threshold: what bisection leaves of the budget
    before = [shares[name][rank - 3].item() for name, rank in plan.ranks.items() if rank > 2]
    assert min(reached) >= max(before, default=0.0) - 1e-9
    assert "keeping" in world.notes[0]


def test_energy_takes_a_share_or_a_budget() -> None:
    with pytest.raises(ValidationError, match="not both"):
        Energy(share=0.9, keep_parameters=0.5)
    layers, values = case(*SHAPES)
    assert Energy().select(layers, values) == Energy(share=0.95).select(layers, values)


# rank loss --------------------------------------------------------------------------------------------------------


def test_rank_loss_finds_the_ranks_that_the_weights_have() -> None:
    layers, _ = case((40, 40), (48, 48))
    needed = {"layer0": 4, "layer1": 12}
    values = spiked(needed, layers, floor=0.001)
    world = World(layers, values)
    plan = RankLoss(tolerance=0.02, shares=(0.05, 0.2, 0.5, 1.0), curve="optimum").select(layers, values, world)
    assert plan.ranks == needed
    record = world.records["rank_loss"]["layer1"]
    assert record["ranks"] == tuple(tried_rank(layers["layer1"], share) for share in (0.05, 0.2, 0.5, 1.0))
    assert record["optimum"][0] == pytest.approx(1 - record["ranks"][0] / 12, abs=1e-3)


def test_the_elbow_of_a_learned_curve_is_where_it_stops_falling() -> None:
    layers, _ = case((40, 40), (48, 48))
    values = spiked({"layer0": 4, "layer1": 12}, layers, floor=0.001)
    world = World(layers, values)
    plan = RankLoss(shares=(0.05, 0.1, 0.2, 0.5, 1.0)).select(layers, values, world)
    for name, needed in (("layer0", 4), ("layer1", 12)):
        tried = world.records["rank_loss"][name]["ranks"]
        assert plan.ranks[name] == min(rank for rank in tried if rank >= needed)  # linear between those tried


@given(corner=st.integers(2, 18))
def test_the_elbow_is_the_corner_of_two_lines(corner: int) -> None:
    errors = torch.cat([torch.linspace(1, 0.05, corner), torch.linspace(0.05, 0.0, 21 - corner)[1:]]).double()
    assert elbow(errors) == corner


def test_a_rank_loss_that_does_not_fall_is_refused() -> None:
    layers, values = case((40, 40), (48, 48))

    def nothing(name: str, rank: int, seed: int) -> Factors:
        one = layers[name]
        return Factors(torch.zeros(rank, one.in_features), torch.zeros(one.out_features, rank), None)

    world = World(layers, values, teach=nothing)
    with pytest.raises(RecipeError, match=r"does not fall(?s:.)*at most 0\.000(?s:.)*ranks\.curve: optimum"):
        RankLoss(tolerance=0.1).select(layers, values, world)
    assert set(world.records["rank_loss"]) == set(layers)  # what was measured is there all the same


def test_rank_loss_within_a_budget_is_the_least_tolerance_that_fits() -> None:
    layers, values = case(*SHAPES, decay=0.9)
    world = World(layers, values)
    plan = RankLoss(keep_parameters=0.4, curve="optimum").select(layers, values, world)
    assert plan.kept_parameters <= 0.4 * plan.dense_parameters < plan.kept_parameters + 40 + 40
    tolerance = float(world.notes[-1].rpartition(" ")[2].rstrip("."))
    looser = RankLoss(tolerance=tolerance * 1.01, curve="optimum").select(layers, values, World(layers, values))
    tighter = RankLoss(tolerance=tolerance * 0.9, curve="optimum").select(layers, values, World(layers, values))
    assert looser.kept_parameters <= 0.4 * plan.dense_parameters < tighter.kept_parameters


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tolerance": 0.1, "keep_parameters": 0.5}, "not both"),
        ({"shares": (0.1, 0.5)}, "at least three"),
        ({"shares": (0.5, 0.1, 1.0)}, "rising"),
        ({"shares": (0.1, 0.5, 1.5)}, "at most 1"),
    ],
)
def test_rank_loss_settings_that_make_no_sense(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RankLoss(**keys)


def test_rank_loss_learns_all_layers_at_once_one_run_a_rank() -> None:
    layers, _ = case(*SHAPES)
    runs = RankLoss(shares=(0.1, 0.5, 1.0)).learning_runs(layers, 3)
    assert [set(run.ranks) for run in runs] == [set(layers)] * 3
    assert {run.seed for run in runs} == {3}
    assert runs[2].ranks["layer0"] == layers["layer0"].max_rank == 19
    assert RankLoss(curve="optimum").learning_runs(layers, 3) == ()


# random search ----------------------------------------------------------------------------------------------------


def searched(**keys: Any) -> RandomSearch:
    return RandomSearch(**{"keep_parameters": 0.4, "trials": 30} | keys)


@pytest.mark.parametrize("per", ["layer", "role", "group", "block"])
@pytest.mark.parametrize("start", ["uniform", "budget"])
def test_a_search_scores_plans_of_one_size_and_takes_the_best(start: str, per: str) -> None:
    layers, values = case(*SHAPES, decay=0.9)
    world = World(layers, values)
    plan = searched(start=start, per=per).select(layers, values, world)
    scores = [World(layers, values).score(one).kl for one, _ in world.scored]
    assert (len({repr(one) for one, _ in world.scored}) > 1) == (per in ("layer", "role"))  # one group, one block
    assert len(scores) == 30
    assert plan == world.scored[scores.index(min(scores))][0]
    for one, _ in world.scored:
        assert one.kept_parameters <= 0.4 * one.dense_parameters < one.kept_parameters + 2 * 104
    first = (Uniform if start == "uniform" else Budget)(keep_parameters=0.4).select(layers, values)
    assert world.scored[0][0] == first
    table = world.records["trials"]["table"]
    assert [row["kl"] for row in table] == scores
    assert table[world.records["trials"]["chosen"]]["ranks"] == plan.ranks
    assert world.counted[-1][:3] == ("trials", 30, 30)


def test_a_search_from_uniform_ranks_finds_a_better_plan_where_layers_differ() -> None:
    layers, _ = case((40, 40), (48, 48))
    values = spiked({"layer0": 3, "layer1": 20}, layers)
    world = World(layers, values)
    plan = searched(spread=4.0).select(layers, values, world)
    assert world.score(plan).kl < 0.7 * kl_of_start(world)


def kl_of_start(world: World) -> float:
    return World(world.layers, world.values).score(world.scored[0][0]).kl or 0.0


def test_a_search_is_drawn_by_the_seed() -> None:
    layers, values = case(*SHAPES)
    plans = {}
    for seed in (0, 0, 1):
        world = World(layers, values, seed=seed)
        searched().select(layers, values, world)
        plans.setdefault(seed, []).append([plan for plan, _ in world.scored])
    assert plans[0][0] == plans[0][1]
    assert plans[0][0] != plans[1][0]


def test_the_factors_are_log_uniform() -> None:
    layers = {f"layer{i}": layer(f"layer{i}", 400, 400) for i in range(60)}
    values = {name: torch.ones(400) for name in layers}
    world = World(layers, values)
    searched(trials=40, spread=3.0).select(layers, values, world)
    ratios = []
    for plan, _ in world.scored[1:]:
        ranks = torch.tensor([plan.ranks.get(name, 200) for name in layers]).double().log()
        ratios.append(ranks - ranks.mean())
    drawn = torch.stack(ratios)
    width = 2 * torch.tensor(3.0).log().item()
    assert drawn.std().item() == pytest.approx(width / 12**0.5, rel=0.08)
    assert (drawn.max() - drawn.min()).item() <= width * 1.15


def test_layers_of_one_role_share_a_factor() -> None:
    layers = {f"h.{i}.{role}": layer(f"h.{i}.{role}", 64, 64) for i in range(3) for role in ("q", "up")}
    values = {name: torch.ones(64) for name in layers}
    world = World(layers, values)
    searched(per="role", trials=10).select(layers, values, world)
    for plan, _ in world.scored:
        for role in ("q", "up"):
            ranks = [plan.ranks[f"h.{i}.{role}"] for i in range(3)]
            assert max(ranks) - min(ranks) <= 1  # what rounding leaves


def test_finalists_are_chosen_after_their_recovery() -> None:
    layers, values = case(*SHAPES, decay=0.9)

    class Turned(World):
        """A recovery turns the order round."""

        def score(self, plan: Any, *, steps: int = 0) -> Any:
            found = super().score(plan, steps=0)
            self.scored[-1] = (plan, steps)
            return type(found)(100 - found.kl, found.loss, found.accuracy) if steps else found

    world = Turned(layers, values)
    plan = searched(finalists=3, recovery_steps=5).select(layers, values, world)
    trained = [one for one, steps in world.scored if steps == 5]
    assert len(trained) == 3
    scores = {repr(one): World(layers, values).score(one).kl for one, _ in world.scored}
    assert plan == max(trained, key=lambda one: scores[repr(one)])
    assert sorted(scores.values())[:3] == sorted(scores[repr(one)] for one in trained)


def test_accuracy_is_made_as_large_as_it_gets() -> None:
    layers, values = case(*SHAPES, decay=0.9)
    by_kl, by_accuracy = World(layers, values), World(layers, values)
    assert searched().select(layers, values, by_kl) == searched(metric="accuracy").select(layers, values, by_accuracy)
    assert "%" in by_accuracy.notes[-1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"finalists": 3}, "belong together"), ({"finalists": 31, "recovery_steps": 2}, "only 30 trials")],
)
def test_finalists_need_a_recovery(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        searched(**keys)


# subspaces --------------------------------------------------------------------------------------------------------


def planted(layers: Mapping[str, Layer], shared: Mapping[str, int]) -> Any:
    """Runs that agree in as many directions as are shared, strongly, and in nothing else."""

    def teach(name: str, rank: int, seed: int) -> Factors:
        one = layers[name]
        both = torch.randn(shared[name], one.in_features, generator=generator(9, name), dtype=torch.float64)
        own = torch.randn(rank - shared[name], one.in_features, generator=generator(seed, name), dtype=torch.float64)
        A = torch.cat([30 * torch.linalg.qr(both.T).Q.T, 0.1 * own])
        B = torch.randn(one.out_features, rank, generator=generator(seed, "B", name), dtype=torch.float64)
        return Factors(A, B, None)

    return teach


def test_subspace_finds_what_two_runs_share() -> None:
    layers = {"a": layer("a", 96, 96), "b": layer("b", 96, 120)}
    values = {name: torch.ones(96).double() for name in layers}
    world = World(layers, values, teach=planted(layers, {"a": 5, "b": 20}))
    plan = Subspace(excess=0.5).select(layers, values, world)
    record = world.records["subspace"]
    for name, shared in (("a", 5), ("b", 20)):
        low, high = record[name]["range"]
        assert low <= shared <= high < 2 * shared
        assert low <= plan.ranks[name] <= high
        assert len(record[name]["phi"]) == len(record[name]["level"]) == 48


def test_subspace_looks_at_the_factor_that_it_is_told_to() -> None:
    layers = {"a": layer("a", 96, 96)}
    values = {"a": torch.ones(96).double()}

    def turned(name: str, rank: int, seed: int) -> Factors:
        pair = planted(layers, {"a": 5})(name, rank, seed)
        return Factors(pair.B.T, pair.A.T, None)

    with pytest.raises(RecipeError, match="φ of A shows nothing in 1 of 1 layers"):
        Subspace(excess=0.5).select(layers, values, World(layers, values, teach=turned))
    plan = Subspace(excess=0.5, factor="B").select(layers, values, World(layers, values, teach=turned))
    assert plan.ranks["a"] <= 10


def test_subspace_says_that_nothing_is_shared_and_does_not_guess() -> None:
    layers = {"a": layer("a", 96, 96), "b": layer("b", 96, 96)}
    values = {name: torch.ones(96).double() for name in layers}
    nothing = planted(layers, {"a": 0, "b": 0})
    for unclear in ("stop", "dense", "uniform"):  # no layer's range that another could follow
        with pytest.raises(RecipeError, match=r"shows nothing in 2 of 2 layers(?s:.)*first a"):
            Subspace(unclear=unclear).select(layers, values, World(layers, values, teach=nothing))
    some = planted(layers, {"a": 6, "b": 0})
    with pytest.raises(RecipeError, match=r"shows nothing in 1 of 2 layers(?s:.)*first b"):
        Subspace().select(layers, values, World(layers, values, teach=some))
    world = World(layers, values, teach=some)
    assert set(Subspace(unclear="dense").select(layers, values, world).ranks) == {"a"}
    assert "stay dense" in world.notes[0]
    both = Subspace(unclear="uniform").select(layers, values, World(layers, values, teach=some))
    assert both.ranks["a"] == both.ranks["b"]


def test_subspace_scales_to_a_budget() -> None:
    layers = {"a": layer("a", 96, 96), "b": layer("b", 96, 96)}
    values = {name: torch.ones(96).double() for name in layers}
    teach = planted(layers, {"a": 5, "b": 20})
    for keep in (0.1, 0.6):
        plan = Subspace(excess=0.5, keep_parameters=keep).select(layers, values, World(layers, values, teach=teach))
        assert plan.kept_parameters <= keep * plan.dense_parameters < plan.kept_parameters + 2 * 192
        assert plan.ranks["a"] < plan.ranks.get("b", 96)


def test_equal_seeds_and_tiny_layers_are_refused() -> None:
    with pytest.raises(ValidationError, match="seeds must differ"):
        Subspace(seeds=(3, 3))
    layers = {"a": layer("a", 96, 96), "head": layer("head", 3, 96)}
    with pytest.raises(RecipeError, match=r"too small to compare(?s:.)*head, 3 × 96(?s:.)*targets.exclude"):
        Subspace().learning_runs(layers, 0)


def test_the_two_runs_are_at_half_the_full_rank() -> None:
    layers = {"a": layer("a", 40, 64), "b": layer("b", 33, 20)}
    first, second = Subspace(seeds=(2, 5)).learning_runs(layers, 10)
    assert first == LearningRun({"a": 20, "b": 10}, Subspace().learning, 12)
    assert second.seed == 15


# target and frontier ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["budget", "uniform"])
@pytest.mark.parametrize("metric", ["kl", "loss", "accuracy"])
def test_target_is_the_smallest_size_that_keeps_the_bound(metric: Any, allocation: Any) -> None:
    layers, values = case(*SHAPES, decay=0.9)
    world = World(layers, values)
    rise = 0.2 if metric == "accuracy" else 0.5
    selector = Target(rise=rise, metric=metric, allocation=allocation, precision=0.002)
    plan = selector.select(layers, values, world)
    dense = world.dense_score().cost(metric)
    assert world.score(plan).cost(metric) - dense <= rise
    kind = Budget if allocation == "budget" else Uniform
    smaller = kind(keep_parameters=plan.kept_parameters / plan.dense_parameters - 0.03).select(layers, values)
    assert world.score(smaller).cost(metric) - dense > rise
    record = world.records["sizes"]
    sizes = [row["kept_parameters"] for row in record["table"]]
    assert sizes == sorted(sizes)
    assert record["table"][record["chosen"]]["ranks"] == plan.ranks
    assert len(world.scored) - 2 <= 14  # bisection


def test_a_relative_rise_is_a_share_of_the_dense_value() -> None:
    layers, values = case(*SHAPES, decay=0.9)
    absolute = Target(rise=0.3).select(layers, values, World(layers, values))
    assert Target(rise=0.3, relative=True).select(layers, values, World(layers, values)) == absolute  # dense loss is 1


def test_a_rise_that_no_size_keeps_names_the_least_that_one_does() -> None:
    layers, _ = case(*SHAPES)
    values = {name: torch.ones(min(one.in_features, one.out_features)).double() for name, one in layers.items()}
    with pytest.raises(RecipeError, match="no size keeps the rise") as refused:
        Target(rise=0.5, metric="kl").select(layers, values, World(layers, values))
    least = float(str(refused.value).split("at least ")[1].split(",")[0])
    plan = Target(rise=least * 1.001, metric="kl").select(layers, values, World(layers, values))
    assert World(layers, values).score(plan).kl == pytest.approx(least, rel=1e-3)


def test_a_rise_that_every_size_keeps_gives_the_smallest_model() -> None:
    layers, values = case(*SHAPES)
    world = World(layers, values)
    plan = Target(rise=1e9, metric="kl").select(layers, values, world)
    assert plan.ranks == dict.fromkeys(layers, 1)
    assert "smallest" in world.notes[0]


def test_a_relative_rise_of_kl_is_refused() -> None:
    with pytest.raises(ValidationError, match="dense model's is 0"):
        Target(rise=0.1, relative=True, metric="kl")


def test_a_frontier_is_the_budgets_own_plans() -> None:
    layers, values = case(*SHAPES)
    frontier = Frontier(keep_parameters=(0.2, 0.5, 0.8), choose=0.5, recover=(0.2,))
    assert frontier.select(layers, values) == Budget(keep_parameters=0.5).select(layers, values)
    for share in frontier.others:
        assert frontier.at(share, layers, values) == Budget(keep_parameters=share).select(layers, values)
    assert frontier.others == (0.8, 0.2)
    assert (frontier.kept_share, frontier.least_share) == (0.5, 0.2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"choose": 0.3}, "choose and recover name shares"),
        ({"choose": 0.5, "recover": (0.4,)}, "got 0.4"),
        ({"choose": 0.5, "keep_parameters": (0.5, 0.5)}, "different shares"),
        ({"choose": 0.5, "keep_parameters": (0.5, 1.5)}, "at most 1"),
    ],
)
def test_a_frontier_of_budgets_that_make_no_sense(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Frontier(**{"keep_parameters": (0.2, 0.5)} | keys)


def test_without_a_run_around_it_a_selector_says_what_it_lacks() -> None:
    layers, values = case(*SHAPES)
    for selector in (searched(), Target(rise=0.1), Subspace(), RankLoss()):
        with pytest.raises(RecipeError, match=r"no run around it(?s:.)*lrcompress\.run"):
            selector.select(layers, values)
