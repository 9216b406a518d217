"""Gauss-Newton steps on mutual information: where two images of any contrasts say, voxel by voxel, that one must move.

The discriminant that maximizes the Donsker-Varadhan bound (arXiv 1908.08767, Eq. 9) is the pointwise mutual information
``L(f, m) = log p(f, m) / (p(f) p(m))``. For a single pair joint histograms give it in closed form, and with it the
force that raises S: ``L_m grad m`` on the moving image and its opposite ``-L_f grad f`` on the fixed one, taken together
(as in Vercauteren et al., "Symmetric log-domain diffeomorphic registration", MICCAI 2008). The Fisher information
``E[L_m^2 | f] grad m grad m^T``, and that of the fixed image, take the place of the Hessian. A step is the smooth field
that answers these forces (:mod:`DivRegNetLib.registration.variational`).

The histograms are those of overlapping neighborhoods, as in spatially encoded MI (Zhuang et al., IEEE TMI 2011): what
two intensities have to do with each other differs from place to place, with the tissues there and with the bias field.

A displacement on a grid of half the resolution needs no look at every voxel. A step looks at one voxel of the images for
each of that grid, at another one the next time: intensities are not averaged, which would make tissues of mixtures, and
eight steps see all voxels at the cost of one.

Axis order and units as in :mod:`DivRegNetLib.core.fields`. Nothing here is learnt, and nothing is differentiated.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration import variational

BINS = 32
PARZEN = 1.2  # standard deviation of the histogram's window, in bins
REACH = 0.6  # standard deviation of the window over blocks
EVERYWHERE = 0.05  # weight of the histogram of the whole images in that of a window
DOUBT = 0.01  # how far a histogram is moved towards independence, so that what was hardly seen says nothing
LEAST = 1e-9  # a share of voxels that is next to none
SEEN = 0.99  # share of a voxel that has been measured
LITTLE = 0.05  # information, per voxel squared, that rounding alone may feign, as a mean
STILL = 1e-3  # information that nothing moves, at every voxel: where nothing else is known, nothing does
FEWEST = 200  # voxels that a step on averaged images must have to look at: of a few it may move all out of sight
LONGEST = 2.0  # of a step, in voxels of the output grid
STEEPEST = 0.7  # gradient of a step (voxels per voxel, summed over its components): below 1 it cannot fold
ITERATIONS = 4  # of conjugate gradients
TOGETHER = 100_000  # cells of histograms that a CPU works on at once, so that they stay in its cache; a GPU takes all

Valid = tuple[Tensor, Tensor]
"""Where a fixed and a moving image have been measured, each (N, 1, D, H, W), bool or the share of a voxel."""


class Smoothness(NamedTuple):
    """What a step is smoothed by.

    window: standard deviation, in voxels of the images, of the Gaussian that forces and information are gathered over.
    fluid: see :mod:`DivRegNetLib.registration.variational`, in units of the mean information: how far a step goes at once.
    elastic: likewise, in nats: half of it is what a squared gradient of the displacement costs at a voxel, so that images that
        say little are bent less than those that say much.
    """

    window: float
    fluid: float
    elastic: float


FIRST, LAST = Smoothness(2.8, 2.0, 0.6), Smoothness(1.4, 0.4, 0.15)
TOLD = (FIRST, LAST)  # of the steps that a network is told of


class Level(NamedTuple):
    """How steps are made at one resolution of the images.

    share: of all steps; the last level takes what is left.
    block: side of the blocks that histograms are counted in, in voxels that are looked at where that is every second one.
    momentum: share of the step before that is made once more (Polyak's heavy ball): fewer steps get as far.
    """

    share: float
    block: int
    momentum: float


LEVELS = {4: Level(8 / 24, 4, 0.0), 2: Level(9 / 24, 6, 0.5), 1: Level(7 / 24, 6, 0.6)}
"""By how many voxels are averaged along each axis, in the order of the steps."""


@torch.no_grad()
def approach(fixed: Tensor, moving: Tensor, steps: int, stride: int, valid: Valid | None = None) -> Tensor:
    """Displacement after some steps from the identity: on images of a quarter and of half the resolution, then on whole ones.

    Steps become less smooth from the first to the last on whole images. The constants of this file were chosen on
    BrainWeb phantoms, MS07, IXI012, label maps, and crops of the hippocampus, the abdomen and limbs (training/README.md).

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], sides multiples of ``4 * stride``, or some levels are left out, and their
            steps with them; as are those at which too little would be seen.
        steps: at least 1.
        stride: voxels of the images per voxel of the output grid.
        valid: where the images count; None: everywhere.
    Returns:
        (N, 3, D/stride, H/stride, W/stride), in voxels of the output grid.
    """
    displacement, shape, seen = None, fixed.shape[2:], fixed[0].numel()
    if valid is not None:
        seen = ((valid[0] > SEEN) & (valid[1] > SEEN)).flatten(1).sum(1).min().item()
    with torch.autocast(fixed.device.type, enabled=False):  # counting voxels needs more than 16 bits
        for pool, smoothnesses in _schedule(steps, stride, shape, seen):
            images = Images(fixed, moving, stride, valid, pool=pool)
            if displacement is not None:
                displacement = fields.resize(displacement, tuple(n // (pool * stride) for n in shape))
            step = None
            for turn, smoothness in enumerate(smoothnesses):
                displacement, step = images.step(displacement, smoothness, turn, step)
    return displacement


def _schedule(steps: int, stride: int, shape: tuple[int, ...], seen: int) -> list[tuple[int, list[Smoothness]]]:
    """For each level, how many voxels are averaged along each axis and the smoothness of each of its steps.

    Args:
        seen: voxels that have been measured in both images.
    """
    coarse = {pool: round(level.share * steps) if steps >= 4 else 0 for pool, level in LEVELS.items() if pool > 1}
    last = steps - sum(coarse.values())
    along = [i / (last - 1) if last > 1 else 1.0 for i in range(last)]
    fine = [Smoothness(*(a + (b - a) * t for a, b in zip(FIRST, LAST, strict=True))) for t in along]
    levels = [
        (pool, [FIRST] * count)
        for pool, count in coarse.items()
        if count and seen >= FEWEST * (pool * stride) ** 3 and not any(n % (pool * stride) for n in shape)
    ]
    return [*levels, (1, fine)]


class Images:
    """A pair at one resolution, and steps that bring it closer."""

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        stride: int,
        valid: Valid | None = None,
        *,
        pool: int = 1,
        parzen: float = PARZEN,
    ) -> None:
        """
        Args:
            fixed, moving, stride, valid: as in :func:`approach`.
            pool: voxels that are averaged along each axis first.
            parzen: standard deviation of the histogram's window, in bins.
        """
        fixed, moving = (F.avg_pool3d(x, pool) if pool > 1 else x for x in (fixed, moving))
        self.stride, self.parzen, self.level = stride, parzen, LEVELS[pool]
        self.rows, self.blocks = _rows(fixed, stride * (self.level.block * 2 // stride))
        self.gradient, self.valid = torch.cat(gradient(fixed), 1), None
        turns = list(itertools.product(range(stride), repeat=3))
        self.turns = [turn for opposite in zip(turns, turns[::-1], strict=True) for turn in opposite][: len(turns)]
        channels = [moving, *gradient(moving)]
        if valid is not None:
            inside = (_without_edge(x).to(moving.dtype) for x in valid)
            self.valid, of_moving = (F.avg_pool3d(x, pool) if pool > 1 else x for x in inside)
            channels.append(of_moving)
        self.moving = torch.cat(channels, 1)

    def step(
        self, displacement: Tensor | None, smoothness: Smoothness, turn: int = 0, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step further.

        Args:
            displacement: (N, 3, d, h, w) on the output grid, in its voxels; None: the identity.
            turn: which voxels are looked at, see :meth:`equations`.
            before: the step before, likewise; None: this is the first.
        Returns:
            The displacement after the step, and the step.
        """
        normal, _ = self.equations(displacement, turn)
        step, _ = solve(normal, smoothness, self.stride, displacement)
        if before is not None:
            step = _bounded(step.add_(before, alpha=self.level.momentum))
        return step if displacement is None else fields.compose(displacement, step), step

    def equations(self, displacement: Tensor | None, turn: int = 0) -> tuple[Tensor, Tensor]:
        """What each voxel of the output grid contributes: information and force.

        Args:
            displacement: as in :meth:`step`.
            turn: number of the step: of the ``stride ** 3`` voxels of the images in each of the output grid, another one is
                looked at in each.
        Returns:
            (N, 9, d, h, w): the information's xx, yy, zz, xy, xz, yz and the force's x, y, z, in voxels of the output grid;
            for (moving, fixed) the information is the same and the force the opposite. And (N,) the mean pointwise mutual
            information of the voxels that count, in nats.
        """
        offset = self.turns[turn % len(self.turns)]
        every = (..., *(slice(o, None, self.stride) for o in offset))
        rows, in_f = self.rows[every], self.gradient[every]
        found = self._moved(displacement, offset, rows.shape[2:])
        moving, in_m = found[:, :1], found[:, 1:4]
        if displacement is not None:  # of the image as it is after the displacement
            in_m = in_m + torch.cat([(slope * in_m).sum(1, keepdim=True) for slope in gradient(displacement)], 1)
        counts = None if self.valid is None else (self.valid[every] > SEEN) & (found[:, 4:] > SEEN)
        normal, known = moving.new_empty((len(rows), 9, *rows.shape[2:])), []
        for i in range(len(rows)):
            of_pair = None if counts is None else counts[i, 0]
            table, cell = _tables(rows[i, 0], moving[i, 0], self.blocks, self.parzen, of_pair)
            says = table.index_select(1, cell.flatten()).view(-1, *cell.shape)
            _contribute(in_m[i], in_f[i], says, normal[i])
            known.append(says[4].sum() / (cell.numel() if counts is None else of_pair.sum().clamp_min(1)))
        units = normal.new_tensor([self.stride**2] * 6 + [self.stride] * 3).view(-1, 1, 1, 1)
        return normal * units, torch.stack(known)

    def _moved(self, displacement: Tensor | None, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The moving image, its gradient and where it has been measured, at the voxels that are looked at after a
        displacement: (N, 4 or 5, d, h, w)."""
        if displacement is None:
            return self.moving[(..., *(slice(o, None, self.stride) for o in offset))]
        aside = [(o + 0.5) / self.stride - 0.5 for o in offset[::-1]]  # of the middle of a voxel of the output grid
        points = fields.identity(shape, like=displacement) + fields.shifted(displacement, *aside)
        return fields.sample(self.moving, points * self.stride + points.new_tensor(offset[::-1]).view(1, 3, 1, 1, 1))


def solve(normal: Tensor, smoothness: Smoothness, stride: int, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The step that the equations ask for.

    Args:
        normal: (N, 9, D, H, W), see :meth:`Images.equations`.
        stride: voxels of the images per voxel of this grid.
        whole: (N, 3, D, H, W) the displacement before the step; None: the identity.
    Returns:
        (N, 3, D, H, W) in voxels of this grid, no longer than LONGEST nor steeper than STEEPEST; and (N, 1, D, H, W) the
        information it is gathered from, the mean over the axes.
    """
    unit = _usual(normal)
    normal = fields.smooth(normal, smoothness.window / stride)
    normal[:, :3] += STILL
    step = variational.solve(normal, whole, smoothness.fluid * unit, smoothness.elastic, ITERATIONS)
    return _bounded(step), _known(normal)


def _bounded(step: Tensor) -> Tensor:
    """A step (N, 3, D, H, W) no longer than LONGEST nor steeper than STEEPEST."""
    step = step / (fields.length(step) / LONGEST).clamp_min(1)
    return step.div_((_steepness(step) / STEEPEST).clamp_min(1))


def _steepness(field: Tensor) -> Tensor:
    """Largest gradient anywhere, along one axis and summed over the components, (N, 1, 1, 1, 1): of ``x -> x + u(x)`` with
    less than 1 no two points meet."""
    along = [slope.abs_().sum(1).flatten(1).amax(1) for slope in fields.gradients(field)]
    return torch.stack(along).amax(0).view(-1, 1, 1, 1, 1)


def _usual(normal: Tensor) -> Tensor:
    """Mean information of the voxels of (N, 9, D, H, W) equations, (N, 1, 1, 1, 1)."""
    return _known(normal).mean((1, 2, 3, 4), keepdim=True) + LITTLE


def _known(normal: Tensor) -> Tensor:
    """(N, 1, D, H, W): information, the mean over the axes."""
    return normal[:, :3].mean(1, keepdim=True)


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


@torch.no_grad()
def guess(fixed: Tensor, moving: Tensor, stride: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The next step, and what a network is told of it.

    Args:
        fixed, moving, stride: as in :func:`approach`, moving already warped.
        counts: (N, 1, D, H, W) bool, which voxels count; None: all.
    Returns:
        (N, 3, d, h, w) step in voxels of the output grid; (N, 4 * len(TOLD), d, h, w) steps, and how much is known (from 0
        over 0.5 where it is the image's mean to 1), for each smoothness of TOLD; and the same of (moving, fixed).
    """
    with torch.autocast(fixed.device.type, enabled=False):
        normal, _ = Images(fixed, moving, stride, None if counts is None else (counts, counts)).equations(None)
        steps, known = zip(*(solve(normal, smoothness, stride) for smoothness in TOLD), strict=True)
        unit = _usual(normal)
        known = [k / (k + unit) for k in known]
    forward, backward = (
        torch.cat([x for s, k in zip(steps, known, strict=True) for x in (sign * s, k)], 1) for sign in (1, -1)
    )
    return steps[-1], forward, backward


def _without_edge(valid: Tensor) -> Tensor:
    """(N, 1, D, H, W) bool, one voxel less, as differences would reach over the edge; all where nothing else would be left."""
    inner = valid.clone()
    for dim in (2, 3, 4):
        before = inner.clone()
        inner.narrow(dim, 0, valid.shape[dim] - 1).logical_and_(before.narrow(dim, 1, valid.shape[dim] - 1))
        inner.narrow(dim, 1, valid.shape[dim] - 1).logical_and_(before.narrow(dim, 0, valid.shape[dim] - 1))
    return inner if inner.any() else valid


def _contribute(m: Tensor, f: Tensor, says: Tensor, out: Tensor) -> None:
    """Writes information and force of each voxel, (9, d, h, w) as in :meth:`Images.equations` but in voxels of the images.

    Args:
        m, f: gradients of the moving and the fixed image along x, y, z, (3, d, h, w).
        says: (5, d, h, w), what :func:`_tables` says of each voxel.
    """
    along_m, along_f, info_m, info_f, _ = says
    by_m, by_f = (m * info_m).unbind(), (f * info_f).unbind()
    m, f, out = m.unbind(), f.unbind(), out.unbind()
    for n, (a, b) in enumerate(variational.PARTS):
        torch.mul(m[a], by_m[b], out=out[n]).addcmul_(f[a], by_f[b])
    for a in range(3):
        torch.mul(m[a], along_m, out=out[6 + a]).addcmul_(f[a], along_f, value=-1)


def gradient(image: Tensor) -> list[Tensor]:
    """Central differences along x, y, z, each (N, 1, D, H, W); 0 at the border."""
    found = []
    for dim in (4, 3, 2):
        inner = image.shape[dim] - 2
        found.append(torch.zeros_like(image))
        torch.sub(image.narrow(dim, 2, inner), image.narrow(dim, 0, inner), out=found[-1].narrow(dim, 1, inner)).div_(2)
    return found


def _rows(fixed: Tensor, block: int) -> tuple[Tensor, tuple[int, ...]]:
    """(N, 1, D, H, W) whole numbers: the row of its block's joint histogram that a voxel is in, block after block; and how many
    blocks there are along D, H, W.

    Args:
        fixed: (N, 1, D, H, W) in [0, 1].
        block: voxels per side.
    """
    blocks = tuple(math.ceil(n / block) for n in fixed.shape[2:])
    z, y, x = (torch.arange(n, device=fixed.device, dtype=torch.int32) // block for n in fixed.shape[2:])
    number = (z[:, None, None] * blocks[1] + y[:, None]) * blocks[2] + x
    return _bins(fixed).add_(number, alpha=BINS), blocks


def _bins(image: Tensor) -> Tensor:
    """Which bin each value in [0, 1] is in, whole numbers."""
    return (image * (BINS - 1)).round_().int().clamp_(0, BINS - 1)


def _tables(
    rows: Tensor, moving: Tensor, blocks: tuple[int, ...], parzen: float, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a pair of intensities says, block by block.

    Args:
        rows: (D, H, W), of the fixed image, see :func:`_rows`.
        moving: (D, H, W) in [0, 1].
        blocks: along D, H, W.
        parzen: standard deviation of the histogram's window, in bins.
        counts: (D, H, W) bool, which voxels are counted; None: all.
    Returns:
        (5, cells) dL/dm, dL/df, E[(dL/dm)^2 | f], E[(dL/df)^2 | m] and L of every block and pair of bins, and of one cell
        more, where all are 0; and (D, H, W) whole numbers: the cell that a voxel is in, the last if it is not counted.
    """
    cells = math.prod(blocks) * BINS**2
    cell = _bins(moving).add_(rows, alpha=BINS)
    if counts is not None:
        cell = cell.masked_fill_(~counts, cells)
    # Whole numbers are counted: sums of floats would depend on their order on a GPU.
    counted = torch.bincount(cell.flatten(), minlength=cells + 1)[:cells].to(moving.dtype)
    z, y, x = (fields.gaussian(n, REACH, like=moving) for n in blocks)
    window = y @ (z @ counted.view(blocks[0], -1)).view(blocks[0], blocks[1], -1)
    window = (x @ window.view(-1, blocks[2], BINS**2)).view(-1, BINS, BINS)
    whole = counted.view(-1, BINS, BINS).sum(0)
    whole = EVERYWHERE * whole / whole.sum().clamp_min(1)
    tables = window.new_empty(5, cells + 1)
    tables[:, cells] = 0
    smoothing, slope = fields.gaussian(BINS, parzen, like=moving), _slope(BINS, like=moving)
    some = len(window) if moving.is_cuda else TOGETHER // BINS**2
    for here, out in zip(window.split(some), tables[:, :cells].view(5, -1, BINS, BINS).split(some, 1), strict=True):
        _pointwise(here, whole, smoothing, slope, out)
    return tables, cell


@fields.kept
def _slope(bins: int, *, like: Tensor) -> Tensor:
    """(bins, bins): takes values at equal steps from 0 to 1 to their slope there, by central differences."""
    return torch.gradient(torch.eye(bins, dtype=like.dtype, device=like.device) * (bins - 1), dim=0)[0]


def _pointwise(window: Tensor, whole: Tensor, smoothing: Tensor, slope: Tensor, out: Tensor) -> None:
    """Writes what :func:`_tables` says of some blocks.

    Args:
        window: (B, BINS, BINS), voxels counted about each block, by the intensity of the fixed and the moving image.
        whole: (BINS, BINS), what is added from the whole images.
        smoothing, slope: (BINS, BINS), by which both axes are smoothed and differentiated.
        out: (5, B, BINS, BINS), written to.
    """
    window = window / window.sum((1, 2), keepdim=True).clamp_min(1e-6)
    joint = smoothing @ (window + whole) @ smoothing.T
    joint /= joint.sum((1, 2), keepdim=True).clamp_min(LEAST)
    of_f, of_m = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    product = of_f * of_m
    joint.lerp_(product, DOUBT)
    along_m, along_f, info_m, info_f, pointwise = out
    torch.div(joint + LEAST, product.add_(LEAST), out=pointwise).log_()
    torch.matmul(slope, pointwise, out=along_f)
    torch.matmul(pointwise, slope.T, out=along_m)
    info_m.copy_((joint * along_m.square()).sum(2, keepdim=True) / of_f.clamp_min(LEAST))
    info_f.copy_((joint * along_f.square()).sum(1, keepdim=True) / of_m.clamp_min(LEAST))
