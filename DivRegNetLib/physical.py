"""Between the working grid of the network and physical space: sampling images in, displacement fields in mm out."""

import math
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import fields
from DivRegNetLib.geometry import Grid, affine_transform
from DivRegNetLib.intensity import without_padding

CHUNK_VOXELS = 250_000
ROUNDING = 1e-3  # voxels that axes which are meant to be parallel may drift apart
LEAST_SIGMA = 0.1  # voxels, below which smoothing does nothing
FINEST = 8.0  # voxels of an image to a voxel of the grid along one axis, beyond which they are averaged in blocks first


def resample_smooth(image: sitk.Image, grid: Grid, *matrices: np.ndarray) -> list[sitk.Image]:
    """An image as float32 on a grid, through each of some (4, 4) LPS maps from grid to image points.

    Averaged and smoothed first along the axes on which the grid is coarser, so that it does not alias. Outside the image,
    and for the padding of a CT, comes its darkest 0.5 %.
    """
    image = sitk.Cast(without_padding(image), sitk.sitkFloat32)
    target = grid.spacing[0]
    blocks = [
        min(max(int(target / s / FINEST), 1), n) for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    if max(blocks) > 1:
        image = sitk.BinShrink(image, blocks)
    own = Grid.of(image)
    sigma = [math.sqrt(0.2 * max((target / s) ** 2 - 1, 0.0)) for s in own.spacing]
    if max(sigma) > LEAST_SIGMA:
        values = torch.from_numpy(sitk.GetArrayFromImage(image))[None, None]
        del image  # large
        image = own.image(fields.smooth(values, *sigma)[0, 0].numpy())
    values = sitk.GetArrayViewFromImage(image).ravel()
    background = float(np.quantile(values[:: max(len(values) // 200_000, 1)], 0.005))
    reference = grid.empty_image()
    return [sitk.Resample(image, reference, affine_transform(m), sitk.sitkLinear, background) for m in matrices]


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
    size = image.GetSizeOfPixelComponent()
    exact = sitk.sitkFloat32 if size <= 2 else sitk.sitkFloat64
    values = sitk.Resample(image, reference, transform, interpolator, default, exact)
    if size <= 4:
        return sitk.Cast(sitk.Clamp(sitk.Round(values), pixel), pixel)
    return _rounded_to_64_bits(values, sitk.GetArrayViewFromImage(image).dtype)


def _rounded_to_64_bits(values: sitk.Image, dtype: np.dtype) -> sitk.Image:
    """Double precision to 64-bit integers; ITK itself rounds within a quarter of their range only."""
    limits = np.iinfo(dtype)
    array = np.floor(sitk.GetArrayViewFromImage(values) + 0.5)
    highest = np.nextafter(float(limits.max), 0)  # the double at or below the limit: the next is one too many
    whole = np.clip(array, float(limits.min), highest).astype(dtype)
    whole[array > highest] = limits.max
    image = sitk.GetImageFromArray(whole)
    image.CopyInformation(values)
    return image


def resample_mask(mask: sitk.Image, grid: Grid, matrix: np.ndarray) -> sitk.Image:
    """A mask on a grid, nearest neighbour, through a (4, 4) LPS map from grid to mask points; 0 outside."""
    return sitk.Resample(mask, grid.empty_image(), affine_transform(matrix), sitk.sitkNearestNeighbor, 0.0)


def field_of_view(image: Grid, grid: Grid, matrix: np.ndarray) -> np.ndarray:
    """Which voxel centres of a grid lie in the voxels of an image, through a (4, 4) LPS map; (D, H, W) bool."""
    to_index = image.inverse_matrix @ matrix @ grid.matrix
    axes = np.ogrid[tuple(slice(n) for n in grid.shape)][::-1]
    inside = np.ones(grid.shape, bool)
    for (*row, start), size in zip(to_index[:3], image.size, strict=True):
        # Axes that an index does not depend on are left to broadcasting: parallel grids are compared row by row.
        at = sum((a * axis for a, axis in zip(row, axes, strict=True) if a), np.full((1, 1, 1), start))
        inside &= (at >= -0.5) & (at <= size - 0.5)
    return inside


def forward_transform(
    displacement: Tensor, grid: Grid, initial: np.ndarray, fixed: Grid
) -> sitk.DisplacementFieldTransform:
    """``T(p) = initial(p + u(p))``, fixed -> moving points, as a displacement field on the fixed grid (LPS, mm).

    Args:
        displacement: u, (1, 3, D, H, W) on the CPU, in voxels of ``grid``; beyond the grid its border values go on.
        grid: working grid, in fixed space.
        initial: (4, 4) LPS, fixed -> moving.
    """
    sampled = _sampler(displacement, grid.inverse_matrix @ fixed.matrix, fixed)
    return _displacement_transform(fixed, initial, initial[:3, :3] @ grid.matrix[:3, :3], sampled)


def inverse_transform(
    displacement: Tensor, inverse: Tensor, grid: Grid, initial: np.ndarray, moving: Grid, iterations: int = 1
) -> sitk.DisplacementFieldTransform:
    """The inverse of :func:`forward_transform`, moving -> fixed points, on the moving grid (LPS, mm).

    Starts from ``inverse``, the inverse of ``displacement`` on the working grid, and solves ``p + u(p) = initial^-1(q)``
    for every moving voxel q by fixed-point iteration, so that no resolution is lost to the working grid: one is enough for
    a hundredth of a voxel of the working grid, and rarely a tenth.
    """
    back = np.linalg.inv(initial)
    to_working = grid.inverse_matrix @ back @ moving.matrix
    start = _sampler(inverse, to_working, moving)

    def sampled(slab: slice) -> Tensor:
        at, found = _points(to_working, moving, slab), start(slab)
        for _ in range(iterations):
            found = -fields.sample(displacement, at + found)
        return found

    return _displacement_transform(moving, back, grid.matrix[:3, :3], sampled)


def _sampler(field: Tensor, to_working: np.ndarray, grid: Grid) -> Callable[[slice], Tensor]:
    """Some slices of a grid -> a field there, (1, 3, d, h, w); beyond the working grid its border values go on.

    Args:
        field: (1, 3, D, H, W) on the working grid.
        to_working: (4, 4), voxels of ``grid`` -> voxels of the working grid.
    """
    along = np.abs(to_working[:3, :3]).argmax(1)  # each axis of the working grid -> the grid's that it follows

    def sampled(slab: slice) -> Tensor:
        return fields.sample(field, _points(to_working, grid, slab))

    def sampled_along_axes(slab: slice) -> Tensor:
        found = field
        for axis in np.argsort(-along):  # the one that the slab is cut from first
            at = np.arange(grid.size[along[axis]])[slab if along[axis] == 2 else slice(None)]
            at = to_working[axis, along[axis]] * at + to_working[axis, 3]
            found = fields.sample_along(found, 4 - axis, torch.from_numpy(at))
        return found.permute(0, 1, *(4 - np.argsort(along)[::-1]))

    others = np.abs(to_working[:3, :3]).sum(1) - np.abs(to_working[range(3), along])
    straight = sorted(along) == [0, 1, 2] and (others * max(grid.size)).max() < ROUNDING
    return sampled_along_axes if straight else sampled


def _points(to_working: np.ndarray, grid: Grid, slab: slice) -> Tensor:
    """Where the voxels of some slices of a grid are, (1, 3, d, h, w) in voxels of the working grid."""
    return torch.stack(_mapped(to_working, grid, slab))[None].to(torch.float32)


def _mapped(matrix: np.ndarray, grid: Grid, slab: slice) -> list[Tensor]:
    """x, y and z, each (d, h, w) in double precision, that a (4, 4) map gives the voxels of some slices of a grid."""
    k, j, i = (torch.arange(n, dtype=torch.float64) for n in grid.shape)
    j, k = j[:, None], k[slab, None, None]
    return [a * i + b * j + c * k + d for a, b, c, d in matrix[:3].tolist()]


def _displacement_transform(
    grid: Grid, linear: np.ndarray, to_mm: np.ndarray, sampled: Callable[[slice], Tensor]
) -> sitk.DisplacementFieldTransform:
    """``q -> linear(q) + to_mm @ sampled(q)`` as the displacement of every voxel of a grid, slab by slab.

    Args:
        linear: (4, 4), LPS -> LPS.
        to_mm: (3, 3), voxels of the working grid -> mm at the far end of the map.
        sampled: some slices of ``grid`` -> displacement there, (1, 3, d, h, w) in voxels of the working grid.
    """
    field = sitk.Image(list(grid.size), sitk.sitkVectorFloat64, 3)
    shift = linear @ grid.matrix - grid.matrix  # voxels -> mm, double precision: origins can be far away
    height, width = grid.shape[1:]
    in_mm = torch.from_numpy(to_mm).to(torch.float32)
    slices = max(CHUNK_VOXELS // (height * width), 1)
    for first in range(0, grid.shape[0], slices):
        last = min(first + slices, grid.shape[0])
        slab = slice(first, last)
        bent = torch.tensordot(in_mm, sampled(slab)[0], 1)
        found = torch.empty(last - first, height, width, 3, dtype=torch.float64)
        for out, straight, more in zip(found.unbind(-1), _mapped(shift, grid, slab), bent, strict=True):
            torch.add(straight, more, out=out)
        field[:, :, slab] = sitk.GetImageFromArray(found.numpy(), isVector=True)  # in place: the field is there once
    return sitk.DisplacementFieldTransform(grid.stamp(field))
