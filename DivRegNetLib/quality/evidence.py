"""Evidence of how well two images are aligned that no step of a registration maximizes.

Every number is a pure function of the two images as they lie now and of the deformation between them. What is known of the
error is fitted to these numbers on registrations whose truth is known (:mod:`DivRegNetLib.quality.verdict`).

Three kinds of question are asked, on the images and on averages of 2 and of 4 voxels along each axis:

* Do strong edges of one image have the direction of the other's there (mean squared cosine of the gradients, Haber and
  Modersitzki, "Intensity gradient based registration", MICCAI 2006)? Chance alone makes a third.
* How much less alike are they, in MIND-SSC descriptors (:mod:`DivRegNetLib.similarity.descriptors`), when one is shifted?
* What is left to move? At every place, the descriptors' distance to the warped image moved by each of some shifts,
  gathered over a Gaussian; the shifts, weighted by ``exp(-distance / temperature)``, have an expected length.

Air, fill and what lies outside of either field of view count for nothing.

Axis order and units as in :mod:`DivRegNetLib.core.fields`.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.similarity.descriptors import believable, mind_ssc

LONGEST_SIDE = 96  # voxels of the box that is looked at; a larger one is averaged down
POOLS = (1, 2, 4)  # voxels averaged along each axis
SHIFTS = tuple(
    s for s in itertools.product((0, -1, 1, -2, 2, -4, 4), repeat=3) if sum(map(abs, s)) <= 6 and 0 in s
)
"""Displacements in voxels along x, y, z, the identity first."""
LENGTHS = tuple(math.sqrt(sum(c * c for c in s)) for s in SHIFTS)
TEMPERATURE = 0.02  # of a shift's weight, as a share of the mean descriptor distance
NATS = 0.04  # the same for the pointwise mutual information
REACH = {1: 4.0, 2: 6.0, 4: 12.0}  # standard deviation of the Gaussian that distances are gathered over, voxels of the box
CELL = 4  # voxels of the box along each side of a place of the map
EDGES = 0.3  # share of the voxels, those of the strongest gradients, whose gradients are compared
BINS = 32  # of the joint histogram
FEWEST = 100  # voxels, of which anything can be said
MARGIN = 4  # voxels around what is not air
MEASURED = 0.99  # share of a voxel
PERCENTILES = (1.0, 99.5)  # an image's darkest and brightest are clipped
RADIUS, DILATION = 1, 1  # of the descriptors


@dataclass(frozen=True)
class Box:
    """The pair where there is anything to look at, and averaged down where that is large.

    fixed, warped: (1, 1, D, H, W) in [0, 1], sides multiples of ``max(POOLS)``.
    valid: likewise, bool: measured in both.
    inside: likewise, bool: what counts: of the foreground of the fixed image, measured in both.
    start: first voxel of the box along D, H, W, in voxels of the whole grid.
    shrink: side of the box's voxels, in voxels of the whole grid.
    overlap: Dice of what is not air in the two.
    seen: share of the fixed foreground that was measured in both.
    """

    fixed: Tensor
    warped: Tensor
    valid: Tensor
    inside: Tensor
    start: tuple[int, int, int]
    shrink: float
    overlap: float
    seen: float


def box(fixed: Tensor, warped: Tensor, valid: Tensor, mask: Tensor | None = None) -> Box | None:
    """Cuts out what is not air. None where the two have next to nothing in common.

    Args:
        fixed, warped: (1, 1, D, H, W).
        valid: likewise, bool: where both were measured.
        mask: likewise, bool: what of the fixed image counts; None: its foreground.
    """
    of_fixed = foreground(fixed) if mask is None else mask & foreground(fixed)
    of_warped = foreground(warped, valid)
    inside = of_fixed & valid
    if inside.sum() < FEWEST:
        return None
    both = (of_fixed & valid, of_warped if mask is None else of_warped & mask)
    overlap = 2 * (both[0] & both[1]).sum() / sum(x.sum() for x in both)
    seen = inside.sum() / of_fixed.sum()
    where = inside[0, 0].nonzero()
    low, high = where.amin(0) - MARGIN, where.amax(0) + 1 + MARGIN
    low, high = low.clamp_min(0), torch.minimum(high, high.new_tensor(fixed.shape[2:]))
    shrink = max((high - low).max().item() / LONGEST_SIDE, 1.0)
    cut = (..., *(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)))
    fixed = _clipped(fixed, inside)[cut]
    warped = _clipped(warped, both[1] if both[1].sum() >= FEWEST else valid)[cut]
    valid, inside = (x[cut].to(fixed.dtype) for x in (valid, inside))
    fixed, warped, valid, inside = (_shrunk(x, shrink) for x in (fixed, warped, valid, inside))
    more = [n for size in reversed(fixed.shape[2:]) for n in (0, -size % max(POOLS))]
    fixed, warped = (F.pad(x, more, mode="replicate") for x in (fixed, warped))
    valid, inside = (F.pad(x, more) for x in (valid, inside))
    valid = valid > MEASURED
    return Box(fixed, warped, valid, (inside > 0.5) & valid, tuple(low.tolist()), shrink, overlap.item(), seen.item())


def _shrunk(image: Tensor, factor: float) -> Tensor:
    """On voxels so much larger, smoothed first so that nothing aliases."""
    if factor == 1:
        return image
    image = fields.smooth(image, math.sqrt(0.2 * (factor**2 - 1)))
    size = [max(round(n / factor), 1) for n in image.shape[2:]]
    return F.interpolate(image, size=size, mode="trilinear", align_corners=False)


def _clipped(image: Tensor, inside: Tensor) -> Tensor:
    """The image in [0, 1] between two percentiles of its values inside."""
    values = image[inside]
    low, high = (values.kthvalue(1 + int(q / 100 * (len(values) - 1))).values for q in PERCENTILES)
    return ((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


@dataclass(frozen=True)
class Scale:
    """What one averaging of the images says.

    numbers: see :func:`measure`.
    motion: (d, h, w) expected length of what is left to move at every cell, voxels of the box.
    soft: the same at a higher temperature.
    contrast: (d, h, w) descriptor distance as the images lie, as a share of its mean over all shifts.
    weight: (d, h, w) how much was seen around each cell.
    """

    numbers: dict[str, float]
    motion: Tensor
    soft: Tensor
    contrast: Tensor
    weight: Tensor


def look(of: Box, pool: int) -> Scale | None:
    """What the images say when averaged over ``pool`` voxels along each axis; None where too little is left of them."""
    fixed, warped = (F.avg_pool3d(x, pool) if pool > 1 else x for x in (of.fixed, of.warped))
    valid, inside = (F.avg_pool3d(x.to(fixed.dtype), pool) if pool > 1 else x for x in (of.valid, of.inside))
    valid = valid > MEASURED
    inside = (inside > 0.5) & valid
    if min(fixed.shape[2:]) < 4 or inside.sum() < FEWEST:
        return None
    slopes = [_slopes(x) for x in (fixed, warped)]
    strength = [x.square().sum(1, keepdim=True) for x in slopes]
    counts = _or_all(inside & _inner(valid, 1), inside)
    cosine = (slopes[0] * slopes[1]).sum(1, keepdim=True).square() / (strength[0] * strength[1]).clamp_min(1e-12)
    numbers = {
        f"{name} {pool}": cosine[_strongest(x, counts, EDGES)].mean().item()
        for name, x in zip(("edges of fixed", "edges of warped"), strength, strict=True)
    }
    known = believable(valid, radius=RADIUS, dilation=DILATION)
    at, known = _or_all(inside & known, inside), _or_all(known, valid)
    descriptors = [mind_ssc(x, radius=RADIUS, dilation=DILATION, valid=valid) for x in (fixed, warped)]
    apart = _Shifts(at, known, pool)
    distance, mean = apart.gathered(apart.of_descriptors(*descriptors))
    said, information = apart.gathered(apart.of_intensities(fixed, warped))
    for step in (2, 4):
        around = [i for i, s in enumerate(SHIFTS) if LENGTHS[i] == step and sum(map(bool, s)) == 1]
        numbers[f"distance {step}, {pool}"] = (mean[around].mean() / mean[0].clamp_min(1e-6)).item()
        numbers[f"information {step}, {pool}"] = (information[around].mean() / information[0].clamp_max(-1e-6)).item()
    one, other = (x[0].flatten(1)[:, at.flatten()] for x in descriptors)
    unrelated = (one.var(1) + other.var(1) + (one.mean(1) - other.mean(1)).square()).mean()
    numbers[f"distance, {pool}"] = (mean[0] / unrelated.clamp_min(1e-6)).item()
    numbers[f"information, {pool}"] = -information[0].item()
    usual = distance.mean(0).clamp_min(1e-6)
    exponent = (distance - distance.amin(0)).div_(TEMPERATURE * usual)
    exponent.add_(said - said.amin(0), alpha=1 / NATS).neg_()
    motion, soft = (torch.tensordot(exponent.new_tensor(LENGTHS), torch.softmax(exponent / t, 0), 1) for t in (1, 6))
    sure, weight = apart.counts[0] > 0.05 * apart.counts[0].amax(), apart.counts[0]
    for name, values in (("motion", motion), ("soft motion", soft), ("moved", motion > 1.5)):
        numbers[f"{name} {pool}"] = ((values * weight)[sure].sum() / weight[sure].sum()).item()
    return Scale(numbers, motion * pool, soft * pool, distance[0] / usual, weight)


class _Shifts:
    """Two images compared at some places, one of them moved by each of SHIFTS, and gathered at the cells of the map."""

    def __init__(self, at: Tensor, known: Tensor, pool: int) -> None:
        """
        Args:
            at: (1, 1, D, H, W) bool: where they may be compared; of the images themselves every 16th of these voxels is.
            known: likewise: where the image that is moved counts.
            pool: voxels of the box per voxel.
        """
        step = max(2 // pool, 1)
        lattice = at[0, 0, ::step, ::step, ::step]
        k, j, i = (torch.arange(n, device=at.device) for n in lattice.shape)
        if pool == 1:
            lattice = lattice & ((k[:, None, None] + j[:, None] + i) % 2 == 0)
        elif pool == 2:
            lattice = lattice & ((k[:, None, None] + j[:, None]) % 2 == 0) & ((j[:, None] + i) % 2 == 0)
        self.shape, self.index = lattice.shape, lattice.flatten().nonzero()[:, 0]
        self.place = tuple((lattice.nonzero() * step).unbind(1))
        self.reach = max(max(map(abs, s)) for s in SHIFTS)
        _, height, width = (n + 2 * self.reach for n in at.shape[2:])
        k, j, i = (p + self.reach for p in self.place)
        home = (k * height + j) * width + i
        self.rows = [home + ((z * height + y) * width + x) for x, y, z in SHIFTS]
        like = torch.empty(0, dtype=torch.float32, device=at.device)
        self.cells = [_gathering(n, step, pool, REACH[pool], like=like) for n in self.shape[::-1]]
        counted = F.pad(known, [self.reach] * 6).flatten().to(like.dtype)
        self.counted = torch.stack([counted.index_select(0, rows) for rows in self.rows])
        self.counts = self._at_cells(self.counted)

    def of_descriptors(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """(S, n) mean squared differences of (1, C, D, H, W) descriptors."""
        wanted = fixed[0].permute(1, 2, 3, 0)[self.place]
        padded = F.pad(warped, [self.reach] * 6, mode="replicate")[0].permute(1, 2, 3, 0).reshape(-1, warped.shape[1])
        return torch.stack([padded.index_select(0, r).sub_(wanted).square_().mean(1) for r in self.rows])

    def of_intensities(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """(S, n) pointwise mutual information of (1, 1, D, H, W) images in [0, 1], in nats, its sign changed."""
        low, high = ((x * (BINS - 1)).round_().to(torch.int64) for x in (fixed, warped))
        padded = F.pad(high.to(fixed.dtype), [self.reach] * 6, mode="replicate").flatten().to(torch.int64)
        of_fixed = low[0, 0][self.place] * BINS
        cells = of_fixed + padded.index_select(0, self.rows[0])
        joint = torch.bincount(cells[self.counted[0] > 0], minlength=BINS**2).view(BINS, BINS).to(fixed.dtype)
        window = fields.gaussian(BINS, 1.0, like=joint)
        joint = window @ joint @ window.T
        joint = joint / joint.sum().clamp_min(1e-9)
        table = -((joint + 1e-6) / (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) + 1e-6)).log_().flatten()
        return torch.stack([table.index_select(0, of_fixed + padded.index_select(0, r)) for r in self.rows])

    def gathered(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(S, n) values at each shift -> their means (S, d, h, w) around every cell, and over the whole image (S,)."""
        values = values * self.counted
        mean = values.sum(1) / self.counted.sum(1).clamp_min(1e-6)
        # Where hardly anything is seen after a shift, it is as likely as any other: nothing is known of it.
        thin = self.counts < 0.5 * self.counts[0]
        return torch.where(thin, mean.mean(), self._at_cells(values) / self.counts.clamp_min(1e-9)), mean

    def _at_cells(self, values: Tensor) -> Tensor:
        spread = values.new_zeros(len(values), math.prod(self.shape)).index_copy_(1, self.index, values)
        return fields.along_axes(spread.view(-1, 1, *self.shape), *self.cells)[:, 0]


