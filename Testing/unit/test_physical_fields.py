"""Between the working grid and physical space: what SimpleITK does with the transforms is what the fields mean."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from DivRegNetLib.core import fields, physical_fields, resampling
from DivRegNetLib.core.composites import displacement_on, field_grid, field_of
from DivRegNetLib.core.grid import Grid, affine_transform, apply_matrix


@pytest.fixture(scope="module")
def working_grid(grid, moving_grid) -> Grid:
    """As the pipeline makes it: along the LPS axes, over all of the fixed image."""
    return grid.axis_aligned(6.0, multiple=4)


@pytest.fixture(scope="module")
def initial(rigid) -> np.ndarray:
    """Rotation, anisotropic stretch and shift, fixed -> moving."""
    stretch = np.diag([1.05, 0.96, 1.02, 1.0])
    about = rigid((0, 0, 0), (31, -47, 112))
    return rigid((10, -12, 20), (8.0, -6.0, 10.0)) @ about @ stretch @ np.linalg.inv(about)


def waves_mm(points: np.ndarray, amplitude: float) -> np.ndarray:
    """A smooth displacement in LPS mm at LPS points (..., 3): waves 120 mm long."""
    x, y, z = np.moveaxis(points, -1, 0) * 2 * np.pi / 120
    waves = [np.sin(y) + np.cos(z), np.sin(z + 1) * np.cos(x), np.cos(x + 2) + np.sin(y)]
    return amplitude * np.stack(waves, -1) / 2


def smooth(grid: Grid, amplitude: float = 5.0) -> torch.Tensor:
    """:func:`waves_mm` as a field on a grid, in its voxels, (1, 3, D, H, W)."""
    k, j, i = np.indices(grid.shape)
    millimeters = waves_mm(grid.to_physical(np.stack([i, j, k], -1)), amplitude)
    voxels = millimeters @ np.linalg.inv(grid.matrix[:3, :3]).T
    return torch.from_numpy(np.moveaxis(voxels, -1, 0)[None].astype(np.float32))


def voxel_centers(grid: Grid, margin: int = 0) -> np.ndarray:
    """Voxel indices (n, 3), those nearer than the margin to the border left out."""
    axes = [np.arange(margin, n - margin) for n in grid.size]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def mapped(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(p) for p in points.tolist()])


def assert_covers(transform: sitk.CompositeTransform, grid: Grid) -> None:
    """The field has the voxels of a grid, and a margin in which it ends in zeros."""
    field = field_of(transform)
    assert Grid.of(field) == field_grid(transform)
    margin = (np.array(field.GetSize()) - grid.size) // 2
    assert (margin >= 1).all()
    assert Grid.of(field[tuple(slice(int(m), int(m + n)) for m, n in zip(margin, grid.size, strict=True))]) == grid
    array = sitk.GetArrayFromImage(field)
    assert max(np.abs(np.take(array, end, axis)).max() for axis in range(3) for end in (0, -1)) == 0


def ramp(points: np.ndarray) -> np.ndarray:
    return points @ np.array([0.7, -0.4, 1.1]) + 20


@pytest.fixture(scope="module")
def ramp_image():
    """``grid -> image`` of a linear function of position."""

    def image(grid: Grid) -> sitk.Image:
        values = ramp(grid.to_physical(voxel_centers(grid))).reshape(grid.size)
        return grid.image(values.transpose(2, 1, 0).astype(np.float32))

    return image


# Images in


@pytest.mark.parametrize("spacing", [3.0, 6.0, 9.0])
def test_a_ramp_is_sampled_where_it_is_however_coarse_the_grid(ramp_image, moving_grid, grid, initial, spacing):
    target = grid.axis_aligned(spacing)
    found = sitk.GetArrayFromImage(resampling.resample_smooth(ramp_image(moving_grid), target, initial)[0])
    assert found.dtype == np.float32
    index = voxel_centers(target)
    points = apply_matrix(initial, target.to_physical(index))
    at = moving_grid.to_index(points)
    inside = ((at >= 6) & (at <= np.array(moving_grid.size) - 7)).all(1)  # clear of the border, where it is mirrored
    assert inside.sum() > 100
    i, j, k = index[inside].T
    np.testing.assert_allclose(found[k, j, i], ramp(points[inside]), atol=2e-3)


def test_what_is_coarser_than_the_target_is_not_smoothed(paint, moving_grid):
    image = paint(moving_grid)
    finer = moving_grid.axis_aligned(4.0)
    plain = sitk.Resample(image, finer.empty_image(), sitk.Transform(), sitk.sitkBSpline, 0.0)
    found = resampling.resample_smooth(image, finer, np.eye(4))[0]
    inside = finer.to_physical(voxel_centers(finer))[moving_grid.contains(finer.to_physical(voxel_centers(finer)))]
    for point in inside[::97].tolist():
        index = finer.empty_image().TransformPhysicalPointToIndex(point)
        assert found.GetPixel(index) == pytest.approx(plain.GetPixel(index), abs=1e-6)


def test_a_wave_of_five_voxels_keeps_its_height_between_the_voxels(moving_grid, initial):
    """Linear interpolation takes away a fifth of it."""
    wave = np.sin(2 * np.pi * np.indices(moving_grid.shape)[2] / 5).astype(np.float32)
    wave[0, 0, 0], wave[-1, -1, -1] = -1, 1  # the range that values are clipped to
    image = moving_grid.image(wave)
    middle = apply_matrix(np.linalg.inv(initial), moving_grid.center)
    target = Grid.build((12, 12, 12), [min(moving_grid.spacing)] * 3, middle - 6 * min(moving_grid.spacing))
    index = voxel_centers(target)
    at = moving_grid.to_index(apply_matrix(initial, target.to_physical(index)))
    inside = ((at >= 4) & (at <= np.array(moving_grid.size) - 5)).all(1)
    assert inside.sum() > 1000
    found = sitk.GetArrayFromImage(resampling.resample_smooth(image, target, initial)[0])
    i, j, k = index[inside].T
    np.testing.assert_allclose(found[k, j, i], np.sin(2 * np.pi * at[inside, 0] / 5), atol=0.04)


@given(
    size=st.tuples(*[st.integers(1, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    target=st.floats(0.5, 12.0),
    value=st.floats(-2000, 2000),
)
@settings(max_examples=50, deadline=None)
def test_a_constant_image_stays_constant(size, spacing, target, value):
    image = Grid.build(size, spacing, (3.0, -70.0, 20.0)).image(np.full(size[::-1], value, np.float32))
    found = resampling.resample_smooth(image, Grid.of(image).axis_aligned(target), np.eye(4))[0]
    np.testing.assert_allclose(sitk.GetArrayViewFromImage(found), value, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", [0.8, 1.2, 1.6, 3.0])
def test_nothing_is_darker_or_brighter_than_the_image(grid_about, spacing):
    """Splines overshoot at an edge: what is black around a brain that was cut out would become gray."""
    image = grid_about((31, -47, 112), (30, 32, 28), (1.0, 1.0, 1.0), (10, 20, 30))
    brain = (np.linalg.norm(image.to_physical(voxel_centers(image)) - image.center, axis=1) < 9).astype(np.float32)
    found = resampling.resample_smooth(
        image.image(brain.reshape(image.size).transpose(2, 1, 0)), image.axis_aligned(spacing), np.eye(4)
    )[0]
    values = sitk.GetArrayViewFromImage(found)
    assert values.min() >= 0 and values.max() <= 1 + 1e-6
    assert values.max() > 0.95


def test_along_a_very_long_axis_values_are_interpolated_linearly():
    """The matrices of splines would take minutes and gigabytes."""
    image = Grid.build((12_000, 4, 4), (0.5, 0.5, 0.5), (0, 0, 0))
    values = np.random.default_rng(0).random(image.shape, dtype=np.float32)
    found = resampling.resample_smooth(image.image(values), image, np.eye(4))[0]
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(found), values)


@given(
    size=st.tuples(*[st.integers(4, 24)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 4.0)] * 3),
    target=st.floats(0.5, 5.0),
    axes=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
)
@settings(max_examples=60, deadline=None)
def test_along_parallel_axes_values_are_those_that_itk_interpolates(size, spacing, target, axes, signs):
    direction = np.eye(3)[list(axes)] * np.array(signs)[:, None]
    values = np.random.default_rng(0).random(size[::-1], dtype=np.float32)
    image = Grid.build(size, spacing, (3.0, -70.0, 20.0), direction.ravel()).image(values)
    grid = Grid.of(image).axis_aligned(target)
    parallel = sitk.GetArrayFromImage(resampling.resample_smooth(image, grid, np.eye(4))[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "PARALLEL", -1.0)
        by_itk = sitk.GetArrayFromImage(resampling.resample_smooth(image, grid, np.eye(4))[0])
    at = Grid.of(image).to_index(grid.to_physical(voxel_centers(grid))) + 0.5
    at_border = (np.minimum(abs(at), abs(at - size)) < 1e-4).any(1)  # where rounding decides whether that is outside
    at_border = at_border.reshape(grid.size).transpose(2, 1, 0)
    np.testing.assert_allclose(parallel[~at_border], by_itk[~at_border], atol=1e-5)


def test_averaging_over_blocks_moves_nothing(grid_about):
    """A bright ball keeps its center and its sum where every other voxel, and more, is averaged."""
    fine = grid_about((31, -47, 112), (61, 54, 66), (0.7, 0.9, 0.6), (0, 0, 0))
    points = fine.to_physical(voxel_centers(fine))
    ball = (np.linalg.norm(points - fine.center, axis=1) < 8).astype(np.float32).reshape(fine.size).transpose(2, 1, 0)
    target = fine.axis_aligned(3.0)
    found = sitk.GetArrayFromImage(resampling.resample_smooth(fine.image(ball), target, np.eye(4))[0])
    weights = found.transpose(2, 1, 0).ravel()
    middle = (weights[:, None] * target.to_physical(voxel_centers(target))).sum(0) / weights.sum()
    np.testing.assert_allclose(middle, fine.center, atol=0.05)
    assert weights.sum() * 3.0**3 == pytest.approx(ball.sum() * np.prod(fine.spacing), rel=0.02)


def test_detail_finer_than_the_target_is_smoothed_away(grid_about):
    """A checkerboard of 1 mm voxels on a grid of 4 mm would alias to noise."""
    fine = grid_about((31, -47, 112), (40, 44, 36), (1.0, 1.0, 1.0), (10, 20, 30))
    board = (np.indices(fine.shape).sum(0) % 2).astype(np.float32)
    coarse = grid_about((31, -47, 112), (5, 5, 5), (4.0, 4.0, 4.0))
    found = sitk.GetArrayFromImage(resampling.resample_smooth(fine.image(board), coarse, np.eye(4))[0])
    np.testing.assert_allclose(found, 0.5, atol=0.02)


def test_outside_the_image_lies_its_darkest_value(ramp_image, moving_grid, grid_about):
    far = grid_about((500, 500, 500), (4, 5, 6), (6.0, 6.0, 6.0))
    image = ramp_image(moving_grid)
    found = sitk.GetArrayFromImage(resampling.resample_smooth(image, far, np.eye(4))[0])
    values = sitk.GetArrayFromImage(image)
    np.testing.assert_allclose(found, np.quantile(values, 0.005), atol=0.02 * np.ptp(values))


def test_integer_images_are_sampled_as_real_numbers(grid, paint):
    image = sitk.Cast(paint(grid) * 1000, sitk.sitkInt16)
    found = resampling.resample_smooth(image, grid.axis_aligned(6.0), np.eye(4))[0]
    assert found.GetPixelID() == sitk.sitkFloat32
    assert Grid.of(found) == grid.axis_aligned(6.0)


def test_a_mask_stays_a_mask_and_is_nought_outside(moving_grid, working_grid, initial):
    array = np.zeros(moving_grid.shape, np.uint8)
    array[5:18, 4:13, 6:20] = 1
    found = sitk.GetArrayFromImage(resampling.resample_mask(moving_grid.image(array), working_grid, initial))
    assert set(np.unique(found)) == {0, 1}
    index = voxel_centers(working_grid)
    at = moving_grid.to_index(apply_matrix(initial, working_grid.to_physical(index)))
    i, j, k = np.clip(np.rint(at).astype(int), 0, np.array(moving_grid.size) - 1).T
    expected = array[k, j, i].astype(bool) & ((at >= -0.5) & (at <= np.array(moving_grid.size) - 0.5)).all(1)
    clear = (np.abs(at - np.rint(at)) < 0.49).all(1)  # ties may fall to either side
    i, j, k = index[clear].T
    np.testing.assert_array_equal(found[k, j, i].astype(bool), expected[clear])


# Fields out


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_displacement_by_one_voxel_leads_to_the_next_voxel_of_the_working_grid(moving_grid, grid, axis):
    """On a working grid with rotated, exchanged and flipped axes; whatever the grid of the transform."""
    displacement = torch.zeros(1, 3, *moving_grid.shape)
    displacement[:, axis] = 1
    step = moving_grid.to_physical(np.eye(3)[axis]) - moving_grid.to_physical((0, 0, 0))
    transform = physical_fields.forward_transform(displacement, moving_grid, np.eye(4), grid)
    points = grid.to_physical(voxel_centers(grid, 1) + 0.3)
    np.testing.assert_allclose(mapped(transform, points), points + step, atol=1e-4)


def test_no_displacement_leaves_the_initial_alignment(grid, working_grid, initial):
    zero = torch.zeros(1, 3, *working_grid.shape)
    transform = physical_fields.forward_transform(zero, working_grid, initial, grid)
    points = grid.to_physical(voxel_centers(grid))
    np.testing.assert_allclose(mapped(transform, points), apply_matrix(initial, points), atol=1e-6)


def test_the_transform_lives_on_the_fixed_grid(grid, working_grid, initial):
    transform = physical_fields.forward_transform(smooth(working_grid), working_grid, initial, grid)
    assert_covers(transform, grid)


@pytest.mark.parametrize("amplitude", [0.0, 0.3, 5.0, 40.0])
def test_beyond_the_fixed_image_the_initial_alignment_goes_on(amplitude, grid, working_grid, initial):
    displacement = smooth(working_grid, amplitude)
    transform = physical_fields.forward_transform(displacement, working_grid, initial, grid)
    outside = grid.to_physical([(-60.0, 5, 5), (10, 90, 5), (5, 5, -70), (80, 80, 80)])
    np.testing.assert_allclose(mapped(transform, outside), apply_matrix(initial, outside), atol=1e-9)
    wide = Grid(tuple(2 * n for n in grid.size), grid.matrix @ offset(-np.array(grid.size) / 2))
    straight = sitk.GetArrayFromImage(displacement_on(affine_transform(initial), wide))
    bend = np.linalg.norm(sitk.GetArrayFromImage(displacement_on(transform, wide)) - straight, axis=-1)
    slopes = [np.abs(np.diff(bend, axis=2 - axis)).max() / grid.spacing[axis] for axis in range(3)]
    own = amplitude * 2 * np.pi / 120  # of the displacement inside
    assert max(slopes) <= 0.6 + own, "there is no tear at the border"


def test_the_margin_of_a_field_is_no_larger_than_planned(grid, working_grid, initial, monkeypatch):
    monkeypatch.setattr(physical_fields, "SMALL_FIELD", 0)
    transform = physical_fields.forward_transform(smooth(working_grid, 40.0), working_grid, initial, grid)
    one_voxel = np.prod(np.array(grid.size) + 2)
    limit = max(physical_fields.LARGEST_GROWTH * grid.voxels, one_voxel)
    assert field_of(transform).GetNumberOfPixels() <= limit


def offset(index) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = index
    return matrix


def test_the_displacement_comes_before_the_initial_alignment(grid, working_grid, initial):
    transform = physical_fields.forward_transform(smooth(working_grid), working_grid, initial, grid)
    points = grid.to_physical(voxel_centers(grid))
    expected = apply_matrix(initial, points + waves_mm(points, 5.0))
    assert np.abs(mapped(transform, points) - expected).max() < 0.2  # interpolation on the 6 mm grid
    swapped = apply_matrix(initial, points) + waves_mm(points, 5.0)
    assert np.abs(swapped - expected).max() > 1, "the order would not be seen"


def test_beyond_the_working_grid_its_border_goes_on(grid_about):
    small = grid_about((0, 0, 0), (4, 5, 6), (2.0, 2.0, 2.0))
    large = grid_about((0, 0, 0), (8, 9, 10), (4.0, 4.0, 4.0))
    displacement = torch.zeros(1, 3, *small.shape)
    displacement[:, 0, :, :, -1] = 1.5  # 3 mm
    transform = physical_fields.forward_transform(displacement, small, np.eye(4), large)
    assert transform.TransformPoint((14.0, 0.0, 2.0)) == pytest.approx((17, 0, 2), abs=1e-5)
    assert transform.TransformPoint((-14.0, 0.0, 2.0)) == pytest.approx((-14, 0, 2), abs=1e-5)


def test_simpleitk_resampling_with_the_transform_is_warping_with_the_field(grid, paint, other_contrast):
    """On one grid, and rotated: voxels of the tensor, and mm of the transform, must mean the same deformation."""
    displacement, image = smooth(grid, 8.0), paint(grid, contrast=other_contrast)
    warped = fields.warp(torch.from_numpy(sitk.GetArrayFromImage(image))[None, None], displacement)[0, 0].numpy()
    transform = physical_fields.forward_transform(displacement, grid, np.eye(4), grid)
    resampled = sitk.GetArrayFromImage(sitk.Resample(image, grid.empty_image(), transform, sitk.sitkLinear, 0.0))
    inside = np.s_[3:-3, 3:-3, 3:-3]
    assert np.abs(warped - sitk.GetArrayFromImage(image))[inside].max() > 0.1
    np.testing.assert_allclose(resampled[inside], warped[inside], atol=1e-4)


def test_the_inverse_transform_undoes_the_forward_one_within_a_tenth_of_a_voxel(
    grid, moving_grid, working_grid, initial
):
    displacement = smooth(working_grid)
    forward = physical_fields.forward_transform(displacement, working_grid, initial, grid)
    inverse = physical_fields.inverse_transform(
        displacement, fields.invert(displacement), working_grid, initial, moving_grid
    )
    assert_covers(inverse, moving_grid)
    tenth = 0.1 * min(*grid.spacing, *moving_grid.spacing)

    def stays(transform: sitk.Transform, source: Grid, target: Grid) -> np.ndarray:
        """Points of the source, between its voxels, that the transform leads well inside the target."""
        points = source.to_physical(voxel_centers(source, 1) + 0.4)
        at = target.to_index(mapped(transform, points))
        return points[((at >= 0.5) & (at <= np.array(target.size) - 1.5)).all(1)]

    for there, back, source, target in (
        (forward, inverse, grid, moving_grid),
        (inverse, forward, moving_grid, grid),
    ):
        points = stays(there, source, target)
        assert len(points) > 1000
        moved = mapped(there, points)
        assert np.linalg.norm(moved - apply_matrix(initial, points), axis=1).max() > 2
        assert np.linalg.norm(mapped(back, moved) - points, axis=1).max() < tenth


def test_the_inverse_is_sharper_than_its_start_on_the_working_grid(grid, moving_grid, working_grid, initial):
    displacement = smooth(working_grid)
    start = fields.invert(displacement)
    target = moving_grid.to_physical(voxel_centers(moving_grid, 4))

    def largest_error(iterations: int) -> float:
        """Where the field itself, not one resampled to the fixed grid, leads the inverse of a moving voxel; mm."""
        inverse = physical_fields.inverse_transform(displacement, start, working_grid, initial, moving_grid, iterations)
        points = mapped(inverse, target)
        index = torch.from_numpy(working_grid.to_index(points).T[None, :, :, None, None]).float()
        u = fields.sample(displacement, index)[0, :, :, 0, 0].T.numpy() @ working_grid.matrix[:3, :3].T
        return np.linalg.norm(apply_matrix(initial, points + u) - target, axis=1).max()

    assert largest_error(3) < 0.02
    assert largest_error(3) < 0.2 * largest_error(0)


def test_the_inverse_of_an_initial_alignment_alone_is_its_inverse_matrix(working_grid, moving_grid, initial):
    zero = torch.zeros(1, 3, *working_grid.shape)
    transform = physical_fields.inverse_transform(zero, zero, working_grid, initial, moving_grid)
    points = moving_grid.to_physical(voxel_centers(moving_grid))
    back = affine_transform(np.linalg.inv(initial))
    np.testing.assert_allclose(mapped(transform, points), mapped(back, points), atol=1e-6)


def test_large_grids_are_mapped_slab_by_slab_to_the_same_transform(grid, working_grid, initial, monkeypatch):
    whole = physical_fields.forward_transform(smooth(working_grid), working_grid, initial, grid)
    monkeypatch.setattr(
        physical_fields, "CHUNK_VOXELS", 4 * grid.size[0] * grid.size[1]
    )  # 18 slices: the last slab is short
    slabs = physical_fields.forward_transform(smooth(working_grid), working_grid, initial, grid)
    one, other = (sitk.GetArrayFromImage(field_of(t)) for t in (whole, slabs))
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_a_fixed_grid_along_the_axes_in_any_order_gets_what_any_other_grid_gets(order, signs, initial, monkeypatch):
    direction = np.eye(3)[:, order] * signs
    fixed = Grid.build((23, 31, 19), (2.0, 3.5, 4.1), (31.0, -47.0, 112.0), direction)
    working = fixed.axis_aligned(6.0, multiple=4)
    along_axes = physical_fields.forward_transform(smooth(working), working, initial, fixed)
    monkeypatch.setattr(physical_fields, "ROUNDING", -1.0)  # no grid is along the axes
    anyhow = physical_fields.forward_transform(smooth(working), working, initial, fixed)
    one, other = (sitk.GetArrayFromImage(field_of(t)) for t in (along_axes, anyhow))
    np.testing.assert_allclose(one, other, atol=2e-5)
