"""Gauss-Newton steps on mutual information: where two images of any contrasts say, voxel by voxel, that one must move.

The discriminant that maximises the Donsker-Varadhan bound (arXiv 1908.08767, Eq. 9) is the pointwise mutual information
``L(f, m) = log p(f, m) / (p(f) p(m))``. For a single pair joint histograms give it in closed form, and with it the
force that raises S: ``L_m grad m`` on the moving image and its opposite ``-L_f grad f`` on the fixed one, taken together
(as in Vercauteren et al., "Symmetric log-domain diffeomorphic registration", MICCAI 2008). The Fisher information
``E[L_m^2 | f] grad m grad m^T``, and that of the fixed image, take the place of the Hessian. Both are gathered over a
window and solved for a displacement (Lucas and Kanade, IJCAI 1981).

The histograms are those of overlapping neighbourhoods, as in spatially encoded MI (Zhuang et al., IEEE TMI 2011): what
two intensities have to do with each other differs from place to place, with the tissues there and with the bias field.

Axis order and units as in :mod:`DivRegNetLib.fields`. Nothing here is learnt, and nothing is differentiated.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib import fields

BINS = 48
PARZEN = 2.0  # standard deviation of the histogram's window, in bins
BLOCK = 12  # side in voxels of the whole image, of the blocks that histograms are counted in
REACH = 0.6  # standard deviation of the window over blocks
EVERYWHERE = 0.05  # weight of the histogram of the whole images in that of a window
DOUBT = 2e-3  # how far a histogram is moved towards independence, so that what was hardly seen says nothing
LEAST = 1e-9  # a share of voxels that is next to none
SEEN = 0.99  # share of a voxel that has been measured
LITTLE = 0.05  # information, per voxel squared, that rounding alone may feign
PRIOR = 0.2  # added to the information, as a share of its mean: how much a place must know to move on its own
LONGEST = 1.0  # of a step before it is scaled, in voxels of the output grid
# Of the steps on images at half resolution, which come first, and of those on whole images: at the first and the last, the
# window's standard deviation in voxels of the images, and what a step is multiplied by, as smoothing takes most of a
# long-range one away.
HALF_WINDOWS, HALF_SCALES = (10.0, 4.0), (4.0, 2.0)
WINDOWS, SCALES = (4.0, 2.0), (2.0, 1.0)
TOLD = (10.0, 2.0)  # the windows that a network is told of
FLUID, ELASTIC = 2.0, 1.0  # smoothing of each step and of the sum of all, standard deviations in voxels of the images
TOGETHER = 100_000  # values worked on at once, so that they stay in the cache of a CPU
SQUARINGS = 2  # a step is integrated as a velocity, so that none of them folds

Valid = tuple[Tensor, Tensor]
"""Where a fixed and a moving image have been measured, each (N, 1, D, H, W), bool or the share of a voxel."""


@torch.no_grad()
def approach(fixed: Tensor, moving: Tensor, steps: int, stride: int, valid: Valid | None = None) -> Tensor:
    """Displacement after some steps from the identity, the window narrowing from the first to the last.

    The first half of the steps, if they are two or more and the images as long, is made on images of half the resolution.
    The constants of this file were chosen on BrainWeb phantoms and on MS07 against BrainWeb (training/README.md).

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], sides multiples of ``stride``.
        steps: at least 1.
        stride: voxels of the images per voxel of the output grid.
        valid: where the images count; None: everywhere.
    Returns:
        (N, 3, D/stride, H/stride, W/stride), in voxels of the output grid.
    """
    images, displacement = {}, None
    with torch.autocast(fixed.device.type, enabled=False):  # counting voxels needs more than 16 bits
        for pool, window, scale in _schedule(steps, stride):
            if pool not in images:
                images[pool] = Images(fixed, moving, stride, valid, pool=pool)
            displacement, _ = images[pool].step(displacement, window, scale)
    return displacement


def _schedule(steps: int, stride: int) -> list[tuple[int, float, float]]:
    """Pooling, window and scale of every step."""
    halves = steps // 2 if stride == 2 else 0
    parts = [(2, halves, HALF_WINDOWS, HALF_SCALES)] if halves else []
    first = (WINDOWS[0], SCALES[0]) if halves else (HALF_WINDOWS[0], HALF_SCALES[0])
    parts.append((1, steps - halves, (first[0], WINDOWS[1]), (first[1], SCALES[1])))
    found = []
    for pool, count, windows, scales in parts:
        for i in range(count):
            along = i / (count - 1) if count > 1 else 1.0
            found.append((pool, *(a + (b - a) * along for a, b in (windows, scales))))
    return found


class Images:
    """A pair at one resolution, and steps that bring it closer."""

    def __init__(
        self, fixed: Tensor, moving: Tensor, stride: int, valid: Valid | None = None, *, pool: int = 1
    ) -> None:
        """
        Args:
            fixed, moving, stride, valid: as in :func:`approach`.
            pool: voxels that are averaged along each axis first; divides ``stride``.
        """
        self.fixed, self.moving = (F.avg_pool3d(x, pool) if pool > 1 else x for x in (fixed, moving))
        self.gradient, self.stride, self.pool = gradient(self.fixed), stride, pool
        self.valid = None
        if valid is not None:
            self.valid = tuple(F.avg_pool3d(_without_edge(x).to(fixed.dtype), pool) for x in valid)

    def step(self, displacement: Tensor | None, window: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """One step further.

        Args:
            displacement: (N, 3, d, h, w) on the output grid, in its voxels; None: the identity.
            window: standard deviation of the Gaussian neighbourhood, in voxels of the images (those before pooling).
            scale: what the step is multiplied by.
        Returns:
            The displacement after the step; and the mean pointwise mutual information before it, (N,) in nats.
        """
        moving, counts = warped(self.moving, displacement, self.valid)
        normal, information = equations(
            self.fixed, moving, self.stride // self.pool, counts, BLOCK // self.pool, self.gradient
        )
        step, _ = solve(normal, window / self.stride)
        step = fields.integrate(fields.smooth(step, FLUID / self.stride) * scale, SQUARINGS)
        whole = step if displacement is None else fields.compose(displacement, step)
        return fields.smooth(whole, ELASTIC / self.stride), information


def warped(moving: Tensor, displacement: Tensor | None, valid: Valid | None) -> tuple[Tensor, Tensor | None]:
    """The moving image after a displacement, and which voxels have then been measured in both images.

    Args:
        moving: (N, 1, D, H, W).
        displacement: (N, 3, d, h, w) on the output grid, in its voxels; None: the identity.
        valid: where the images have been measured; None: everywhere.
    Returns:
        (N, 1, D, H, W); and (N, 1, D, H, W) bool, or None.
    """
    both = moving if valid is None else torch.cat((moving, valid[1].to(moving.dtype)), 1)
    if displacement is not None:
        both = fields.warp(both, fields.resize(displacement, moving.shape[2:]))
    return both[:, :1], None if valid is None else (valid[0] > SEEN) & (both[:, 1:] > SEEN)


def _without_edge(valid: Tensor) -> Tensor:
    """(N, 1, D, H, W) bool, one voxel less, as differences would reach over the edge; all where nothing else would be left."""
    inner = valid.clone()
    for dim in (2, 3, 4):
        before = inner.clone()
        inner.narrow(dim, 0, valid.shape[dim] - 1).logical_and_(before.narrow(dim, 1, valid.shape[dim] - 1))
        inner.narrow(dim, 1, valid.shape[dim] - 1).logical_and_(before.narrow(dim, 0, valid.shape[dim] - 1))
    return inner if inner.any() else valid


@torch.no_grad()
def guess(fixed: Tensor, moving: Tensor, stride: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The next step, and what a network is told of it.

    Args:
        fixed, moving, stride, counts: as in :func:`equations`.
    Returns:
        (N, 3, d, h, w) step in voxels of the output grid; (N, 4 * len(TOLD), d, h, w) steps and how much is known, for
        each window of TOLD; and the same of (moving, fixed).
    """
    with torch.autocast(fixed.device.type, enabled=False):
        normal, _ = equations(fixed, moving, stride, counts)
        found = [solve(normal, window / stride) for window in TOLD]
        step = fields.smooth(found[-1][0], FLUID / stride)
    forward, backward = (torch.cat([x for step, known in found for x in (sign * step, known)], 1) for sign in (1, -1))
    return step, forward, backward


