"""Joint histograms of overlapping neighborhoods, and the pointwise mutual information in them.

The image is divided into cubic blocks. Each block has a joint distribution p(f, m), estimated from the voxels of the block
and its neighbors, with a small contribution of the whole images. Source: Zhuang et al., "A nonrigid registration framework
using spatially encoded mutual information and free-form deformations", IEEE TMI 2011.

The cells of the joint histograms of all blocks and all pairs of a batch are numbered consecutively: pair, block, row (fixed
intensity), column (moving intensity). One more cell, the last, is that of voxels that are not counted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.settings import VariationalSettings

EMPTY = 1e-12  # voxels in an empty cell: too few to matter, but enough to divide by


class Layout(NamedTuple):
    """How the histograms of a batch are laid out.

    pairs: of images.
    blocks: along D, H, W.
    bins: per image.
    """

    pairs: int
    blocks: tuple[int, int, int]
    bins: int

    @property
    def cells(self) -> int:
        """Of all histograms; also the number of the cell beyond them."""
        return self.pairs * math.prod(self.blocks) * self.bins**2


def histogram_rows(fixed: Tensor, block: int, bins: int, counted: Tensor | None = None) -> tuple[Tensor, Layout]:
    """The cell at which the row begins that each voxel falls into, in the joint histogram of its block.

    Args:
        fixed: (N, 1, D, H, W) in [0, 1].
        block: side of a block in voxels.
        counted: (N, 1, D, H, W) bool, voxels of the fixed image that are counted; None: all.
    Returns:
        (N, 1, D, H, W) int32, ``layout.cells`` where a voxel is not counted; and the layout.
    """
    layout = Layout(len(fixed), tuple(math.ceil(n / block) for n in fixed.shape[2:]), bins)
    row = to_bins(fixed, bins).int()
    rows = torch.add(_first_cells(*fixed.shape[2:], block, bins, like=fixed), row, alpha=bins)
    if layout.pairs > 1:
        pair = torch.arange(layout.pairs, device=fixed.device, dtype=torch.int32).view(-1, 1, 1, 1, 1)
        rows += pair * (layout.cells // layout.pairs)
    return (rows if counted is None else rows.masked_fill_(~counted, layout.cells)), layout


def _first_cells(depth: int, height: int, width: int, block: int, bins: int, *, like: Tensor) -> Tensor:
    """(D, H, W) int32: the first cell of the histogram of the block that a voxel lies in."""
    z, y, x = (torch.arange(n, device=like.device, dtype=torch.int32) // block for n in (depth, height, width))
    rows, columns = math.ceil(height / block), math.ceil(width / block)
    return ((z[:, None, None] * rows + y[:, None]) * columns + x) * bins**2


_first_cells = fields.cached(_first_cells, size=fields.CACHED_GRIDS)


def to_bins(image: Tensor, bins: int) -> Tensor:
    """The bin of each value in [0, 1], as a float; the first for NaN, which has no index."""
    return (image * (bins - 1)).round_().nan_to_num_().clamp_(0, bins - 1)


def write_tables(cell: Tensor, layout: Layout, settings: VariationalSettings, tables: Tensor) -> None:
    """Pointwise mutual information L(f, m) = log p(f, m) / (p(f) p(m)) and its derivatives, for every cell.

    Args:
        cell: int64, of all voxels of the batch, any shape.
        tables: (5, cells + 1), written to but for the last cell: dL/dm, dL/df, E[(dL/dm)^2 | f], E[(dL/df)^2 | m] and L.
    """
    # Sums of ones are whole numbers (below 2^24), so they do not depend on the order in which a GPU adds.
    ones = fields.constants(1, like=tables).expand(cell.numel())
    counts = tables.new_full((layout.cells + 1,), EMPTY).scatter_add_(0, cell.flatten(), ones)
    _pointwise(_joint(counts[: layout.cells], layout, settings), settings, tables[:, : layout.cells])


def _joint(counts: Tensor, layout: Layout, settings: VariationalSettings) -> Tensor:
    """Joint distributions p(f, m) of all blocks, (pairs * blocks, bins, bins), before independence is mixed in.

    Args:
        counts: (cells,).
    """
    n, (d, h, w), bins = layout
    z, y, x = (fields.gaussian(side, settings.block_sigma, like=counts) for side in (d, h, w))
    near = y @ (z @ counts.view(n, d, -1)).view(n * d, h, -1)
    near = (x @ near.view(n * d * h, w, -1)).view(n, -1, bins, bins)
    everywhere = counts.view(n, -1, bins, bins).sum(1, keepdim=True)
    # Each histogram gets the share global_weight of the number of its own voxels from that of the whole images.
    share = near.sum((2, 3), keepdim=True) / everywhere.sum((2, 3), keepdim=True)
    near = torch.addcmul(near, share, everywhere, value=settings.global_weight).view(-1, bins, bins)
    parzen = fields.gaussian(bins, settings.parzen_sigma, like=counts)
    joint = parzen @ near @ parzen.T
    return joint.div_(joint.sum((1, 2), keepdim=True))


def _pointwise(joint: Tensor, settings: VariationalSettings, out: Tensor) -> None:
    """Writes the tables of joint distributions.

    Args:
        joint: (B, bins, bins), written to.
        out: (5, B * bins * bins), see :func:`write_tables`.
    """
    epsilon, derivative = settings.epsilon, _derivative(settings.bins, like=joint)
    along_m, along_f, info_m, info_f, pointwise = out = out.view(5, *joint.shape)
    p_f, p_m = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    product = p_f * p_m
    joint.lerp_(product, settings.independence_weight)
    torch.div(joint + epsilon, product.add_(epsilon), out=pointwise).log_()
    torch.matmul(derivative, pointwise, out=along_f)
    torch.matmul(pointwise, derivative.T, out=along_m)
    # E[(dL/dm)^2 | f] is the same in a row, E[(dL/df)^2 | m] in a column.
    both = (out[:2] * joint).mul_(out[:2])
    torch.div(both[0].sum(2, keepdim=True).expand_as(joint), p_f, out=info_m)
    torch.div(both[1].sum(1, keepdim=True).expand_as(joint), p_m, out=info_f)


@fields.cached
def _derivative(bins: int, *, like: Tensor) -> Tensor:
    """(bins, bins): maps values at equal steps from 0 to 1 to their derivative there, by central differences."""
    return torch.gradient(torch.eye(bins, dtype=like.dtype, device=like.device) * (bins - 1), dim=0)[0]
