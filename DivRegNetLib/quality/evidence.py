"""Evidence of how well two images are aligned, none of which a registration maximizes.

Numbers and a map are computed from the two images as they lie after the registration and from the deformation between
them. What they mean in millimeters is fitted on registrations whose truth is known, see
:mod:`DivRegNetLib.quality.verdict` and ``training/experiments/calibration.py``.

Three questions are asked of the images, and again of their averages over cubes of 2 and of 4 voxels a side:

* Do strong edges of one image have the direction of the other's edges? The mean squared cosine between the gradients
  (Haber and Modersitzki, "Intensity gradient based registration and fusion of multi-modal images", MICCAI 2006) is a third
  by chance and 1 at best.
* How much larger does the distance between the images' MIND-SSC descriptors (:mod:`DivRegNetLib.similarity.descriptors`)
  become when one image is shifted? Not at all, where they are not aligned.
* What is left to move? At every place, the warped image is compared to the fixed one after each of some shifts, by MIND-SSC
  and by pointwise mutual information, both averaged over a Gaussian window. The shifts, each with the weight
  ``exp(-cost / temperature)``, have an expected length, called motion here, and a mean. The affine map nearest to these means
  is what an alignment would still change, called trend.

Air, fill values and what lies outside of either field of view do not count.

Axis order and units as in :mod:`DivRegNetLib.core.fields`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.similarity.descriptors import believable, mind_ssc

LONGEST_SIDE = 96  # voxels of the box that is looked at; a longer one is resampled
SHRINK = (1, 2, 4)  # voxels averaged along each axis
SHIFTS = tuple(
    s for s in itertools.product((0, -1, 1, -2, 2, -4, 4), repeat=3)
    if sum(map(bool, s)) <= 1 or (sum(map(bool, s)) == 2 and max(map(abs, s)) <= 2 and len({abs(c) for c in s if c}) == 1)
)  # fmt: skip
"""Displacements of the warped image in voxels along x, y, z; the first is none."""
LENGTHS = tuple(math.sqrt(sum(c * c for c in s)) for s in SHIFTS)
STRIDE = {1: 2, 2: 1, 4: 1}  # voxels between those that are compared along each axis, at each averaging
WINDOW = {1: 4.0, 2: 6.0, 4: 12.0}  # standard deviation of the Gaussian window, voxels of the box
CELL = 4  # voxels of the box along each side of a cell of the map
COMPONENTS = 6  # principal components of the descriptors that are compared
TEMPERATURE = 0.02  # of descriptor distances, as a fraction of their mean
NATS = 0.08  # temperature of the pointwise mutual information
SOFT = 6.0  # how much higher the second temperature is
WIDE = 1.5  # standard deviation of a second Gaussian window, in cells, on top of the first
RELATIVE = 0.4  # temperature in the wider window, as a fraction of the standard deviation of the costs there
EDGE_WINDOW = 2.0  # standard deviation of the Gaussian window of the cells' edges, in cells
MOVED = 1.5  # voxels of motion from which a cell counts as displaced
STRONG = 0.3  # fraction of the voxels, those of the strongest gradients, at which gradients are compared
BINS = 32  # of the joint histogram
MIN_VOXELS = 100  # from which anything is concluded
MARGIN = 4  # voxels around the foreground that belong to the box
MEASURED = 0.99  # fraction of a voxel
PERCENTILES = (1.0, 99.5)  # at which intensities are clipped


@dataclass(frozen=True)
class Evidence:
    """What is known of an alignment.

    numbers: by name; see :func:`measure`. A number that cannot be told is left out.
    cells: name -> (d, h, w) array: the same at every cell of CELL voxels of the box.
    grid: of the cells, in fixed space.
    """

    numbers: dict[str, float]
    cells: dict[str, np.ndarray]
    grid: Grid


def measure(
    fixed: Tensor,
    warped: Tensor,
    grid: Grid,
    *,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    displacement: Tensor | None = None,
) -> Evidence | None:
    """The evidence of an alignment; None where the images have next to nothing in common.

    Args:
        fixed, warped: (1, 1, D, H, W) of any intensities; a grid of about 100 voxels a side is enough.
        grid: theirs, isotropic.
        valid: (1, 1, D, H, W) bool: where both were measured; None: everywhere.
        mask: likewise: the part of the fixed image that counts; None: all of its foreground.
        displacement: (1, 3, D, H, W) in voxels, what the moving image was deformed by; None: nothing is known of it.
    Returns:
        Numbers, for each k of SHRINK, the voxels that were averaged along each axis:

        ``fixed edges k``, ``warped edges k``: squared cosine at the strong edges of either image.
        ``distance growth k``, ``information loss k``: what a shift by 2 voxels makes of the descriptor distance (a ratio),
        and of the pointwise mutual information (nats).
        ``motion k``, ``soft motion k``: mean of the map, in averaged voxels, at two temperatures; ``wide motion k``: the
        same in a wider window, at a temperature that follows from the costs there; ``trend k``: mean length of the trend;
        ``moved k``: fraction of the cells whose motion exceeds MOVED.

        ``overlap``: Dice coefficient of the foregrounds. ``covered``: fraction of the fixed foreground where both were
        measured. ``bend``, ``slope``: mean length, and mean norm of the gradient, of the displacement less its best affine
        fit. ``voxel_mm``, ``diagonal_mm``: of the box.

        Cells: ``motion k``, ``soft motion k``, ``wide motion k``, ``trend k``, ``edges k`` (squared cosine, weighted by both
        gradients' strength), ``weight k`` (how much was seen around), ``bend``, ``slope`` and ``inside``, the fraction of the
        cell that counts. ``spread k``: standard deviation of the shifts that wide motion is the mean length of. ``drift k``:
        length of the shifts' mean there and in the neighboring cells. ``contrast k``, ``gain k``: standard deviation of
        the shifts' costs, and how much less than without a shift the best costs, in units of the temperatures. ``ripple``:
        length of the displacement's Laplacian. Lengths are in voxels of the box.
    """
    if valid is None:
        valid = torch.ones_like(fixed, dtype=torch.bool)
    box = cut(fixed, warped, valid, mask)
    if box is None:
        return None
    scales = {k: scale for k in SHRINK if (scale := look(box, k)) is not None}
    if SHRINK[0] not in scales:
        return None
    numbers = {name: value for scale in scales.values() for name, value in scale.numbers.items()}
    cells = {name: value for scale in scales.values() for name, value in scale.cells.items()}
    inside = F.avg_pool3d(box.inside.to(fixed.dtype), CELL)[0, 0]
    cells["inside"], shape = inside, inside.shape
    if displacement is not None:
        bend, slope, ripple = _beyond_affine(_to_cells(displacement, box, shape) / box.shrink, inside)
        cells |= {"bend": bend, "slope": slope, "ripple": ripple}
        numbers |= {name: ((cells[name] * inside).sum() / inside.sum()).item() for name in ("bend", "slope")}
    voxel = box.shrink * grid.spacing[0]
    size = torch.tensor(box.fixed.shape[2:], dtype=torch.float64)
    numbers |= {
        "overlap": box.overlap,
        "covered": box.covered,
        "voxel_mm": voxel,
        "diagonal_mm": size.norm().item() * voxel,
    }
    corner = grid.to_physical(np.array(box.start[::-1]) - 0.5)
    matrix = grid.matrix.copy()
    matrix[:3, :3] *= box.shrink * CELL
    matrix[:3, 3] = corner + matrix[:3, :3] @ np.full(3, 0.5)
    arrays = {name: value.cpu().numpy().astype(np.float32) for name, value in cells.items()}
    return Evidence(numbers, arrays, Grid(shape[::-1], matrix))


# --- what is looked at


@dataclass(frozen=True)
class Box:
    """The part of a pair where there is something to look at, resampled where that is large.

    fixed, warped: (1, 1, D, H, W) in [0, 1], sides multiples of ``max(SHRINK)`` voxels.
    valid: likewise, bool: measured in both.
    inside: likewise, bool: what counts, that is valid foreground of the fixed image.
    start: first voxel along D, H, W, in voxels of the whole grid.
    shrink: side of a voxel of the box, in voxels of the whole grid.
    overlap, covered: see :func:`measure`.
    """

    fixed: Tensor
    warped: Tensor
    valid: Tensor
    inside: Tensor
    start: tuple[int, int, int]
    shrink: float
    overlap: float
    covered: float


def cut(fixed: Tensor, warped: Tensor, valid: Tensor, mask: Tensor | None = None) -> Box | None:
    """The box around the foreground; None where there is hardly any that was measured in both. Arguments as in
    :func:`measure`."""
    of_fixed, of_warped = foreground(fixed), foreground(warped, valid)
    if mask is not None:
        of_fixed, of_warped = of_fixed & mask, of_warped & mask
    inside = of_fixed & valid
    if inside.sum() < MIN_VOXELS:
        return None
    overlap = 2 * (inside & of_warped).sum() / (inside.sum() + of_warped.sum())
    where = inside[0, 0].nonzero()
    low, high = (where.amin(0) - MARGIN).clamp_min(0), where.amax(0) + 1 + MARGIN
    high = torch.minimum(high, high.new_tensor(fixed.shape[2:]))
    part = (..., *(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)))
    shrink = max((high - low).max().item() / LONGEST_SIDE, 1.0)
    images = [_clipped(fixed, inside), _clipped(warped, of_warped if of_warped.sum() >= MIN_VOXELS else valid)]
    images, masks = ([_shrunk(x[part].to(fixed.dtype), shrink) for x in xs] for xs in (images, (valid, inside)))
    more = [n for side in reversed(images[0].shape[2:]) for n in (0, -side % max(SHRINK))]
    images = [F.pad(x, more, mode="replicate").contiguous() for x in images]
    measured, inside = (F.pad(x, more) for x in masks)
    measured = measured > MEASURED
    covered = (of_fixed & valid).sum() / of_fixed.sum()
    return Box(
        *images, measured, (inside > 0.5) & measured, tuple(low.tolist()), shrink, overlap.item(), covered.item()
    )


def foreground(image: Tensor, valid: Tensor | None = None) -> Tensor:
    """What is not air, and what that encloses: (1, 1, D, H, W) bool.

    Air is darker than a quarter of the way from the median of the darker class to Otsu's threshold.

    Args:
        image: (1, 1, D, H, W).
        valid: likewise, bool: where it was measured; None: everywhere.
    """
    smooth = fields.smooth(image, 0.7)
    values = smooth.flatten()[::3] if valid is None else smooth.flatten()[::3][valid.flatten()[::3]]
    if not values.numel() or values.min() == values.max():
        return torch.ones_like(image, dtype=torch.bool) if valid is None else valid.clone()
    limit = _otsu(values)
    air = values[values <= limit].median().item()
    bright = smooth > air + 0.25 * (limit - air)
    if valid is not None:
        bright &= valid
    filled = _filled(_opened(bright[0, 0].cpu().numpy()))
    return torch.from_numpy(filled)[None, None].to(image.device)


def _opened(mask: np.ndarray) -> np.ndarray:
    """A boolean array (D, H, W) without what does not hold a voxel and its 18 neighbors by face or edge. As SimpleITK's
    BinaryMorphologicalOpening, in a fifteenth of the time."""

    for combine, beyond in ((np.logical_and, True), (np.logical_or, False)):
        lines = [_combined(mask, axis, combine, beyond) for axis in range(2)]
        planes = [_combined(lines[i], axis, combine, beyond) for i, axis in ((0, 1), (0, 2), (1, 2))]
        mask = combine(combine(planes[0], planes[1]), planes[2])
    return mask


def _combined(mask: np.ndarray, axis: int, combine: Callable, beyond: bool) -> np.ndarray:
    """Each voxel combined with the ones before and after it along an axis; beyond the border they are ``beyond``."""
    padded = np.pad(mask, [(1, 1) if a == axis else (0, 0) for a in range(3)], constant_values=beyond)
    padded = np.moveaxis(padded, axis, 0)
    return np.moveaxis(combine(combine(padded[:-2], padded[1:-1]), padded[2:]), 0, axis)


def _filled(mask: np.ndarray) -> np.ndarray:
    """A boolean array (D, H, W) and what it encloses. As SimpleITK's BinaryFillhole, in a third of the time."""
    outside = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray((~mask).astype(np.uint8))))
    faces = [np.take(outside, (0, -1), axis) for axis in range(3)]
    enclosed = np.ones(int(outside.max()) + 1, bool)
    for face in faces:
        enclosed[np.unique(face)] = False
    enclosed[0] = True  # the mask itself
    return enclosed[outside]


