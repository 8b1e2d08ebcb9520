"""φ of two subspaces, its random level, and amplification, against their definitions computed directly."""

import time
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrcompress.subspaces import amplification, evidence, random_level, right_basis, similarity


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


@given(rows=st.integers(1, 6), others=st.integers(1, 6), n=st.integers(6, 12), seed=st.integers(0, 50))
def test_phi_is_the_definition_for_every_i_and_j(rows: int, others: int, n: int, seed: int) -> None:
    first, second = right_basis(normal(rows, n, seed=seed)), right_basis(normal(others, n, seed=seed + 1))
    phi = similarity(first, second)
    assert phi.shape == (rows, others)
    for i in range(1, rows + 1):
        for j in range(1, others + 1):
            direct = torch.linalg.matrix_norm(first[:i] @ second[:j].T).square() / min(i, j)
            assert phi[i - 1, j - 1].item() == pytest.approx(direct.item(), abs=1e-12)
    assert (phi >= 0).all()
    assert (phi <= 1).all()


def test_phi_of_equal_subspaces_is_1_whatever_their_bases() -> None:
    a = normal(4, 10)
    mixed = normal(4, 4, seed=1) @ a  # the same row space
    assert similarity(right_basis(a), right_basis(mixed))[3, 3].item() == pytest.approx(1)
    assert similarity(right_basis(a), right_basis(a)).diagonal().tolist() == pytest.approx([1] * 4)


def test_phi_does_not_change_when_the_space_is_rotated() -> None:
    a, b, turn = normal(3, 8), normal(5, 8, seed=1), rotation(8, 2)
    turned = similarity(right_basis(a @ turn), right_basis(b @ turn))
    assert torch.allclose(similarity(right_basis(a), right_basis(b)), turned, atol=1e-10)


def test_phi_of_orthogonal_subspaces_is_0() -> None:
    basis = rotation(8, 0)
    assert similarity(basis[:3], basis[3:6]).abs().max().item() < 1e-20


@pytest.mark.parametrize(("i", "j", "n"), [(1, 1, 2), (2, 5, 12), (6, 6, 24), (3, 3, 3)])
def test_the_random_level_is_that_of_drawn_subspaces(i: int, j: int, n: int) -> None:
    draws = torch.stack([similarity(rotation(n, 2 * k)[:i], rotation(n, 2 * k + 1)[:j])[-1, -1] for k in range(1500)])
    level = random_level(i, j, n)
    error = level.deviation / sqrt(len(draws))
    assert draws.mean().item() == pytest.approx(level.mean, abs=5 * error + 1e-9)
    assert draws.std().item() == pytest.approx(level.deviation, rel=0.1, abs=1e-9)


def test_the_range_is_where_a_shared_subspace_was_planted() -> None:
    n, shared = 60, 8
    turn = rotation(n, 0)
    strong = torch.diag(torch.linspace(9, 5, shared, dtype=torch.float64))

    def run(seed: int) -> Tensor:
        return torch.cat([strong @ turn[:shared], 0.1 * normal(22, n, seed=seed) @ turn]) + 0.01 * normal(
            30, n, seed=seed + 7
        )

    found = evidence(similarity(right_basis(run(1)), right_basis(run(2))), n)
    span = found.range(sigmas=4, excess=0.5)
    assert span is not None
    assert span[0] == 1
    assert shared <= span[1] < 2 * shared
    assert found.phi[shared - 1].item() > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_random_runs_show_nothing(seed: int) -> None:
    first, second = normal(24, 96, seed=2 * seed), normal(24, 96, seed=2 * seed + 1)
    found = evidence(similarity(right_basis(first), right_basis(second)), 96)
    assert found.range(sigmas=4, excess=0.1) is None


def test_the_whole_space_is_no_evidence() -> None:
    """At full dimension φ is 1 for any two subspaces."""
    found = evidence(similarity(rotation(5, 0), rotation(5, 1)), 5)
    assert found.phi[-1].item() == pytest.approx(1)
    assert not found.clear(sigmas=4, excess=0.1)[-1]


def test_phi_of_two_factors_of_a_wide_layer_takes_no_loop_of_decompositions() -> None:
    first, second = normal(384, 768).float(), normal(384, 768, seed=1).float()
    began = time.perf_counter()
    phi = similarity(right_basis(first), right_basis(second))
    assert time.perf_counter() - began <= 2  # seconds, on two cores
    assert phi.shape == (384, 384)


def test_amplification_is_the_papers_ratio() -> None:
    weight, A, B = normal(9, 7), normal(4, 7, seed=1), normal(9, 4, seed=2)
    u, s, vh = torch.linalg.svd(B @ A)
    for rank in (1, 3, 4):
        found = amplification(weight, A, B, rank)
        inside = torch.linalg.matrix_norm(u[:, :rank].T @ weight @ vh[:rank].T).item()
        assert found.learned == pytest.approx(s[:rank].norm().item())
        assert found.in_learned == pytest.approx(inside)
        assert found.factor == pytest.approx(s[:rank].norm().item() / inside)
        assert found.in_own == pytest.approx(torch.linalg.svdvals(weight)[:rank].norm().item())
        assert found.in_own >= found.in_learned


def test_amplification_of_the_weight_itself_is_1() -> None:
    u, s, vh = torch.linalg.svd(normal(8, 6), full_matrices=False)
    found = amplification((u * s) @ vh, vh, u * s, 3)
    assert found.factor == pytest.approx(1)
    assert found.in_learned == pytest.approx(found.in_own)


def test_the_weight_in_random_directions() -> None:
    weight = normal(10, 8)
    squares = [
        torch.linalg.matrix_norm(rotation(10, 2 * k)[:, :3].T @ weight @ rotation(8, 2 * k + 1)[:, :3]).square()
        for k in range(2000)
    ]
    level = amplification(weight, normal(3, 8), normal(10, 3), 3).in_random
    assert torch.stack(squares).mean().sqrt().item() == pytest.approx(level, rel=0.03)
