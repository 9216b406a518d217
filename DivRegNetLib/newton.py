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

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib import fields

BINS = 32
PARZEN = 1.5  # standard deviation of the histogram's window, in bins
BLOCK = 8  # side in voxels of the images, of the blocks that histograms are counted in
REACH = 1.0  # standard deviation of the window over blocks
EVERYWHERE = 0.05  # weight of the histogram of the whole images in that of a window
PRIOR = 0.2  # added to the information, as a share of its mean: how much a place must know to move on its own
LONGEST = 1.0  # of a step before it is scaled, in voxels of the output grid
# At the first and the last step: the window's standard deviation in voxels of the output grid, and what a step is
# multiplied by, as smoothing takes most of a long-range one away.
WINDOWS, SCALES = (5.0, 1.0), (4.0, 1.0)
FLUID, ELASTIC = 1.0, 0.5  # smoothing of each step and of the sum of all, standard deviations in the same voxels
SQUARINGS = 3  # a step is integrated as a velocity, so that none of them folds


@torch.no_grad()
def approach(fixed: Tensor, moving: Tensor, steps: int, stride: int) -> Tensor:
    """Displacement after some steps from the identity, the window narrowing from the first to the last.

    The constants of this file were chosen on BrainWeb phantoms and on MS07 against BrainWeb (training/README.md).

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], sides multiples of ``stride``.
        steps: at least 1.
        stride: voxels of the images per voxel of the output grid.
    Returns:
        (N, 3, D/stride, H/stride, W/stride), in voxels of the output grid.
    """
    displacement, slope = None, gradient(fixed)
    with torch.autocast(fixed.device.type, enabled=False):  # counting voxels needs more than 16 bits
        for i in range(steps):
            warped = (
                moving if displacement is None else fields.warp(moving, fields.resize(displacement, moving.shape[2:]))
            )
            window, scale = (a + (b - a) * i / max(steps - 1, 1) for a, b in (WINDOWS, SCALES))
            step, _ = solve(equations(fixed, warped, stride, slope), window)
            step = fields.integrate(smooth(step, FLUID) * scale, SQUARINGS)
            displacement = smooth(step if displacement is None else fields.compose(displacement, step), ELASTIC)
    return displacement


