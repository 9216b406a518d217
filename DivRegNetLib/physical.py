"""Between the working grid of the network and physical space: sampling images in, displacement fields in mm out."""

from collections.abc import Iterator

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import fields
from DivRegNetLib.geometry import Grid, affine_transform, apply_matrix

CHUNK_POINTS = 1_000_000


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


def resample_mask(mask: sitk.Image, grid: Grid, matrix: np.ndarray) -> sitk.Image:
    """A mask on a grid, nearest neighbour, through a (4, 4) LPS map from grid to mask points; 0 outside."""
    return sitk.Resample(mask, grid.empty_image(), affine_transform(matrix), sitk.sitkNearestNeighbor, 0.0)


def to_mm(displacement: Tensor, grid: Grid) -> Tensor:
    """Voxels of a grid -> LPS mm: ``u_mm = direction @ diag(spacing) @ u``, (1, 3, D, H, W) in and out."""
    return torch.einsum("ij,njdhw->nidhw", displacement.new_tensor(grid.matrix[:3, :3]), displacement)


def forward_transform(
    displacement_mm: Tensor, grid: Grid, initial: np.ndarray, fixed: Grid
) -> sitk.DisplacementFieldTransform:
    """``T(p) = initial(p + u(p))``, fixed -> moving points, as a displacement field on the fixed grid (LPS, mm).

    Args:
        displacement_mm: (1, 3, D, H, W) on ``grid``, LPS mm; beyond the grid its border values go on.
        initial: (4, 4) LPS, fixed -> moving.
    """

    def map_points(points: np.ndarray) -> np.ndarray:
        return apply_matrix(initial, points + _sample_mm(displacement_mm, grid, points))

    return _displacement_transform(fixed, map_points)


def inverse_transform(
    displacement_mm: Tensor, inverse_mm: Tensor, grid: Grid, initial: np.ndarray, moving: Grid, iterations: int = 3
) -> sitk.DisplacementFieldTransform:
    """The inverse of :func:`forward_transform`, moving -> fixed points, on the moving grid (LPS, mm).

    Starts from ``inverse_mm``, the inverse on the working grid, and solves ``p = initial^-1(q) - u(p)`` for every moving
    voxel q by fixed-point iteration, so that no resolution is lost to the working grid.
    """
    back = np.linalg.inv(initial)

    def map_points(points: np.ndarray) -> np.ndarray:
        start = apply_matrix(back, points)
        found = start + _sample_mm(inverse_mm, grid, start)
        for _ in range(iterations):
            found = start - _sample_mm(displacement_mm, grid, found)
        return found

    return _displacement_transform(moving, map_points)


def _displacement_transform(grid: Grid, map_points) -> sitk.DisplacementFieldTransform:
    """A map of LPS points (n, 3) -> (n, 3) as the displacement of every voxel of a grid."""
    displacement = np.empty((*grid.shape, 3))
    for part, points in _chunks(grid):
        displacement[part] = (map_points(points) - points).reshape(displacement[part].shape)
    # The transform takes over the image's buffer instead of copying it.
    return sitk.DisplacementFieldTransform(grid.image(displacement))


def _chunks(grid: Grid) -> Iterator[tuple[slice, np.ndarray]]:
    """Slabs of a grid, as a slice along k and the LPS points (n, 3) of its voxels."""
    depth, height, width = grid.shape
    slices = max(CHUNK_POINTS // (height * width), 1)
    j, i = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    for first in range(0, depth, slices):
        k = np.arange(first, min(first + slices, depth))
        index = np.empty((len(k), height, width, 3))
        index[..., 0], index[..., 1], index[..., 2] = i, j, k[:, None, None]
        yield slice(first, first + len(k)), grid.to_physical(index.reshape(-1, 3))


def _sample_mm(displacement_mm: Tensor, grid: Grid, points: np.ndarray) -> np.ndarray:
    """Displacement (mm) at LPS points (n, 3), trilinear, border values beyond the grid; (n, 3)."""
    index = torch.from_numpy(grid.to_index(points)).to(displacement_mm)
    sampled = fields.sample(displacement_mm, index.T[None, :, :, None, None])
    return sampled[0, :, :, 0, 0].T.double().cpu().numpy()
