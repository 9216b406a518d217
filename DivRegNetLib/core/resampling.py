"""Resampling of volumes in physical space: onto the working grid, and through a transform onto the fixed grid."""

import math

import numpy as np
import SimpleITK as sitk
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.core.intensity import subsample, without_padding

MINIMUM_SIGMA = 0.1  # voxels; smaller standard deviations are not applied
BLOCK_RATIO = 8.0  # voxels of an image per voxel of the grid along an axis, from which on blocks are averaged first


def resample_smooth(image: sitk.Image, grid: Grid, *matrices: np.ndarray) -> list[sitk.Image]:
    """An image as float32 on a grid, through each of some (4, 4) LPS maps from grid to image points.

    Along axes on which the grid is coarser, the image is averaged and smoothed first, to avoid aliasing. Outside the image the
    value is its 0.5th percentile.
    """
    image = sitk.Cast(without_padding(image), sitk.sitkFloat32)
    target = grid.spacing[0]
    blocks = [
        min(max(int(target / s / BLOCK_RATIO), 1), n) for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    if max(blocks) > 1:
        image = sitk.BinShrink(image, blocks)
    own = Grid.of(image)
    sigma = [math.sqrt(0.2 * max((target / s) ** 2 - 1, 0.0)) for s in own.spacing]
    if max(sigma) > MINIMUM_SIGMA:
        values = torch.from_numpy(sitk.GetArrayFromImage(image))[None, None]
        del image  # large
        image = own.image(fields.smooth(values, *sigma)[0, 0].numpy())
    background = float(np.quantile(subsample(sitk.GetArrayViewFromImage(image)), 0.005))
    reference = grid.empty_image()
    return [sitk.Resample(image, reference, affine_transform(m), sitk.sitkLinear, background) for m in matrices]


def resample(
    image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, interpolator: int, default: float
) -> sitk.Image:
    """A volume on the grid of another one, in its own pixel type, through a transform from reference to image points.

    Interpolated integers are rounded, as in Slicer; ITK truncates them.

    Args:
        interpolator: of SimpleITK.
        default: value outside the image.
    """
    pixel = image.GetPixelID()
    whole = "integer" in image.GetPixelIDTypeAsString() and image.GetNumberOfComponentsPerPixel() == 1
    if interpolator == sitk.sitkNearestNeighbor or not whole:
        return sitk.Resample(image, reference, transform, interpolator, default)
    size = image.GetSizeOfPixelComponent()
    exact = sitk.sitkFloat32 if size <= 2 else sitk.sitkFloat64
    values = sitk.Resample(image, reference, transform, interpolator, default, exact)
    if size <= 4:
        return sitk.Cast(sitk.Clamp(sitk.Round(values), pixel), pixel)
    return _rounded_to_64_bits(values, sitk.GetArrayViewFromImage(image).dtype)


def _rounded_to_64_bits(values: sitk.Image, dtype: np.dtype) -> sitk.Image:
    """Double precision to 64-bit integers, over their whole range; ITK rounds correctly in a quarter of it."""
    limits = np.iinfo(dtype)
    array = np.floor(sitk.GetArrayViewFromImage(values) + 0.5)
    highest = np.nextafter(float(limits.max), 0)  # largest double below the limit, which is not a double itself
    whole = np.clip(array, float(limits.min), highest).astype(dtype)
    whole[array > highest] = limits.max
    image = sitk.GetImageFromArray(whole)
    image.CopyInformation(values)
    return image


def resample_mask(mask: sitk.Image, grid: Grid, matrix: np.ndarray) -> sitk.Image:
    """A mask on a grid, nearest neighbor, through a (4, 4) LPS map from grid to mask points; 0 outside."""
    return sitk.Resample(mask, grid.empty_image(), affine_transform(matrix), sitk.sitkNearestNeighbor, 0.0)


def field_of_view(image: Grid, grid: Grid, matrix: np.ndarray) -> np.ndarray:
    """Which voxel centers of a grid lie inside an image, through a (4, 4) LPS map; (D, H, W) bool."""
    to_index = image.inverse_matrix @ matrix @ grid.matrix
    axes = np.ogrid[tuple(slice(n) for n in grid.shape)][::-1]
    inside = np.ones(grid.shape, bool)
    for (*row, start), size in zip(to_index[:3], image.size, strict=True):
        # Axes that an index does not depend on are broadcast, so that parallel grids take one comparison per row.
        at = sum((a * axis for a, axis in zip(row, axes, strict=True) if a), np.full((1, 1, 1), start))
        inside &= (at >= -0.5) & (at <= size - 0.5)
    return inside