def foreground(image: Tensor, valid: Tensor | None = None) -> Tensor:
    """What is not air: (1, 1, D, H, W) bool.

    Brighter than a quarter of the way from the darker half's median to Otsu's threshold, after slight smoothing, with what
    that encloses.

    Args:
        image: (1, 1, D, H, W).
        valid: likewise, bool: where it was measured; None: everywhere.
    """
    smooth = fields.smooth(image, 0.7)
    values = smooth.flatten() if valid is None else smooth[valid]
    if not values.numel() or values.min() == values.max():
        return torch.zeros_like(image, dtype=torch.bool) if valid is None else valid.clone()
    limit = _otsu(values)
    air = values[values <= limit].median().item()
    inside = smooth > air + 0.25 * (limit - air)
    if valid is not None:
        inside &= valid
    mask = sitk.GetImageFromArray(inside[0, 0].cpu().numpy().astype(np.uint8))
    mask = sitk.BinaryFillhole(sitk.BinaryMorphologicalOpening(mask, [1, 1, 1]))
    return torch.from_numpy(sitk.GetArrayFromImage(mask) > 0)[None, None].to(image.device)


def _otsu(values: Tensor, bins: int = 128) -> float:
    """The threshold that leaves least variance within what lies below and above it (Otsu, IEEE Trans. SMC 1979)."""
    low, high = values.min().item(), values.max().item()
    counts = torch.histc(values.float(), bins, low, high).double().cpu()
    share = counts / counts.sum()
    at = torch.linspace(low, high, bins, dtype=torch.float64)
    below, mean = share.cumsum(0), (share * at).cumsum(0)
    between = (mean[-1] * below - mean).square() / (below * (1 - below)).clamp_min(1e-9)
    return at[between.argmax()].item()


