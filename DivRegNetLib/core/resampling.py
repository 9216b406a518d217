"""Resampling of volumes in physical space: onto the working grid, and through a transform onto the fixed grid."""

import math

import numpy as np
import SimpleITK as sitk
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.core.intensity import subsample, without_padding

KEPT_RATIO = 2.0  # voxels of an image per voxel of the grid along an axis that are kept, at least, where it has more


def resample_smooth(image: sitk.Image, grid: Grid, *matrices: np.ndarray) -> list[sitk.Image]:
    """An image as float32 on a grid, through each of some (4, 4) LPS maps from grid to image points.

    Along axes on which the grid is coarser, the image is averaged over the length of a voxel of the grid first, to avoid
    aliasing. It is interpolated by cubic B-splines, which blur less than linear interpolation (Thevenaz et al., "Interpolation
    revisited", IEEE TMI 2000). Outside the image the value is its 0.5th percentile.
    """
    image = sitk.Cast(without_padding(image), sitk.sitkFloat32)
    background = float(np.quantile(subsample(sitk.GetArrayViewFromImage(image)), 0.005))
    spline, reference = _spline(image, grid.spacing[0]), grid.empty_image()
    cubic = sitk.sitkBSplineResampler  # of splines whose coefficients are given
    return [sitk.Resample(spline, reference, affine_transform(m), cubic, background) for m in matrices]


def _spline(image: sitk.Image, spacing: float) -> sitk.Image:
    """The coefficients of the cubic B-splines through an image that is averaged for a grid of a spacing (mm)."""
    own = Grid.of(image)
    ratios = [spacing / s for s in own.spacing]
    blocks = [min(max(int(r / KEPT_RATIO), 1), n) for r, n in zip(ratios, own.size, strict=True)]
    values = torch.from_numpy(sitk.GetArrayFromImage(image))[None, None]
    values = fields.along_axes(
        values, *(_to_spline(n, b, r, like=values) for n, b, r in zip(own.size, blocks, ratios, strict=True))
    )
    to_first = np.eye(4)
    to_first[:3, 3] = (np.array(blocks) - 1) / 2
    return Grid(tuple(values.shape[:1:-1]), own.matrix @ to_first @ np.diag([*blocks, 1])).image(values[0, 0].numpy())


def _to_spline(n: int, block: int, ratio: float, *, like: torch.Tensor) -> torch.Tensor:
    """(m, n): from n voxels along an axis to the coefficients of splines whose knots are m blocks of voxels.

    Blocks are averaged, and smoothed by a Gaussian. Both together have the variance of an average over ``ratio`` voxels. The
    last voxel is repeated to complete the last block; beyond the border the spline is mirrored, as ITK does.
    """
    m = -(-n // block)
    averages = torch.zeros(m, n, dtype=torch.float64)
    within = torch.arange(m * block)
    averages.index_put_((within // block, within.clamp(max=n - 1)), torch.tensor(1 / block).double(), accumulate=True)
    sigma = math.sqrt(max((ratio / block) ** 2 - 1, 0.0) / 12)
    if sigma > 0:
        averages = fields.gaussian(m, sigma, like=averages) @ averages
    if m == 1:
        return averages.to(like.dtype)
    knots = torch.eye(m, dtype=torch.float64) * 4
    knots.diagonal(1)[:], knots.diagonal(-1)[:] = 1, 1
    knots[0, 1] = knots[-1, -2] = 2
    return torch.linalg.solve(knots / 6, averages).to(like.dtype)


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
