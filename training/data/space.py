"""The common space of a cohort, derived from headers: the reference, the grid, and volumes that share a frame."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import LARGEST_WORKING_VOXELS, Grid
from DivRegNetLib.errors import InputError
from DivRegNetLib.io import images
from training.data.broken import Broken, blame, complaint
from training.data.layouts import Source
from training.data.volumes import read

MULTIPLE = 16  # the sides of the common grid are multiples of this number of voxels, so that RegNet needs no padding
MOST_VOXELS = 1_200_000  # of a grid whose spacing is chosen automatically
NICE = tuple(step * 10.0**power for power in (-2, -1, 0, 1) for step in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8))


OVERLAP = 0.5  # two volumes share a frame if at least this share of the smaller one lies inside the other


@dataclass(frozen=True)
class Header:
    """The header of a volume.

    spacing: median side of a voxel, mm.
    grid: grid of the first image; None unless it has three axes.
    """

    spacing: float
    grid: Grid | None

    @property
    def extent(self) -> float:
        """mm^3."""
        return 0.0 if self.grid is None else float(np.abs(np.linalg.det(self.grid.matrix)) * np.prod(self.grid.size))


def measure(source: Source) -> Header:
    """The header of a volume; the voxels are read only where a format requires it.

    Raises:
        Broken: a file is missing or cannot be opened.
    """
    with blame() as at:
        for path in reversed(source.files):  # the first image last
            at(path)
            if not path.exists():
                raise InputError("there is no such file")
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)) if path.is_dir() else ()
        first, last = (_header(Path(name)) for name in (names[0], names[-1])) if names else [_header(path)] * 2
        spacing = float(np.median(first.GetSpacing()))
        if len(first.GetSize()) != 3:
            return Header(spacing, None)
        grid = Grid.of(first)
        if len(names) > 1:  # slices, in order
            matrix = grid.matrix.copy()
            matrix[:3, 2] = np.subtract(last.GetOrigin(), first.GetOrigin()) / (len(names) - 1)
            grid = Grid((*grid.size[:2], len(names)), matrix)
        return Header(spacing, grid)


def _header(path: Path) -> sitk.ImageFileReader | sitk.Image:
    """An object that has the size, spacing, origin and direction of a file."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return images.read_image(path)  # it raises an error that explains the reason
    return reader


def frames(
    sources: Sequence[Source], headers: Mapping[str, Header], reference: Source, together: bool
) -> list[list[Source]]:
    """Groups of volumes that share a frame: volumes of one subject with the same ``frame`` or, if they have none, volumes that
    overlap according to their headers.

    Returns:
        lists whose first volume is the one with the most reliable alignment: the reference, or else the volume most similar
        to it in contrast, then in role. With ``together`` False every volume is a list of its own.
    """
    ranked = sorted(
        sources, key=lambda s: (s is not reference, s.contrasts != reference.contrasts, s.role != reference.role)
    )
    groups: list[list[Source]] = []
    for source in ranked:
        shared = (frame for frame in groups if together and _one_frame(frame[0], source, headers))
        if (frame := next(shared, None)) is None:
            groups.append([source])
        else:
            frame.append(source)
    return groups


def _one_frame(a: Source, b: Source, headers: Mapping[str, Header]) -> bool:
    if a.subject != b.subject:
        return False
    if a.frame or b.frame:
        return a.frame == b.frame
    grids = [headers[source.name].grid for source in (a, b)]
    return None not in grids and overlap(*grids) >= OVERLAP


def overlap(a: Grid, b: Grid) -> float:
    """Share (0 to 1) of the smaller grid that lies inside the other, estimated on a lattice of points."""
    small, large = sorted((a, b), key=lambda grid: abs(np.linalg.det(grid.matrix)) * np.prod(grid.size))
    steps = np.stack(np.meshgrid(*[(np.arange(8) + 0.5) / 8] * 3, indexing="ij"), -1)
    return float(large.contains(small.to_physical(steps * np.array(small.size) - 0.5)).mean())


def choose_reference(
    sources: list[Source],
    splits: dict[str, str],
    headers: Mapping[str, Header],
    wanted: str | None,
    broken: dict[str, Broken],
) -> tuple[Source, sitk.Image]:
    """The reference and its first image; candidates that cannot be read are added to ``broken``.

    Raises:
        ValueError: the wanted reference does not exist or is broken, or all volumes are.
    """
    if wanted is not None:
        candidates = [source for source in sources if source.name == wanted]
        if not candidates:
            names = ", ".join(source.name for source in sources[:5])
            raise ValueError(f"the reference {wanted!r} is not in the cohort; its volumes are {names}, ...")
        if wanted in broken:
            raise InputError(f"the reference cannot be used: {broken[wanted].file}: {broken[wanted].reason}")
    else:
        usable = [source for source in sources if source.name in headers]
        training = [source for source in usable if source.role != "moving" and splits[source.name] == "train"]
        ranked = sorted(training or usable, key=lambda source: (headers[source.name].extent, source.name))
        middle = (len(ranked) - 1) / 2
        candidates = [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: abs(i - middle))]
        candidates += [source for source in usable if source not in candidates]
    for source in candidates:
        try:
            return source, read(source)[0][0]
        except Broken as error:
            broken[source.name] = error
    raise InputError(complaint([broken[source.name] for source in sources if source.name in broken], len(sources)))


def common_grid(reference: Grid, spacing: float | None, spacings: list[float]) -> Grid:
    """The isotropic grid along the LPS axes that covers the reference.

    Raises:
        ValueError: with this spacing the grid is larger than the largest working grid of a registration.
    """
    if spacing is not None:
        grid = reference.axis_aligned(spacing, multiple=MULTIPLE)
        if math.prod(grid.size) > LARGEST_WORKING_VOXELS:
            raise ValueError(
                f"at {spacing:g} mm the common grid has {' x '.join(map(str, grid.size))} voxels, more than the "
                f"{LARGEST_WORKING_VOXELS:,} that a registration works on; choose a coarser spacing"
            )
        return grid
    median = float(np.median(spacings))
    nearest = min(range(len(NICE)), key=lambda i: abs(math.log(NICE[i] / median)))
    grids = (reference.axis_aligned(step, multiple=MULTIPLE) for step in NICE[nearest:])
    return next(grid for grid in grids if math.prod(grid.size) <= MOST_VOXELS or grid.spacing[0] >= NICE[-1])
