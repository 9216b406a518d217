"""Joint histograms of overlapping neighborhoods, and the pointwise mutual information in them.

The image is divided into cubic blocks. Each block has a joint distribution p(f, m), estimated from the voxels of the block
and its neighbors, with a small contribution of the whole images. Source: Zhuang et al., "A nonrigid registration framework
using spatially encoded mutual information and free-form deformations", IEEE TMI 2011.

The cells of the joint histograms of all blocks and all pairs of a batch are numbered consecutively: pair, block, row (fixed
intensity), column (moving intensity). One more row, the last, is that of voxels that are not counted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.settings import VariationalSettings

SMALLEST = 1e-6  # share of what was observed in a joint distribution


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
        """Of all histograms; also the number of the first cell beyond them."""
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
    row = to_bins(fixed, bins).int()  # the whole part
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
    """Values in [0, 1] on the scale of the bins, whose numbers are the whole parts; the first bin for NaN."""
    return torch.nan_to_num(image).clamp_(0, 1).mul_(bins - 1).add_(0.5)


def write_tables(cell: Tensor, layout: Layout, settings: VariationalSettings, tables: Tensor) -> None:
    """Pointwise mutual information L(f, m) = log p(f, m) / (p(f) p(m)) and its derivatives, for every cell.

    Args:
        cell: int64, of all voxels of the batch, any shape.
        tables: (5, cells + bins), written to but for the last row: dL/dm, -dL/df, E[(dL/dm)^2 | f], E[(dL/df)^2 | m] and L up
            to a constant.
    """
    # Sums of ones are whole numbers (below 2^24), so they do not depend on the order in which a GPU adds.
    ones = fields.constants(1, like=tables).expand(cell.numel())
    counts = tables.new_full((layout.cells + layout.bins,), settings.epsilon).scatter_add_(0, cell.flatten(), ones)
    _pointwise(_joint(counts[: layout.cells], layout, settings), settings, tables[:, : layout.cells])


def _joint(counts: Tensor, layout: Layout, settings: VariationalSettings) -> Tensor:
    """Joint histograms of all blocks after smoothing, (pairs * blocks, bins + 1, bins + 1): the last column has the sums of the
    rows, the last row those of the columns.

    Args:
        counts: (cells,).
    """
    n, (d, h, w), bins = layout
    z, y, x = (fields.gaussian(side, settings.block_sigma, like=counts) for side in (d, h, w))
    near = y @ (z @ counts.view(n, d, -1)).view(n * d, h, -1)
    near = (x @ near.view(n * d * h, w, -1)).view(n, -1, bins, bins)
    everywhere = counts.view(n, -1, bins, bins).sum(1, keepdim=True)
    # The whole images count as much everywhere as global_weight times the voxels of a usual block.
    near = torch.add(near, everywhere, alpha=settings.global_weight / (d * h * w)).view(-1, bins, bins)
    parzen = _parzen(bins, settings.parzen_sigma, like=counts)
    return parzen @ near @ parzen.T


def _pointwise(joint: Tensor, settings: VariationalSettings, out: Tensor) -> None:
    """Writes the tables of joint histograms.

    Args:
        joint: (B, bins + 1, bins + 1), with the sums.
        out: (5, B * bins * bins), see :func:`write_tables`.
    """
    along_m, along_f, info_m, info_f, pointwise = out = out.view(5, len(joint), settings.bins, settings.bins)
    joint, of_f, of_m, total = joint[:, :-1, :-1], joint[:, :-1, -1:], joint[:, -1:, :-1], joint[:, -1:, -1:]
    torch.div(joint, torch.mul(of_f, of_m / total, out=pointwise), out=pointwise)
    # Mixed with the product of the marginals; the logarithm of that, up to a constant.
    share = settings.independence_weight
    pointwise.add_(share / max(1 - share, SMALLEST)).log_()
    torch.matmul(_derivative(settings.bins, -1, like=joint), pointwise, out=along_f)
    torch.matmul(pointwise, _derivative(settings.bins, 1, like=joint).T, out=along_m)
    # E[(dL/dm)^2 | f] is the same in a row, E[(dL/df)^2 | m] in a column.
    both = torch.mul(out[:2], joint, out=out[2:4]).mul_(out[:2])
    of_rows, of_columns = both[0].sum(2, keepdim=True), both[1].sum(1, keepdim=True)
    torch.div(of_rows.expand_as(joint), of_f, out=info_m)
    torch.div(of_columns.expand_as(joint), of_m, out=info_f)


@fields.cached
def _parzen(bins: int, sigma: float, *, like: Tensor) -> Tensor:
    """(bins + 1, bins): the Parzen window, and a row that adds what it gives."""
    window = fields.gaussian(bins, sigma, like=like)
    return torch.cat((window, window.sum(0, keepdim=True)))


@fields.cached
def _derivative(bins: int, sign: int, *, like: Tensor) -> Tensor:
    """(bins, bins): maps values at equal steps from 0 to 1 to their derivative there, by central differences, times a sign."""
    steps = torch.eye(bins, dtype=like.dtype, device=like.device) * (sign * (bins - 1))
    return torch.gradient(steps, dim=0)[0]
