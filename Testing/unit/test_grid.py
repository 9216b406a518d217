"""Grids: voxels, millimeters, LPS and RAS."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids, numbers

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, affine_matrix, affine_transform, apply_matrix


@given(grids(), st.lists(numbers(-50, 50), min_size=1, max_size=5))
def test_voxels_become_millimeters_and_voxels_again(grid, index):
    np.testing.assert_allclose(grid.to_index(grid.to_physical(index)), index, atol=1e-9)


@given(grids(), st.lists(numbers(-50, 50), min_size=1, max_size=5))
def test_simpleitk_puts_voxels_at_the_same_points(grid, index):
    image = grid.empty_image()
    points = [image.TransformContinuousIndexToPhysicalPoint(i) for i in index]
    np.testing.assert_allclose(grid.to_physical(index), points, atol=1e-9)
    last = [n - 1 for n in grid.size]
    np.testing.assert_allclose(grid.to_physical(last), image.TransformIndexToPhysicalPoint(last), atol=1e-9)
    np.testing.assert_allclose(grid.to_index(points), index, atol=1e-8)


@given(grids())
def test_the_grid_of_an_image_is_the_grid_it_was_made_on(grid):
    image = grid.empty_image(sitk.sitkInt16)
    assert Grid.of(image) == grid
    assert image.GetPixelID() == sitk.sitkInt16
    assert sitk.GetArrayViewFromImage(image).shape == grid.shape
    assert Grid.build(grid.size, grid.spacing, grid.origin, grid.direction) == grid


@given(grids(), numbers(-50, 50))
def test_ras_is_lps_with_the_first_two_axes_turned_and_back(grid, index):
    x, y, z = grid.to_physical(index)
    ras = apply_matrix(grid.ras_matrix, index)
    np.testing.assert_allclose(ras, (-x, -y, z), atol=1e-9)
    np.testing.assert_allclose(apply_matrix(LPS_FROM_RAS, ras), (x, y, z), atol=1e-9)


@given(grids())
def test_the_center_is_the_middle_of_the_corners(grid):
    np.testing.assert_allclose(grid.center, grid.corners().mean(0), atol=1e-9)


@given(grids())
def test_a_grid_contains_its_voxels_up_to_half_a_voxel_beyond_the_outermost(grid):
    outermost = np.stack(np.meshgrid(*[[0.0, n - 1.0] for n in grid.size], indexing="ij"), -1).reshape(-1, 3)
    outwards = np.sign(outermost - (np.array(grid.size) - 1) / 2)
    outwards[outwards == 0] = 1
    assert grid.contains(grid.to_physical(outermost + 0.499 * outwards)).all()
    for axis in np.eye(3):
        assert not grid.contains(grid.to_physical(outermost + 0.501 * outwards * axis)).any()


@given(grids(), st.floats(0.5, 10), st.integers(1, 16))
def test_the_axis_aligned_grid_covers_every_corner_and_no_more_than_needed(grid, spacing, multiple):
    aligned = grid.axis_aligned(spacing, multiple=multiple)
    np.testing.assert_allclose(aligned.matrix[:3, :3], np.eye(3) * spacing, atol=1e-12)
    extent = np.ptp(grid.corners(), axis=0)
    thin, off = extent <= spacing, aligned.center - grid.center
    np.testing.assert_allclose(off[~thin], 0, atol=1e-6)
    middle = aligned.to_index(grid.center)[thin]
    np.testing.assert_allclose(middle, np.round(middle), atol=1e-6, err_msg="what is thin falls between two voxels")
    assert all(n % multiple == 0 for n in aligned.size)
    low, high = aligned.corners().min(0), aligned.corners().max(0)
    slack = 1e-5 * spacing * multiple
    assert (grid.corners() >= low - slack).all()
    assert (grid.corners() <= high + slack).all()
    assert ((high - low) < extent + spacing * multiple + slack).all()


@given(grids(), st.floats(0.5, 10), st.integers(1, 16))
def test_the_working_grid_covers_every_corner_and_its_voxels_begin_where_the_grid_does(grid, spacing, multiple):
    working = grid.working_grid(spacing, multiple=multiple)
    spacing = working.spacing[0]
    assert working.size == grid.axis_aligned(spacing, multiple=multiple).size
    corners = grid.corners()
    low, high = working.corners().min(0), working.corners().max(0)
    assert (corners >= low - 1e-5 * spacing * multiple).all()
    assert (corners <= high + 1e-5 * spacing * multiple).all()
    before = (corners.min(0) - low)[np.ptp(corners, 0) > spacing] / spacing
    np.testing.assert_allclose(before, np.round(before), atol=1e-4)
    assert (np.abs(working.center - grid.center) <= (0.5 + 1e-4) * spacing).all(), "the room beyond is shared"


@given(st.tuples(*[st.integers(2, 12)] * 3), st.floats(0.5, 5), st.integers(1, 16), st.sampled_from([1, -1]))
def test_at_its_own_spacing_a_grid_s_voxels_are_voxels_of_its_working_grid(size, spacing, multiple, sign):
    grid = Grid.build(size, [spacing] * 3, (11.3, -7.9, 40.2), (0, 0, sign, -1, 0, 0, 0, sign, 0))
    index = grid.working_grid(spacing, multiple=multiple).to_index(grid.to_physical((0, 0, 0)))
    np.testing.assert_allclose(index, np.round(index), atol=1e-5)


@given(grids(), grids(), st.floats(0.05, 0.95))
def test_grids_overlap_where_they_share_a_point_and_not_where_a_plane_parts_them(grid, other, share):
    inside = other.to_physical((np.array(other.size) - 1) * share)
    matrix = other.matrix.copy()
    matrix[:3, 3] += grid.to_physical((np.array(grid.size) - 1) * (1 - share)) - inside
    assert grid.overlaps(Grid(other.size, matrix))
    assert Grid(other.size, matrix).overlaps(grid)
    way = other.center - grid.center + 1e-3
    way /= np.linalg.norm(way)
    reach = (grid.corners() @ way).max() - (other.corners() @ way).min()
    apart = other.matrix.copy()
    apart[:3, 3] += (reach + 0.01) * way
    assert not grid.overlaps(Grid(other.size, apart))
    assert not Grid(other.size, apart).overlaps(grid)


def test_plates_that_cross_between_their_corners_overlap(grid_about):
    flat = grid_about((0, 0, 0), (50, 50, 1), (4.0, 4.0, 1.0))
    upright = grid_about((1.7, 2.3, 0), (1, 50, 50), (1.0, 4.0, 4.0), (0, 0, 40))
    assert flat.overlaps(upright)
    assert not flat.overlaps(grid_about((1.7, 2.3, 101.0), (1, 50, 50), (1.0, 4.0, 4.0), (0, 0, 40)))


def test_array_indices_are_k_j_i_and_points_are_x_y_z(grid):
    array = np.arange(np.prod(grid.shape), dtype=np.float32).reshape(grid.shape)
    image = grid.image(array)
    assert image.GetSize() == grid.size == (20, 26, 18)
    assert image.GetPixel(3, 11, 7) == array[7, 11, 3]
    index = image.TransformPhysicalPointToIndex(grid.to_physical((3, 11, 7)))
    assert index == (3, 11, 7)


def test_an_array_of_vectors_becomes_a_vector_image(grid):
    array = np.random.default_rng(0).normal(size=(*grid.shape, 3))
    image = grid.image(array)
    assert image.GetNumberOfComponentsPerPixel() == 3
    assert image.GetPixel(3, 11, 7) == tuple(array[7, 11, 3])
    assert Grid.of(image) == grid


def test_grids_are_equal_within_a_thousandth_of_a_voxel(grid):
    def moved(millimeters: float) -> Grid:
        matrix = grid.matrix.copy()
        matrix[0, 3] += millimeters
        return Grid(grid.size, matrix)

    assert grid == moved(0.5e-3 * min(grid.spacing))
    assert hash(grid) == hash(moved(0.5e-3 * min(grid.spacing)))
    assert grid != moved(2e-3 * min(grid.spacing))
    assert grid != Grid((20, 26, 19), grid.matrix)
    assert grid != "a grid"


def test_a_grid_keeps_its_own_copy_of_the_matrix():
    matrix = np.eye(4)
    grid = Grid((2, 3, 4), matrix)
    matrix[0, 3] = 7
    assert grid.origin == (0, 0, 0)


@pytest.mark.parametrize(
    ("size", "matrix", "says"),
    [
        ((2, 3), np.eye(4), "three positive side lengths"),
        ((2, 3, 0), np.eye(4), "three positive side lengths"),
        ((2, 3, 4), np.eye(3), "4x4"),
        ((2, 3, 4), np.full((4, 4), np.nan), "finite"),
        ((2, 3, 4), np.diag([1.0, 0.0, 1.0, 1.0]), "singular"),
    ],
)
def test_an_impossible_grid_is_refused(size, matrix, says):
    with pytest.raises(ValueError, match=says):
        Grid(size, matrix)


def test_a_linear_transform_becomes_a_matrix_and_a_transform_again(landmarks):
    euler = sitk.Euler3DTransform((10.0, -20.0, 30.0), 0.2, -0.4, 0.1, (5.0, 6.0, 7.0))
    stretch = sitk.ScaleTransform(3, (1.1, 0.9, 1.2))
    both = sitk.CompositeTransform([euler, stretch])
    expected = [both.TransformPoint(p) for p in landmarks.tolist()]
    matrix = affine_matrix(both)
    np.testing.assert_allclose(apply_matrix(matrix, landmarks), expected, atol=1e-9)
    again = affine_transform(matrix)
    np.testing.assert_allclose([again.TransformPoint(p) for p in landmarks.tolist()], expected, atol=1e-9)


def test_a_transform_that_is_not_linear_has_no_matrix(grid):
    field = sitk.DisplacementFieldTransform(grid.image(np.zeros((*grid.shape, 3))))
    with pytest.raises(ValueError, match="linear"):
        affine_matrix(field)
