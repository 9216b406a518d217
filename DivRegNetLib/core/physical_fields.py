"""From a displacement on the working grid to transforms in physical space (LPS, mm).

They are computed on the displacement's device, slab by slab, and kept in main memory. Transforms are composites as in
:mod:`DivRegNetLib.core.composites`.
"""

import ctypes
import math
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.core.composites import LARGEST_GROWTH, composite
from DivRegNetLib.core.grid import Grid

CHUNK_VOXELS = 250_000
ROUNDING = 1e-3  # voxels by which axes may deviate from parallel to count as parallel
FADE = 3.0  # width of the margin in which the field fades to zero, in lengths of the largest displacement at the border
SMALL_FIELD = 500_000  # voxels up to which LARGEST_GROWTH does not limit the margin
FACE_POINTS = 24  # sample points along each edge of the image, for the largest displacement at its border


def forward_transform(displacement: Tensor, grid: Grid, initial: np.ndarray, fixed: Grid) -> sitk.CompositeTransform:
    """``T(p) = initial(p + u(p))``, which maps fixed points to moving points (LPS, mm), with a field on the fixed grid.

    Args:
        displacement: u, (1, 3, D, H, W) in voxels of ``grid``; beyond the grid its border values continue.
        grid: working grid, in fixed space.
        initial: (4, 4) LPS, maps fixed points to moving points.
    """

    def sampled_on(padded: Grid) -> Callable[[slice], Tensor]:
        return _sampler(displacement, grid.inverse_matrix @ padded.matrix, padded)

    return composite(initial, _faded_field(fixed, grid.matrix[:3, :3], sampled_on))


def inverse_transform(
    displacement: Tensor, inverse: Tensor, grid: Grid, initial: np.ndarray, moving: Grid, iterations: int = 1
) -> sitk.CompositeTransform:
    """The inverse of :func:`forward_transform`: maps moving points to fixed points (LPS, mm), with a field on the moving grid.

    Starts from ``inverse``, the inverse of ``displacement`` on the working grid, and solves ``p + u(p) = initial^-1(q)``
    for every moving voxel q by fixed-point iteration, so that the working grid does not limit the resolution. One iteration
    brings the error to a hundredth of a voxel of the working grid, in rare cases to a tenth.
    """
    back, moved = np.linalg.inv(initial), fields.Sampler(displacement)

    def sampled_on(padded: Grid) -> Callable[[slice], Tensor]:
        to_working = grid.inverse_matrix @ back @ padded.matrix
        start = _sampler(inverse, to_working, padded)

        def sampled(slab: slice) -> Tensor:
            at, v = _points(to_working, padded, slab, displacement.device), start(slab)
            for _ in range(iterations):
                v = -moved(at + v)
            return v

        return sampled

    return composite(back, _faded_field(moving, initial[:3, :3] @ grid.matrix[:3, :3], sampled_on))


def _sampler(field: Tensor, to_working: np.ndarray, grid: Grid) -> Callable[[slice], Tensor]:
    """A function from some slices of a grid to the field there, (1, 3, d, h, w); beyond the working grid its border values
    continue.

    Args:
        field: (1, 3, D, H, W) on the working grid.
        to_working: (4, 4), voxels of ``grid`` -> voxels of the working grid.
    """
    # The axis of the grid that each axis of the working grid is nearest to.
    along = np.abs(to_working[:3, :3]).argmax(1)

    def sampled_along_axes(slab: slice) -> Tensor:
        values = field
        for axis in np.argsort(-along):  # first the axis that the slab is cut from
            at = np.arange(grid.size[along[axis]])[slab if along[axis] == 2 else slice(None)]
            at = to_working[axis, along[axis]] * at + to_working[axis, 3]
            values = fields.sample_along(values, 4 - axis, torch.from_numpy(at).to(field.device))
        return values.permute(0, 1, *(4 - np.argsort(along)[::-1]))

    others = np.abs(to_working[:3, :3]).sum(1) - np.abs(to_working[range(3), along])
    straight = sorted(along) == [0, 1, 2] and (others * max(grid.size)).max() < ROUNDING
    if straight:
        return sampled_along_axes
    values_at = fields.Sampler(field)
    return lambda slab: values_at(_points(to_working, grid, slab, field.device))


