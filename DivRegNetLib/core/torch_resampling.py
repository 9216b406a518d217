"""Resampling of a volume by torch where its displacements are computed, with SimpleITK's result.

The displacements need not leave a graphics card for it, and a CPU does it in half of SimpleITK's time.
"""

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core.composites import voxels
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.physical_fields import chunk_voxels

BYTES_PER_SLAB_VOXEL = 200  # positions, weights and interpolated values in double precision


class Resampling:
    """Resamples a volume at ``matrix(p + u(p))`` for the voxels p of a reference, linearly, in its own pixel type, some slices
    at a time.

    The same as :func:`DivRegNetLib.core.resampling.resample` through a :func:`~DivRegNetLib.core.composites.composite` with the
    field u on the grid of the reference, but for rounding: it decides where a value lies in the middle between two whole
    numbers or a position at the border of the volume, and changes the last digits of double precision.

    warped: the result, with exactly the geometry of the reference.
    """

    def __init__(
        self, image: sitk.Image, reference: sitk.Image, matrix: np.ndarray, default: float, device: torch.device
    ) -> None:
        """
        Args:
            image: for which :func:`can_resample`.
            reference: whose voxels do not matter.
            matrix: (4, 4), LPS.
            default: value outside the image.
            device: of the displacements.
        """
        self.warped = sitk.Image(reference.GetSize(), image.GetPixelID())
        self.warped.CopyInformation(reference)
        self._grid, self._default = Grid.of(reference), default
        self._image, self._to_index = _Voxels(image, device), Grid.of(image).inverse_matrix @ matrix

    def __call__(self, slab: slice, displacement: Tensor) -> None:
        """Resamples some slices of the grid, at a displacement (1, 3, d, h, w) in mm."""
        at = _positions(self._to_index, self._grid, slab, displacement)
        result = voxels(self.warped)
        result[slab] = _in_type(self._image.at(at, self._default), result.dtype).cpu().numpy()


def can_resample(image: sitk.Image) -> bool:
    """Whether an image has one component whose values double precision holds: no integers of 64 bits."""
    dtype = sitk.GetArrayViewFromImage(image).dtype
    return image.GetNumberOfComponentsPerPixel() == 1 and (dtype.kind == "f" or dtype.itemsize < 8)


def memory(image: sitk.Image, grid: Grid, device: torch.device) -> int:
    """Bytes that :class:`Resampling` takes on the device."""
    slab = max(chunk_voxels(device), grid.shape[1] * grid.shape[2])
    return 8 * image.GetNumberOfPixels() + BYTES_PER_SLAB_VOXEL * min(slab, grid.voxels)


def _positions(to_index: np.ndarray, grid: Grid, slab: slice, displacement: Tensor) -> list[Tensor]:
    """Where the voxels of some slices of a grid are found, in voxels of the image: x, y and z, each (d, h, w), float64.

    Args:
        to_index: (4, 4), points after the displacement -> voxels of the image.
        displacement: (1, 3, d, h, w), mm.
    """
    of_voxels, of_displacement = to_index @ grid.matrix, to_index[:3, :3].tolist()
    k, j, i = (torch.arange(n, dtype=torch.float64, device=displacement.device) for n in grid.shape)
    j, k, moved = j[:, None], k[slab, None, None], displacement[0].double()
    positions = []
    for (a, b, c, d), row in zip(of_voxels[:3].tolist(), of_displacement, strict=True):
        at = (b * j + (c * k + d)) + a * i
        for factor, component in zip(row, moved, strict=True):
            if factor:
                at.add_(component, alpha=factor)
        positions.append(at)
    return positions


class _Voxels:
    """The voxels of an image on a device, from which values between them are interpolated."""

    def __init__(self, image: sitk.Image, device: torch.device) -> None:
        values = sitk.GetArrayViewFromImage(image)
        single = values.dtype.itemsize <= 2 or values.dtype == np.float32  # holds every value
        # One voxel more at the far ends, whose weight is always 0.
        padded = np.zeros([n + 1 for n in values.shape], np.float32 if single else np.float64)
        padded[:-1, :-1, :-1] = values
        _, height, width = padded.shape
        self._sizes, self._steps = image.GetSize(), (1, width, width * height)
        self._flat = torch.from_numpy(padded.ravel()).to(device)

    def at(self, at: list[Tensor], default: float) -> Tensor:
        """Values at positions x, y, z in voxels (each (d, h, w), float64), float64; the border reaches half a voxel beyond
        the outermost voxels."""
        index, inside, weights = None, None, []
        for position, n, step in zip(at, self._sizes, self._steps, strict=True):
            within = (position >= -0.5) & (position < n - 0.5)
            inside = within if inside is None else inside & within
            position = position.clamp(0, n - 1)
            low = position.floor()
            weights.append(position.sub_(low))
            index = low.mul_(step) if index is None else index.add_(low, alpha=step)
        index = index.flatten().to(torch.int32 if len(self._flat) < 2**31 else torch.int64)
        (one_x, one_y, one_z), (x, y, z) = self._steps, (weight.flatten() for weight in weights)

        def value(offset: int) -> Tensor:
            return self._flat[offset:].index_select(0, index).double()

        def along_x(offset: int) -> Tensor:
            return value(offset).lerp_(value(offset + one_x), x)

        near, far = (along_x(offset).lerp_(along_x(offset + one_y), y) for offset in (0, one_z))
        return near.lerp_(far, z).view(inside.shape).where(inside, default)


def _in_type(values: Tensor, dtype: np.dtype) -> Tensor:
    """Values in the pixel type of an image; integers are rounded, halves upward, and kept in their range."""
    if dtype.kind == "f":
        return values.to(torch.float32 if dtype == np.float32 else torch.float64)
    if dtype.itemsize <= 2:
        values = values.float().double()  # as SimpleITK interpolates them
    limits = np.iinfo(dtype)
    return (values + 0.5).floor().clamp(limits.min, limits.max).to(torch.int32 if dtype.itemsize <= 2 else torch.int64)
