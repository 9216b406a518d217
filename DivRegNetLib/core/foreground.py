"""Where an image shows something: the box without the air around it. No torch here.

The box is an estimate on the safe side: what is barely brighter than air counts as something, and where air cannot be told
plainly, the box is the whole image.
"""

import math

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.core.intensity import AIR_HU, without_padding

COARSE_VOXELS = 72  # along the longest side of the averaged image that is looked at
FEWEST_VOXELS = 6  # of the averaged image along an axis; a thinner image is not cut
# The darkest tenth of an image is taken for air, the distance of two percentiles of it for the noise in it, and the median of
# what is brighter than the mean, less air, for the contrast.
AIR_PERCENT, DARKEST_PERCENT = 10.0, 1.0
SPREAD, LEAST_SPREAD = 5.0, 0.06  # in units of the noise and of the contrast: the larger one is the upper limit of air
LARGEST_SPREAD = 0.15  # of the contrast; where the limit is higher, nothing is taken for air
PLAIN, PLAIN_PERCENT = 0.03, 90.0  # what is left out must be this dark, in units of the contrast, up to this percentile
CT_AIR_HU = -930.0  # upper limit of air in a CT; lungs and pads are above
CT_DARKEST_HU = AIR_HU - 100.0, AIR_HU + 60.0  # range of the darkest value of a CT
FEWEST_SHARE = 1e-3  # of the foreground: smaller parts of it are taken for noise
MARGIN = 0.02  # around the foreground, on each side, as a fraction of its longest side
REACH = 0.1  # likewise, how far the box can be extended to what the moving image shows
WORTH = 0.95  # of the volume of an image: a box of more is not cut out

Bounds = tuple[np.ndarray, np.ndarray]
"""The corners of a box along the LPS axes, with the lowest and with the highest coordinates, (3,) each, mm."""


def covered_region(
    fixed: sitk.Image,
    moving: sitk.Image,
    matrix: np.ndarray,
    fixed_mask: sitk.Image | None = None,
    moving_mask: sitk.Image | None = None,
) -> Grid:
    """The part of the fixed image that a registration covers: its foreground, or its mask, with a margin, and what the moving
    image shows a little around that.

    Args:
        matrix: (4, 4) LPS, maps fixed points to moving points.
        fixed_mask, moving_mask: where the images are compared; None: everywhere.
    Returns:
        Whole voxels of the fixed grid where it lies along the LPS axes, otherwise an isotropic grid along these axes; the
        fixed grid itself where there is too little to leave out.
    """
    grid, shown = Grid.of(fixed), foreground_bounds(fixed, fixed_mask)
    if shown is None:
        return grid
    low, high = shown
    longest = (high - low).max()
    margin, reach = MARGIN * longest, REACH * longest
    there = foreground_bounds(moving, moving_mask, np.linalg.inv(matrix))
    if there is None:
        corners = apply_matrix(np.linalg.inv(matrix), Grid.of(moving).corners())
        there = corners.min(0), corners.max(0)
    low = np.minimum(low - margin, np.maximum(there[0], low - reach))
    high = np.maximum(high + margin, np.minimum(there[1], high + reach))
    return _cut(grid, low, high)


