"""Displacement and velocity fields: each function against maps that are known in closed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from DivRegNetLib.core import fields

SHAPE = (18, 26, 20)  # D, H, W: three different sides
SIZE = SHAPE[::-1]  # along x, y, z


def voxels(shape=SHAPE) -> torch.Tensor:
    """Voxel coordinates (1, 3, D, H, W) as x, y, z, independent of the library."""
    k, j, i = np.indices(shape)
    return torch.from_numpy(np.stack([i, j, k])[None].astype(float))


def linear_field(matrix, shape=SHAPE) -> torch.Tensor:
    """u(x) = A (x - middle of the grid)."""
    middle = (torch.tensor(shape[::-1], dtype=torch.float64) - 1) / 2
    return torch.einsum("ij,njdhw->nidhw", torch.as_tensor(matrix), voxels(shape) - middle.view(1, 3, 1, 1, 1))


def waves(points: torch.Tensor, amplitude: float, phase: float = 0.0, size=SIZE) -> torch.Tensor:
    """A smooth field at any points (1, 3, ...): each component varies along the next two axes and its own."""
    x, y, z = ((points[:, a] + 0.5) / size[a] * math.pi for a in range(3))
    return amplitude * torch.stack(
        [
            torch.sin(y + phase) * torch.cos(z) * torch.sin(x),
            torch.cos(z + phase) * torch.sin(x) * torch.sin(y),
            torch.sin(x + phase) * torch.cos(y) * torch.sin(z),
        ],
        1,
    )


def interior(x: torch.Tensor, margin: int = 4) -> torch.Tensor:
    return x[..., margin:-margin, margin:-margin, margin:-margin]


def assert_within(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (actual - expected).abs().max().item() <= tolerance


@given(by=st.tuples(*[st.floats(-3, 3)] * 3))
def test_a_shifted_image_is_the_image_sampled_aside(by):
    image = torch.randn(1, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = voxels() + torch.tensor(by, dtype=torch.float64).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(fields.shifted(image, *by), fields.sample(image, points))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_shift_by_whole_voxels_along_one_axis_is_array_slicing(axis, mode):
    shape = (8, 32, 16)  # powers of two: no coordinate is rounded, so the result is exact to the bit
    image = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(0))
    displacement = torch.zeros(1, 3, *shape)
    displacement[:, axis] = 3  # component 0 is x, that is W, the last dimension
    dim = 4 - axis
    warped = fields.warp(image, displacement, mode=mode)
    inside = shape[dim - 2] - 3
    assert torch.equal(warped.narrow(dim, 0, inside), image.narrow(dim, 3, inside))
    last = image.narrow(dim, shape[dim - 2] - 1, 1)
    assert torch.equal(warped.narrow(dim, inside, 3), last.expand_as(warped.narrow(dim, inside, 3)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_field_along_one_axis_of_an_uneven_grid_moves_along_that_axis_only(axis):
    displacement = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
    displacement[:, axis] = 2.5
    moved = fields.warp(voxels(), displacement) - voxels()
    inside = moved.narrow(4 - axis, 0, SIZE[axis] - 3)
    expected = torch.zeros(3, dtype=torch.float64)
    expected[axis] = 2.5
    assert_within(inside, expected.view(1, 3, 1, 1, 1).expand_as(inside), 1e-12)


def test_coordinates_are_x_y_z():
    assert torch.equal(fields.identity(SHAPE, like=voxels()), voxels())


@given(shape=st.tuples(*[st.integers(1, 8)] * 3), channels=st.integers(1, 4))
def test_one_image_is_sampled_as_each_of_a_batch_and_as_one_that_is_learned_from(shape, channels):
    """Each goes another way: parts of one image are sampled by several threads."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, 5, 6, 7, generator=generator)
    points = torch.rand(1, 3, *shape, generator=generator) * 9 - 1
    alone = fields.sample(image, points)
    assert torch.equal(alone, fields.sample(torch.cat((image, image)), torch.cat((points, points)))[1:])
    assert torch.equal(alone, fields.sample(image.clone().requires_grad_(), points).detach())


