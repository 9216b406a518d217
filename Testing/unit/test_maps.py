"""Maps of a displacement field against closed forms and SimpleITK."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.quality.maps import displacement_length, jacobian_determinant, jacobian_determinant_slabs


def points(grid) -> np.ndarray:
    k, j, i = np.indices(grid.shape)
    return grid.to_physical(np.stack([i, j, k], -1))


def test_a_linear_map_has_the_determinant_of_its_matrix_on_an_oblique_grid(grid):
    linear = np.array([[1.2, 0.1, 0], [0, 0.9, -0.2], [0.05, 0, 1.1]])
    field = points(grid) @ (linear - np.eye(3)).T
    assert jacobian_determinant(field, grid) == pytest.approx(np.linalg.det(linear), abs=1e-4)


def test_a_smooth_field_has_the_determinant_that_simpleitk_computes_in_slabs_too(grid_about):
    """On a grid along the axes: SimpleITK's filter leaves the directions of a grid out."""
    grid = grid_about((3, -8, 13), (20, 26, 18), (6.0, 5.0, 7.5))
    field = 6 * np.sin(points(grid) / 17)[..., [1, 2, 0]]
    image = sitk.GetImageFromArray(field, isVector=True)
    image.CopyInformation(grid.empty_image())
    expected = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image))[1:-1, 1:-1, 1:-1]
    assert jacobian_determinant(field, grid)[1:-1, 1:-1, 1:-1] == pytest.approx(expected, abs=2e-3)
    slabs = list(jacobian_determinant_slabs(field, grid, 5))
    assert len(slabs) == 4 and np.array_equal(np.concatenate(slabs), jacobian_determinant(field, grid))


def test_the_length_is_that_of_the_vectors():
    assert displacement_length(np.array([[[[3.0, 0, 4]]]])) == pytest.approx(5)
