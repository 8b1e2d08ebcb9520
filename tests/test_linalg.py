"""Roots, the weighted SVD and its truncation against dense decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompress.artifacts import Factors
from lrcompress.errors import NumericalError
from lrcompress.linalg import (
    Root,
    Roots,
    diagonal_root,
    expansion_errors,
    psd_root,
    relative_error,
    sampled_ranks,
    singular_values,
    tail_shares,
    truncate,
    truncation_errors,
    weighted_svd,
)

SHAPES = [(9, 5), (5, 9), (7, 7), (1, 4), (4, 1)]
SIDES = ["none", "diagonal", "dense"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(n: int, rank: int, *, seed: int = 0) -> Tensor:
    """Positive semi-definite `[n, n]` of a given rank."""
    factor = normal(n, rank, seed=seed)
    return factor @ factor.T


def dense(root: Tensor) -> Tensor:
    return torch.diag(root) if root.ndim == 1 else root


def root_of(kind: str, n: int, side: str, seed: int) -> Root | None:
    if kind == "none":
        return None
    if kind == "diagonal":
        return diagonal_root(normal(n, seed=seed).square(), damping=1e-3)
    return psd_root(moment(n, n, seed=seed), damping=1e-3, side=side)


@given(
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    damping=st.sampled_from([1e-6, 1e-3, 0.5]),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_root_squares_to_the_damped_matrix_and_its_inverse_inverts(n, rank, damping, scale, side, seed) -> None:
    matrix = scale * moment(n, min(rank, n), seed=seed)  # rank < n: exact null directions
    root = psd_root(matrix, damping=damping, side=side)
    wanted = matrix + damping * matrix.diagonal().mean() * torch.eye(
        n, dtype=torch.float64
    )  # the trace is the sum of eigenvalues
    product = root.matrix @ root.matrix.T if side == "right" else root.matrix.T @ root.matrix
    assert torch.allclose(product, wanted, rtol=0, atol=1e-12 * float(wanted.abs().sum()))
    assert torch.allclose(root.matrix @ root.inverse, torch.eye(n, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(root.inverse @ root.matrix, torch.eye(n, dtype=torch.float64), atol=1e-8)
    assert root.added == damping


def test_sides_differ() -> None:
    matrix = moment(5, 5)
    left, right = (psd_root(matrix, damping=0.1, side=side).matrix for side in ("left", "right"))
    assert torch.allclose(left, right.T)
    assert not torch.allclose(left @ left.T, matrix + 0.1 * matrix.diagonal().mean() * torch.eye(5).double(), atol=1e-3)


def test_rounding_below_zero_is_clamped() -> None:
    vector = normal(6, 1)
    matrix = vector @ vector.T - 1e-7 * torch.eye(6).double()  # eigenvalues that should be 0 and came out negative
    root = psd_root(matrix, damping=1e-9, side="right")
    assert torch.isfinite(root.matrix).all()
    assert torch.isfinite(root.inverse).all()
    assert torch.allclose(root.matrix @ root.matrix.T, matrix, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: torch.zeros(4, 4), lambda: torch.zeros(4)], ids=["dense", "diagonal"])
def test_zero_moment_weighs_all_directions_the_same(make) -> None:
    zero = make()
    root = psd_root(zero, damping=1e-3, side="right") if zero.ndim == 2 else diagonal_root(zero, damping=1e-3)
    assert torch.equal(dense(root.matrix), torch.eye(4, dtype=torch.float64))
    assert torch.equal(dense(root.inverse), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_refused_by_name_shape_and_count(bad: float) -> None:
    matrix, weights, weight = moment(3, 3), normal(3).abs(), normal(2, 3)
    matrix[0, 1] = weights[2] = weight[1, 0] = bad
    weight[0, 0] = bad
    with pytest.raises(NumericalError, match=r"second moment \[3, 3\] has 1 non-finite"):
        psd_root(matrix, damping=0.1, side="left")
    with pytest.raises(NumericalError, match=r"diagonal weights \[3\] has 1 non-finite"):
        diagonal_root(weights, damping=0.1)
    with pytest.raises(NumericalError, match=r"weight \[2, 3\] has 2 non-finite"):
        weighted_svd(weight, Roots())


def test_singular_moment_without_damping_is_refused() -> None:
    with pytest.raises(NumericalError, match=r"second moment of size 3 is singular.*raise the damping"):
        psd_root(torch.diag(torch.tensor([1.0, 0.0, 2.0])), damping=0, side="right")
    with pytest.raises(NumericalError, match="diagonal weights of size 2 is singular"):
        diagonal_root(torch.tensor([0.0, 1.0]), damping=0)


def test_diagonal_root_is_the_dense_root_of_the_diagonal_matrix() -> None:
    weights = torch.tensor([4.0, 0.0, 9.0, 1.0])
    root = diagonal_root(weights, damping=0.01)
    assert torch.allclose(root.matrix.square(), weights.double() + 0.01 * 3.5)
    assert torch.allclose(root.matrix * root.inverse, torch.ones(4, dtype=torch.float64))
    other = psd_root(torch.diag(weights), damping=0.01, side="right")
    assert torch.allclose(other.matrix @ other.matrix.T, torch.diag(root.matrix.square()))


@pytest.mark.parametrize("right", SIDES)
@pytest.mark.parametrize("left", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_svd_is_the_svd_of_the_product_with_the_roots_undone(shape, left, right) -> None:
    weight = normal(*shape, seed=1)
    roots = Roots(root_of(left, shape[0], "left", 2), root_of(right, shape[1], "right", 3))
    L = torch.eye(shape[0], dtype=torch.float64) if roots.left is None else dense(roots.left.matrix)
    R = torch.eye(shape[1], dtype=torch.float64) if roots.right is None else dense(roots.right.matrix)
    spectrum = weighted_svd(weight, roots)
    u, s, vt = torch.linalg.svd(L @ weight @ R, full_matrices=False)
    assert torch.allclose(spectrum.values, s, atol=1e-7 * float(s[0]))
    assert set(spectrum.added) == {side for side, kind in (("left", left), ("right", right)) if kind != "none"}
    full = (spectrum.out_basis * spectrum.values) @ spectrum.in_basis
    assert torch.allclose(full, weight, atol=1e-9)
    for rank in range(1, len(s) + 1):
        part = (spectrum.out_basis[:, :rank] * spectrum.values[:rank]) @ spectrum.in_basis[:rank]
        best = torch.linalg.solve(L, (u[:, :rank] * s[:rank]) @ vt[:rank]) @ torch.linalg.inv(R)
        assert torch.allclose(part, best, atol=1e-6)
        error = (L @ (weight - part) @ R).square().sum()
        assert torch.allclose(error, s[rank:].square().sum(), rtol=1e-6, atol=1e-9 * float(s.square().sum()))


@given(
    O=st.integers(1, 10), I=st.integers(1, 10), rank=st.integers(1, 10), cut=st.integers(0, 10), seed=st.integers(0, 99)
)
@settings(max_examples=80, deadline=None)
def test_rank_deficient_weights_and_cut_bases_stay_finite(O, I, rank, cut, seed) -> None:  # noqa: E741
    weight = normal(O, rank, seed=seed) @ normal(rank, I, seed=seed + 1)
    spectrum = weighted_svd(weight, Roots(), max_rank=cut)
    assert len(spectrum.values) == min(O, I)  # all of them, whatever is cut
    kept = min(cut, O, I)
    assert spectrum.out_basis.shape == (O, kept)
    assert spectrum.in_basis.shape == (kept, I)
    assert (spectrum.values.diff() <= 0).all()
    if kept:
        factors = truncate(spectrum, kept)
        assert torch.isfinite(factors.A).all()
        assert torch.isfinite(factors.B).all()
        tail = torch.linalg.svdvals(weight)[kept:].square().sum()
        error = (weight - factors.B @ factors.A).square().sum()
        assert torch.allclose(error, tail, rtol=1e-6, atol=1e-12 * float(weight.square().sum()))


def test_zero_weight_gives_zero_factors() -> None:
    factors = truncate(weighted_svd(torch.zeros(4, 6), Roots()), 2)
    assert torch.equal(factors.A, torch.zeros(2, 6, dtype=torch.float64))
    assert torch.equal(factors.B, torch.zeros(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_is_decomposed_in_float64(dtype: torch.dtype) -> None:
    weight = normal(6, 4).to(dtype)
    spectrum = weighted_svd(weight, Roots())
    assert spectrum.values.dtype == spectrum.out_basis.dtype == spectrum.in_basis.dtype == torch.float64
    assert torch.allclose(spectrum.values, torch.linalg.svdvals(weight.double()), rtol=1e-10)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_truncation_is_the_best_approximation_in_balanced_factors(shape: tuple[int, int], rank: int) -> None:
    weight, bias = normal(*shape), normal(shape[0])
    factors = truncate(weighted_svd(weight, Roots()), rank, bias)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(factors.B @ factors.A, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-8)
    assert factors.A.shape == (rank, shape[1])
    assert factors.B.shape == (shape[0], rank)
    assert factors.bias is bias
    assert relative_error(weight, factors) == pytest.approx(float(s[rank:].square().sum() / s.square().sum()))


@given(left=st.sampled_from(SIDES), right=st.sampled_from(SIDES), rank=st.integers(1, 5), seed=st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_factors_are_balanced_whatever_the_roots_were(left: str, right: str, rank: int, seed: int) -> None:
    roots = Roots(root_of(left, 8, "left", seed), root_of(right, 6, "right", seed + 1))
    factors = truncate(weighted_svd(normal(8, 6, seed=seed), roots), rank)
    # BᵀB = AAᵀ = diagonal of the product's singular values: norms equal, direction by direction
    values = torch.linalg.svdvals(factors.B @ factors.A)[:rank]
    assert torch.allclose(factors.B.T @ factors.B, torch.diag(values), atol=1e-8)
    assert torch.allclose(factors.A @ factors.A.T, torch.diag(values), atol=1e-8)


def test_non_finite_spectra_are_refused_by_the_factor() -> None:
    spectrum = weighted_svd(normal(4, 4), Roots())
    spectrum.out_basis[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"out_basis · values \[4, 2\] has 1 non-finite"):
        truncate(spectrum, 2)


def test_relative_error_of_known_factors() -> None:
    weight = normal(5, 3)
    zero = Factors(torch.zeros(1, 3), torch.zeros(5, 1), None)
    exact = Factors(weight, torch.eye(5, dtype=torch.float64), None)
    double = Factors(2 * weight, torch.eye(5, dtype=torch.float64), None)
    assert [relative_error(weight, pair) for pair in (exact, zero, double)] == pytest.approx([0, 1, 1])
    assert relative_error(torch.zeros(5, 3), zero) == 0


# errors of every rank at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_tail_shares_are_the_errors_of_truncated_svds(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    shares = tail_shares(singular_values(weight))
    for rank in range(1, len(s) + 1):
        error = (weight - (u[:, :rank] * s[:rank]) @ vh[:rank]).square().sum() / weight.square().sum()
        assert shares[rank - 1].item() == pytest.approx(error.item(), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_errors_are_those_of_the_cut_product(shape: tuple[int, int]) -> None:
    weight, rank = normal(*shape), 3
    pair = Factors(normal(rank, shape[1], seed=1), normal(shape[0], rank, seed=2), None)
    u, s, vh = torch.linalg.svd(pair.B @ pair.A, full_matrices=False)
    errors = truncation_errors(weight, pair)
    for cut in range(1, min(rank, *shape) + 1):
        direct = (weight - (u[:, :cut] * s[:cut]) @ vh[:cut]).square().sum() / weight.square().sum()
        assert errors[cut - 1].item() == pytest.approx(direct.item(), rel=1e-9)
    assert errors[-1].item() == pytest.approx(relative_error(weight, pair), rel=1e-9)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)])
def test_expansion_errors_are_those_of_each_truncation(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    roots = Roots(psd_root(moment(shape[0], 4), damping=1e-2, side="left"), root_of("dense", shape[1], "right", 3))
    spectrum = weighted_svd(weight, roots, 4)
    errors = expansion_errors(weight, spectrum)
    assert len(errors) == 4
    for rank in range(1, 5):
        assert errors[rank - 1].item() == pytest.approx(relative_error(weight, truncate(spectrum, rank)), rel=1e-8)


@given(count=st.integers(1, 500), most=st.integers(1, 64))
def test_sampled_ranks_reach_from_the_first_to_the_last(count: int, most: int) -> None:
    ranks = sampled_ranks(count, most)
    assert ranks == sorted(set(ranks))
    assert len(ranks) <= most
    assert ranks[0] == 1
    assert most == 1 or ranks[-1] == count
    assert set(ranks) <= set(range(1, count + 1))
