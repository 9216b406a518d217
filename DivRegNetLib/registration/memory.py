"""Estimates the memory of a registration before it runs, and the memory that is available. No torch here.

The bytes per voxel were fitted to measured peaks; ``python Testing/tools/benchmark.py --memory`` compares them again.
"""

import contextlib
import ctypes
import gc
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from DivRegNetLib.core.composites import LARGEST_GROWTH
from DivRegNetLib.core.control_groups import control_groups, read_kernel_file
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import DeviceError
from DivRegNetLib.models.card import FINEST_MM, Card

# Bytes of the process, independent of the images.
LIBRARIES = 343e6  # torch (CPU), ITK, numpy and a model
EXTRA = 170e6  # code loaded later, slabs, patches, pictures, and memory that the allocator keeps
# Bytes per voxel of the working grid.
FIELDS = 180  # images, fields, histograms and their copies while the network runs
SAMPLED = 60  # the part of FIELDS that is there before any network runs
FLOAT = 4
PER_CHANNEL = 12  # features of the two finest levels, joined, before and after a convolution
PER_CLASS = 16  # on the displacement's grid: class probabilities of both images, warped, and their gradients
INVERSION = 275  # of the field, after the network's memory is free
ALL_VOXELS = 90  # equations of a level that samples all voxels
REFINEMENT = 60  # at full resolution, where the field is twice as fine
# Bytes per voxel of the volumes.
SMOOTHING = 20  # smoothing of the larger volume in single precision
FIELD = 24  # a displacement in double precision, as ITK needs it; once more while it is written
WARPING = 14  # resampling on the fixed grid
# What is kept of the memory that the methods freed, while the volumes take theirs (DivRegNetLib/run/process.py): a share of the
# lesser of both, and bytes at most.
KEPT_SHARE, KEPT = 0.7, 250e6

COARSEST = 4.0  # times the model's spacing; a coarser registration would be little more than an affine alignment
COARSER = 1.25  # factor of the spacing from one attempt to the next, which halves the voxels
SPARE = 0.9  # fraction of the available memory that is planned with


@dataclass(frozen=True)
class Estimate:
    """Bytes that one registration takes in addition to the libraries and the two images.

    working: size of the working grid in voxels along x, y, z.
    device: on the device that the methods run on, while they run.
    host: in main memory, for the volumes and their displacement fields, after that.
    """

    working: tuple[int, int, int]
    device: int
    host: int

    @property
    def cpu(self) -> int:
        """In main memory where the methods run on the CPU: the two follow each other, and some of the first is kept."""
        kept = KEPT_SHARE * (min(self.device, self.host) - EXTRA)
        return max(self.device, self.host) + int(min(kept, KEPT))


@dataclass(frozen=True)
class Plan:
    """Grids of a registration that fit into the memory.

    working: in fixed space.
    fixed, moving: of the displacement field and its inverse: those of the volumes, or every n-th voxel of them.
    """

    working: Grid
    fixed: Grid
    moving: Grid


def estimate(
    card: Card,
    fixed: Grid,
    moving: Grid,
    *,
    spacing: float | None = None,
    refine: int = 0,
    fields: tuple[Grid, Grid] | None = None,
    region: Grid | None = None,
) -> Estimate:
    """Memory for one registration, its files included.

    Args:
        fixed, moving: grids of the volumes.
        spacing: working resolution in mm; None: the model's.
        refine: refinement steps; any number above 0 takes the same memory.
        fields: grids of the displacement field and its inverse; None: those of the volumes.
        region: what the working grid covers; None: all of the fixed grid.
    """
    region = region or fixed
    grid = working_grid(card, region, max(spacing or card.working_spacing(region, moving), FINEST_MM))
    channels = (16, 32) if card.regnet is None else card.regnet.get("channels") or (16, 32)
    network = FIELDS + PER_CHANNEL * sum(channels[:2]) / _stride(card) ** 3 + (REFINEMENT if refine else 0)
    if any(level.all_voxels for level in card.variational_settings.levels):
        network += ALL_VOXELS
    # The class network runs before the others, and its probabilities are kept.
    if card.classnet is not None and card.classes_cover(grid):
        finest, classes = _stride(card) ** 3, len(card.classes)
        voxels = card.classnet.get("stride", 1) ** 3
        kept = 2 * FLOAT * classes / voxels
        running = PER_CHANNEL * sum(card.classnet.get("channels", (16, 32))[:2]) / voxels
        network = kept + max(network + PER_CLASS * classes / finest, SAMPLED + running)
    in_fields = [LARGEST_GROWTH * g.voxels for g in fields or (fixed, moving)]
    host = max(
        SMOOTHING * max(fixed.voxels, moving.voxels),
        FIELD * (sum(in_fields) + max(in_fields)),
        FIELD * sum(in_fields) + WARPING * fixed.voxels,
    )
    return Estimate(grid.size, int(EXTRA + grid.voxels * max(network, INVERSION)), int(EXTRA + host))


