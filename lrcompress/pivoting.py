"""The pivoted layout of a pair of factors: the same product in R² numbers fewer.

A rank-R product has R rows that all others are combinations of, so `B·A = P [1; rest] rows` with a permutation P:
R·I + (O − R)·R numbers where A and B have R·I + O·R (PIFA, arXiv 2501.19090, sec. 3).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lrcompress.artifacts import Factors, Layout, Pivoted
from lrcompress.errors import NumericalError
from lrcompress.int8 import rounded
from lrcompress.linalg import product_svd
from lrcompress.recovery.whitening import Coordinates, Whitening

Stored = TypeVar("Stored", Factors, Pivoted)

BOUND = 1.5
"""Largest entry of `rest`; what keeps the pivot rows well conditioned (strong rank-revealing pivoting)."""

LARGEST_LOSS = 5.0
"""How many times the rounding error of plain factors of the same rank that of pivoted ones may be, in the stored dtype,
before plain ones of a smaller rank are thought of."""

HARMLESS = 1e-6
"""A relative error of the product up to which it does not matter: float32 is always fine enough."""


def pivot(factors: Factors, bound: float = BOUND) -> Pivoted:
    """The pivoted form of a pair, in float64; R must be below O.

    Pivot rows by Gaussian elimination with partial pivoting on an orthonormal basis of B's columns, then exchanged
    until no entry of `rest` exceeds `bound` (> 1): each exchange multiplies the volume of the pivot block by the
    entry that asked for it, so it ends, near the largest volume (Gu and Eisenstat 1996, alg. 4; Goreinov et al. 2010,
    "How to find a good submatrix"). Then the pivot block's condition number is at most √(1 + bound² R (O − R)).
    """
    A, B = factors.A.double(), factors.B.double()
    features, rank = B.shape
    if rank >= features:
        raise NumericalError(f"rank {rank} of {features} output features leaves nothing to pivot")
    basis = torch.linalg.qr(B).Q
    order, lower = _eliminated(basis)
    # of [L₁; L₂]·U, rows after the first R as combinations of those: L₂·L₁⁻¹
    rest = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    for _ in range(50 * rank):
        flat = rest.abs().argmax()
        row, column = int(flat // rank), int(flat % rank)
        if rest[row, column].abs() <= bound:
            break
        _exchange(rest, row, column)
        order[column], order[rank + row] = order[rank + row].clone(), order[column].clone()
    exact = basis[order[rank:]] @ torch.linalg.inv(basis[order[:rank]])  # exchanges add up their rounding
    return Pivoted(B[order[:rank]] @ A, exact, order.argsort().to(torch.int32), factors.bias)


def _eliminated(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Which row each row of L is in `basis = P·L·U`, `[O]`, and L without its ones, `[O, R]`.

    On the CPU: for such shapes torch 2.11 leaves it to MAGMA on CUDA, which prints a banner for every call.
    """
    lower, exchanges = torch.linalg.lu_factor(basis.cpu())
    order = list(range(len(basis)))
    for row, other in enumerate(exchanges.tolist()):  # counted from 1, as in LAPACK
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order, device=basis.device), lower.to(basis.device)


def _exchange(rest: Tensor, row: int, column: int) -> None:
    """What `rest` becomes when a row of it and a pivot row change places. Changes `rest`."""
    entry = rest[row, column].clone()
    entering, leaving = rest[row].clone(), rest[:, column].clone()
    # the entering row stands for Σ_k entering_k · pivot_k; solved for the leaving pivot
    rest -= torch.outer(leaving / entry, entering)
    rest[:, column] = leaving / entry
    rest[row] = -entering / entry
    rest[row, column] = 1 / entry


def pivot_condition(rest: Tensor) -> float:
    """Condition number of the pivot block on an orthonormal basis, ‖[1; rest]‖₂.

    So much rounding of the pivot rows' outputs can grow in the others.
    """
    return (1 + torch.linalg.matrix_norm(rest.double(), 2).item() ** 2) ** 0.5


def laid_out(
    factors: Factors,
    layout: Layout,
    dtype: torch.dtype,
    *,
    int8: bool = False,
    most: int | None = None,
    coordinates: Callable[[], Coordinates] = Coordinates,
) -> Factors | Pivoted:
    """A pair in its layout, cast to the dtype that it is stored in.

    With `int8` float32 numbers on a grid of 8 bits, its scales and the bias in `dtype`. `most`: the numbers that the
    layer may hold, without the bias (None: those of this rank, pivoted); what fits into them as it is stays plain.
    Where pivoting would cost precision in the dtype, the layer is plain, of the rank that as many numbers allow, unless
    that is farther from the pair, in the `coordinates` of the training. Raises NumericalError for factors that are not
    finite in the dtype.
    """
    plain = _cast(factors, dtype, int8)
    (rank, inside), outside = factors.A.shape, len(factors.B)
    if most is None:
        most = rank * (inside + outside - rank)
    if layout == "plain" or rank * (inside + outside) <= most:
        return plain
    exact = pivot(factors)
    pivoted = _cast(exact, dtype, int8)
    product = factors.B.double() @ factors.A.double()
    lost = _rounding(product, pivoted.factors())
    # factors that were rounded to this dtype before lose nothing more, and are not exact for that
    unit = 1 / 254 if int8 else torch.finfo(dtype).eps / 2
    smaller = most // (inside + outside)
    if smaller == 0 or lost <= max(LARGEST_LOSS * max(_rounding(product, plain), unit), HARMLESS):
        return pivoted
    whitening = Whitening(coordinates(), factors.A.device).double()
    whole = _weighted(whitening, factors)
    u, s, vt = product_svd(whole.B, whole.A)
    root = s[:smaller].sqrt()
    A, B = whitening.back(root[:, None] * vt[:smaller], u[:, :smaller] * root)
    cut = _cast(Factors(A, B, factors.bias), dtype, int8)
    product = whole.B @ whole.A
    near, nearer = (_rounding(product, _weighted(whitening, one.factors())) for one in (pivoted, cut))
    return cut if nearer < near else pivoted


def _weighted(whitening: Whitening, factors: Factors) -> Factors:
    A, B = whitening.weighted(factors.A.double(), factors.B.double())
    return Factors(A, B, factors.bias)


def _rounding(product: Tensor, factors: Factors) -> float:
    difference = product - factors.B.double() @ factors.A.double()
    return (difference.norm() / product.norm().clamp_min(1e-300)).item()


def _cast(stored: Stored, dtype: torch.dtype, int8: bool) -> Stored:
    bias = None if stored.bias is None else stored.bias.to(dtype)
    if isinstance(stored, Pivoted):
        rows, rest = (_numbers(one, dtype, int8) for one in (stored.rows, stored.rest))
        return replace(stored, rows=rows, rest=rest, bias=bias)
    return replace(stored, A=_numbers(stored.A, dtype, int8), B=_numbers(stored.B, dtype, int8), bias=bias)


def _numbers(tensor: Tensor, dtype: torch.dtype, int8: bool) -> Tensor:
    cast = rounded(tensor, dtype) if int8 else tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise NumericalError(f"factors are not finite in {'int8' if int8 else dtype}")
    return cast
