"""The equations of a pair: which voxels are sampled, closed forms, symmetry."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from textures import deformed, other_contrast, textured

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational import DEFAULT, VariationalSettings, solver
from DivRegNetLib.registration.variational.equations import Equations, gradient
from DivRegNetLib.registration.variational.method import next_step

XX, X, YY, Y, ZZ, Z = 0, 3, 5, 7, 10, 11
FULL, HALF = replace(DEFAULT, stride=1), DEFAULT
MEASURED = replace(FULL, independence_weight=0.0)  # nothing is mixed into the histograms, as closed forms assume


def equations_of(
    fixed: torch.Tensor, moving: torch.Tensor, settings: VariationalSettings, level: int = -2
) -> Equations:
    """At the finest level that samples one voxel per voxel of the displacement's grid, or at another one."""
    return Equations(fixed, moving, settings, settings.levels[level])


# What is sampled


def test_every_voxel_is_sampled_once_in_a_round_of_steps():
    at = torch.arange(16 * 24 * 16).view(1, 1, 16, 24, 16)
    equations = equations_of(torch.zeros(at.shape), torch.zeros(at.shape), HALF)
    assert sorted(equations.offsets) == sorted({(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)})
    sampled = torch.cat([at[equations._sampled(number)] for number in range(8)])
    assert torch.equal(sampled.flatten().sort()[0], at.flatten())


@pytest.mark.parametrize("number", range(8))
def test_a_displacement_on_the_output_grid_moves_the_sampled_voxels_by_as_much(number):
    """Of a ramp, sampled at whatever voxels: its value there plus slope times displacement, which is linear, too."""
    shape = (16, 24, 16)
    x, y, z = fields.identity(shape, like=torch.zeros(())).split(1, 1)
    ramp = 0.25 + 0.02 * x - 0.01 * y + 0.015 * z
    u, v, w = fields.identity((8, 12, 8), like=ramp).split(1, 1)
    coarse = torch.cat((0.1 + 0.05 * u, 0.02 * v, -0.1 - 0.03 * w), 1)  # in voxels of the output grid
    equations = equations_of(ramp, ramp, HALF)
    offset = equations.offsets[number]
    every = (..., *(slice(o, None, 2) for o in offset))
    middle = [(c[every] + 0.5) / 2 - 0.5 for c in (x, y, z)]  # in voxels of the output grid
    moved = 2 * (0.02 * (0.1 + 0.05 * middle[0]) - 0.01 * 0.02 * middle[1] + 0.015 * (-0.1 - 0.03 * middle[2]))
    warped = equations._warped(coarse, fields.differences(coarse), number)[:, :1]
    warped = (warped - 0.5) / (DEFAULT.bins - 1)  # bins
    inside = (..., *[slice(2, -2)] * 3)
    torch.testing.assert_close(warped[inside], (ramp[every] + moved)[inside], atol=1e-5, rtol=0)


def test_the_equations_of_all_voxels_are_means_of_those_of_the_whole_grid():
    """Lengths are in voxels of the displacement's grid, so that information counts four times and force twice."""
    moving, fixed, truth = deformed((16, 24, 16), 1.0, seed=4)
    coarse = fields.resize(truth, (8, 12, 8))
    everywhere, whole = (equations_of(fixed, moving, s, -1) for s in (HALF, FULL))
    for half, full in ((None, None), (coarse, fields.resize(coarse, (16, 24, 16)))):
        mean = torch.nn.functional.avg_pool3d(whole(full), 2)
        for found, expected, scale in zip(solver.parts(everywhere(half)), solver.parts(mean), (4, 2), strict=True):
            torch.testing.assert_close(found, scale * expected)
        assert everywhere.objective(half) == whole.objective(full)


# What they say