def test_kept_matrices_have_the_asked_type_and_can_be_learned_through():
    with torch.inference_mode():
        first = fields.gaussian(9, 1.25, like=torch.zeros(1))
    assert fields.gaussian(9, 1.25, like=torch.zeros(1)) is first
    assert fields.gaussian(9, 1.25, like=torch.zeros(1).double()).dtype == torch.float64
    weight = torch.ones(9, requires_grad=True)
    (first @ weight).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * first.T @ first.sum(1))


def test_padding_repeats_the_border_or_gives_zeros():
    image = torch.full((1, 1, 4, 5, 6), 7.0)
    outside = torch.full((1, 3, 1, 1, 1), -3.0)
    assert fields.sample(image, outside).item() == 7
    assert fields.sample(image, outside, padding="zeros").item() == 0


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("shape", [SHAPE, (1, 7, 2)])
def test_a_sampler_gives_what_sampling_gives_inside_and_beyond_the_border(shape, channels):
    random = torch.Generator().manual_seed(0)
    image = torch.rand(1, channels, *shape, generator=random)
    sampler = fields.Sampler(image)
    corners = torch.tensor([[0.0, 0, 0], [n - 1 for n in shape[::-1]], [-40, 1.5, 900]]).T.view(1, 3, 3, 1, 1)
    for spread, count in ((1.0, (4, 5, 6)), (3.0, (1, 1, 8))):
        points = torch.rand(1, 3, *count, generator=random) * torch.tensor(shape[::-1]).view(1, 3, 1, 1, 1) * spread - 1
        for at in (points, corners):
            torch.testing.assert_close(sampler(at), fields.sample(image, at), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_a_sampler_gives_what_sampling_at_a_displacement_gives(stride, count):
    random = torch.Generator().manual_seed(0)
    image = torch.rand(count, 3, 8, 12, 10, generator=random)
    displacement = 4 * torch.randn(count, 3, 8 // stride, 12 // stride, 10 // stride, generator=random)
    expected = fields.sample_displaced(image, displacement, stride)
    torch.testing.assert_close(fields.Sampler(image).displaced(displacement, stride), expected, atol=1e-5, rtol=0)


def test_a_sampler_survives_positions_that_are_not_finite():
    """Whoever computed them notices it by the values."""
    image = torch.rand(1, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([float("nan"), float("inf"), -float("inf")]).view(1, 1, 1, 1, 3).expand(1, 3, 1, 1, 3)
    found = fields.Sampler(image)(points).flatten(2)[0]
    assert found[:, 0].isnan().all()
    torch.testing.assert_close(found[:, 1:], torch.stack((image[0, :, -1, -1, -1], image[0, :, 0, 0, 0]), 1))


def test_nearest_sampling_invents_no_label():
    labels = torch.randint(0, 4, (1, 1, *SHAPE), generator=torch.Generator().manual_seed(0)).double() * 10
    warped = fields.warp(labels, waves(voxels(), 3.0), mode="nearest")
    assert set(warped.unique().tolist()) <= {0.0, 10.0, 20.0, 30.0}


@pytest.mark.parametrize("shape", [(9, 13, 10), (36, 52, 40), (12, 39, 25)])
def test_resize_keeps_the_physical_deformation(shape):
    matrix = np.array([[0.02, -0.05, 0.03], [0.04, 0.01, -0.02], [-0.03, 0.06, 0.05]])
    ratio = np.array(shape[::-1]) / np.array(SIZE)
    # Lengths in new voxels are longer by the ratio, and so are the coordinates that the field is a function of.
    expected = linear_field(np.diag(ratio) @ matrix @ np.diag(1 / ratio), shape)
    margin = 4 * max(1, math.ceil(ratio.max()))
    resized = fields.resize(linear_field(matrix), shape)
    assert resized.shape == (1, 3, *shape)
    assert_within(interior(resized, margin // 2), interior(expected, margin // 2), 1e-12)


def test_resize_to_the_same_shape_changes_nothing():
    field = waves(voxels(), 2.0)
    assert torch.equal(fields.resize(field, SHAPE), field)


def test_composition_is_outer_after_inner():
    inner, outer = waves(voxels(), 1.5), waves(voxels(), 2.0, phase=1.0)
    expected = inner + waves(voxels() + inner, 2.0, phase=1.0)
    assert_within(interior(fields.compose(outer, inner)), interior(expected), 0.03)
    other_way = fields.compose(inner, outer)
    assert (interior(other_way) - interior(expected)).abs().max() > 0.1, "the order would not be seen"


def test_composition_is_associative():
    a, b, c = (waves(voxels(), 1.5, phase) for phase in (0.0, 1.0, 2.0))
    left = fields.compose(fields.compose(a, b), c)
    right = fields.compose(a, fields.compose(b, c))
    assert_within(interior(left), interior(right), 0.03)


def test_composition_with_the_identity_changes_nothing():
    field = waves(voxels(), 2.0)
    zero = torch.zeros_like(field)
    assert_within(fields.compose(field, zero), field, 1e-12)
    assert torch.equal(fields.compose(zero, field), field)


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_constant_velocity_integrates_to_itself(steps):
    velocity = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    assert_within(fields.integrate(velocity, steps), velocity, 1e-12)


def test_a_turning_velocity_integrates_to_a_rotation():
    angle = 0.4
    generator = np.array([[0.0, -angle, 0.0], [angle, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rotation = torch.matrix_exp(torch.from_numpy(generator)).numpy()
    flow = fields.integrate(linear_field(generator), 8)
    assert_within(interior(flow, 6), interior(linear_field(rotation - np.eye(3)), 6), 0.01)


def test_the_flow_of_the_opposite_velocity_leads_back():
    velocity = waves(voxels(), 2.5)
    there, back = fields.integrate(velocity), fields.integrate(-velocity)
    assert interior(there).norm(dim=1).max() > 2
    assert interior(fields.compose(back, there)).norm(dim=1).max() < 0.1
    assert interior(fields.compose(there, back)).norm(dim=1).max() < 0.1


def test_a_smooth_velocity_does_not_fold_where_the_same_displacement_does():
    velocity = waves(voxels(), 8.0)
    assert fields.jacobian_determinant(velocity).min() < 0
    assert fields.jacobian_determinant(fields.integrate(velocity)).min() > 0


def test_the_inverse_undoes_an_invertible_deformation_within_a_tenth_of_a_voxel():
    displacement = waves(voxels(), 3.0, phase=0.5)
    assert (fields.jacobian_determinant(displacement) > 0.2).all()
    inverse = fields.invert(displacement)
    assert interior(fields.compose(displacement, inverse)).norm(dim=1).max() < 0.1
    assert interior(fields.compose(inverse, displacement)).norm(dim=1).max() < 0.1


def test_the_inverse_of_a_shift_is_the_opposite_shift():
    shift = torch.tensor([1.25, -2.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    assert_within(fields.invert(shift), -shift, 1e-12)


def test_the_jacobian_determinant_of_an_affine_map_is_that_of_its_matrix():
    matrix = np.array([[1.1, -0.3, 0.2], [0.4, 0.8, -0.1], [-0.2, 0.5, 1.3]])
    found = fields.jacobian_determinant(linear_field(matrix - np.eye(3)))
    assert found.shape == (1, *(n - 1 for n in SHAPE))
    np.testing.assert_allclose(found.numpy(), np.linalg.det(matrix), rtol=1e-12)


def test_the_jacobian_determinant_of_a_quadratic_map_is_exact_between_the_voxels():
    rates = torch.tensor([0.02, -0.01, 0.03], dtype=torch.float64).view(1, 3, 1, 1, 1)
    found = fields.jacobian_determinant(rates * voxels().square() / 2)
    between = voxels(tuple(n - 1 for n in SHAPE)) + 0.5
    np.testing.assert_allclose(found.numpy(), (1 + rates * between).prod(1).numpy(), rtol=1e-10)


def test_a_fold_along_one_axis_has_a_negative_determinant_there_only():
    displacement = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
    displacement[:, 1, :, 10:] = -1.5  # y jumps back by more than one voxel between rows 9 and 10
    determinant = fields.jacobian_determinant(displacement)
    assert (determinant[:, :, 9] == -0.5).all()
    assert (determinant[:, :, :9] == 1).all()
    assert (determinant[:, :, 10:] == 1).all()


def test_smoothness_of_linear_fields_is_known():
    matrix = np.array([[0.1, -0.3, 0.2], [0.4, 0.2, -0.1], [-0.2, 0.5, 0.3]])
    field = linear_field(matrix)
    assert fields.bending(field).item() == pytest.approx(0, abs=1e-24)
    assert fields.diffusion(field).item() == pytest.approx((matrix**2).sum() / 3)
    assert fields.diffusion(torch.ones_like(field)).item() == 0


def test_bending_of_a_quadratic_field_is_known():
    rates = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64).view(1, 3, 1, 1, 1)
    field = rates * voxels().square() / 2  # each component bends along its own axis alone
    assert fields.bending(field).item() == pytest.approx((rates**2).sum().item() / 3)


def test_gradients_run_along_x_y_z():
    slopes = [0.5, -0.25, 0.125]
    field = sum(s * voxels()[:, a : a + 1] for a, s in enumerate(slopes))
    for axis, gradient in enumerate(fields.gradients(field)):
        assert gradient.shape[4 - axis] == SIZE[axis] - 1
        assert_within(gradient, torch.full_like(gradient, slopes[axis]), 1e-12)


def test_fields_pass_gradients_to_the_velocity():
    velocity = waves(voxels(), 1.0).requires_grad_()
    image = waves(voxels(), 1.0, phase=2.0)[:, :1]
    fields.warp(image, fields.resize(fields.integrate(velocity, 3), SHAPE)).square().mean().backward()
    assert torch.isfinite(velocity.grad).all()
    assert velocity.grad.abs().max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_and_cuda_agree():
    velocity, image = waves(voxels(), 2.0).float(), waves(voxels(), 1.0).float()
    results = [
        [fields.integrate(v), fields.invert(v), fields.warp(i, v), fields.resize(v, (9, 13, 10))]
        for v, i in ((velocity, image), (velocity.cuda(), image.cuda()))
    ]
    for cpu, cuda in zip(*results, strict=True):
        assert_within(cuda.cpu(), cpu, 1e-4)


@given(sigma=st.floats(0.3, 4), value=st.floats(-5, 5), sides=st.tuples(*[st.integers(1, 9)] * 3))
def test_smoothing_keeps_a_constant(sigma, value, sides):
    field = torch.full((2, 3, *sides), value)
    torch.testing.assert_close(fields.smooth(field, sigma), field, atol=1e-5, rtol=1e-5)


@given(sigma=st.floats(0.3, 2), at=st.tuples(*[st.integers(6, 8)] * 3))
def test_smoothing_spreads_one_voxel_evenly_and_loses_nothing(sigma, at):
    field = torch.zeros(1, 1, 15, 15, 15, dtype=torch.float64)
    field[0, 0, at[0], at[1], at[2]] = 1
    smoothed = fields.smooth(field, sigma)
    torch.testing.assert_close(smoothed.sum().item(), 1.0)
    torch.testing.assert_close(smoothed.argmax().item(), field.argmax().item())
    flipped = fields.smooth(field.flip(2, 3, 4), sigma).flip(2, 3, 4)
    torch.testing.assert_close(smoothed, flipped)
    center, beside = smoothed[0, 0, at[0], at[1], at[2]], smoothed[0, 0, at[0], at[1], at[2] + 1]
    torch.testing.assert_close((beside / center).item(), math.exp(-0.5 / sigma**2), atol=1e-6, rtol=1e-5)


def test_each_axis_is_smoothed_by_its_own_width():
    field = torch.zeros(1, 1, 15, 17, 19, dtype=torch.float64)
    field[0, 0, 7, 8, 9] = 1
    smoothed = fields.smooth(field, 1.5, 0.0, 0.8)[0, 0]
    assert smoothed.nonzero()[:, 1].unique().tolist() == [8]  # y stays as it is
    for dim, sigma in ((2, 1.5), (0, 0.8)):
        along = smoothed.sum([d for d in range(3) if d != dim])
        at = torch.arange(len(along)) - along.argmax()
        assert (along * at**2).sum().sqrt().item() == pytest.approx(sigma, rel=0.05)
