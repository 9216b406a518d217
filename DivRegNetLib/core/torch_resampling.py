"""Resampling of a volume through the transform of a registration by torch, for a graphics card; as SimpleITK does it."""

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core.composites import field_of
from DivRegNetLib.core.grid import Grid, affine_matrix

SLAB_VOXELS = 1_000_000
BYTES_PER_SLAB_VOXEL = 400  # positions, corners and weights in double precision
WHOLE = 1e-6  # voxels by which one grid may be shifted from whole voxels of another


def resample(
    image: sitk.Image, grid: Grid, transform: sitk.CompositeTransform, default: float, device: torch.device
) -> sitk.Image | None:
    """A volume on a grid through a :func:`~DivRegNetLib.core.composites.composite`, linearly, in its own pixel type.

    The same as :func:`DivRegNetLib.core.resampling.resample`, but for values that lie within rounding of the middle between
    two whole numbers or of the border of the volume.

    Args:
        image: of one component.
        transform: from points of the grid to points of the image.
        default: value outside the image.
    Returns:
        None where this cannot be done: for integers of 64 bits, which double precision does not hold, and where the field of
        the transform does not hold the very voxels of the grid.
    """
    field = field_of(transform)
    first, dtype = _offset(Grid.of(field), grid), sitk.GetArrayViewFromImage(image).dtype
    if first is None or (dtype.itemsize == 8 and dtype.kind != "f"):
        return None
    displacement = sitk.GetArrayViewFromImage(field)
    i, j, k = first
    displacement = displacement[k : k + grid.shape[0], j : j + grid.shape[1], i : i + grid.shape[2]]
    single = dtype.itemsize <= 2 or dtype == np.float32  # holds every value
    values = torch.from_numpy(sitk.GetArrayFromImage(image).astype(np.float32 if single else np.float64)).to(device)
    to_index = Grid.of(image).inverse_matrix @ affine_matrix(transform.GetNthTransform(0))
    result = np.empty(grid.shape, dtype)
    slices = max(SLAB_VOXELS // (grid.shape[1] * grid.shape[2]), 1)
    for start in range(0, grid.shape[0], slices):
        slab = slice(start, min(start + slices, grid.shape[0]))
        moved = torch.from_numpy(displacement[slab].copy()).to(device)
        at = _positions(to_index, grid, slab, moved)
        result[slab] = _in_type(_linear(values, at, default), dtype).cpu().numpy()
    return grid.image(result)


def memory(image: sitk.Image, grid: Grid) -> int:
    """Bytes that :func:`resample` takes on the device."""
    slab = max(SLAB_VOXELS, grid.shape[1] * grid.shape[2])
    return 8 * image.GetNumberOfPixels() + BYTES_PER_SLAB_VOXEL * min(slab, grid.voxels)


def _offset(field: Grid, grid: Grid) -> tuple[int, int, int] | None:
    """The voxel of a field's grid, along i, j and k, that is the first one of a grid; None if the latter is no part of it."""
    ends = field.to_index(grid.to_physical([(0, 0, 0), np.array(grid.size) - 1]))
    first, last = np.round(ends).astype(int)
    parallel = np.allclose(field.matrix[:3, :3], grid.matrix[:3, :3], rtol=0, atol=1e-9)
    inside = (first >= 0).all() and (last < field.size).all()
    whole = np.abs(ends - np.round(ends)).max() < WHOLE
    return tuple(first.tolist()) if parallel and inside and whole else None


def _positions(to_index: np.ndarray, grid: Grid, slab: slice, displacement: Tensor) -> list[Tensor]:
    """Where the voxels of some slices of a grid are found, in voxels of the image: x, y and z, each (d, h, w), float64.

    Args:
        to_index: (4, 4), points after the displacement -> voxels of the image.
        displacement: (d, h, w, 3), float64, mm.
    """
    of_voxels, of_displacement = to_index @ grid.matrix, to_index[:3, :3].tolist()
    k, j, i = (torch.arange(n, dtype=torch.float64, device=displacement.device) for n in grid.shape)
    j, k, moved = j[:, None], k[slab, None, None], displacement.unbind(-1)
    return [
        (a * i + b * j + c * k + d) + sum(m * u for m, u in zip(row, moved, strict=True))
        for (a, b, c, d), row in zip(of_voxels[:3].tolist(), of_displacement, strict=True)
    ]


def _linear(values: Tensor, at: list[Tensor], default: float) -> Tensor:
    """Values of an image (D, H, W) at positions, float64; the border reaches half a voxel beyond the outermost voxels."""
    sizes = values.shape[::-1]
    inside = torch.ones_like(at[0], dtype=torch.bool)
    corners, weights = [], []
    for position, n in zip(at, sizes, strict=True):
        inside &= (position >= -0.5) & (position < n - 0.5)
        low = position.floor()
        weights.append(position - low)
        low = low.long()
        corners.append((low.clamp(0, n - 1), (low + 1).clamp(0, n - 1)))
    flat, (x, y, z), (wx, wy, wz) = values.flatten(), corners, weights

    def row(j: Tensor, k: Tensor) -> Tensor:
        start = (k * sizes[1] + j) * sizes[0]
        return torch.lerp(flat[start + x[0]].double(), flat[start + x[1]].double(), wx)

    near, far = (torch.lerp(row(y[0], k), row(y[1], k), wy) for k in z)
    return torch.lerp(near, far, wz).where(inside, default)


def _in_type(values: Tensor, dtype: np.dtype) -> Tensor:
    """Values in the pixel type of an image; integers are rounded, halves upward, and kept in their range."""
    if dtype.kind == "f":
        return values.to(torch.float32 if dtype == np.float32 else torch.float64)
    if dtype.itemsize <= 2:
        values = values.float().double()  # as SimpleITK interpolates them
    limits = np.iinfo(dtype)
    return (values + 0.5).floor().clamp(limits.min, limits.max).to(torch.int64)
