"""Joint histograms of overlapping neighborhoods, and the pointwise mutual information in them.

The image is divided into cubic blocks. Each block has a joint distribution p(f, m), estimated from the voxels of the block
and its neighbors, with a small contribution of the whole images. Source: Zhuang et al., "A nonrigid registration framework
using spatially encoded mutual information and free-form deformations", IEEE TMI 2011.
"""

import math

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.settings import VariationalSettings

CELLS_AT_ONCE = 100_000  # of histograms that a CPU works on at once, so that they stay in its cache; a GPU takes all
MIN_COUNT = 1e-6  # replaces the number of voxels of a neighborhood without any


def histogram_rows(fixed: Tensor, block: int, bins: int) -> tuple[Tensor, tuple[int, int, int]]:
    """The row of its block's joint histogram that each voxel falls into, numbered through all blocks.

    Args:
        fixed: (N, 1, D, H, W) in [0, 1].
        block: side of a block in voxels.
    Returns:
        (N, 1, D, H, W) int32, and the number of blocks along D, H, W.
    """
    blocks = tuple(math.ceil(n / block) for n in fixed.shape[2:])
    z, y, x = (torch.arange(n, device=fixed.device, dtype=torch.int32) // block for n in fixed.shape[2:])
    number = (z[:, None, None] * blocks[1] + y[:, None]) * blocks[2] + x
    return _bin(fixed, bins).add_(number, alpha=bins), blocks


def _bin(image: Tensor, bins: int) -> Tensor:
    """The bin of each value in [0, 1], int32."""
    return (image * (bins - 1)).round_().int().clamp_(0, bins - 1)


def pointwise_tables(
    rows: Tensor, moving: Tensor, blocks: tuple[int, int, int], settings: VariationalSettings, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pointwise mutual information L(f, m) = log p(f, m) / (p(f) p(m)) and its derivatives, for every block and bin pair.

    Args:
        rows: (D, H, W) of the fixed image, see :func:`histogram_rows`.
        moving: (D, H, W) in [0, 1].
        blocks: along D, H, W.
        counted: (D, H, W) bool, the voxels that are counted; None: all.
    Returns:
        (5, cells + 1): dL/dm, dL/df, E[(dL/dm)^2 | f], E[(dL/df)^2 | m] and L of each cell, and a last cell of zeros.
        (D, H, W) int32: the cell of each voxel, the last one where it is not counted.
    """
    bins, cells = settings.bins, math.prod(blocks) * settings.bins**2
    cell = _bin(moving, bins).add_(rows, alpha=bins)
    if counted is not None:
        cell = cell.masked_fill_(~counted, cells)
    # Whole numbers are counted: on a GPU a sum of floats would depend on its order.
    counts = torch.bincount(cell.flatten(), minlength=cells + 1)[:cells].to(moving.dtype)
    z, y, x = (fields.gaussian(n, settings.block_sigma, like=moving) for n in blocks)
    neighborhood = y @ (z @ counts.view(blocks[0], -1)).view(blocks[0], blocks[1], -1)
    neighborhood = (x @ neighborhood.view(-1, blocks[2], bins**2)).view(-1, bins, bins)
    everywhere = counts.view(-1, bins, bins).sum(0)
    everywhere = settings.global_weight * everywhere / everywhere.sum().clamp_min(1)
    tables = neighborhood.new_empty(5, cells + 1)
    tables[:, cells] = 0
    at_once = len(neighborhood) if moving.is_cuda else max(CELLS_AT_ONCE // bins**2, 1)
    parts = tables[:, :cells].view(5, -1, bins, bins).split(at_once, 1)
    for some, out in zip(neighborhood.split(at_once), parts, strict=True):
        _pointwise(some, everywhere, settings, out)
    return tables, cell


@fields.cached
def _derivative(bins: int, *, like: Tensor) -> Tensor:
    """(bins, bins): maps values at equal steps from 0 to 1 to their derivative there, by central differences."""
    return torch.gradient(torch.eye(bins, dtype=like.dtype, device=like.device) * (bins - 1), dim=0)[0]


def _pointwise(counts: Tensor, everywhere: Tensor, settings: VariationalSettings, out: Tensor) -> None:
    """Writes the tables of some blocks.

    Args:
        counts: (B, bins, bins) of voxels in the neighborhood of each block, by fixed and moving intensity.
        everywhere: (bins, bins), weighted distribution of the whole images.
        out: (5, B, bins, bins), see :func:`pointwise_tables`.
    """
    bins, epsilon = settings.bins, settings.epsilon
    parzen, derivative = fields.gaussian(bins, settings.parzen_sigma, like=counts), _derivative(bins, like=counts)
    distribution = counts / counts.sum((1, 2), keepdim=True).clamp_min(MIN_COUNT)
    joint = parzen @ (distribution + everywhere) @ parzen.T
    joint /= joint.sum((1, 2), keepdim=True).clamp_min(epsilon)
    p_f, p_m = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    product = p_f * p_m
    joint.lerp_(product, settings.independence_weight)
    along_m, along_f, info_m, info_f, pointwise = out
    torch.div(joint + epsilon, product.add_(epsilon), out=pointwise).log_()
    torch.matmul(derivative, pointwise, out=along_f)
    torch.matmul(pointwise, derivative.T, out=along_m)
    info_m.copy_((joint * along_m.square()).sum(2, keepdim=True) / p_f.clamp_min(epsilon))
    info_f.copy_((joint * along_f.square()).sum(1, keepdim=True) / p_m.clamp_min(epsilon))