@given(seed=st.integers(0, 10**6))
def test_the_equations_of_the_swapped_pair_ask_for_the_opposite_step(seed):
    fixed, moving = textured((16, 24, 16), seed), other_contrast(textured((16, 24, 16), seed + 1))
    forward, backward = (equations_of(*pair, HALF)(None) for pair in ((fixed, moving), (moving, fixed)))
    for part, sign in zip(zip(*map(solver.parts, (forward, backward)), strict=True), (1, -1), strict=True):
        torch.testing.assert_close(part[0], sign * part[1])
    one, other = (solver.step(normal, DEFAULT.last_smoothness, HALF) for normal in (forward, backward))
    torch.testing.assert_close(one, -other, atol=1e-4, rtol=1e-3)


def test_unrelated_images_hold_little_information_and_related_ones_much():
    noise, other = torch.rand(2, 1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    unrelated, related = (
        equations_of(noise, image, MEASURED)(None)[:, [XX, YY, ZZ]].mean() for image in (other, other_contrast(noise))
    )
    assert related > 50 * unrelated


def test_the_equations_of_jointly_gaussian_images_are_those_of_their_correlation():
    """Of standard normal f and m with correlation r: dL/dm = (r f - r^2 m) / (1 - r^2), and E[(dL/dm)^2 | f] from it.

    The histogram's window widens both variances, so that the correlation is less and the scale larger.
    """
    r, sd = 0.8, 0.15
    f, z = torch.randn(2, 1, 1, 48, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = r * f + math.sqrt(1 - r * r) * z
    fixed, moving = ((0.5 + sd * x).clamp(0, 1) for x in (f, m))
    normal = equations_of(fixed, moving, MEASURED)(None)
    blur = 1 + (DEFAULT.parzen_sigma / (DEFAULT.bins - 1) / sd) ** 2
    rho, width = r / blur, math.sqrt(blur) * sd
    f, m = ((x - 0.5) / width for x in (fixed, moving))
    along_m, along_f = ((rho * a - rho**2 * b) / (1 - rho**2) / width for a, b in ((f, m), (m, f)))
    # With m ~ N(rho f, 1 - rho^2) where f is given.
    info_m, info_f = (
        (rho**2 * x.square() * (1 - rho**2) ** 2 + rho**4 * (1 - rho**2)) / (1 - rho**2) ** 2 / width**2 for x in (f, m)
    )
    usual = (f.abs() < 1.5) & (m.abs() < 1.5)  # counted often enough
    for axis, (in_m, in_f) in enumerate(zip(*(gradient(x).split(1, 1) for x in (moving, fixed)), strict=True)):
        pairs = [((X, Y, Z)[axis], in_m * along_m - in_f * along_f)]
        pairs += [((XX, YY, ZZ)[axis], in_m**2 * info_m + in_f**2 * info_f)]
        for part, expected in pairs:
            a, b = normal[:, part : part + 1][usual], expected[usual]
            assert torch.corrcoef(torch.stack((a, b)))[0, 1] > 0.9
            assert (a * b).sum() / b.square().sum() == pytest.approx(1, abs=0.15)


def test_the_information_is_that_of_the_displacement_and_rises_from_step_to_step():
    moving, fixed, truth = deformed((32, 32, 32), 1.5, seed=10)
    equations, displacement, information = equations_of(fixed, moving, FULL), None, []
    for _ in range(6):
        information.append(equations.objective(displacement).item())
        displacement, _ = next_step(equations, displacement, DEFAULT.first_smoothness)
    assert information == sorted(information)
    aligned = equations.objective(truth).item()
    assert information[0] < 0.7 * aligned and information[-1] > 0.8 * aligned


# Differences


@given(slopes=st.tuples(*[st.floats(-2, 2)] * 3))
def test_the_gradient_of_a_ramp_is_its_slope_and_nought_at_the_border(slopes):
    at = fields.identity((5, 7, 6), like=torch.zeros((), dtype=torch.float64))
    ramp = sum(slope * at[:, axis : axis + 1] for axis, slope in enumerate(slopes))
    for axis, (slope, differences) in enumerate(zip(slopes, gradient(ramp).split(1, 1), strict=True)):
        assert differences.shape == ramp.shape
        along = differences.movedim(4 - axis, 0)
        torch.testing.assert_close(along[1:-1], torch.full_like(along[1:-1], slope))
        assert not along[[0, -1]].any()
