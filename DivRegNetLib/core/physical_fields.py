"""From a displacement on the working grid to transforms in physical space (LPS, mm), slab by slab."""

from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid

CHUNK_VOXELS = 250_000
ROUNDING = 1e-3  # voxels that axes which are meant to be parallel may drift apart


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