def foreground_bounds(
    image: sitk.Image, mask: sitk.Image | None = None, to_space: np.ndarray | None = None
) -> Bounds | None:
    """The box around what an image shows; None: it shows something everywhere, or that cannot be told.

    Args:
        image: 3D, scalar.
        mask: on any grid; where there is one, the box is that of its non-zero voxels.
        to_space: (4, 4) map from LPS points of the image to those of the box; None: the same.
    """
    image = without_padding(image) if mask is None else mask
    grid = Grid.of(image)
    mm = max(n * s for n, s in zip(grid.size, grid.spacing, strict=True)) / COARSE_VOXELS
    blocks = [min(max(round(mm / s), 1), n) for n, s in zip(grid.size, grid.spacing, strict=True)]
    if mask is not None:
        shown = _averaged(sitk.GetArrayViewFromImage(mask) != 0, blocks) > 0  # no mask is empty
    else:
        shown = _foreground(_averaged(sitk.GetArrayViewFromImage(image), blocks))
    if shown is None:
        return None
    index = np.argwhere(shown)[:, ::-1]
    first, end = index * blocks, np.minimum((index + 1) * blocks, grid.size)
    matrix = grid.matrix if to_space is None else to_space @ grid.matrix
    centers = apply_matrix(matrix, (first + end - 1) / 2)
    half = (end - first) / 2 @ np.abs(matrix[:3, :3]).T
    return (centers - half).min(0), (centers + half).max(0)


def _averaged(values: np.ndarray, blocks: list[int]) -> np.ndarray:
    """Means of an array (D, H, W) over blocks of so many voxels along x, y and z; the last ones may be smaller. float32."""
    for axis, n in zip((0, 1, 2), reversed(blocks), strict=True):
        starts = np.arange(0, values.shape[axis], n)
        counts = np.diff(np.append(starts, values.shape[axis])).astype(np.float32)
        values = np.add.reduceat(values, starts, axis=axis, dtype=np.float32)
        values /= counts.reshape([-1 if a == axis else 1 for a in range(3)])
    return values


def _foreground(values: np.ndarray) -> np.ndarray | None:
    """What is brighter than air, (D, H, W) bool, without specks; None where air cannot be told."""
    if min(values.shape) < FEWEST_VOXELS:
        return None
    values = sitk.GetArrayFromImage(sitk.BoxMean(sitk.GetImageFromArray(values), [1] * 3))  # noise becomes a level
    darkest, air = np.percentile(values, [DARKEST_PERCENT, AIR_PERCENT])
    contrast = float(np.median(values[values >= values.mean()])) - air
    limit = air + max(SPREAD * (air - darkest), LEAST_SPREAD * contrast)
    ct = CT_DARKEST_HU[0] <= values.min() <= CT_DARKEST_HU[1]
    if ct:
        limit = CT_AIR_HU
    elif limit - air > LARGEST_SPREAD * contrast:
        return None
    shown = sitk.GetImageFromArray((values > limit).astype(np.uint8))
    parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(shown))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    shown = (sizes >= FEWEST_SHARE * sizes.sum())[parts] & (parts > 0)
    left_out = np.ones(values.shape, bool)
    left_out[tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(shown))] = False
    if not left_out.any() or (not ct and np.percentile(values[left_out], PLAIN_PERCENT) > air + PLAIN * contrast):
        return None
    return shown


def _cut(grid: Grid, low: np.ndarray, high: np.ndarray) -> Grid:
    """The part of a grid in a box along the LPS axes, see :func:`covered_region`."""
    corners = grid.corners()
    low, high = np.maximum(low, corners.min(0)), np.minimum(high, corners.max(0))
    if np.abs(np.reshape(grid.direction, (3, 3))).max(0).min() > 1 - 1e-6:  # along the LPS axes
        ends = np.sort(grid.to_index(np.stack((low, high))), 0)
        first = np.clip(np.floor(ends[0] + 0.5 + 1e-6).astype(int), 0, np.array(grid.size) - 1)
        end = np.clip(np.ceil(ends[1] + 0.5 - 1e-6).astype(int), first + 1, grid.size)
        matrix = grid.matrix.copy()
        matrix[:3, 3] = grid.to_physical(first)
        part = Grid(tuple(end - first), matrix)
    else:
        mm = min(grid.spacing)
        size = [max(math.ceil(n - 1e-6), 1) for n in (high - low) / mm]
        part = Grid.build(size, [mm] * 3, low + mm / 2)
    volumes = (g.voxels * math.prod(g.spacing) for g in (part, grid))
    return part if next(volumes) < WORTH * next(volumes) else grid
