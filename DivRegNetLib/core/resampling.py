"""Resampling of volumes in physical space: onto the working grid, and through a transform onto the fixed grid."""

import functools
import math

import numpy as np
import SimpleITK as sitk
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.core.intensity import subsample, without_padding

KEPT_RATIO = 2.0  # voxels of an image per voxel of the grid along an axis that are kept, at least, where it has more
# Splines interpolate where the least ratio of voxels of all axes lies between these: finer images are to be blurred more than
# linear interpolation does, and between slices that are far apart splines swing.
THICK_RATIO, FINE_RATIO = 0.5, 1.5
LONGEST_SPLINE = 1024  # voxels along an axis; the matrix that gives the coefficients has the square of their number
PARALLEL = 1e-3  # voxels that parallel axes differ by, at most, from one end to the other
LINEAR_VARIANCE = 1 / 6  # of linear interpolation, the mean over all positions between two voxels, in squared voxels


def resample_smooth(image: sitk.Image, grid: Grid, *matrices: np.ndarray) -> list[sitk.Image]:
    """An image as float32 on a grid, through each of some (4, 4) LPS maps from grid to image points.

    Along axes on which the grid is coarser, the image is averaged over the length of a voxel of the grid first, to avoid
    aliasing. It is interpolated linearly; where its voxels are about as long as those of the grid, by cubic B-splines, which
    blur less (Thevenaz et al., "Interpolation revisited", IEEE TMI 2000), and clipped to its own range. Outside the image the
    value is its 0.5th percentile.
    """
    image = sitk.Cast(without_padding(image), sitk.sitkFloat32)
    values, ratios = sitk.GetArrayViewFromImage(image), [grid.spacing[0] / s for s in image.GetSpacing()]
    background = float(np.quantile(subsample(values), 0.005))
    linear = not THICK_RATIO <= min(ratios) < FINE_RATIO or max(image.GetSize()) > LONGEST_SPLINE
    averaged = _Averaged(image, ratios, linear)
    found = [averaged.on_grid(grid, matrix, background) for matrix in matrices]
    return found if linear else [sitk.Clamp(x, x.GetPixelID(), float(values.min()), float(values.max())) for x in found]


class _Averaged:
    """An image that is averaged for linear interpolation, or the coefficients of the cubic B-splines through its averages."""

    def __init__(self, image: sitk.Image, ratios: list[float], linear: bool) -> None:
        """
        Args:
            ratios: length of the voxels of the grid that follows, in those of the image, along x, y, z.
        """
        own = Grid.of(image)
        blocks = [min(max(int(r / KEPT_RATIO), 1), n) for r, n in zip(ratios, own.size, strict=True)]
        axes = zip(own.size, blocks, ratios, strict=True)
        self._linear, self._original, self._matrices = linear, image, [_averages(*about, linear) for about in axes]
        to_first = np.eye(4)
        to_first[:3, 3] = (np.array(blocks) - 1) / 2
        size = tuple(-(-n // block) for n, block in zip(own.size, blocks, strict=True))
        self._grid = Grid(size, own.matrix @ to_first @ np.diag([*blocks, 1]))

    @property
    def _unchanged(self) -> bool:
        return all(matrix is None for matrix in self._matrices)

    @functools.cached_property
    def _image(self) -> sitk.Image:
        return self._original if self._unchanged else self._grid.image(self._along_axes(self._matrices))

    def _along_axes(self, matrices: list[torch.Tensor | None]) -> np.ndarray:
        """The values before averaging, multiplied by a matrix along x, y and z."""
        values = torch.from_numpy(sitk.GetArrayFromImage(self._original))[None, None]
        single = (None if m is None else m.to(values.dtype) for m in matrices)
        return fields.along_axes(values, *single)[0, 0].numpy()

    def on_grid(self, grid: Grid, matrix: np.ndarray, background: float) -> sitk.Image:
        """Interpolated on a grid through a (4, 4) LPS map, with a value outside."""
        to_index = self._grid.inverse_matrix @ matrix @ grid.matrix
        along = np.abs(to_index[:3, :3]).argmax(1)  # the axis of the grid that goes along each axis of the image
        across = np.abs(to_index[:3, :3]) @ np.diag(grid.size)
        across[range(3), along] = 0
        if self._unchanged or across.max() > PARALLEL:
            # The second one interpolates splines whose coefficients are given.
            how = sitk.sitkLinear if self._linear else sitk.sitkBSplineResampler
            return sitk.Resample(self._image, grid.empty_image(), affine_transform(matrix), how, background)
        # Along parallel axes, what averages and what interpolates are one matrix each.
        weights, outside = [], []
        for axis, (n, averages) in enumerate(zip(self._grid.size, self._matrices, strict=True)):
            at = np.arange(grid.size[along[axis]]) * to_index[axis, along[axis]] + to_index[axis, 3]
            interpolation = _interpolation(torch.from_numpy(at), n, self._linear)
            weights.append(interpolation if averages is None else interpolation @ averages)
            outside.append((at < -0.5) | (at >= n - 0.5))
        found = self._along_axes(weights)
        for axis, beyond in enumerate(outside):
            found[(..., beyond, *[slice(None)] * axis)] = background
        # From the order of the image's axes to that of the grid's; arrays have them in reverse.
        return grid.image(found.transpose(2 - np.argsort(along)[::-1]))


def _averages(n: int, block: int, ratio: float, linear: bool) -> torch.Tensor | None:
    """(m, n) float64: averages n voxels along an axis over blocks and smooths these by a Gaussian. Together with linear
    interpolation, if that follows, this has the variance of an average over ``ratio`` voxels. None: there is nothing to do.

    The last voxel is repeated to complete the last block. Coefficients of splines are those of splines that are mirrored at
    both ends, as ITK's are.
    """
    m, variance = -(-n // block), ((ratio / block) ** 2 - 1) / 12 - (LINEAR_VARIANCE if linear else 0)
    if linear and block == 1 and variance <= 0:
        return None
    averages = torch.zeros(m, n, dtype=torch.float64)
    within = torch.arange(m * block)
    averages.index_put_((within // block, within.clamp(max=n - 1)), torch.tensor(1 / block).double(), accumulate=True)
    if variance > 0:
        averages = fields.gaussian(m, math.sqrt(variance), like=averages) @ averages
    if linear or m == 1:
        return averages
    knots = torch.eye(m, dtype=torch.float64) * 4
    knots.diagonal(1)[:], knots.diagonal(-1)[:] = 1, 1
    knots[0, 1] = knots[-1, -2] = 2
    return torch.linalg.solve(knots / 6, averages)


def _interpolation(at: torch.Tensor, n: int, linear: bool) -> torch.Tensor:
    """(k, n) float64: interpolates n values, or cubic B-splines with n coefficients, along an axis at k positions (float64)."""
    if linear or n == 1:
        return fields.sample_along(torch.eye(n, dtype=torch.float64), 0, at)
    knots = at.floor()[:, None] + torch.arange(-1, 3)
    distance = (at[:, None] - knots).abs()
    weights = torch.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6)
    mirrored = knots.long() % (2 * n - 2)
    return weights.new_zeros(len(at), n).scatter_add_(1, torch.minimum(mirrored, 2 * n - 2 - mirrored), weights)


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
