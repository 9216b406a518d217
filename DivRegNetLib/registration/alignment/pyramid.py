"""Images at one resolution, and what of them is looked at: content, air beyond the field of view, sampled points."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.intensity import percentile_window, without_padding
from DivRegNetLib.registration.alignment.settings import AlignmentSettings

PLASTIC = (
    1.2207440846057596  # root of x^4 = x + 1: its powers make the sequence of most even points in three dimensions
)


@dataclass(frozen=True)
class Look:
    """An image at one resolution.

    values: (D, H, W) float32 from 0 to 1.
    inside: (D, H, W) bool: voxels wholly inside the mask.
    grid: where they are.
    content: (D, H, W) bool: inside, and not background.
    known: (D + 2, H + 2, W + 2) bool: whether a voxel counts; one more at either end of each axis stands for all beyond. It
        counts where the field of view ends in air, which is taken to go on with the value of the outermost voxel.
    """

    values: np.ndarray
    inside: np.ndarray
    content: np.ndarray
    grid: Grid
    known: np.ndarray

    @cached_property
    def box(self) -> np.ndarray:
        """(2, 3) i, j, k: first and last voxel of the content, less what is scattered beyond its outermost half percent."""
        found = []
        for axis in (2, 1, 0):
            profile = self.content.sum(tuple(a for a in range(3) if a != axis)).cumsum()
            found.append(np.searchsorted(profile, np.array([0.005, 0.995]) * profile[-1]))
        return np.array(found, float).T

    @cached_property
    def centers(self) -> np.ndarray:
        """(3, 3) LPS mm: centers of the grid, of the content's box and of its mass."""
        at = np.argwhere(self.content)[:, ::-1].mean(0)
        return np.stack([self.grid.center, self.grid.to_physical(self.box.mean(0)), self.grid.to_physical(at)])

    @cached_property
    def spread(self) -> np.ndarray:
        """(3, 3): the symmetric square root of the covariance of the content's positions, LPS mm."""
        positions = self.grid.to_physical(np.argwhere(self.content)[:, ::-1])
        squares, axes = np.linalg.eigh(np.cov(positions.T))
        return axes @ np.diag(np.sqrt(np.maximum(squares, (0.1 * min(self.grid.spacing)) ** 2))) @ axes.T

    @property
    def extent(self) -> float:
        """Side of a cube as large as the box of the content, mm."""
        sides = (self.box[1] - self.box[0] + 1) * self.grid.spacing
        return float(np.prod(sides)) ** (1 / 3)

    def points(self, count: int, margin: float) -> np.ndarray:
        """About ``count`` voxel positions (n, 3) i, j, k in the box around the content, where the image is known."""
        rim = margin * (self.box[1] - self.box[0] + 1)
        low = np.maximum(self.box[0] - 0.5 - rim, -0.5)
        high = np.minimum(self.box[1] + 0.5 + rim, np.array(self.grid.size) - 0.5)
        number = np.arange(1, int(count / max(self.inside.mean(), 0.02)) + 1)[:, None]
        points = low + (0.5 + number * PLASTIC ** -np.arange(1.0, 4.0)) % 1.0 * (high - low)
        i, j, k = np.clip(np.round(points).astype(int), 0, np.array(self.grid.size) - 1).T
        return points[self.inside[k, j, i]][:count]


def prepare(image: sitk.Image, mask: sitk.Image | None) -> tuple[sitk.Image, sitk.Image | None]:
    """Float32 without the padding of a CT; the mask on the image's grid."""
    if mask is not None:
        mask = sitk.Cast(
            sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0) != 0, sitk.sitkFloat32
        )
    return sitk.Cast(without_padding(image), sitk.sitkFloat32), mask


def look(image: sitk.Image, mask: sitk.Image | None, spacing: float, settings: AlignmentSettings) -> Look:
    """Averages blocks to about ``spacing`` mm, never finer than the image.

    Args:
        image, mask: as from :func:`prepare`.
    """
    factors = [
        min(max(int(spacing / s + 0.25), 1), n) for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    coarse = sitk.BinShrink(image, factors)
    array = sitk.GetArrayFromImage(coarse)
    inside = np.ones(array.shape, bool)
    if mask is not None:
        whole = sitk.GetArrayFromImage(sitk.BinShrink(mask, factors)) > 0.99
        inside = whole if whole.any() else inside  # a mask thinner than a block says nothing at this resolution
    low, high = percentile_window(array[inside], *settings.window)
    if high <= low:
        low, high = float(array[inside].min()), float(array[inside].max())
    if high <= low:
        high = low + 1.0
    values = np.clip((array - low) / (high - low), 0, 1).astype(np.float32)
    known, background = _known(values, inside, settings)
    content = inside if background is None else inside & (np.abs(values - background) > settings.content)
    return Look(values, inside, content if content.sum() >= 8 else inside, Grid.of(coarse), known)


def _known(values: np.ndarray, inside: np.ndarray, settings: AlignmentSettings) -> tuple[np.ndarray, float | None]:
    """What is known, beyond the field of view as well, see :class:`Look`, and the value of the air; None where
    no face of the field of view shows any."""
    border = np.concatenate([values.take(at, axis).ravel() for axis in range(3) for at in (0, -1)])
    background = _mode(border)
    air = np.pad(inside & (np.abs(values - background) < settings.air), 1, "edge")
    known, any_open = np.pad(inside, 1, "edge"), False
    for axis in range(3):
        for at in (0, -1):
            face = [slice(None)] * 3
            face[axis] = at
            share = air[tuple(face)][1:-1, 1:-1].mean()
            open_ = share >= settings.open_face
            any_open |= open_
            known[tuple(face)] &= air[tuple(face)] & open_
    return known, background if any_open else None


def _mode(values: np.ndarray) -> float:
    """The middle of the fullest of 25 bins and its neighbors, from 0 to 1."""
    counts = np.histogram(values, 25, (0, 1))[0]
    near = np.convolve(counts, [1, 1, 1], "same")
    at = int(near.argmax())
    chosen = values[np.abs(values - (at + 0.5) / 25) < 1.5 / 25]
    return float(np.median(chosen)) if len(chosen) else float(np.median(values))
