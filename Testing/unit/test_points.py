"""Points through transforms and back, checked against the points they came from."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.composites import composite
from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.core.points import invert_points, is_known, map_points


def waves(points: np.ndarray) -> np.ndarray:
    """A smooth displacement of up to 5 mm at LPS points (..., 3)."""
    x, y, z = np.moveaxis(points, -1, 0) / 20
    return 5 * np.stack([np.sin(y), np.cos(z), np.sin(x + z)], -1)


def voxels(grid: Grid) -> np.ndarray:
    k, j, i = np.indices(grid.shape)
    return grid.to_physical(np.stack([i, j, k], -1))


@pytest.fixture(params=[(0, 0, 0), (0, 0, 60), (0, 0, 250), (-400, 30, 900)], ids=str)
def initial(request, rigid) -> np.ndarray:
    """A rotation, a stretch, and a shift as between scanners whose coordinates begin elsewhere."""
    return rigid((10, -20, 15), request.param) @ np.diag([1.1, 0.95, 1.0, 1.0])


def as_field(grid: Grid, initial: np.ndarray) -> sitk.Transform:
    """``initial(p + waves(p))`` as a plain displacement field, as old result files have it."""
    points = voxels(grid)
    return sitk.DisplacementFieldTransform(grid.image(apply_matrix(initial, points + waves(points)) - points))


@pytest.mark.parametrize("told", [True, False], ids=["initial alignment given", "initial alignment fitted"])
def test_points_come_back_however_far_the_initial_alignment_moves_them(grid, initial, told):
    transform = as_field(grid, initial)
    index = np.random.default_rng(0).uniform(1, np.array(grid.size) - 2, (40, 3))
    points = grid.to_physical(index)
    inverted = invert_points(transform, map_points(transform, points), initial if told else None)
    assert inverted.reasons == {}
    np.testing.assert_allclose(inverted.points, points, atol=0.01)


def test_a_point_beyond_a_plain_field_is_named_and_not_left_where_it_is(grid, initial):
    transform = as_field(grid, initial)
    outside = grid.to_physical([(-40.0, 5, 5), (5, 5, 90)])
    inverted = invert_points(transform, np.vstack([apply_matrix(initial, outside), [[np.nan] * 3]]), initial)
    assert np.isnan(inverted.points).all()
    assert inverted.reasons == dict.fromkeys((0, 1), "lies outside the region that the transform covers")


def test_beyond_a_composite_the_initial_alignment_goes_on(grid, initial):
    points = voxels(grid)
    fade = np.minimum.reduce(
        [np.minimum(i, n - 1 - i) for i, n in zip(np.indices(grid.shape), grid.shape, strict=True)]
    )
    transform = composite(initial, grid.image(waves(points) * np.clip(fade / 4, 0, 1)[..., None]))
    outside = grid.to_physical([(-40.0, 5, 5), (5, 5, 90)])
    inverted = invert_points(transform, apply_matrix(initial, outside), initial)
    assert inverted.reasons == {}
    np.testing.assert_allclose(inverted.points, outside, atol=0.01)


def test_what_a_transform_is_known_of(grid):
    inside, outside = grid.center, grid.to_physical((-9, 5, 5))
    ends_in_zero = sitk.DisplacementFieldTransform(grid.image(np.zeros((*grid.shape, 3))))
    ends_abruptly = sitk.DisplacementFieldTransform(grid.image(np.full((*grid.shape, 3), 4.0)))
    both = np.stack([inside, outside])
    assert is_known(ends_abruptly, both).tolist() == [True, False]
    assert is_known(sitk.Transform(ends_abruptly), both).tolist() == [True, False]
    for transform in (ends_in_zero, sitk.TranslationTransform(3, (1, 2, 3)), sitk.Transform(3, sitk.sitkIdentity)):
        assert is_known(transform, both).all()
