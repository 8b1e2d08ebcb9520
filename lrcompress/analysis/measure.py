"""The numbers of an analysis: each layer by itself, then every selector at one size."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lrcompress.analysis.schema import (
    AmplificationRow,
    EffectiveRank,
    LayerAnalysis,
    RankCurve,
    SelectorRow,
    Similarity,
)
from lrcompress.artifacts import Factors, Layer, LayerStatistics, RankPlan, Spectrum
from lrcompress.errors import RecipeError
from lrcompress.linalg import expansion_errors, relative_error, sampled_ranks, singular_values, tail_shares
from lrcompress.ranks import AbstractSelector, RankLoss, Subspace
from lrcompress.ranks.context import AbstractContext
from lrcompress.subspaces import amplification, evidence, right_basis, similarity

MAP_RANKS = 32
"""Rows and columns of a φ map."""

Plans = Mapping[str, RankPlan | None]


def measure_layers(
    layers: Mapping[str, Layer],
    context: AbstractContext,
    statistics: Callable[[str], LayerStatistics],
    spectrum: Callable[[str, str], Spectrum],
    methods: tuple[str, ...],
    selectors: Mapping[str, AbstractSelector],
    plans: Plans,
) -> list[LayerAnalysis]:
    """One value a layer; `spectrum(method, layer)` is read for one layer at a time."""
    rank_loss, subspace = selectors["rank_loss"], selectors["subspace"]
    assert isinstance(rank_loss, RankLoss)
    assert isinstance(subspace, Subspace)
    tried = [(run.ranks, context.learned(run)) for run in rank_loss.learning_runs(layers, context.seed)]
    first, second = (context.learned(run) for run in subspace.learning_runs(layers, context.seed))
    found = []
    for number, (name, layer) in enumerate(layers.items(), 1):
        weight, moments = context.weight(name).double(), statistics(name)
        spectra = {method: _on_cpu(spectrum(method, name)) for method in methods}
        squares = singular_values(weight).square()
        own = next(iter(methods))
        found.append(
            LayerAnalysis(
                name=name, role=layer.role, group=layer.group, block=layer.block, out_features=layer.out_features,
                in_features=layer.in_features, max_rank=layer.max_rank, weight=effective_rank(squares),
                inputs=effective_rank(_eigenvalues(moments.input_moment)),
                curvature=effective_rank(_eigenvalues(moments.grad_moment)),
                methods={method: effective_rank(one.values.square()) for method, one in spectra.items()},
                spectra={"weight": _curve(tail_shares(squares.sqrt()))}
                | {method: _curve(tail_shares(one.values)) for method, one in spectra.items()},
                rank_loss={
                    "optimum": _curve(tail_shares(squares.sqrt())),
                    own: _curve(expansion_errors(weight, spectra[own])),
                    "learned": _learned_curve(weight, name, tried),
                },
                similarity={
                    "A": _similarity(first[name].A, second[name].A, subspace),
                    "B": _similarity(first[name].B.T, second[name].B.T, subspace),
                },
                amplification=_amplification(weight, first[name]),
                kept={kind: plan.ranks.get(name) for kind, plan in plans.items() if plan is not None},
            )
        )  # fmt: skip
        context.progress("layers", number, len(layers))
    return found


def compare_selectors(
    layers: Mapping[str, Layer],
    values: Mapping[str, Tensor],
    selectors: Mapping[str, AbstractSelector],
    context: Callable[[], tuple[AbstractContext, list[str]]],
    *,
    scored: bool,
) -> tuple[list[SelectorRow], dict[str, RankPlan | None]]:
    """Each selector's plan and its validation scores; one that refuses is a row that says why."""
    rows, plans = [], {}
    for name, selector in selectors.items():
        bench, notes = context()
        began = time.perf_counter()
        try:
            plans[name] = plan = selector.select(layers, values, bench)
        except RecipeError as error:
            plans[name] = None
            reason = error.what if error.allowed is None else f"{error.what} (possible: {error.allowed})"
            rows.append(SelectorRow(name=name, refused=reason, seconds=time.perf_counter() - began))
            continue
        finally:
            bench.close()
        seconds = time.perf_counter() - began
        score = vars(bench.score(plan)) if scored else {}
        share = plan.kept_parameters / plan.dense_parameters
        rows.append(SelectorRow(name=name, kept_share=share, notes=notes, seconds=seconds, **score))
    return rows, plans


def effective_rank(squares: Tensor) -> EffectiveRank:
    """Of squared singular values or of a moment's eigenvalues `[K]`, in any order."""
    ordered = squares.double().clamp_min(0).sort(descending=True).values
    total = ordered.sum()
    if total <= 0:
        return EffectiveRank(full=len(ordered), entropy=0, stable=0, share_90=0, share_95=0, share_99=0)
    shares = ordered / total
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    held = shares.cumsum(0)
    least = {level: min(int((held < level / 100).sum()) + 1, len(held)) for level in (90, 95, 99)}
    return EffectiveRank(
        full=len(ordered), entropy=entropy.exp().item(), stable=(total / ordered[0]).item(),
        share_90=least[90], share_95=least[95], share_99=least[99],
    )  # fmt: skip


def _on_cpu(one: Spectrum) -> Spectrum:
    """Where weights and learned pairs are."""
    return Spectrum(one.out_basis.cpu(), one.values.cpu(), one.in_basis.cpu(), one.added)


def _eigenvalues(moment: Tensor | None) -> Tensor:
    assert moment is not None  # the methods together need every moment
    return torch.linalg.eigvalsh(moment.double())


def _curve(values: Tensor) -> RankCurve:
    """At most 64 of the values, `values[r − 1]` at rank r."""
    ranks = sampled_ranks(len(values))
    return RankCurve(ranks=ranks, values=[_short(values[rank - 1].item()) for rank in ranks])


def _learned_curve(
    weight: Tensor, name: str, tried: list[tuple[Mapping[str, int], Mapping[str, Factors]]]
) -> RankCurve:
    errors = {ranks[name]: _short(relative_error(weight, pairs[name])) for ranks, pairs in tried}
    return RankCurve(ranks=list(errors), values=list(errors.values()))


def _similarity(first: Tensor, second: Tensor, settings: Subspace) -> Similarity:
    phi = similarity(right_basis(first), right_basis(second))
    found = evidence(phi, first.shape[1])
    ranks = sampled_ranks(len(phi), MAP_RANKS)
    chosen = torch.tensor(ranks) - 1
    return Similarity(
        ranks=ranks,
        map=[[_short(value) for value in row] for row in phi[chosen][:, chosen].tolist()],
        diagonal=[_short(value) for value in found.phi[chosen].tolist()],
        level=[_short(value) for value in found.level[chosen].tolist()],
        deviation=[_short(value) for value in found.deviation[chosen].tolist()],
        range=found.range(sigmas=settings.sigmas, excess=settings.excess),
    )


def _amplification(weight: Tensor, pair: Factors) -> list[AmplificationRow]:
    ranks = sorted({min(rank, pair.A.shape[0]) for rank in (4, 16, pair.A.shape[0])})
    found = [amplification(weight, pair.A, pair.B, rank) for rank in ranks]
    return [
        AmplificationRow(
            rank=one.rank, learned=one.learned, in_learned=one.in_learned, in_own=one.in_own,
            in_random=one.in_random, factor=one.factor,
        )
        for one in found
    ]  # fmt: skip


def _short(value: float) -> float:
    """Six significant digits: enough for a curve, and a third of the file."""
    return float(f"{value:.6g}")
