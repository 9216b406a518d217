"""Gauss-Newton steps on mutual information: what they find, what they leave alone, and the equations by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from textures import deformed, inner, other_contrast, textured

from DivRegNetLib.core import fields
from DivRegNetLib.registration import newton

XX, YY, ZZ, XY, XZ, YZ, X, Y, Z = range(9)


def equations(fixed: torch.Tensor, moving: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    return newton.Images(fixed, moving, stride).equations(None)


# What the steps find


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(32, 32, 32), (32, 40, 24)])
def test_a_smooth_deformation_between_contrasts_is_mostly_recovered(stride, shape):
    moving, fixed, truth = deformed(shape, 2.0, seed=0)
    found = fields.resize(newton.approach(fixed, moving, 8, stride), shape)
    before, after = (inner(error).norm(dim=1).mean() for error in (truth, found - truth))
    assert before > 1.2
    assert after < 0.3 * before


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_between_contrasts_is_found_along_its_axis(axis):
    moving, shape = textured((32, 24, 28), seed=1), (32, 24, 28)
    shift = torch.zeros(1, 3, 1, 1, 1)
    shift[0, axis] = -1.6
    fixed = other_contrast(fields.warp(moving, shift.expand(1, 3, *shape)))
    found = fields.resize(newton.approach(fixed, moving, 24, 2), shape)
    torch.testing.assert_close(inner(found).mean((0, 2, 3, 4)), shift.flatten(), atol=0.1, rtol=0)


def test_more_steps_come_closer():
    moving, fixed, truth = deformed((32, 32, 32), 2.5, seed=2)
    errors = [
        inner(fields.resize(newton.approach(fixed, moving, steps, 2), (32, 32, 32)) - truth).norm(dim=1).mean()
        for steps in (1, 3, 8)
    ]
    assert errors[2] < errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("stride", [1, 2])
def test_momentum_gets_further_where_the_way_is_long(stride, monkeypatch):
    moving, fixed, truth = deformed((32, 32, 32), 4.0, seed=3)

    def error() -> torch.Tensor:
        found = fields.resize(newton.approach(fixed, moving, 24, stride), (32, 32, 32))
        return inner(found - truth).norm(dim=1).mean()

    with_momentum = error()
    without = {pool: level._replace(momentum=0.0) for pool, level in newton.LEVELS.items()}
    monkeypatch.setattr(newton, "LEVELS", without)
    assert with_momentum < 0.8 * error()


def test_no_step_is_too_long_or_too_steep_with_the_one_before():
    moving, fixed, _ = deformed((32, 32, 32), 2.5, seed=12)
    images = newton.Images(fixed, moving, 1)
    before = 5 * textured((32, 32, 32), seed=13).expand(-1, 3, -1, -1, -1)
    _, step = images.step(None, newton.FIRST, before=before)
    assert fields.length(step).max() <= newton.LONGEST + 1e-5
    assert max(slope.abs().sum(1).max() for slope in fields.gradients(step)) <= newton.STEEPEST + 1e-5


def test_the_next_step_is_the_least_smooth_and_both_are_told():
    """Fixed image, moving image, and what a network gets: for each smoothness a step and how much is known."""
    moving, fixed, _ = deformed((24, 32, 16), 1.0, seed=3)
    step, forward, backward = newton.guess(fixed, moving, 2)
    normal, _ = equations(fixed, moving, 2)
    first, last = (newton.solve(normal, smoothness, 2)[0] for smoothness in newton.TOLD)
    torch.testing.assert_close(step, last)
    torch.testing.assert_close(forward[:, [0, 1, 2, 4, 5, 6]], torch.cat((first, last), 1))
    torch.testing.assert_close(backward[:, [0, 1, 2, 4, 5, 6]], -torch.cat((first, last), 1))
    torch.testing.assert_close(forward[:, [3, 7]], backward[:, [3, 7]])
    assert 0 <= forward[:, [3, 7]].min() < 0.5 < forward[:, [3, 7]].max() < 1
    assert step.shape == (1, 3, 12, 16, 8)


def test_every_voxel_is_looked_at_once_in_a_round_of_steps():
    at = index_image((16, 24, 16))
    images = newton.Images(at, at, 2)
    assert sorted(images.turns) == sorted({(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)})
    seen = [images._moved(None, turn, (8, 12, 8))[:, 0] for turn in images.turns]
    assert torch.equal(torch.cat(seen).flatten().sort()[0], at.flatten())


@pytest.mark.parametrize("turn", range(8))
def test_a_displacement_on_the_output_grid_moves_the_voxels_that_are_looked_at_by_as_much(turn):
    """Of a ramp, sampled at whatever voxels: its value there plus slope times displacement, which is linear, too."""
    shape = (16, 24, 16)
    x, y, z = fields.identity(shape, like=torch.zeros(())).split(1, 1)
    ramp = 0.02 * x - 0.01 * y + 0.015 * z
    u, v, w = fields.identity((8, 12, 8), like=ramp).split(1, 1)
    coarse = torch.cat((0.1 + 0.05 * u, 0.02 * v, -0.1 - 0.03 * w), 1)  # in voxels of the output grid
    images = newton.Images(ramp, ramp, 2)
    offset = images.turns[turn]
    every = (..., *(slice(o, None, 2) for o in offset))
    middle = [(c[every] + 0.5) / 2 - 0.5 for c in (x, y, z)]  # in voxels of the output grid
    moved = 2 * (0.02 * (0.1 + 0.05 * middle[0]) - 0.01 * 0.02 * middle[1] + 0.015 * (-0.1 - 0.03 * middle[2]))
    found = images._moved(coarse, offset, (8, 12, 8))[:, :1]
    torch.testing.assert_close(inner2(found), inner2(ramp[every] + moved), atol=1e-5, rtol=0)


def index_image(shape) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(1, 1, *shape)


def inner2(field: torch.Tensor) -> torch.Tensor:
    return field[..., 2:-2, 2:-2, 2:-2]


# What they leave alone


@given(seed=st.integers(0, 10**6), stride=st.sampled_from((1, 2)))
def test_identical_images_do_not_move(seed, stride):
    image = textured((16, 24, 16), seed)
    assert newton.approach(image, image, 2, stride).abs().max() < 1e-3
    assert newton.guess(image, image, stride)[0].abs().max() < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_flat_images_do_not_move(value):
    flat = torch.full((1, 1, 16, 16, 16), value)
    for other in (flat, torch.full_like(flat, 1 - value)):
        assert torch.equal(newton.approach(flat, other, 2, 2), torch.zeros(1, 3, 8, 8, 8))
        step, *told = newton.guess(flat, other, 2)
        assert torch.equal(step, torch.zeros(1, 3, 8, 8, 8))
        assert all(torch.isfinite(x).all() for x in told)


@pytest.mark.parametrize("swap", [False, True])
def test_a_flat_and_a_textured_image_do_not_move(swap):
    images = torch.full((1, 1, 16, 16, 16), 0.5), textured((16, 16, 16))
    fixed, moving = reversed(images) if swap else images
    assert newton.approach(fixed, moving, 3, 2).abs().max() < 0.02


def test_what_has_not_been_measured_neither_pulls_nor_counts():
    """A moving image cut off in the middle: the cut would attract whatever is bright beside it."""
    moving, fixed, truth = deformed((32, 32, 32), 1.0, seed=9)
    seen = torch.ones_like(moving, dtype=torch.bool)
    seen[..., 14:] = False
    cut = moving * seen
    errors = [
        inner(fields.resize(newton.approach(fixed, image, 9, 2, valid), (32, 32, 32)) - truth)[..., :6]
        .norm(dim=1)
        .mean()
        for image, valid in ((cut, None), (cut, (torch.ones_like(seen), seen)), (moving, None))
    ]
    assert errors[2] < errors[1] < 0.95 * errors[0]


def test_the_information_of_a_step_is_that_of_its_start_and_rises_from_step_to_step():
    moving, fixed, truth = deformed((32, 32, 32), 1.5, seed=10)
    images, displacement, found = newton.Images(fixed, moving, 1), None, []
    for _ in range(6):
        found.append(images.equations(displacement)[1].item())
        displacement, _ = images.step(displacement, newton.FIRST)
    assert found == sorted(found)
    aligned = images.equations(truth)[1].item()
    assert found[0] < 0.7 * aligned and found[-1] > 0.8 * aligned


@given(seed=st.integers(0, 10**6))
def test_the_equations_of_the_swapped_pair_ask_for_the_opposite_step(seed):
    fixed, moving = textured((16, 24, 16), seed), other_contrast(textured((16, 24, 16), seed + 1))
    forward, backward = equations(fixed, moving, 2)[0], equations(moving, fixed, 2)[0]
    torch.testing.assert_close(forward[:, :X], backward[:, :X])
    torch.testing.assert_close(forward[:, X:], -backward[:, X:])
    torch.testing.assert_close(
        newton.solve(forward, newton.LAST, 2)[0], -newton.solve(backward, newton.LAST, 2)[0], atol=1e-4, rtol=1e-3
    )
    told, swapped = newton.guess(fixed, moving, 2)[2], newton.guess(moving, fixed, 2)[1]
    torch.testing.assert_close(told, swapped, atol=1e-4, rtol=1e-3)


def test_a_batch_of_two_is_two_batches_of_one():
    pairs = [deformed((16, 24, 16), 1.0, seed)[:2] for seed in (4, 5)]
    moving, fixed = (torch.cat(images) for images in zip(*pairs, strict=True))
    together = newton.approach(fixed, moving, 3, 2)
    apart = torch.cat([newton.approach(f, m, 3, 2) for m, f in pairs])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_the_arithmetic_is_that_of_the_images():
    moving, fixed, _ = deformed((16, 24, 16), 1.0, seed=6)
    single = newton.approach(fixed, moving, 3, 2)
    double = newton.approach(fixed.double(), moving.double(), 3, 2)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert all(x.dtype == torch.float64 for x in newton.guess(fixed.double(), moving.double(), 2))
    assert (single - double).abs().max() < 0.05  # a voxel may fall into another bin


def test_mixed_precision_changes_nothing():
    moving, fixed, _ = deformed((16, 24, 16), 1.0, seed=6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = newton.approach(fixed, moving, 2, 2), *newton.guess(fixed, moving, 2)
    for found, expected in zip(
        mixed, (newton.approach(fixed, moving, 2, 2), *newton.guess(fixed, moving, 2)), strict=True
    ):
        assert torch.equal(found, expected)


def test_nothing_is_differentiated():
    moving, fixed, _ = deformed((16, 16, 16), 1.0, seed=7)
    moving.requires_grad_()
    assert not newton.approach(fixed, moving, 1, 2).requires_grad
    assert not any(x.requires_grad for x in newton.guess(fixed, moving, 2))


def test_unrelated_images_hold_little_information_and_related_ones_much():
    noise, other = torch.rand(2, 1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    unrelated, related = (
        equations(noise, image, 1)[0][:, [XX, YY, ZZ]].mean() for image in (other, other_contrast(noise))
    )
    assert related > 50 * unrelated


# The equations


def constant(values: dict[int, float], shape=(6, 7, 8)) -> torch.Tensor:
    """Equations that are the same everywhere."""
    normal = torch.zeros(1, 9, *shape, dtype=torch.float64)
    for part, value in values.items():
        normal[:, part] = value
    return normal


def test_equal_equations_everywhere_have_their_own_solution():
    """A u = b, A with off-diagonal terms, by torch's solver: nothing to smooth."""
    parts = {XX: 4.0, XY: 1.0, XZ: -0.5, YY: 3.0, YZ: 0.25, ZZ: 2.0, X: 0.6, Y: -0.3, Z: 0.9}
    step = newton.solve(constant(parts), newton.FIRST, 2)[0]
    matrix = torch.tensor([[4.0, 1.0, -0.5], [1.0, 3.0, 0.25], [-0.5, 0.25, 2.0]], dtype=torch.float64)
    expected = torch.linalg.solve(matrix, torch.tensor([0.6, -0.3, 0.9]).double())
    assert expected.norm() < newton.LONGEST
    torch.testing.assert_close(step, expected.view(1, 3, 1, 1, 1).expand_as(step), atol=1e-3, rtol=1e-3)


