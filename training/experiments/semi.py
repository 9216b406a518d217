"""FFD+SEMI, the iterative baseline: a free-form deformation that maximizes spatially encoded mutual information.

Source: Zhuang, Arridge, Hawkes, Ourselin, "A nonrigid registration framework using spatially encoded mutual information
and free-form deformations", IEEE TMI 2011. arXiv 1908.08767 compares with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.similarity.mutual_information import check_histogram, entropy, parzen_window
from training.data.free_form import bspline_basis, evaluate


@dataclass(frozen=True)
class SemiSettings:
    """Settings of a registration. Lengths are in voxels of a level's grid.

    shrink: shrink factor of each level, from coarse to fine.
    steps: gradient steps of each level.
    control: distance between control points of the deformation.
    window: distance between the centers of the windows of local MI; a window is four times as wide.
    bins: bins per image of the joint histograms.
    bending: weight of the bending energy (``fields.bending``).
    rate: learning rate of Adam at the beginning of a level; it falls to 0 along a cosine.

    Raises:
        ValueError: the numbers of steps and levels differ.
    """

    shrink: tuple[int, ...] = (4, 2, 1)
    steps: tuple[int, ...] = (40, 40, 10)
    control: float = 5.0
    window: float = 12.0
    bins: int = 32
    bending: float = 2.0
    rate: float = 0.3

    def __post_init__(self) -> None:
        if len(self.shrink) != len(self.steps):
            raise ValueError(f"{len(self.shrink)} levels (shrink) but steps for {len(self.steps)}: give one per level")


def local_mi(fixed: Tensor, moving: Tensor, *, window: float, bins: int = 32) -> Tensor:
    """Spatially encoded MI in nats, differentiable in ``moving`` (a scalar).

    The joint histogram of a window weights voxels by a cubic B-spline around its center. The result is the mean of the MIs
    of all windows, weighted by their mass. The splines of all windows add up to 1 at every voxel, so this is the conditional
    MI I(F; M | window). Histograms as in Mattes et al., IEEE TMI 2003: the fixed intensity falls into one bin, the moving one
    into four bins under a cubic B-spline.

    Voxels are added to the histogram of their block, which is a quarter of ``window`` wide, and blocks to the windows. A
    spline is nearly constant over a block, and a voxel then changes 4 numbers instead of 256.

    Args:
        fixed, moving: (1, 1, D, H, W) in [0, 1] (values outside are clamped).
        window: voxels between window centers; ``math.inf`` gives the MI of the whole images.
        bins: bins per image, at least 4.
    Raises:
        ValueError: fewer than 4 bins, or images of unlike shape.
    """
    check_histogram(fixed, moving, bins)
    shape = fixed.shape[2:]
    side = math.ceil(min(window / 4, max(shape)))
    blocks = tuple(math.ceil(n / side) for n in shape)
    z, y, x = (torch.arange(n, device=fixed.device) // side for n in shape)
    block = (z[:, None, None] * blocks[1] + y[:, None]) * blocks[2] + x

    # [0, 1] is mapped to bins 1 to bins - 2, so that the four bins around a moving intensity exist.
    f, m = (image[0, 0].clamp(0, 1) * (bins - 3) + 1 for image in (fixed, moving))
    below = m.detach().floor().clamp(max=bins - 3)
    first = (block * bins + f.round().long()) * bins + below.long() - 1
    cells = first.flatten()[:, None] + torch.arange(4, device=fixed.device)
    weights = parzen_window((m - below).flatten() + 1, 4) / m.numel()
    joint = weights.new_zeros(math.prod(blocks) * bins * bins).scatter_add(0, cells.flatten(), weights.flatten())

    bases = (bspline_basis(n, window / side, fixed.device).to(joint) for n in blocks)
    p = torch.einsum("zyxfm,zi,yj,xk->ijkfm", joint.view(*blocks, bins, bins), *bases)
    return -entropy(p) + entropy(p.sum(-1)) + entropy(p.sum(-2)) - entropy(p.sum((-2, -1)))


def register(
    fixed: Tensor,
    moving: Tensor,
    settings: SemiSettings | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """The displacement that maximizes spatially encoded MI minus bending energy, from coarse to fine, starting from zero.

    Each level adds a free-form deformation to the displacement of the level before. Adam replaces the paper's gradient ascent.

    Args:
        fixed, moving: (1, 1, D, H, W) in [0, 1] on one grid, on any device.
        progress: called with the finished fraction; may raise to cancel.
    Returns:
        (1, 3, D, H, W) in voxels.
    """
    settings = settings or SemiSettings()
    displacement, done = torch.zeros_like(fixed).repeat(1, 3, 1, 1, 1), 0
    for shrink, steps in zip(settings.shrink, settings.steps, strict=True):
        shape = tuple(max(round(n / shrink), 1) for n in fixed.shape[2:])
        f, m = (F.interpolate(image, shape, mode="area") for image in (fixed, moving))
        start = fields.resize(displacement, shape)
        bases = [bspline_basis(n, settings.control, fixed.device).to(fixed) for n in shape]
        control = fixed.new_zeros(3, *(basis.shape[1] for basis in bases)).requires_grad_()

        def deform(control: Tensor, start: Tensor = start, bases: list[Tensor] = bases) -> Tensor:
            return start + evaluate(control, bases)

        optimizer = torch.optim.Adam([control], lr=settings.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            displacement = deform(control)
            similarity = local_mi(f, fields.warp(m, displacement), window=settings.window, bins=settings.bins)
            optimizer.zero_grad()
            (settings.bending * fields.bending(displacement) - similarity).backward()
            optimizer.step()
            schedule.step()
            done += 1
            progress(done / sum(settings.steps))
        displacement = deform(control.detach())
    return fields.resize(displacement, tuple(fixed.shape[2:]))
