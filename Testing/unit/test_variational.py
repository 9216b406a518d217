"""The equations of a step: against a dense solver, and what must hold whatever the images."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from DivRegNetLib.registration import variational

SHAPE = (4, 5, 6)  # three different sides


def equations(seed: int, shape=SHAPE, pairs: int = 1) -> torch.Tensor:
    """Positive definite matrices and forces at every voxel, (pairs, 9, *shape), double precision."""
    root = torch.randn(pairs, 3, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = torch.einsum("nij...,nkj...->nik...", root, root)
    upper = [matrix[:, i, j] for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
    force = torch.randn(pairs, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat((torch.stack(upper, 1), force), 1)


def weights(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def laplacian(field: torch.Tensor) -> torch.Tensor:
    """Minus the Laplacian by second differences, nothing flowing across the border."""
    found = torch.zeros_like(field)
    for dim in (2, 3, 4):
        slope, inner = field.diff(dim=dim), field.shape[dim] - 1
        found.narrow(dim, 0, inner).sub_(slope)
        found.narrow(dim, 1, inner).add_(slope)
    return found


def dense(normal: torch.Tensor, whole: torch.Tensor, fluid: float, elastic: float) -> torch.Tensor:
    """The same by a dense matrix among the cosines of low frequency (Galerkin's method)."""
    waves = slow_waves(whole.shape[2:])
    left = variational._times(normal[:, :6], waves) + (fluid + elastic) * laplacian(waves)
    right = normal[:, 6:] - elastic * laplacian(whole)
    shares = torch.linalg.solve(waves.flatten(1) @ left.flatten(1).T, waves.flatten(1) @ right.flatten())
    return (shares @ waves.flatten(1)).view(whole.shape)


def slow_waves(shape: tuple[int, int, int]) -> torch.Tensor:
    """(M, 3, *shape): fields of one component and one cosine along each axis, of the frequencies that are kept."""
    axes = []
    for n in shape:
        frequency = torch.arange(math.ceil(variational.KEPT * n), dtype=torch.float64)
        axes.append(torch.cos(torch.pi * frequency[:, None] * (torch.arange(n) + 0.5) / n))
    return torch.einsum("cC,zk,yj,xi->czyxCkji", torch.eye(3, dtype=torch.float64), *axes).flatten(0, 3)


@pytest.mark.parametrize("elastic", [0.0, 0.7])
def test_enough_iterations_give_the_solution_of_a_dense_solver(elastic):
    normal = equations(0)
    whole = torch.randn(1, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = variational.solve(normal, whole, weights(0.5), elastic, iterations=200)
    torch.testing.assert_close(found, dense(normal, whole, 0.5, elastic), atol=1e-8, rtol=1e-6)


def test_each_iteration_comes_closer():
    normal = equations(1)
    exact = dense(normal, torch.zeros(1, 3, *SHAPE, dtype=torch.float64), 2.0, 0.0)
    errors = [(variational.solve(normal, None, weights(2.0), 0.0, n) - exact).norm() for n in (1, 3, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 * exact.norm()


def test_the_same_matrix_everywhere_is_solved_at_once():
    """There the preconditioner is the inverse: a force of one cosine is answered by that cosine."""
    normal = torch.zeros(1, 9, *SHAPE, dtype=torch.float64)
    normal[:, :3] = 3.0
    at = torch.arange(SHAPE[2], dtype=torch.float64)
    normal[:, 6] = torch.cos(torch.pi * 2 * (at + 0.5) / SHAPE[2])
    found = variational.solve(normal, None, weights(1.5), 0.5, iterations=1)
    stiffness = 2.0 * (2 - 2 * torch.cos(torch.tensor(torch.pi * 2 / SHAPE[2])).double())
    torch.testing.assert_close(found, normal[:, 6:] / (3 + stiffness))


@given(seed=st.integers(0, 10**6))
def test_pairs_of_a_batch_do_not_know_of_each_other(seed):
    normal, fluid, elastic = equations(seed, pairs=2), weights(0.5, 2.0), 0.1
    whole = equations(seed + 7, pairs=2)[:, 6:]
    together = variational.solve(normal, whole, fluid, elastic, 5)
    for i in range(2):
        one = (x[i : i + 1] for x in (normal, whole, fluid))
        torch.testing.assert_close(together[i : i + 1], variational.solve(*one, elastic, 5))


def test_without_force_nothing_moves_and_without_information_nothing_breaks():
    normal = equations(2)
    normal[:, 6:] = 0
    for still in (normal, torch.zeros_like(normal)):
        assert torch.equal(variational.solve(still, None, weights(1.0), 0.0, 6), torch.zeros(1, 3, *SHAPE).double())
    assert torch.isfinite(variational.solve(torch.zeros_like(normal), None, weights(0.0), 0.0, 6)).all()
