"""Between the working grid of the network and physical space: sampling images in, displacement fields in mm out."""

from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import fields
from DivRegNetLib.geometry import Grid, affine_transform

CHUNK_VOXELS = 1_000_000


def resample_smooth(image: sitk.Image, grid: Grid, matrix: np.ndarray) -> sitk.Image:
    """An image as float32 on a grid, through a (4, 4) LPS map from grid to image points.

    Smoothed first along the axes on which the grid is coarser, so that it does not alias. Outside the image comes its
    darkest 0.5 %.
    """
    image = sitk.Cast(image, sitk.sitkFloat32)
    target = grid.spacing[0]
    variance = [0.2 * max(target**2 - s**2, 0.0) for s in image.GetSpacing()]
    if any(variance):
        image = sitk.DiscreteGaussian(image, variance, 32, 0.01, True)
    values = sitk.GetArrayViewFromImage(image).ravel()
    background = float(np.quantile(values[:: max(len(values) // 200_000, 1)], 0.005))
    return sitk.Resample(image, grid.empty_image(), affine_transform(matrix), sitk.sitkLinear, background)


def resample(
    image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, interpolator: int, default: float
) -> sitk.Image:
    """A volume on the grid of another, through a transform from reference to image points, in its own pixel type.

    Interpolated integers are rounded, as in Slicer and unlike ITK, which cuts them off.

    Args:
        interpolator: of SimpleITK.
        default: where the image has nothing.
    """
    pixel = image.GetPixelID()
    whole = "integer" in image.GetPixelIDTypeAsString() and image.GetNumberOfComponentsPerPixel() == 1
    if interpolator == sitk.sitkNearestNeighbor or not whole:
        return sitk.Resample(image, reference, transform, interpolator, default)
    exact = sitk.sitkFloat32 if image.GetSizeOfPixelComponent() <= 2 else sitk.sitkFloat64
    values = sitk.Resample(image, reference, transform, interpolator, default, exact)
    return sitk.Cast(sitk.Clamp(sitk.Round(values), pixel), pixel)


def resample_mask(mask: sitk.Image, grid: Grid, matrix: np.ndarray) -> sitk.Image:
    """A mask on a grid, nearest neighbour, through a (4, 4) LPS map from grid to mask points; 0 outside."""
    return sitk.Resample(mask, grid.empty_image(), affine_transform(matrix), sitk.sitkNearestNeighbor, 0.0)


def forward_transform(
    displacement: Tensor, grid: Grid, initial: np.ndarray, fixed: Grid
) -> sitk.DisplacementFieldTransform:
    """``T(p) = initial(p + u(p))``, fixed -> moving points, as a displacement field on the fixed grid (LPS, mm).

    Args:
        displacement: u, (1, 3, D, H, W) on the CPU, in voxels of ``grid``; beyond the grid its border values go on.
        grid: working grid, in fixed space.
        initial: (4, 4) LPS, fixed -> moving.
    """

    def correction(at: Tensor) -> Tensor:
        return fields.sample(displacement, at)

    to_working = grid.inverse_matrix @ fixed.matrix
    return _displacement_transform(fixed, initial, to_working, initial[:3, :3] @ grid.matrix[:3, :3], correction)


def inverse_transform(
    displacement: Tensor, inverse: Tensor, grid: Grid, initial: np.ndarray, moving: Grid, iterations: int = 3
) -> sitk.DisplacementFieldTransform:
    """The inverse of :func:`forward_transform`, moving -> fixed points, on the moving grid (LPS, mm).

    Starts from ``inverse``, the inverse of ``displacement`` on the working grid, and solves ``p + u(p) = initial^-1(q)``
    for every moving voxel q by fixed-point iteration, so that no resolution is lost to the working grid.
    """
    back = np.linalg.inv(initial)

    def correction(at: Tensor) -> Tensor:
        found = fields.sample(inverse, at)
        for _ in range(iterations):
            found = -fields.sample(displacement, at + found)
        return found

    to_working = grid.inverse_matrix @ back @ moving.matrix
    return _displacement_transform(moving, back, to_working, grid.matrix[:3, :3], correction)


def _displacement_transform(
    grid: Grid, linear: np.ndarray, to_working: np.ndarray, to_mm: np.ndarray, correction: Callable[[Tensor], Tensor]
) -> sitk.DisplacementFieldTransform:
    """``q -> linear(q) + to_mm @ correction(q)`` as the displacement of every voxel of a grid, slab by slab.

    Args:
        linear: (4, 4), LPS -> LPS.
        to_working: (4, 4), voxels of ``grid`` -> voxels of the working grid, where ``correction`` is asked.
        to_mm: (3, 3), voxels of the working grid -> mm at the far end of the map.
        correction: (1, 3, d, h, w) working voxels -> (1, 3, d, h, w) displacement in working voxels.
    """
    displacement = np.empty((*grid.shape, 3))
    shift = linear @ grid.matrix - grid.matrix  # voxels -> mm, double precision: origins can be far away
    height, width = grid.shape[1:]
    slices = max(CHUNK_VOXELS // (height * width), 1)
    for first in range(0, grid.shape[0], slices):
        slab = displacement[first : first + slices]
        k, j, i = np.ogrid[first : first + len(slab), :height, :width]
        at = np.stack([row[0] * i + row[1] * j + row[2] * k + row[3] for row in to_working[:3]])[None]
        found = correction(torch.from_numpy(at).to(torch.float32))[0].numpy()
        for axis, row in enumerate(shift[:3]):
            slab[..., axis] = row[0] * i + row[1] * j + row[2] * k + row[3]
            slab[..., axis] += np.tensordot(to_mm[axis].astype(np.float32), found, 1)
    return sitk.DisplacementFieldTransform(grid.image(displacement))
