"""Each method is the best of its rank in its own norm, and methods are one where their statistics agree."""

from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompress.artifacts import LayerStatistics
from lrcompress.errors import NumericalError
from lrcompress.linalg import truncate, weighted_svd
from lrcompress.methods import AbstractMethod, Asvd, Fwsvd, Kron, Method, Svd, SvdLlm

METHODS: list[type[AbstractMethod]] = list(get_args(get_args(Method)[0]))
SHAPES = [(10, 6), (6, 10), (8, 8)]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
TOKENS, SEQUENCES = 60, 12

VARIANTS: dict[str, Any] = {method.model_fields["kind"].default: method for method in METHODS}
VARIANTS["fwsvd-inputs"] = partial(Fwsvd, weigh="inputs")

every_method = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def samples(shape: tuple[int, int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs `[T, I]` and gradients `[T, O]` of very unequal directions, correlated with each other."""
    O, I = shape  # noqa: E741
    x = draw(TOKENS, I, seed=seed) * torch.logspace(-1, 1, I) @ draw(I, I, seed=seed + 1)
    g = draw(TOKENS, O, seed=seed + 2) * torch.logspace(0.5, -1, O) @ draw(O, O, seed=seed + 3)
    return x, g * (x[:, :1].abs() + 0.1)


def statistics(shape: tuple[int, int], *, seed: int = 0) -> LayerStatistics:
    x, g = samples(shape, seed=seed)
    weight_gradients = torch.einsum(
        "sto,sti->soi", g.view(SEQUENCES, -1, g.shape[1]), x.view(SEQUENCES, -1, x.shape[1])
    )
    return LayerStatistics(
        tokens=TOKENS,
        sequences=SEQUENCES,
        input_moment=x.T @ x,
        input_abs_sum=x.abs().sum(0),
        weighted_input_moment=(x * g.square().sum(1, keepdim=True)).T @ x,
        grad_moment=g.T @ g,
        fisher_by_output=weight_gradients.square().sum((0, 2)),
        fisher_by_input=weight_gradients.square().sum((0, 1)),
    )


def damped(matrix: Tensor, share: float) -> Tensor:
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def norm_of(method: AbstractMethod, shape: tuple[int, int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """G `[O, O]` and C `[I, I]` of what a method minimises, tr(G Δ C Δᵀ), from the samples themselves."""
    x, g = samples(shape, seed=seed)
    G, C = torch.eye(shape[0], dtype=torch.float64), torch.eye(shape[1], dtype=torch.float64)
    if isinstance(method, Svd):
        return G, C
    if isinstance(method, Asvd):
        return G, damped(torch.diag(x.abs().mean(0) ** (2 * method.alpha)), method.damping)
    if isinstance(method, SvdLlm):
        return G, damped(sum(torch.outer(row, row) for row in x) / TOKENS, method.damping)
    if isinstance(method, Fwsvd):
        per = TOKENS // SEQUENCES
        squared = sum((g[i : i + per].T @ x[i : i + per]).square() for i in range(0, TOKENS, per)) / SEQUENCES
        if method.weigh == "inputs":
            return G, damped(torch.diag(squared.sum(0)), method.damping)
        return damped(torch.diag(squared.sum(1)), method.damping), C
    assert isinstance(method, Kron), "a method of the union without an oracle here"
    weights = g.square().sum(1)
    C = sum(w * torch.outer(row, row) for w, row in zip(weights, x, strict=True)) / weights.sum()
    G = sum(torch.outer(row, row) for row in g) / SEQUENCES
    return damped(G, method.output_damping), damped(C, method.input_damping)


def error(G: Tensor, C: Tensor, difference: Tensor) -> float:
    return float(torch.trace(G @ difference @ C @ difference.T))


def product(method: AbstractMethod, weight: Tensor, statistics: LayerStatistics, rank: int) -> Tensor:
    factors = truncate(weighted_svd(weight, method.roots(statistics)), rank)
    return factors.B @ factors.A


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_shape
@every_method
def test_weighted_error_is_the_squared_tail(method, shape, dtype) -> None:
    weight = draw(*shape, seed=9).to(dtype)
    spectrum = weighted_svd(weight, method().roots(statistics(shape)))
    G, C = norm_of(method(), shape)
    total = error(G, C, weight.double())
    assert float(spectrum.values.square().sum()) == pytest.approx(total, rel=1e-9)
    for rank in range(1, min(shape) + 1):
        factors = truncate(spectrum, rank)
        difference = weight.double() - factors.B @ factors.A
        tail = float(spectrum.values[rank:].square().sum())
        assert error(G, C, difference) == pytest.approx(tail, rel=1e-6, abs=1e-10 * total)
    assert torch.allclose(difference, torch.zeros_like(difference), atol=1e-8)  # full rank is the weight


@every_shape
@every_method
def test_no_other_pair_of_the_rank_is_better_in_the_methods_own_norm(method, shape) -> None:
    weight, found = draw(*shape, seed=9), statistics(shape)
    G, C = norm_of(method(), shape)
    for rank in (1, 3, min(shape) - 1):
        own = error(G, C, weight - product(method(), weight, found, rank))
        for other in METHODS:
            assert error(G, C, weight - product(other(), weight, found, rank)) >= own * (1 - 1e-9)
        for seed in range(20):
            A = draw(rank, shape[1], seed=seed)
            B = weight @ C @ A.T @ torch.linalg.inv(A @ C @ A.T)  # the best B for this A, whatever G is
            assert error(G, C, weight - B @ A) >= own
            factors = truncate(weighted_svd(weight, method().roots(found)), rank)
            A = factors.A + 1e-3 * draw(*factors.A.shape, seed=seed)  # nor is a neighbour
            B = factors.B + 1e-3 * draw(*factors.B.shape, seed=seed + 100)
            assert error(G, C, weight - B @ A) >= own


@every_method
def test_error_falls_with_rank(method) -> None:
    shape = (12, 9)
    weight, found = draw(*shape, seed=5), statistics(shape)
    G, C = norm_of(method(), shape)
    errors = [error(G, C, weight - product(method(), weight, found, rank)) for rank in range(1, 10)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


def identity_statistics(shape: tuple[int, int], **changes: Tensor) -> LayerStatistics:
    """As if inputs and gradients were white, of different sizes and counts."""
    O, I = shape  # noqa: E741
    eye = {"input_moment": 7.0 * torch.eye(I), "weighted_input_moment": 3.0 * torch.eye(I)}
    eye |= {"grad_moment": 5.0 * torch.eye(O), "input_abs_sum": 2.0 * torch.ones(I)}
    eye |= {"fisher_by_output": 9.0 * torch.ones(O), "fisher_by_input": 9.0 * torch.ones(I)}
    return LayerStatistics(tokens=11, sequences=4, **eye | changes)


@every_shape
@every_method
def test_white_statistics_make_every_method_plain_svd(method, shape) -> None:
    weight, white = draw(*shape, seed=9), identity_statistics(shape)
    for rank in range(1, min(shape) + 1):
        assert torch.allclose(product(method(), weight, white, rank), product(Svd(), weight, white, rank), atol=1e-8)


@every_shape
def test_asvd_with_alpha_zero_is_svd(shape) -> None:
    weight, found = draw(*shape, seed=9), statistics(shape)
    for rank in range(1, min(shape) + 1):
        plain = product(Svd(), weight, found, rank)
        assert torch.allclose(product(Asvd(alpha=0), weight, found, rank), plain, atol=1e-8)
        if rank < min(shape):
            assert not torch.allclose(product(Asvd(), weight, found, rank), plain, atol=1e-3)


@every_shape
def test_kron_with_white_gradients_is_svd_llm_with_the_same_moment(shape) -> None:
    weight, moment = draw(*shape, seed=9), statistics(shape).input_moment
    found = identity_statistics(shape, input_moment=moment, weighted_input_moment=4.0 * moment)
    for rank in range(1, min(shape) + 1):
        whitened = product(SvdLlm(), weight, found, rank)
        assert torch.allclose(product(Kron(), weight, found, rank), whitened, atol=1e-7)
        if rank < min(shape):
            assert not torch.allclose(product(Svd(), weight, found, rank), whitened, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
@every_method
def test_scaling_of_statistics_does_not_matter(method, scale) -> None:
    shape = (9, 7)
    weight, found = draw(*shape, seed=9), statistics(shape)
    sums = {key: scale * value for key, value in vars(found).items() if isinstance(value, Tensor)}
    scaled = LayerStatistics(tokens=found.tokens * 3, sequences=found.sequences * 5, **sums)
    for rank in (1, 4, 7):
        assert torch.allclose(
            product(method(), weight, scaled, rank), product(method(), weight, found, rank), atol=1e-7
        )


def test_values_of_kron_estimate_twice_the_loss_increase() -> None:
    """Softmax of two classes: gradients have one direction, so the Kronecker product is the Fisher exactly."""
    weight, x = draw(2, 5, seed=1), draw(400, 5, seed=2)
    p = (x @ weight.T).softmax(1)
    # expectation over the model's own labels in place of samples: g = p − onehot(y), with probability p_y
    pairs = [(p - F.one_hot(torch.tensor(y), 2), p[:, y]) for y in range(2)]
    grad_moment = sum((g * q[:, None]).T @ g for g, q in pairs)
    weights = sum(g.square().sum(1) * q for g, q in pairs)
    found = LayerStatistics(400, 400, weighted_input_moment=(x * weights[:, None]).T @ x, grad_moment=grad_moment)
    method = Kron(input_damping=0, output_damping=1e-12)
    difference = draw(2, 5, seed=3)
    estimate = float(weighted_svd(difference, method.roots(found)).values.square().sum())
    fisher = torch.stack(
        [torch.stack([torch.outer(a, b).flatten() for a, b in zip(g, x, strict=True)]) for g, _ in pairs]
    )
    exact = sum(q @ (rows @ difference.flatten()).square() for rows, (_, q) in zip(fisher, pairs, strict=True)) / 400
    assert estimate == pytest.approx(float(exact), rel=1e-6)
    small = 1e-3 * difference
    log_p, log_q = p.log(), (x @ (weight - small).T).log_softmax(1)
    increase = float((p * (log_p - log_q)).sum(1).mean())
    assert increase == pytest.approx(0.5 * 1e-6 * estimate, rel=1e-2)


@pytest.mark.parametrize("method", [method for method in METHODS if method.needs], ids=lambda method: method.__name__)
def test_missing_statistics_are_refused_by_name(method) -> None:
    found = vars(statistics((4, 3)))
    for name in method.needs:
        with pytest.raises(NumericalError, match=name):
            method().roots(LayerStatistics(**found | {name: None}))
    unneeded = {key: None for key, value in found.items() if isinstance(value, Tensor) and key not in method.needs}
    method().roots(LayerStatistics(**found | unneeded))


def test_only_kron_claims_to_estimate_the_loss() -> None:
    assert [method for method in METHODS if method.estimates_loss] == [Kron]