def test_a_step_is_cut_at_its_longest_in_its_own_direction():
    parts = {XX: 1.0, YY: 1.0, ZZ: 1.0, X: 30.0, Y: -40.0, Z: 0.0}
    step = newton.solve(constant(parts), newton.FIRST, 1)[0]
    expected = newton.LONGEST * torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64)
    torch.testing.assert_close(step, expected.view(1, 3, 1, 1, 1).expand_as(step), atol=1e-6, rtol=1e-6)


def test_a_step_is_nowhere_so_steep_that_it_folds():
    """Neighbors that are pulled apart, and little smoothness."""
    normal = constant({XX: 1.0, YY: 1.0, ZZ: 1.0}, (12, 12, 12))
    normal[:, X, :, :, :6], normal[:, X, :, :, 6:] = 2.0, -2.0
    step = newton.solve(normal, newton.Smoothness(0.0, 0.1, 0.0), 2)[0]
    steepest = max(slope.abs().sum(1).max().item() for slope in fields.gradients(step))
    assert steepest == pytest.approx(newton.STEEPEST)
    assert (fields.jacobian_determinant(step) > 0).all()


@pytest.mark.parametrize(("seen", "levels"), [(10**6, [4, 2, 1]), (50_000, [2, 1]), (1000, [1])])
def test_averaged_images_are_looked_at_only_where_enough_of_them_was_seen(seen, levels):
    schedule = newton._schedule(24, 2, (96, 96, 96), seen)
    assert [pool for pool, _ in schedule] == levels
    assert {pool: len(steps) for pool, steps in schedule} == {n: {4: 8, 2: 9, 1: 7}[n] for n in levels}
    assert schedule[-1][1][0] == newton.FIRST
    assert tuple(schedule[-1][1][-1]) == pytest.approx(newton.LAST)


