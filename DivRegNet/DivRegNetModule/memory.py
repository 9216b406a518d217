"""How much memory a registration is going to take, before torch is there to ask."""

from collections.abc import Sequence
from dataclasses import dataclass

from DivRegNetLib.geometry import Grid
from DivRegNetLib.models import Card

# Bytes per voxel, from the peak memory of single registrations; estimates err to the large side.
FIELDS = 160  # images, fields and their copies on the working grid
PER_CHANNEL = 12  # features of the two finest levels, joined, before and after a convolution
REFINEMENT = 400  # what automatic differentiation keeps
OUTPUT = 72  # full resolution: a field in double precision, twice, and the volumes
FINEST_MM = 0.1


@dataclass(frozen=True)
class Estimate:
    """working: voxels along x, y, z of the network's grid; device, host: bytes."""

    working: tuple[int, int, int]
    device: int
    host: int


def estimate(
    card: Card, fixed: Grid, moving_size: Sequence[int], *, spacing: float | None = None, refine: int = 0
) -> Estimate:
    """Memory for one registration.

    Args:
        fixed: grid of the fixed volume, of which the working grid covers all.
        moving_size: voxels of the moving volume along its axes.
        spacing: working resolution in mm; None: the model's.
        refine: refinement steps, which cost the same whether few or many.
    """
    stride = card.regnet.get("stride", 2)
    grid = fixed.working_grid(max(spacing or card.spacing_mm, FINEST_MM), multiple=stride * 8)
    channels = card.regnet.get("channels") or (16, 32)
    per_voxel = FIELDS + PER_CHANNEL * sum(channels[:2]) / stride**3 + (REFINEMENT if refine else 0)
    voxels = _product(grid.size)
    return Estimate(grid.size, int(voxels * per_voxel), OUTPUT * (_product(fixed.size) + _product(moving_size)))


def text(size: int) -> str:
    """A number of bytes for people: ``1.2 GB``, ``350 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 950e6 else f"{max(round(size / 1e6, -1), 10):.0f} MB"


def _product(sides: Sequence[int]) -> int:
    total = 1
    for side in sides:
        total *= int(side)
    return total
