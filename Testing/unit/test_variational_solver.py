"""The linear system of a step: against a dense solver, and what must hold whatever the images."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational import DEFAULT, Smoothness, solver

SHAPE = (4, 5, 6)  # three different sides
XX, XY, XZ, X, YX, YY, YZ, Y, ZX, ZY, ZZ, Z = range(12)


def solve(normal, displacement, fluid, elastic: float, iterations: int) -> torch.Tensor:
    settings = replace(DEFAULT, cg_iterations=iterations, tikhonov=0.0)
    return solver.solve(normal, displacement, fluid + elastic, elastic, settings)


def equations(seed: int, shape=SHAPE, pairs: int = 1) -> torch.Tensor:
    """Positive definite matrices and forces at every voxel, (pairs, 12, *shape), double precision."""
    root = torch.randn(pairs, 3, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = torch.einsum("nij...,nkj...->nik...", root, root)
    force = torch.randn(pairs, 3, 1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat((matrix, force), 2).flatten(1, 2)


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


def dense(normal: torch.Tensor, displacement: torch.Tensor, fluid: float, elastic: float) -> torch.Tensor:
    """The same by a dense matrix among the cosines of low frequency (Galerkin's method)."""
    waves = low_frequencies(displacement.shape[2:])
    matrix, force = solver.parts(normal)
    left = (matrix * waves[:, None]).sum(2) + (fluid + elastic) * laplacian(waves)
    right = force - elastic * laplacian(displacement)
    shares = torch.linalg.solve(waves.flatten(1) @ left.flatten(1).T, waves.flatten(1) @ right.flatten())
    return (shares @ waves.flatten(1)).view(displacement.shape)


def low_frequencies(shape: tuple[int, int, int]) -> torch.Tensor:
    """(M, 3, *shape): fields of one component and one cosine along each axis, of the frequencies that are kept."""
    axes = []
    for n in shape:
        frequency = torch.arange(math.ceil(DEFAULT.frequencies * n), dtype=torch.float64)
        axes.append(torch.cos(torch.pi * frequency[:, None] * (torch.arange(n) + 0.5) / n))
    return torch.einsum("cC,zk,yj,xi->czyxCkji", torch.eye(3, dtype=torch.float64), *axes).flatten(0, 3)


@pytest.mark.parametrize("elastic", [0.0, 0.7])
def test_enough_iterations_give_the_solution_of_a_dense_solver(elastic):
    normal = equations(0)
    displacement = torch.randn(1, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = solve(normal, displacement, weights(0.5), elastic, iterations=200)
    torch.testing.assert_close(found, dense(normal, displacement, 0.5, elastic), atol=1e-8, rtol=1e-6)


def test_each_iteration_comes_closer():
    normal = equations(1)
    exact = dense(normal, torch.zeros(1, 3, *SHAPE, dtype=torch.float64), 2.0, 0.0)
    errors = [(solve(normal, None, weights(2.0), 0.0, n) - exact).norm() for n in (1, 3, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 * exact.norm()


def test_the_same_matrix_everywhere_is_solved_at_once():
    """There the preconditioner is the inverse: a force of one cosine is answered by that cosine."""
    normal = torch.zeros(1, 12, *SHAPE, dtype=torch.float64)
    normal[:, [XX, YY, ZZ]] = 3.0
    at = torch.arange(SHAPE[2], dtype=torch.float64)
    normal[:, X] = torch.cos(torch.pi * 2 * (at + 0.5) / SHAPE[2])
    found = solve(normal, None, weights(1.5), 0.5, iterations=1)
    stiffness = 2.0 * (2 - 2 * torch.cos(torch.tensor(torch.pi * 2 / SHAPE[2])).double())
    torch.testing.assert_close(found, solver.parts(normal)[1] / (3 + stiffness))


@given(seed=st.integers(0, 10**6))
def test_pairs_of_a_batch_do_not_know_of_each_other(seed):
    normal, fluid, elastic = equations(seed, pairs=2), weights(0.5, 2.0), 0.1
    displacement = solver.parts(equations(seed + 7, pairs=2))[1]
    together = solve(normal, displacement, fluid, elastic, 5)
    for i in range(2):
        one = (x[i : i + 1] for x in (normal, displacement, fluid))
        torch.testing.assert_close(together[i : i + 1], solve(*one, elastic, 5))


def test_without_force_nothing_moves_and_without_information_nothing_breaks():
    normal = equations(2)
    normal[:, [X, Y, Z]] = 0
    for still in (normal, torch.zeros_like(normal)):
        assert torch.equal(solve(still, None, weights(1.0), 0.0, 6), torch.zeros(1, 3, *SHAPE).double())
    assert torch.isfinite(solve(torch.zeros_like(normal), None, weights(0.0), 0.0, 6)).all()


# The step


def step_of(normal: torch.Tensor, smoothness: Smoothness, stride: int) -> torch.Tensor:
    return solver.step(normal, smoothness, replace(DEFAULT, stride=stride))


def constant(values: dict[int, float], shape=(6, 7, 8)) -> torch.Tensor:
    """Equations that are the same everywhere."""
    normal = torch.zeros(1, 12, *shape, dtype=torch.float64)
    for part, value in values.items():
        normal[:, part] = value
    return normal


def test_equal_equations_everywhere_have_their_own_solution():
    """A u = b, A with off-diagonal terms, by torch's solver: nothing to smooth."""
    parts = {XX: 4.0, XY: 1.0, XZ: -0.5, YY: 3.0, YZ: 0.25, ZZ: 2.0, X: 0.6, Y: -0.3, Z: 0.9}
    parts |= {YX: parts[XY], ZX: parts[XZ], ZY: parts[YZ]}
    step = step_of(constant(parts), DEFAULT.first_smoothness, 2)
    matrix = torch.tensor([[4.0, 1.0, -0.5], [1.0, 3.0, 0.25], [-0.5, 0.25, 2.0]], dtype=torch.float64)
    expected = torch.linalg.solve(matrix, torch.tensor([0.6, -0.3, 0.9]).double())
    assert expected.norm() < DEFAULT.max_step
    torch.testing.assert_close(step, expected.view(1, 3, 1, 1, 1).expand_as(step), atol=1e-3, rtol=1e-3)


def test_a_step_is_cut_at_max_step_in_its_own_direction():
    parts = {XX: 1.0, YY: 1.0, ZZ: 1.0, X: 30.0, Y: -40.0, Z: 0.0}
    step = step_of(constant(parts), DEFAULT.first_smoothness, 1)
    expected = DEFAULT.max_step * torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64)
    torch.testing.assert_close(step, expected.view(1, 3, 1, 1, 1).expand_as(step), atol=1e-6, rtol=1e-6)


def test_a_step_is_nowhere_so_steep_that_it_folds():
    """Neighbors that are pulled apart, and little smoothness."""
    normal = constant({XX: 1.0, YY: 1.0, ZZ: 1.0}, (12, 12, 12))
    normal[:, X, :, :, :6], normal[:, X, :, :, 6:] = 2.0, -2.0
    step = step_of(normal, Smoothness(0.0, 0.1, 0.0), 2)
    steepest = max(slope.abs().sum(1).max().item() for slope in fields.gradients(step))
    assert steepest == pytest.approx(DEFAULT.max_gradient)
    assert (fields.jacobian_determinant(step) > 0).all()


def test_information_is_carried_further_the_smoother_a_step_is():
    """Information and a pull in the middle alone."""
    normal = constant({}, (25, 25, 25))
    normal[:, [XX, YY, ZZ], 12, 12, 12] = 1000.0
    normal[:, X, 12, 12, 12] = 500.0
    first, last = (
        step_of(normal, smoothness, 2)[0, 0, 12, 12, [12, 18]]
        for smoothness in (DEFAULT.first_smoothness, DEFAULT.last_smoothness)
    )
    for here, there in (first, last):
        assert here > there > 0
    assert first[1] / first[0] > last[1] / last[0]


@pytest.mark.parametrize("window", [0.0, 1.4])
def test_the_equations_that_are_given_stay_as_they_are(window):
    normal = equations(3)
    before = normal.clone()
    step_of(normal, Smoothness(window, 1.0, 0.1), 1)
    assert torch.equal(normal, before)