def _points(to_working: np.ndarray, grid: Grid, slab: slice, device: torch.device) -> Tensor:
    """Positions of the voxels of some slices of a grid, (1, 3, d, h, w) in voxels of the working grid."""
    i, j, k = (column[:, None] * np.arange(n) for n, column in zip(grid.size, to_working[:3, :3].T, strict=True))
    rest = k[:, slab, None] + j[:, None] + to_working[:3, 3, None, None]
    along_i, rest = (torch.from_numpy(part).to(device, torch.float32) for part in (i, rest))
    return (rest[..., None] + along_i[:, None, None])[None]


def _faded_field(grid: Grid, to_mm: np.ndarray, sampled_on: Callable[[Grid], Callable[[slice], Tensor]]) -> sitk.Image:
    """``to_mm @ sampled`` at every voxel of a grid and of a margin around it, in which it fades to zero, slab by slab.

    Args:
        to_mm: (3, 3), voxels of the working grid -> mm.
        sampled_on: a grid -> some slices of it -> displacement there, (1, 3, d, h, w) in voxels of the working grid.
    """
    margin = _margin(grid, _largest_at_border(grid, to_mm, sampled_on))
    offset = np.eye(4)
    offset[:3, 3] = -margin
    padded = Grid(tuple(np.array(grid.size) + 2 * margin), grid.matrix @ offset)
    sampled = sampled_on(padded)
    x, y, z = (_weights(n, int(m)) for n, m in zip(grid.size, margin, strict=True))
    field = sitk.Image(list(padded.size), sitk.sitkVectorFloat64, 3)
    values = torch.from_numpy(_voxels(field))  # written in place, so that the field is in memory once
    depth, height, width = padded.shape
    slices = max(CHUNK_VOXELS // (height * width), 1)
    for first in range(0, depth, slices):
        slab = slice(first, min(first + slices, depth))
        in_space = _in_mm(sampled(slab)[0], to_mm)
        along_z, along_y, along_x = (w.to(in_space.device) for w in (z[slab], y, x))
        faded = in_space * (along_z[:, None, None] * along_y[:, None] * along_x)
        values[slab].copy_(faded.permute(1, 2, 3, 0))
    return padded.stamp(field)


def _voxels(image: sitk.Image) -> np.ndarray:
    """The memory of an image to be written to, (D, H, W, components), for as long as the image lives and nothing else uses it:
    SimpleITK's views are for reading."""
    view = sitk.GetArrayViewFromImage(image)
    memory = (ctypes.c_char * view.nbytes).from_address(view.ctypes.data)
    return np.frombuffer(memory, view.dtype).reshape(view.shape)


def _in_mm(displacement: Tensor, to_mm: np.ndarray) -> Tensor:
    """A displacement (3, d, h, w) in voxels multiplied by a (3, 3) matrix."""
    return torch.tensordot(torch.from_numpy(to_mm).to(displacement), displacement, 1)


def _largest_at_border(grid: Grid, to_mm: np.ndarray, sampled_on: Callable[[Grid], Callable[[slice], Tensor]]) -> float:
    """Approximate length (mm) of the largest displacement on the six sides of a grid."""
    every = np.maximum((np.array(grid.size) - 1) / (FACE_POINTS - 1), 1)
    size = np.floor((np.array(grid.size) - 1) / every + 1e-6).astype(int) + 1
    every = np.where(size > 1, (np.array(grid.size) - 1) / np.maximum(size - 1, 1), 1)
    coarse = Grid(tuple(size), grid.matrix @ np.diag([*every, 1]))
    length = torch.linalg.vector_norm(_in_mm(sampled_on(coarse)(slice(None))[0], to_mm), dim=0).cpu()
    return max(float(length.select(axis, end).max()) for axis in range(3) for end in (0, -1))


def _margin(grid: Grid, displacement: float) -> np.ndarray:
    """Voxels (3,) along x, y and z in which a displacement (mm) fades out on each side."""
    margin = np.maximum(np.ceil(FADE * displacement / np.array(grid.spacing)), 1)
    limit = max(LARGEST_GROWTH * grid.voxels, SMALL_FIELD)
    while margin.max() > 1 and np.prod(np.array(grid.size) + 2 * margin) > limit:
        margin = np.maximum(np.floor(0.8 * margin), 1)
    return margin.astype(int)


def _weights(size: int, margin: int) -> Tensor:
    """1 along ``size`` voxels, and a cosine down to 0 in a margin at either end, double precision."""
    rising = [0.5 - 0.5 * math.cos(math.pi * k / margin) for k in range(margin)]
    return torch.tensor(rising + [1.0] * size + rising[::-1], dtype=torch.float64)