@torch.no_grad()
def equations(
    fixed: Tensor,
    moving: Tensor,
    stride: int,
    counts: Tensor | None = None,
    block: int = BLOCK,
    fixed_gradient: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What each voxel of the output grid contributes: information and force.

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], moving already warped, sides multiples of ``stride``.
        stride: voxels of the images per voxel of the output grid.
        counts: (N, 1, D, H, W) bool, which voxels count; None: all.
        block: voxels per side of a histogram's block.
        fixed_gradient: what :func:`gradient` gives for ``fixed``, where it is at hand.
    Returns:
        (N, 9, D/stride, H/stride, W/stride): the information's xx, xy, xz, yy, yz, zz and the force's x, y, z, in voxels
        of the output grid; for (moving, fixed) the information is the same and the force the opposite. And (N,) the mean
        pointwise mutual information of the voxels that count, in nats.
    """
    in_m, in_f = gradient(moving), fixed_gradient or gradient(fixed)
    depth, height, width = fixed.shape[2:]
    slices = _at_once(height * width * stride, fixed) * stride
    found = fixed.new_empty((len(fixed), 9, *(n // stride for n in fixed.shape[2:])))
    known = []
    for i in range(len(fixed)):
        of_pair = None if counts is None else counts[i, 0]
        table, cell = _tables(fixed[i, 0], moving[i, 0], block, of_pair)
        total = 0.0
        for first in range(0, depth, slices):
            slab = slice(first, min(first + slices, depth))
            says = table.index_select(1, cell[slab].flatten()).view(-1, *cell[slab].shape)
            m, f = ([g[i, 0, slab] for g in gradients] for gradients in (in_m, in_f))
            found[i, :, slab.start // stride : slab.stop // stride] = F.avg_pool3d(_contributions(m, f, says), stride)
            total = total + says[4].sum()
        known.append(total / (cell.numel() if counts is None else of_pair.sum().clamp_min(1)))
    units = found.new_tensor([stride**2] * 6 + [stride] * 3).view(-1, 1, 1, 1)
    return found * units, torch.stack(known)


def _contributions(m: list[Tensor], f: list[Tensor], says: Tensor) -> Tensor:
    """Information and force of each voxel, (9, d, h, w) as in :func:`equations` but in voxels of the images.

    Args:
        m, f: gradients of the moving and the fixed image along x, y, z, each (d, h, w).
        says: (5, d, h, w), what :func:`_tables` says of each voxel.
    """
    along_m, along_f, info_m, info_f, _ = says
    by_m, by_f = ([g * info for g in gradients] for gradients, info in ((m, info_m), (f, info_f)))
    parts = says.new_empty((9, *says.shape[1:]))
    for n, (a, b) in enumerate(itertools.combinations_with_replacement(range(3), 2)):
        torch.mul(m[a], by_m[b], out=parts[n]).addcmul_(f[a], by_f[b])
    for a in range(3):
        torch.mul(m[a], along_m, out=parts[6 + a]).addcmul_(f[a], along_f, value=-1)
    return parts


def solve(normal: Tensor, window: float) -> tuple[Tensor, Tensor]:
    """The step that the equations of a neighbourhood ask for, and how much is known there.

    Args:
        normal: (N, 9, D, H, W), see :func:`equations`.
        window: standard deviation of the Gaussian neighbourhood, in voxels of this grid.
    Returns:
        (N, 3, D, H, W) step in voxels of this grid, no longer than LONGEST; and (N, 1, D, H, W) how much is known, from
        0 over 0.5 where it is the image's mean to 1.
    """
    xx, xy, xz, yy, yz, zz, x, y, z = fields.smooth(normal, window).split(1, 1)
    known = (xx + yy + zz) / 3
    usual = known.mean((2, 3, 4), keepdim=True) + LITTLE
    prior = PRIOR * usual
    xx, yy, zz = xx + prior, yy + prior, zz + prior
    # Inverse of the symmetric 3x3 matrix by cofactors.
    a, b, c = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    d, e, f = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
    step = torch.cat((a * x + b * y + c * z, b * x + d * y + e * z, c * x + e * y + f * z), 1)
    step = step / (xx * a + xy * b + xz * c)
    step = step / (fields.length(step) / LONGEST).clamp_min(1)
    return step, known / (known + usual)


def gradient(image: Tensor) -> list[Tensor]:
    """Central differences along x, y, z, each (N, 1, D, H, W); 0 at the border."""
    found = []
    for dim in (4, 3, 2):
        inner = image.shape[dim] - 2
        found.append(torch.zeros_like(image))
        torch.sub(image.narrow(dim, 2, inner), image.narrow(dim, 0, inner), out=found[-1].narrow(dim, 1, inner)).div_(2)
    return found


def _tables(fixed: Tensor, moving: Tensor, block: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a pair of intensities says, block by block.

    Args:
        fixed, moving: (D, H, W) in [0, 1].
        block: voxels per side.
        counts: (D, H, W) bool, which voxels are counted; None: all.
    Returns:
        (5, cells) dL/dm, dL/df, E[(dL/dm)^2 | f], E[(dL/df)^2 | m] and L of every block and pair of bins, and of one cell
        more, where all are 0; and (D, H, W) whole numbers: the cell that a voxel is in, the last if it is not counted.
    """
    blocks = [math.ceil(n / block) for n in fixed.shape]
    z, y, x = (torch.arange(n, device=fixed.device, dtype=torch.int32) // block for n in fixed.shape)
    cell = (z[:, None, None] * blocks[1] + y[:, None]) * blocks[2] + x
    for image in (fixed, moving):
        cell = cell.mul_(BINS).add_((image * (BINS - 1)).round_().int().clamp_(0, BINS - 1))
    cells = math.prod(blocks) * BINS**2
    if counts is not None:
        cell = cell.masked_fill_(~counts, cells)
    # Whole numbers are counted: sums of floats would depend on their order on a GPU.
    counted = torch.bincount(cell.flatten(), minlength=cells + 1)[:cells].to(fixed.dtype)
    z, y, x = (fields.gaussian(n, REACH, like=fixed) for n in blocks)
    window = y @ (z @ counted.view(blocks[0], -1)).view(blocks[0], blocks[1], -1)
    window = (x @ window.view(-1, blocks[2], BINS**2)).view(-1, BINS, BINS)
    whole = counted.view(-1, BINS, BINS).sum(0)
    whole = EVERYWHERE * whole / whole.sum().clamp_min(1)
    tables = window.new_empty(5, cells + 1)
    tables[:, cells] = 0
    some, parzen = _at_once(BINS**2, fixed), fields.gaussian(BINS, PARZEN, like=fixed)
    for here, out in zip(window.split(some), tables[:, :cells].view(5, -1, BINS, BINS).split(some, 1), strict=True):
        _pointwise(here, whole, parzen, out)
    return tables, cell


def _pointwise(window: Tensor, whole: Tensor, parzen: Tensor, out: Tensor) -> None:
    """Writes what :func:`_tables` says of some blocks.

    Args:
        window: (B, BINS, BINS), voxels counted about each block, by the intensity of the fixed and the moving image.
        whole: (BINS, BINS), what is added from the whole images.
        parzen: (BINS, BINS), by which both axes are smoothed.
        out: (5, B, BINS, BINS), written to.
    """
    window = window / window.sum((1, 2), keepdim=True).clamp_min(1e-6)
    joint = parzen @ (window + whole) @ parzen.T
    joint /= joint.sum((1, 2), keepdim=True).clamp_min(LEAST)
    of_f, of_m = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    product = of_f * of_m
    joint.lerp_(product, DOUBT)
    pointwise = ((joint + LEAST) / product.add_(LEAST)).log_()
    along_f, along_m = (g.mul_(BINS - 1) for g in torch.gradient(pointwise, dim=(1, 2)))
    info_m = (joint * along_m.square()).sum(2, keepdim=True) / of_f.clamp_min(LEAST)
    info_f = (joint * along_f.square()).sum(1, keepdim=True) / of_m.clamp_min(LEAST)
    for table, values in zip(out, (along_m, along_f, info_m, info_f, pointwise), strict=True):
        table.copy_(values.expand_as(joint))


def _at_once(values: int, like: Tensor) -> int:
    """How many things of so many values each are worked on together: few on a CPU, for its cache's sake, else all."""
    return like.numel() if like.is_cuda else max(TOGETHER // values, 1)