def test_what_is_known_reaches_further_the_smoother_a_step_is():
    """Information and a pull in the middle alone."""
    normal = constant({}, (25, 25, 25))
    normal[:, [XX, YY, ZZ], 12, 12, 12] = 1000.0
    normal[:, X, 12, 12, 12] = 500.0
    first, last = (newton.solve(normal, smoothness, 2)[0][0, 0, 12, 12, [12, 18]] for smoothness in newton.TOLD)
    for here, there in (first, last):
        assert here > there > 0
    assert first[1] / first[0] > last[1] / last[0]


def test_the_equations_of_jointly_gaussian_images_are_those_of_their_correlation():
    """Of standard normal f and m with correlation r: dL/dm = (r f - r^2 m) / (1 - r^2), and E[(dL/dm)^2 | f] from it.

    The histogram's window widens both variances, so that the correlation is less and the scale larger.
    """
    r, sd = 0.8, 0.15
    f, z = torch.randn(2, 1, 1, 48, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = r * f + math.sqrt(1 - r * r) * z
    fixed, moving = ((0.5 + sd * x).clamp(0, 1) for x in (f, m))
    found, _ = equations(fixed, moving, 1)
    blur = 1 + (newton.PARZEN / (newton.BINS - 1) / sd) ** 2
    rho, width = r / blur, math.sqrt(blur) * sd
    f, m = ((x - 0.5) / width for x in (fixed, moving))
    along_m, along_f = ((rho * a - rho**2 * b) / (1 - rho**2) / width for a, b in ((f, m), (m, f)))
    # With m ~ N(rho f, 1 - rho^2) where f is given.
    info_m, info_f = (
        (rho**2 * x.square() * (1 - rho**2) ** 2 + rho**4 * (1 - rho**2)) / (1 - rho**2) ** 2 / width**2 for x in (f, m)
    )
    usual = (f.abs() < 1.5) & (m.abs() < 1.5)  # counted often enough
    for axis, (in_m, in_f) in enumerate(zip(newton.gradient(moving), newton.gradient(fixed), strict=True)):
        pairs = [(X + axis, in_m * along_m - in_f * along_f)]
        pairs += [((XX, YY, ZZ)[axis], in_m**2 * info_m + in_f**2 * info_f)]
        for part, expected in pairs:
            a, b = found[:, part : part + 1][usual], expected[usual]
            assert torch.corrcoef(torch.stack((a, b)))[0, 1] > 0.9
            assert (a * b).sum() / b.square().sum() == pytest.approx(1, abs=0.15)


# Differences


@given(slopes=st.tuples(*[st.floats(-2, 2)] * 3))
def test_the_gradient_of_a_ramp_is_its_slope_and_nought_at_the_border(slopes):
    at = fields.identity((5, 7, 6), like=torch.zeros((), dtype=torch.float64))
    ramp = sum(slope * at[:, axis : axis + 1] for axis, slope in enumerate(slopes))
    for axis, (slope, found) in enumerate(zip(slopes, newton.gradient(ramp), strict=True)):
        assert found.shape == ramp.shape
        along = found.movedim(4 - axis, 0)
        torch.testing.assert_close(along[1:-1], torch.full_like(along[1:-1], slope))
        assert not along[[0, -1]].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_and_cuda_agree():
    moving, fixed, _ = deformed((32, 32, 32), 1.5, seed=8)
    on_cpu, on_cuda = newton.approach(fixed, moving, 4, 2), newton.approach(fixed.cuda(), moving.cuda(), 4, 2)
    assert on_cuda.device.type == "cuda"
    assert (on_cuda.cpu() - on_cpu).abs().max() < 0.05
