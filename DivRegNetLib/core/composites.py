"""The transforms of a registration: composites of a displacement field and the initial alignment, ``T(p) = A(p + d(p))``.

The field d covers a little more than the image and fades to zero in that margin, so that the initial alignment A continues
beyond the image in every program: outside a field, ITK assumes a displacement of zero, and VTK and Slicer use the one at the
border, which is zero as well. No torch here.
"""

import ctypes

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, affine_transform

LARGEST_GROWTH = 1.25  # of the number of voxels of a large field by its margin


def composite(matrix: np.ndarray, field: sitk.Image) -> sitk.CompositeTransform:
    """``T(p) = matrix(p + d(p))``.

    Args:
        matrix: (4, 4) LPS.
        field: d, vectors of double precision (LPS, mm); its content moves into the transform.
    """
    transform = sitk.CompositeTransform(3)
    transform.AddTransform(affine_transform(matrix))
    transform.AddTransform(sitk.DisplacementFieldTransform(field))  # what is added last is applied first
    return transform


def field_of(transform: sitk.Transform) -> sitk.Image:
    """A copy of the field d of a :func:`composite`, which extends a little beyond the image."""
    parts = sitk.CompositeTransform(transform)
    return sitk.DisplacementFieldTransform(parts.GetNthTransform(1)).GetDisplacementField()


def field_grid(transform: sitk.CompositeTransform) -> Grid:
    """The grid of :func:`field_of`, which is not copied for it."""
    of_field = transform.GetFixedParameters()[:18]  # ITK's order begins with what is applied first
    size, origin, spacing, direction = (of_field[a:b] for a, b in ((0, 3), (3, 6), (6, 9), (9, 18)))
    return Grid.build([int(n) for n in size], spacing, origin, direction)


def displacement_on(transform: sitk.Transform, grid: Grid, pixel: int = sitk.sitkVectorFloat64) -> sitk.Image:
    """``T(p) - p`` at the voxels p of a grid, LPS mm, of any transform."""
    return sitk.TransformToDisplacementField(
        transform, pixel, list(grid.size), list(grid.origin), list(grid.spacing), list(grid.direction)
    )


def voxels(image: sitk.Image) -> np.ndarray:
    """The voxels of an image as an array to write to, (D, H, W) or (D, H, W, components); SimpleITK's views are for reading.

    The array does not keep the image alive. It must not be used any more once the image is copied or moved into a transform.
    """
    view = sitk.GetArrayViewFromImage(image)
    memory = (ctypes.c_char * view.nbytes).from_address(view.ctypes.data)
    return np.frombuffer(memory, view.dtype).reshape(view.shape)