def _slopes(image: Tensor) -> Tensor:
    """Derivatives along x, y, z of the image smoothed by a Gaussian of one voxel, (1, 3, D, H, W); 0 at the border."""
    smooth = fields.smooth(image, 1.0)
    slopes = smooth.new_zeros(1, 3, *image.shape[2:])
    for out, dim in zip(slopes[0], (4, 3, 2), strict=True):
        inner = image.shape[dim] - 2
        ahead, behind = (smooth.narrow(dim, start, inner)[0, 0] for start in (2, 0))
        torch.sub(ahead, behind, out=out.narrow(dim - 2, 1, inner))
    return slopes.div_(2)


def _strongest(values: Tensor, inside: Tensor, share: float) -> Tensor:
    """Which voxels inside have the largest values, a share of them."""
    of = values[inside]
    return inside & (values >= of.kthvalue(max(int((1 - share) * len(of)), 1)).values)


def _inner(valid: Tensor, width: int) -> Tensor:
    """Less a rim of ``width`` voxels along what is not valid."""
    outside = (~valid).to(torch.float32)
    for dim in range(3):
        size = [2 * width + 1 if d == dim else 1 for d in range(3)]
        outside = F.max_pool3d(outside, size, 1, [n // 2 for n in size])
    return outside < 0.5


def _or_all(some: Tensor, all_of_them: Tensor) -> Tensor:
    """The first where that is enough to tell anything from, or else the second."""
    return some if some.sum() >= FEWEST else all_of_them


@fields.cached
def _gathering(n: int, step: int, pool: int, sigma: float, *, like: Tensor) -> Tensor:
    """(cells, n): Gaussian weights of every ``step``-th voxel of an average of ``pool`` voxels, for cells of CELL voxels."""
    places = (torch.arange(n, dtype=torch.float64) * step + 0.5) * pool - 0.5
    cells = (torch.arange(math.ceil(n * step * pool / CELL), dtype=torch.float64) + 0.5) * CELL - 0.5
    return torch.exp(-0.5 * ((cells[:, None] - places) / sigma) ** 2).to(like)
