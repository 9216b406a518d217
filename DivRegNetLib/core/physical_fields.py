"""From a displacement on the working grid to transforms in physical space (LPS, mm).

They are computed on the displacement's device, slab by slab, and written to where ITK keeps them in main memory. Transforms
are composites as in :mod:`DivRegNetLib.core.composites`.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.core.composites import LARGEST_GROWTH, composite, voxels
from DivRegNetLib.core.grid import Grid

OnSlices = Callable[[slice], Tensor]
"""From some slices of a grid to a field there, (1, 3, d, h, w)."""

Use = Callable[[slice, Tensor], None]
"""Is given some slices of a grid, and a field there, (1, 3, d, h, w)."""

# Voxels that are computed at a time: few enough to stay in the cache of a processor, enough to keep a graphics card busy.
CHUNK_VOXELS, CHUNK_ON_CARD = 250_000, 1_000_000
ROUNDING = 1e-3  # voxels by which axes may deviate from parallel to count as parallel
FADE = 3.0  # width of the margin in which the field fades to zero, in lengths of the largest displacement at the border
SMALL_FIELD = 500_000  # voxels up to which LARGEST_GROWTH does not limit the margin
FACE_POINTS = 24  # sample points along each edge of the image, for the largest displacement at its border


def forward_transform(
    displacement: Tensor, grid: Grid, initial: np.ndarray, fixed: Grid, use: Use | None = None
) -> sitk.CompositeTransform:
    """``T(p) = initial(p + u(p))``, which maps fixed points to moving points (LPS, mm), with a field on the fixed grid.

    Args:
        displacement: u, (1, 3, D, H, W) in voxels of ``grid``; beyond the grid its border values continue.
        grid: working grid, in fixed space.
        initial: (4, 4) LPS, maps fixed points to moving points.
        use: called with u (mm) at all voxels of the fixed grid, some slices at a time.
    """
    in_mm = _in_mm(displacement, grid.matrix[:3, :3])

    def sampled_on(padded: Grid) -> OnSlices:
        return _sampler(in_mm, grid.inverse_matrix @ padded.matrix, padded)

    return composite(initial, _faded_field(fixed, sampled_on, displacement.device, use))


def inverse_transform(
    displacement: Tensor, inverse: Tensor, grid: Grid, initial: np.ndarray, moving: Grid, iterations: int = 1
) -> sitk.CompositeTransform:
    """The inverse of :func:`forward_transform`: maps moving points to fixed points (LPS, mm), with a field on the moving grid.

    Starts from ``inverse``, the inverse of ``displacement`` on the working grid, and solves ``p + u(p) = initial^-1(q)``
    for every moving voxel q by fixed-point iteration, so that the working grid does not limit the resolution. One iteration
    brings the error to a hundredth of a voxel of the working grid, in rare cases to a tenth.
    """
    back, device = np.linalg.inv(initial), displacement.device
    to_mm, moved = initial[:3, :3] @ grid.matrix[:3, :3], fields.Sampler(-displacement)

    def sampled_on(padded: Grid) -> OnSlices:
        to_working = grid.inverse_matrix @ back @ padded.matrix
        start = _sampler(inverse, to_working, padded)

        def sampled(slab: slice) -> Tensor:
            at, v = _points(to_working, padded, slab, device), start(slab)
            for _ in range(iterations):
                v = moved(at + v)
            return _in_mm(v, to_mm)

        return sampled

    return composite(back, _faded_field(moving, sampled_on, device))


def _sampler(field: Tensor, to_field: np.ndarray, grid: Grid) -> OnSlices:
    """A function from some slices of a grid to the field there; beyond its own grid the field's border values continue.

    Args:
        field: (1, 3, D, H, W), in any unit.
        to_field: (4, 4), voxels of ``grid`` -> voxels of the field.
    """
    along = np.abs(to_field[:3, :3]).argmax(1)  # the axis of the grid that each axis of the field is nearest to
    others = np.abs(to_field[:3, :3]).sum(1) - np.abs(to_field[range(3), along])
    if sorted(along) != [0, 1, 2] or (others * max(grid.size)).max() >= ROUNDING:
        values_at = fields.Sampler(field)
        return lambda slab: values_at(_points(to_field, grid, slab, field.device))
    axes = np.argsort(along)  # of the field, along i, j and k
    field = field.permute(0, 1, *(4 - axes[::-1]))
    i, j, k = (to_field[axis, own] * np.arange(grid.size[own]) + to_field[axis, 3] for own, axis in enumerate(axes))
    along_i, along_j, along_k = (torch.from_numpy(at).to(field.device) for at in (i, j, k))

    def sampled_along_axes(slab: slice) -> Tensor:
        # The slices come last, from the fewer ones of the field: they are the cheapest to interpolate.
        ends = np.clip([k[slab].min(), k[slab].max()], 0, field.shape[2] - 1)
        first, last = math.floor(ends[0]), math.ceil(ends[1])
        slices = fields.sample_along(field[:, :, first : last + 1], 4, along_i)
        return fields.sample_along(fields.sample_along(slices, 3, along_j), 2, along_k[slab] - first)

    return sampled_along_axes


def _points(to_working: np.ndarray, grid: Grid, slab: slice, device: torch.device) -> Tensor:
    """Positions of the voxels of some slices of a grid, (1, 3, d, h, w) in voxels of the working grid."""
    i, j, k = (column[:, None] * np.arange(n) for n, column in zip(grid.size, to_working[:3, :3].T, strict=True))
    rest = k[:, slab, None] + j[:, None] + to_working[:3, 3, None, None]
    along_i, rest = (torch.from_numpy(part).to(device, torch.float32) for part in (i, rest))
    return (rest[..., None] + along_i[:, None, None])[None]


def _faded_field(
    grid: Grid, sampled_on: Callable[[Grid], OnSlices], device: torch.device, use: Use | None = None
) -> sitk.Image:
    """A displacement (mm) at every voxel of a grid and of a margin around it, in which it fades to zero, slab by slab.

    Args:
        sampled_on: from a grid to the displacement on it.
        use: of the displacement on the grid without the margin.
    """
    margin = _margin(grid, _largest_at_border(grid, sampled_on))
    offset = np.eye(4)
    offset[:3, 3] = -margin
    padded = Grid(tuple(np.array(grid.size) + 2 * margin), grid.matrix @ offset)
    sampled = sampled_on(padded)
    x, y, z = (_weights(n, int(m)) for n, m in zip(grid.size, margin, strict=True))
    in_slice, along_z = (weights.to(device, torch.float32) for weights in (y[:, None] * x, z[:, None, None]))
    field = sitk.Image(list(padded.size), sitk.sitkVectorFloat64, 3)
    values = torch.from_numpy(voxels(field))  # written in place, so that the field is in memory once
    (depth, height, width), (i, j, k) = grid.shape, margin.tolist()
    for slab in slabs(padded, device):
        in_space = sampled(slab)
        inner = slice(max(slab.start - k, 0), min(slab.stop - k, depth))
        if use is not None and inner.start < inner.stop:
            within = slice(inner.start + k - slab.start, inner.stop + k - slab.start)
            use(inner, in_space[:, :, within, j : j + height, i : i + width])
        in_space.mul_(in_slice).mul_(along_z[slab])
        values[slab].copy_(in_space[0].permute(1, 2, 3, 0))
    return padded.stamp(field)


def chunk_voxels(device: torch.device) -> int:
    """CHUNK_VOXELS on a CPU, CHUNK_ON_CARD on a graphics card."""
    return CHUNK_VOXELS if device.type == "cpu" else CHUNK_ON_CARD


def slabs(grid: Grid, device: torch.device) -> Iterator[slice]:
    """The slices of a grid, as many at a time as have :func:`chunk_voxels`, or one."""
    depth, height, width = grid.shape
    slices = max(chunk_voxels(device) // (height * width), 1)
    return (slice(first, min(first + slices, depth)) for first in range(0, depth, slices))


def _in_mm(displacement: Tensor, to_mm: np.ndarray) -> Tensor:
    """A displacement (1, 3, D, H, W) in voxels multiplied by a (3, 3) matrix."""
    return torch.tensordot(torch.from_numpy(to_mm).to(displacement), displacement[0], 1)[None]


def _largest_at_border(grid: Grid, sampled_on: Callable[[Grid], OnSlices]) -> float:
    """Approximate length (mm) of the largest displacement on the six sides of a grid."""
    every = np.maximum((np.array(grid.size) - 1) / (FACE_POINTS - 1), 1)
    size = np.floor((np.array(grid.size) - 1) / every + 1e-6).astype(int) + 1
    every = np.where(size > 1, (np.array(grid.size) - 1) / np.maximum(size - 1, 1), 1)
    coarse = Grid(tuple(size), grid.matrix @ np.diag([*every, 1]))
    length = fields.length(sampled_on(coarse)(slice(None)))[0, 0].cpu()
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
