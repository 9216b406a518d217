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
SHIFTS = tuple(s for s in itertools.product((0, -1, 1, -2, 2, -4, 4), repeat=3) if sum(map(abs, s)) <= 6)
"""Displacements in voxels, the identity first."""
LENGTHS = tuple(math.sqrt(sum(c * c for c in s)) for s in SHIFTS)
TEMPERATURE = 0.02  # of the weights of shifts, as a share of the mean distance
REACH = {1: 4.0, 2: 6.0, 4: 12.0}  # standard deviation of the Gaussian that distances are gathered over, voxels of the box
CELL = 4  # voxels between two places at which distances are gathered
EDGES, STRONG = 0.3, 0.5  # share of the voxels whose gradients are compared, and that distances are taken of
FEWEST = 100  # voxels, of which anything can be said
MARGIN = 4  # voxels around what is not air
MEASURED = 0.99  # share of a voxel
PERCENTILES = (1.0, 99.5)  # an image's darkest and brightest are clipped


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
    distance: (S, d, h, w) mean descriptor distance around each cell of the box, for each of SHIFTS.
    weight: (d, h, w) how much was seen around each cell.
    """

    numbers: dict[str, float]
    distance: Tensor
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
    known = believable(valid)
    at = _strongest(strength[0], _or_all(inside & known, inside), STRONG)
    descriptors = [mind_ssc(x, valid=valid) for x in (fixed, warped)]
    distance, weight, mean = _distances(*descriptors, at, _or_all(known, valid), pool)
    numbers |= {f"distance {pool}": mean[0].item()}
    for step in (2, 4):
        around = [mean[i] for i, s in enumerate(SHIFTS) if LENGTHS[i] == step and sum(map(bool, s)) == 1]
        numbers[f"shifted by {step}, {pool}"] = torch.stack(around).mean().item()
    one, other = (x[0].flatten(1)[:, at.flatten()] for x in descriptors)
    apart = one.var(1) + other.var(1) + (one.mean(1) - other.mean(1)).square()
    numbers[f"unrelated {pool}"] = apart.mean().item()
    return Scale(numbers, distance, weight)


def _distances(
    fixed: Tensor, warped: Tensor, at: Tensor, known: Tensor, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of the fixed image's descriptors to the warped one's at each of SHIFTS.

    Args:
        fixed, warped: (1, 12, D, H, W) descriptors.
        at: (1, 1, D, H, W) bool: where they are compared.
        known: likewise: where the warped image's can be believed.
    Returns:
        (S, d, h, w) gathered at every cell, (d, h, w) the weight of what is gathered there, and (S,) the mean of all.
    """
    step = max(2 // pool, 1)  # on the images themselves every other voxel is enough
    lattice = at[0, 0, ::step, ::step, ::step]
    place = lattice.nonzero() * step
    wanted = fixed[0].permute(1, 2, 3, 0)[tuple(place.unbind(1))]
    reach = max(max(map(abs, s)) for s in SHIFTS)
    padded = F.pad(warped, [reach] * 6, mode="replicate")[0].permute(1, 2, 3, 0)
    depth, height, width = padded.shape[:3]
    rows, counted = padded.reshape(-1, padded.shape[3]), F.pad(known, [reach] * 6)[0, 0].flatten().to(warped.dtype)
    home = ((place[:, 0] + reach) * height + place[:, 1] + reach) * width + place[:, 2] + reach
    apart, counts = (warped.new_zeros(len(SHIFTS), lattice.numel()) for _ in range(2))
    index = lattice.flatten().nonzero()[:, 0]
    for (x, y, z), out, count in zip(SHIFTS, apart, counts, strict=True):
        there = home + ((z * height + y) * width + x)
        seen = counted.index_select(0, there)
        squared = rows.index_select(0, there).sub_(wanted).square_().mean(1)
        out[index], count[index] = squared * seen, seen
    mean = apart.sum(1) / counts.sum(1).clamp_min(1e-6)
    cells = [_gathering(n, step, pool, REACH[pool], like=warped) for n in lattice.shape[::-1]]
    apart, counts = (fields.along_axes(x.view(-1, 1, *lattice.shape), *cells)[:, 0] for x in (apart, counts))
    weight = counts[0]
    # Where hardly anything is seen, or less than at home, a shift is as likely as any other: nothing is known of it.
    thin = counts < 0.5 * weight
    distance = torch.where(thin, mean.mean(), apart / counts.clamp_min(1e-9))
    return distance, weight, mean
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


@fields.kept
def _gathering(n: int, step: int, pool: int, sigma: float, *, like: Tensor) -> Tensor:
    """(cells, n): Gaussian weights of every ``step``-th voxel of an average of ``pool`` voxels, for cells of CELL voxels."""
    places = (torch.arange(n, dtype=torch.float64) * step + 0.5) * pool - 0.5
    cells = (torch.arange(math.ceil(n * step * pool / CELL), dtype=torch.float64) + 0.5) * CELL - 0.5
    return torch.exp(-0.5 * ((cells[:, None] - places) / sigma) ** 2).to(like)