def plan(
    card: Card,
    fixed: Grid,
    moving: Grid,
    spacing: float,
    refine: int,
    fits: Callable[[Estimate], bool],
    region: Grid | None = None,
) -> Plan:
    """The finest working resolution, from ``spacing`` (mm) to COARSEST times the model's, at which a registration fits.

    Where displacement fields do not fit at full resolution, they are stored at the working resolution.

    Args:
        fits: whether an estimate fits into the memory.
        region: what the working grid covers; None: all of the fixed grid.
    Raises:
        DeviceError: not even the coarsest fits; the message states what it takes.
    """
    region = region or fixed
    coarsest = max(spacing, COARSEST * card.working_spacing(region, moving))
    for step in range(math.ceil(math.log(coarsest / spacing) / math.log(COARSER) - 1e-9) + 1):
        mm = min(spacing * COARSER**step, coarsest)
        for grids in ((fixed, moving), (fixed.thinned(mm), moving.thinned(mm))):
            needed = estimate(card, fixed, moving, spacing=mm, refine=refine, fields=grids, region=region)
            if fits(needed):
                return Plan(working_grid(card, region, mm), *grids)
    sizes = " and ".join(" x ".join(map(str, grid.size)) for grid in (fixed, moving))
    raise DeviceError(
        f"the memory is too small for volumes of {sizes} voxels: even at {mm:.3g} mm their registration takes "
        f"{text(needed.cpu)} more; crop or shrink them, or use a computer with more memory"
    )


def working_grid(card: Card, region: Grid, spacing: float) -> Grid:
    """The network's grid over a region at a resolution (mm). Its sides are multiples of what RegNet pads to
    (``RegNetConfig.multiple``, which needs torch)."""
    return region.working_grid(spacing, multiple=_stride(card) * 4)


def room(limit: float | None, *images: sitk.Image) -> float:
    """Bytes that a registration of these images may take in addition; infinite where the system does not report memory.

    Args:
        limit: of the process, in GB; None: what the system has.
    """
    return SPARE * available() if limit is None else limit * 1e9 - held(*images)


def held(*images: sitk.Image) -> float:
    """Bytes that a process has taken before it registers: the libraries and the images."""
    each = (i.GetNumberOfPixels() * i.GetNumberOfComponentsPerPixel() * i.GetSizeOfPixelComponent() for i in images)
    return LIBRARIES + sum(each)


def available(root: Path = Path("/")) -> float:
    """Bytes of main memory that this process can allocate: those that the system reports, and in a container or a batch job
    those that the limit of its control group leaves. Infinite where the system reports nothing.

    Args:
        root: of the file system that is read, for tests.
    """
    limits = [_meminfo(root / "proc/meminfo"), *map(_left_in_group, control_groups(root, "memory"))]
    if reported := [n for n in limits if n is not None]:
        return max(min(reported), 0)
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def give_back() -> None:
    """Returns free memory to the system, after each pair of a cohort and where the memory ran out.

    Collects objects that refer to each other, and lets glibc return free memory, of which it otherwise keeps a quarter of a
    megabyte more with each pair.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def text(size: float) -> str:
    """A number of bytes for people: ``1.2 GB``, ``350 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 950e6 else f"{max(round(size / 1e6, -1), 10):.0f} MB"


def _meminfo(file: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return 1024 * int(read_kernel_file(file).split("MemAvailable:")[1].split()[0])
    return None


def _left_in_group(group: Path) -> float | None:
    """Bytes that the limit of a control group leaves; file caches count as free, as the system drops them."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            most, used = (int(read_kernel_file(group / name)) for name in (limit, usage))
            statistics = dict(line.split() for line in read_kernel_file(group / "memory.stat").splitlines())
            return most - used + int(statistics.get("inactive_file", 0))
    return None


def _stride(card: Card) -> int:
    return (card.variational if card.regnet is None else card.regnet).get("stride", 2)
