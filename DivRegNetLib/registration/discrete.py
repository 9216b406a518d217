"""A discrete start: a coarse displacement by trying every shift, where Gauss-Newton steps would not get.

Gauss-Newton steps follow the gradient and stay in the next local optimum. Here every cell of a few voxels is compared to the
moving image after each of some hundred shifts, and the shifts of neighboring cells are made to agree by coupled convex
optimization: with the costs K(x, s) of cell x and shift s,

    s(x) = argmin K(x, s) + coupling |s - u(x)|^2,    u = smooth(s),

for rising weights of the coupling. Sources: Heinrich et al., "Non-parametric discrete registration with convex
optimisation", WBIR 2014; Siebert et al., "ConvexAdam: Self-configuring dual-optimisation-based 3D multitask medical image
registration", IEEE TMI 2024. The costs are squared distances of MIND-SSC descriptors that were averaged over the cells, so
that a shift takes one pass over the cells.

The result is a candidate: in a small field of view, or where contrasts say little, it can be worse than no start. Evidence
has to choose (:mod:`DivRegNetLib.quality.evidence`).

Axis order and units as in :mod:`DivRegNetLib.core.fields`. Nothing here is differentiated, and nothing waits for a GPU.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.features import Valid
from DivRegNetLib.similarity.descriptors import believable, mind_ssc


@dataclass(frozen=True)
class DiscreteSettings:
    """Settings of the discrete start. A voxel is one of the images that are compared.

    voxels: the images are averaged until they have no more voxels than this.
    cell: side of a cell in voxels.
    steps: shifts to each side along each axis, so that there are ``(2 * steps + 1) ** 3``.
    step: largest distance of one shift to the next, in voxels.
    reach: longest shift along an axis, as a fraction of the side of a cube as large as the field of view.
    couplings: weights of the squared distance of a cell's shift to the smooth field, one for each iteration; in units of the
        mean cost per squared ``step``.
    smoothing: standard deviation of the Gaussian that smooths the shifts, in cells.
    window: the same, of the costs.
    """

    voxels: int = 1_300_000
    cell: int = 4
    steps: int = 4
    step: int = 2
    reach: float = 0.12
    couplings: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    smoothing: float = 1.0
    window: float = 0.0


DEFAULT = DiscreteSettings()


@torch.no_grad()
def register(
    fixed: Tensor,
    moving: Tensor,
    settings: DiscreteSettings = DEFAULT,
    *,
    valid: Valid | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """The displacement of coupled convex optimization.

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], on one grid.
        valid: where the images were measured, two (N, 1, D, H, W); None: everywhere.
        progress: called with the fraction that is done; what it raises ends the registration.
    Returns:
        (N, 3, D, H, W) in voxels.
    """
    shape = fixed.shape[2:]
    shrink = 1
    while math.prod(shape) > settings.voxels * shrink**3:
        shrink += 1
    step = shift_length(shape, shrink, settings)
    if step == 0:
        return fixed.new_zeros(len(fixed), 3, *shape)
    images = torch.cat((fixed, moving))
    multiple = shrink * settings.cell
    images = fields.padded(images, multiple)
    measured = torch.ones_like(images) if valid is None else torch.cat(valid).to(images.dtype)
    measured = fields.padded(measured, multiple, mode="constant")
    if shrink > 1:
        images, measured = (F.avg_pool3d(x, shrink) for x in (images, measured))
    costs = _costs(images, measured > 0.99, step, settings, progress)
    displacement = _coupled(costs, step, settings)
    progress(1.0)
    whole = fields.resize(displacement, tuple(n * multiple for n in displacement.shape[2:]))
    return whole[(..., *(slice(n) for n in shape))]


def shift_length(shape: tuple[int, int, int], shrink: int = 1, settings: DiscreteSettings = DEFAULT) -> int:
    """Distance of one shift to the next for images of (D, H, W), in voxels of the averaged images; 0 where the images are too
    small for any shift."""
    side = math.prod(shape) ** (1 / 3) / shrink
    return min(int(settings.reach * side / settings.steps), settings.step)


def _costs(
    images: Tensor, measured: Tensor, step: int, settings: DiscreteSettings, progress: Callable[[float], None]
) -> Tensor:
    """Costs of every shift at every cell, (N, shifts, d, h, w), in units of their mean.

    Args:
        images: (2 N, 1, D, H, W), the fixed ones first; measured: likewise, bool.
    """
    cell, steps = settings.cell // step, settings.steps
    known = believable(measured).to(images.dtype)
    known = F.avg_pool3d(known, step) if step > 1 else known
    descriptors = torch.cat((mind_ssc(images, stride=step, valid=known > 0.5) * known, known), 1)
    fixed, moving = descriptors.chunk(2)
    fixed = F.avg_pool3d(fixed, cell)
    moving = F.avg_pool3d(F.pad(moving, [steps, steps + cell - 1] * 3), cell, 1)  # beyond the image nothing is known
    fixed_known, moving_known = fixed[:, -1:], moving[:, -1:]
    fixed, moving = (x[:, :-1] / x[:, -1:].clamp_min(1e-3) for x in (fixed, moving))  # means of what was measured
    d, h, w = fixed.shape[2:]
    costs = images.new_empty(len(fixed), (2 * steps + 1) ** 3, d, h, w)
    weights = torch.empty_like(costs)
    shifts = 2 * steps + 1

    def moved(image: Tensor, z: int, y: int) -> Tensor:
        """What lies at each cell after each shift along x, (N, C, d, h, shifts, w)."""
        at = (slice(o, o + cell * (n - 1) + 1, cell) for o, n in ((z, d), (y, h)))
        length = cell * (w - 1) + 1
        return image[(..., *at, slice(length + shifts - 1))].unfold(-1, length, 1)[..., ::cell]

    for number, (z, y) in enumerate(itertools.product(range(shifts), repeat=2)):
        part = slice(number * shifts, (number + 1) * shifts)
        difference = (fixed[..., None, :] - moved(moving, z, y)).square_()
        costs[:, part] = difference.sum(1).permute(0, 3, 1, 2, 4)
        weights[:, part] = (moved(moving_known, z, y) * fixed_known[..., None, :])[:, 0].permute(0, 3, 1, 2, 4)
        if number % shifts == shifts - 1:
            progress(0.9 * (number + 1) / shifts**2)
    mean = (costs * weights).sum((1, 2, 3, 4), keepdim=True) / weights.sum((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
    costs = costs.div_(mean.clamp_min_(1e-9)).sub_(1).mul_(weights).add_(1)
    if settings.window:
        costs = fields.smooth(costs, settings.window)
    return costs


def _coupled(costs: Tensor, step: int, settings: DiscreteSettings) -> Tensor:
    """The smooth field that the shifts agree on, (N, 3, d, h, w) in cells.

    Args:
        costs: (N, shifts, d, h, w).
    """
    n, count, *shape = costs.shape
    shifts = _shifts(settings.steps, like=costs)
    lengths = shifts.square().sum(1).view(1, count, 1)
    flat, displacement = costs.flatten(2), costs.new_zeros(n, 3, *shape)
    for coupling in settings.couplings:
        products = shifts @ displacement.flatten(2)
        total = torch.add(flat, products, alpha=-2 * coupling).add_(lengths, alpha=coupling)
        best = shifts.index_select(0, total.argmin(1).flatten()).view(n, *shape, 3).permute(0, 4, 1, 2, 3)
        displacement = fields.smooth(best, settings.smoothing)
    return displacement * (step / settings.cell)


@fields.cached
def _shifts(steps: int, *, like: Tensor) -> Tensor:
    """(shifts, 3): all shifts along x, y and z, in steps."""
    every = torch.arange(-steps, steps + 1, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(every, every, every, indexing="ij")[::-1], -1).view(-1, 3)