@torch.no_grad()
def guess(fixed: Tensor, moving: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """The next step, and what a network is told of it.

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], sides multiples of ``stride``.
    Returns:
        (N, 3, d, h, w) step in voxels of the output grid; (N, 4 * len(WINDOWS), d, h, w) steps and how much is known, for
        each window; and the same of (moving, fixed).
    """
    with torch.autocast(fixed.device.type, enabled=False):
        normal = equations(fixed, moving, stride)
        found = [solve(normal, window) for window in WINDOWS]
        step = smooth(found[-1][0], FLUID)
    forward, backward = (torch.cat([x for step, known in found for x in (sign * step, known)], 1) for sign in (1, -1))
    return step, forward, backward


@torch.no_grad()
def equations(fixed: Tensor, moving: Tensor, stride: int, fixed_gradient: list[Tensor] | None = None) -> Tensor:
    """What each voxel of the output grid contributes: information and force.

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], moving already warped, sides multiples of ``stride``.
        fixed_gradient: what :func:`gradient` gives for ``fixed``, where it is at hand.
    Returns:
        (N, 9, D/stride, H/stride, W/stride): the information's xx, xy, xz, yy, yz, zz and the force's x, y, z, in voxels
        of the output grid. For (moving, fixed) the information is the same and the force the opposite.
    """
    read = [table[cell] for table, cell in (_tables(f[0], m[0]) for f, m in zip(fixed, moving, strict=True))]
    along_m, along_f, info_m, info_f = torch.stack(read)[:, None].unbind(-1)
    in_m, in_f = gradient(moving), fixed_gradient or gradient(fixed)
    info_m, info_f, along_m, along_f = info_m * stride**2, info_f * stride**2, along_m * stride, along_f * stride
    parts = [in_m[a] * in_m[b] * info_m + in_f[a] * in_f[b] * info_f for a in range(3) for b in range(a, 3)]
    parts += [m * along_m - f * along_f for m, f in zip(in_m, in_f, strict=True)]
    return torch.cat([F.avg_pool3d(part, stride) for part in parts], 1)


def solve(normal: Tensor, window: float) -> tuple[Tensor, Tensor]:
    """The step that the equations of a neighbourhood ask for, and how much is known there.

    Args:
        normal: (N, 9, D, H, W), see :func:`equations`.
        window: standard deviation of the Gaussian neighbourhood, in voxels of this grid.
    Returns:
        (N, 3, D, H, W) step in voxels of this grid, no longer than LONGEST; and (N, 1, D, H, W) how much is known, from
        0 over 0.5 where it is the image's mean to 1.
    """
    xx, xy, xz, yy, yz, zz, x, y, z = smooth(normal, window).split(1, 1)
    known = (xx + yy + zz) / 3
    usual = known.mean((2, 3, 4), keepdim=True) + 1e-6
    prior = PRIOR * usual
    xx, yy, zz = xx + prior, yy + prior, zz + prior
    # Inverse of the symmetric 3x3 matrix by cofactors.
    a, b, c = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    d, e, f = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
    step = torch.cat((a * x + b * y + c * z, b * x + d * y + e * z, c * x + e * y + f * z), 1)
    step = step / (xx * a + xy * b + xz * c)
    step = step / (step.norm(dim=1, keepdim=True) / LONGEST).clamp_min(1)
    return step, known / (known + usual)


def gradient(image: Tensor) -> list[Tensor]:
    """Central differences along x, y, z, each (N, 1, D, H, W); 0 at the border."""
    found = []
    for dim in (4, 3, 2):
        inner = (image.narrow(dim, 2, image.shape[dim] - 2) - image.narrow(dim, 0, image.shape[dim] - 2)) / 2
        found.append(F.pad(inner, [int(i // 2 == 4 - dim) for i in range(6)]))
    return found


def smooth(field: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of (N, C, D, H, W) by ``sigma`` voxels, the border repeated."""
    for dim in (2, 3, 4):  # a banded matrix along each axis: many channels at once, the same sum on every run
        matrix = _banded(field.shape[dim], sigma, field)
        field = torch.tensordot(field, matrix, ([dim], [1])).movedim(-1, dim)
    return field.contiguous()


def _tables(fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
    """What a pair of intensities says, block by block.

    Args:
        fixed, moving: (D, H, W) in [0, 1].
    Returns:
        (cells, 4) dL/dm, dL/df, E[(dL/dm)^2 | f], E[(dL/df)^2 | m] of every block and pair of bins; and (D, H, W) whole
        numbers: the cell that a voxel is in.
    """
    blocks = [math.ceil(n / BLOCK) for n in fixed.shape]
    z, y, x = (torch.arange(n, device=fixed.device) // BLOCK for n in fixed.shape)
    cell = (z[:, None, None] * blocks[1] + y[:, None]) * blocks[2] + x
    for image in (fixed, moving):
        cell = cell * BINS + (image * (BINS - 1)).round().long().clamp(0, BINS - 1)
    # Whole numbers are counted: sums of floats would depend on their order on a GPU.
    counts = torch.bincount(cell.flatten(), minlength=math.prod(blocks) * BINS**2).to(fixed.dtype)
    window = smooth(counts.view(*blocks, BINS**2).movedim(-1, 0)[None], REACH)[0].movedim(0, -1)
    window = window.reshape(-1, BINS, BINS)
    window = window / window.sum((1, 2), keepdim=True).clamp_min(1e-6)
    whole = counts.view(-1, BINS, BINS).sum(0)
    parzen = _banded(BINS, PARZEN, fixed)
    joint = parzen @ (window + EVERYWHERE * whole / whole.sum()) @ parzen.T
    joint = joint / joint.sum((1, 2), keepdim=True) + 1e-5
    joint = joint / joint.sum((1, 2), keepdim=True)
    of_f, of_m = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    along_f, along_m = (g * (BINS - 1) for g in torch.gradient((joint / (of_f * of_m)).log(), dim=(1, 2)))
    info_m = (joint * along_m.square()).sum(2, keepdim=True) / of_f
    info_f = (joint * along_f.square()).sum(1, keepdim=True) / of_m
    tables = (along_m, along_f, info_m.expand_as(joint), info_f.expand_as(joint))
    return torch.stack(tables, -1).view(-1, 4), cell


def _banded(n: int, sigma: float, like: Tensor) -> Tensor:
    """(n, n): each row a Gaussian about its own place, what would fall over the border added to it."""
    reach = max(round(2.5 * sigma), 1)
    at, offsets = torch.arange(n, device=like.device), range(-reach, reach + 1)
    kernel = torch.tensor([math.exp(-0.5 * (o / sigma) ** 2) for o in offsets], dtype=like.dtype, device=like.device)
    matrix = like.new_zeros(n, n)
    for offset, weight in zip(offsets, kernel / kernel.sum(), strict=True):
        matrix[at, (at + offset).clamp(0, n - 1)] += weight
    return matrix