def _otsu(values: Tensor, bins: int = 128) -> float:
    """The threshold with the largest variance between the classes (Otsu, IEEE Trans. SMC 1979)."""
    low, high = values.min().item(), values.max().item()
    counts = torch.histc(values.float(), bins, low, high).double().cpu()
    share = counts / counts.sum()
    at = torch.linspace(low, high, bins, dtype=torch.float64)
    below, mean = share.cumsum(0), (share * at).cumsum(0)
    between = (mean[-1] * below - mean).square() / (below * (1 - below)).clamp_min(1e-9)
    return at[between.argmax()].item()


def _clipped(image: Tensor, inside: Tensor) -> Tensor:
    """The image in [0, 1] between two percentiles of its values inside."""
    values = image[inside]
    values = values[:: max(len(values) // 50_000, 1)]
    low, high = (values.kthvalue(1 + int(q / 100 * (len(values) - 1))).values for q in PERCENTILES)
    return ((image - low) / (high - low).clamp_min(1e-6)).clamp_(0, 1)


def _shrunk(image: Tensor, factor: float) -> Tensor:
    """On voxels that are larger by a factor, smoothed first so that nothing aliases."""
    if factor == 1:
        return image
    image = fields.smooth(image, math.sqrt(0.2 * (factor**2 - 1)))
    size = [max(round(n / factor), 1) for n in image.shape[2:]]
    return F.interpolate(image, size=size, mode="trilinear", align_corners=False)


# --- what the images say


@dataclass(frozen=True)
class Scale:
    """What the images say at one averaging: numbers, and arrays (d, h, w) of the cells, by name; see :func:`measure`."""

    numbers: dict[str, float]
    cells: dict[str, Tensor]


def look(box: Box, shrink: int) -> Scale | None:
    """What the images say when averaged over ``shrink`` voxels along each axis; None where too little of them remains."""
    fixed, warped, valid, inside = box.fixed, box.warped, box.valid, box.inside
    if shrink > 1:
        fixed, warped = (F.avg_pool3d(x, shrink) for x in (fixed, warped))
        valid, inside = (F.avg_pool3d(x.to(fixed.dtype), shrink) for x in (valid, inside))
        valid = valid > MEASURED
        inside = (inside > 0.5) & valid
    if min(fixed.shape[2:]) < 4 or inside.sum() < MIN_VOXELS:
        return None
    known = believable(valid)
    at, known = _if_enough(inside & known, inside), _if_enough(known, valid)
    numbers, edges = _edges(fixed, warped, at, CELL // shrink)
    # All channels of the descriptors take more memory than anything else here, and are gone before the costs.
    components = _principal(*(mind_ssc(x, valid=valid) for x in (fixed, warped)), at)
    costs = _Costs(components, _pointwise(fixed, warped, at), at, known, shrink)
    axes = [i for i, s in enumerate(SHIFTS) if LENGTHS[i] == 2 and sum(map(bool, s)) == 1]
    numbers["distance growth"] = (costs.distance[axes].mean() / costs.distance[0].clamp_min(1e-6)).item()
    numbers["information loss"] = (costs.information[axes].mean() - costs.information[0]).item()
    motion = costs.expected_length()
    wide, spread = costs.wide_motion()
    trend, drift = costs.trend_and_drift()
    lengths = {"motion": motion, "soft motion": costs.expected_length(SOFT), "wide motion": wide, "trend": trend}
    seen = costs.weight > 0.05 * costs.weight.amax()
    for name, values in (lengths | {"moved": motion > MOVED}).items():
        numbers[name] = ((values * costs.weight)[seen].sum() / costs.weight[seen].sum()).item()
    cells = lengths | {"spread": spread, "drift": drift}
    cells = {name: values * shrink for name, values in cells.items()} | {"edges": edges, "weight": costs.weight}
    cells |= {"contrast": costs.cells.std(0), "gain": costs.cells[0] - costs.cells.amin(0)}
    return Scale(*({f"{name} {shrink}": value for name, value in some.items()} for some in (numbers, cells)))


def _edges(fixed: Tensor, warped: Tensor, at: Tensor, cell: int) -> tuple[dict[str, float], Tensor]:
    """Mean squared cosine between the gradients where those of one image, or of the other, are strongest; and (d, h, w) that
    around each cell, of so many voxels a side, weighted by the strength of both."""
    slopes = [_gradient(x) for x in (fixed, warped)]
    strength = [x.square().sum(1, keepdim=True) for x in slopes]
    cosine = squared_cosine(*slopes)
    numbers = {}
    for name, values in zip(("fixed edges", "warped edges"), strength, strict=True):
        of = values[at]
        numbers[name] = cosine[at & (values >= of.kthvalue(int((1 - STRONG) * len(of)) + 1).values)].mean().item()
    weight = (strength[0] * strength[1]).sqrt_().mul_(at)
    sums = F.avg_pool3d(torch.cat((cosine.mul_(weight), weight)), cell)
    sums = fields.along_axes(sums, *(_windows(n, 1, CELL, CELL * EDGE_WINDOW, like=sums) for n in sums.shape[:1:-1]))
    return numbers, (sums[0] / sums[1].clamp_min(1e-9))[0]


def squared_cosine(slope: Tensor, other: Tensor, floor: Tensor | float = 0.0) -> Tensor:
    """Squared cosine of the angle between gradients (N, 3, ...), (N, 1, ...).

    Args:
        floor: length of ``other``, or a tensor of lengths, at which half of the cosine counts: what is weaker than that has
            no direction.
    """
    strength = [x.square().sum(1, keepdim=True) for x in (slope, other)]
    product = (slope * other).sum(1, keepdim=True)
    return product.square_() / (strength[0] * (strength[1] + floor**2)).clamp_min(1e-12)


def _gradient(image: Tensor) -> Tensor:
    """Derivatives along x, y, z of the image smoothed by a Gaussian of one voxel, (1, 3, D, H, W); 0 at the border."""
    return fields.differences(fields.smooth(image, 1.0))[:, :, 0]


def _principal(fixed: Tensor, warped: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The descriptors' principal components, (COMPONENTS, D, H, W) each: distances of fewer channels, nearly the same."""
    every = at.flatten().nonzero()[:, 0]
    every = every[:: max(len(every) // 5000, 1)]
    values = torch.cat([x[0].flatten(1)[:, every] for x in (fixed, warped)], 1)
    values = values - values.mean(1, keepdim=True)
    _, axes = torch.linalg.eigh((values @ values.T).double())
    axes = axes[:, -COMPONENTS:].T.to(fixed)
    return tuple((axes @ x[0].flatten(1)).unflatten(1, x.shape[2:]) for x in (fixed, warped))


def _pointwise(fixed: Tensor, warped: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(BINS**2,) pointwise mutual information in nats, its sign changed, and the row and the column, (D, H, W) each, in
    which each voxel of the fixed and of the warped image finds it."""
    row, column = ((x[0, 0] * (BINS - 1)).round_().int() for x in (fixed, warped))
    row *= BINS
    joint = torch.bincount((row + column)[at[0, 0]], minlength=BINS**2).view(BINS, BINS).to(fixed.dtype)
    window = fields.gaussian(BINS, 1.0, like=joint)
    joint = window @ joint @ window.T
    joint = joint / joint.sum().clamp_min(1e-9)
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return ((product + 1e-6) / (joint + 1e-6)).log_().flatten(), row, column


class _Costs:
    """The images compared after each of SHIFTS, and the costs averaged over a Gaussian window around every cell.

    distance, information: (S,) mean descriptor distance and negative pointwise mutual information after each shift.
    cells: (S, d, h, w) total cost, in units of the temperatures.
    wide_cells: the same in a wider window.
    weight: (d, h, w) fraction of the window that was compared.
    """

    def __init__(
        self,
        descriptors: tuple[Tensor, Tensor],
        pointwise: tuple[Tensor, Tensor, Tensor],
        at: Tensor,
        known: Tensor,
        shrink: int,
    ) -> None:
        """
        Args:
            descriptors: (C, D, H, W) of the fixed and of the warped image.
            pointwise: see :func:`_pointwise`.
            at: (1, 1, D, H, W) bool: where the images are compared.
            known: likewise: where the warped image can be.
            shrink: voxels of the box per voxel.
        """
        table, row, column = pointwise
        stride = STRIDE[shrink]
        every = (slice(None, None, stride),) * 3
        reach, shape = max(max(map(abs, s)) for s in SHIFTS), at.shape[2:]
        wanted, row, at = (x[(..., *every)].contiguous() for x in (descriptors[0], row, at[0, 0].to(table.dtype)))
        offered, column = (_padded(x, reach) for x in (descriptors[1], column))
        known = F.pad(known[0, 0].to(table.dtype), [reach] * 6)
        distance, information, counted = (table.new_empty(len(SHIFTS), *at.shape) for _ in range(3))
        difference = torch.empty_like(wanted)
        for i, shift in enumerate(SHIFTS):
            there = tuple(slice(reach + s, reach + s + n, stride) for s, n in zip(shift[::-1], shape, strict=True))
            torch.sub(offered[(slice(None), *there)], wanted, out=difference)
            torch.sum(difference.square_(), 0, out=distance[i])
            torch.index_select(table, 0, (row + column[there]).flatten(), out=information[i].view(-1))
            torch.mul(known[there], at, out=counted[i])
        voxels = counted.sum((1, 2, 3)).clamp_min(1e-6)
        self.distance, self.information = ((x * counted).sum((1, 2, 3)) / voxels for x in (distance, information))
        usual = TEMPERATURE * self.distance.mean().clamp_min(1e-9)
        costs = distance.div_(usual).add_(information, alpha=1 / NATS).mul_(counted)
        windows = [_windows(n, stride, shrink, WINDOW[shrink], like=table) for n in at.shape[::-1]]
        costs, counts = (fields.along_axes(x[:, None], *windows)[:, 0] for x in (costs, counted))
        self.weight = counts[0]
        self.cells = self._mean(costs, counts)
        windows = [_windows(n, 1, CELL, CELL * WIDE, like=table) for n in counts.shape[:0:-1]]
        self.wide_cells = self._mean(*(fields.along_axes(x[:, None], *windows)[:, 0] for x in (costs, counts)))

    @staticmethod
    def _mean(costs: Tensor, counts: Tensor) -> Tensor:
        """A shift after which hardly anything can be compared is as likely as any other."""
        return torch.where(counts < 0.5 * counts[0], costs.sum() / counts.sum(), costs / counts.clamp_min(1e-9))

    def expected_length(self, temperature: float = 1.0) -> Tensor:
        """(d, h, w) mean length of the shifts at a multiple of the temperatures, in voxels."""
        return self._expected_length(self.cells / temperature)

    def wide_motion(self) -> tuple[Tensor, Tensor]:
        """(d, h, w) the same in the wider window, at a temperature that suits the costs there: where shifts differ little,
        because there is little to see, or much. And the standard deviation of the shifts at that temperature."""
        costs = self.wide_cells / (RELATIVE * self.wide_cells.std(0, keepdim=True).clamp_min(1e-6))
        return self._expected_length(costs), self._moments(costs)[1].sqrt()

    @staticmethod
    def _expected_length(costs: Tensor) -> Tensor:
        """(d, h, w) mean length of the shifts whose costs (S, d, h, w) are in units of the temperature, in voxels."""
        weights = torch.softmax(-costs, 0)
        return torch.tensordot(weights.new_tensor(LENGTHS), weights, 1)

    @staticmethod
    def _moments(costs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (3, d, h, w) and variance (d, h, w), summed over the axes, of the shifts whose costs (S, d, h, w) are in units
        of the temperature, in voxels and their squares."""
        weights = torch.softmax(-costs, 0)
        shifts = weights.new_tensor(SHIFTS)
        mean = torch.tensordot(shifts.T, weights, 1)
        squares = torch.tensordot(shifts.square().sum(1), weights, 1)
        return mean, (squares - mean.square().sum(0)).clamp_min(0)

    def trend_and_drift(self) -> tuple[Tensor, Tensor]:
        """(d, h, w) each, in voxels: length of the affine map nearest to the mean shifts, and of their average over a Gaussian
        of one cell. Mean shifts count the more the surer they are."""
        mean, variance = self._moments(self.cells)
        weight = self.weight / (variance + 0.3)
        windows = [_windows(n, 1, CELL, CELL, like=weight) for n in weight.shape[::-1]]
        sums = fields.along_axes(torch.cat((mean * weight, weight[None]))[:, None], *windows)[:, 0]
        averages = sums[:3] / sums[3].clamp_min(1e-9)
        return fields.length(_nearest_affine(mean, weight)[None])[0, 0], fields.length(averages[None])[0, 0]


def _padded(values: Tensor, by: int) -> Tensor:
    """(..., D, H, W) of any type with the border repeated ``by`` voxels further."""
    index = [torch.arange(-by, n + by, device=values.device).clamp_(0, n - 1) for n in values.shape[-3:]]
    return values[..., index[0], :, :][..., index[1], :][..., index[2]]


@fields.cached
def _windows(n: int, stride: int, shrink: int, sigma: float, *, like: Tensor) -> Tensor:
    """(cells, n): Gaussian weights, of sum 1, of every ``stride``-th voxel of an average of ``shrink`` voxels."""
    places = (torch.arange(n, dtype=torch.float64) * stride + 0.5) * shrink - 0.5
    cells = (torch.arange(math.ceil(n * stride * shrink / CELL), dtype=torch.float64) + 0.5) * CELL - 0.5
    weights = torch.exp(-0.5 * ((cells[:, None] - places) / sigma) ** 2)
    return (weights * (stride * shrink / sigma / math.sqrt(2 * math.pi))).to(like)


def _if_enough(some: Tensor, all_of_them: Tensor) -> Tensor:
    """The first where anything can be concluded from it, or else the second."""
    return some if some.sum() >= MIN_VOXELS else all_of_them


# --- what the deformation says


def _to_cells(values: Tensor, box: Box, shape: torch.Size) -> Tensor:
    """(1, C, D, H, W) of the whole grid -> its means (C, d, h, w) in the cells of a box."""
    size = [round(n * box.shrink) for n in box.fixed.shape[2:]]
    part = values[(..., *(slice(a, a + n) for a, n in zip(box.start, size, strict=True)))]
    more = [n for side, full in zip(reversed(part.shape[2:]), reversed(size), strict=True) for n in (0, full - side)]
    return F.interpolate(F.pad(part, more, mode="replicate"), size=shape, mode="area")[0]


def _beyond_affine(displacement: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Length of a displacement (3, d, h, w) less its best affine fit, norm of the gradient of that, per voxel, and length of
    its Laplacian, per cell squared: (d, h, w) each.

    Args:
        displacement: in voxels of the box, of cells.
        weight: (d, h, w) how much each cell counts in the fit.
    """
    rest = displacement - _nearest_affine(displacement, weight)
    squares, laplacian = torch.zeros_like(weight), torch.zeros_like(rest)
    for dim in (1, 2, 3):
        if rest.shape[dim] > 1:
            (slope,) = torch.gradient(rest, dim=dim)
            squares += slope.square().sum(0)
            laplacian += torch.gradient(slope, dim=dim)[0]
    return rest.square().sum(0).sqrt(), squares.sqrt() / CELL, laplacian.square().sum(0).sqrt()


def _nearest_affine(displacement: Tensor, weight: Tensor) -> Tensor:
    """The affine map nearest to a displacement (3, d, h, w) in the sense of weighted least squares, (3, d, h, w).

    Args:
        weight: (d, h, w) how much each cell counts.
    """
    points = fields.identity(weight.shape, like=displacement)[0].flatten(1)
    points = torch.cat((points, torch.ones_like(points[:1]))).double()
    target, scale = displacement.flatten(1).double(), weight.flatten().double() + 1e-3
    affine = torch.linalg.solve(
        (points * scale) @ points.T + 1e-6 * torch.eye(4).to(points), (points * scale) @ target.T
    )
    return (affine.T @ points).view_as(displacement).to(displacement.dtype)
