"""The space that a cohort is brought into, as its headers tell: the reference, the common grid, and who keeps together."""

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

MULTIPLE = 16  # sides of the common grid, in voxels: what RegNet takes without padding
MOST_VOXELS = 1_200_000  # of a grid whose spacing is chosen here
NICE = tuple(step * 10.0**power for power in (-2, -1, 0, 1) for step in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8))


OVERLAP = 0.5  # share of the smaller of two volumes inside the other that makes them of one frame


@dataclass(frozen=True)
class Header:
    """What is known of a volume before it is read.

    spacing: median side of a voxel, mm.
    grid: of the first image; None where it has not three axes.
    """

    spacing: float
    grid: Grid | None

    @property
    def extent(self) -> float:
        """mm^3."""
        return 0.0 if self.grid is None else float(np.abs(np.linalg.det(self.grid.matrix)) * np.prod(self.grid.size))


def measure(source: Source) -> Header:
    """The header of a volume, without reading the rest where that can be.

    Raises:
        Broken: a file is missing, or cannot be opened.
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
    """What knows a file's size, spacing, origin and direction."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return images.read_image(path)  # for its error
    return reader


def frames(
    sources: Sequence[Source], headers: Mapping[str, Header], reference: Source, together: bool
) -> list[list[Source]]:
    """The volumes that keep their places to each other: those of one subject that name the same ``frame`` or, where they
    name none, lie at the same place as their headers have it.

    Returns:
        lists, each led by the one whose alignment is the most reliable: the reference, or else what is likest to it (by
        contrast, then role). With ``together`` False a list for each volume.
    """
    ranked = sorted(
        sources, key=lambda s: (s is not reference, s.contrasts != reference.contrasts, s.role != reference.role)
    )
    found: list[list[Source]] = []
    for source in ranked:
        shared = (frame for frame in found if together and _one_frame(frame[0], source, headers))
        if (frame := next(shared, None)) is None:
            found.append([source])
        else:
            frame.append(source)
    return found


def _one_frame(a: Source, b: Source, headers: Mapping[str, Header]) -> bool:
    if a.subject != b.subject:
        return False
    if a.frame or b.frame:
        return a.frame == b.frame
    grids = [headers[source.name].grid for source in (a, b)]
    return None not in grids and overlap(*grids) >= OVERLAP


def overlap(a: Grid, b: Grid) -> float:
    """Share of the smaller grid that lies inside the other, 0 to 1, on a lattice of points."""
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
    """The reference and its first image; candidates that turn out broken are added to ``broken``.

    Raises:
        ValueError: the one that is wanted is not there or broken, or all are.
    """
    if wanted is not None:
        found = [source for source in sources if source.name == wanted]
        if not found:
            names = ", ".join(source.name for source in sources[:5])
            raise ValueError(f"the reference {wanted!r} is not in the cohort; its volumes are {names}, ...")
        if wanted in broken:
            raise InputError(f"the reference cannot be used: {broken[wanted].file}: {broken[wanted].reason}")
    else:
        usable = [source for source in sources if source.name in headers]
        training = [source for source in usable if source.role != "moving" and splits[source.name] == "train"]
        ranked = sorted(training or usable, key=lambda source: (headers[source.name].extent, source.name))
        middle = (len(ranked) - 1) / 2
        found = [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: abs(i - middle))]
        found += [source for source in usable if source not in found]
    for source in found:
        try:
            return source, read(source)[0][0]
        except Broken as error:
            broken[source.name] = error
    raise InputError(complaint([broken[source.name] for source in sources if source.name in broken], len(sources)))


def common_grid(reference: Grid, spacing: float | None, spacings: list[float]) -> Grid:
    """The isotropic grid along the LPS axes that covers the reference.

    Raises:
        ValueError: the spacing asked for makes a grid larger than a registration works on.
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
