"""The picture of a registration: fixed, moving, warped, both interleaved, and the deformed grid, in three planes."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.composites import displacement_on
from DivRegNetLib.core.grid import Grid, affine_transform, apply_matrix
from DivRegNetLib.core.intensity import percentile_window, stretch, subsample
from DivRegNetLib.io import atomic

GRID_MM = 10.0
LONGEST_PIXELS = 320  # of the fixed image's longest side
SQUARES = 6  # of a checkerboard, along the longer side
PIXELS = 1560  # width of the picture
COMPRESSION = 3  # of 9: half the time of the usual 6, 5 % larger
LINES = "#ffc04d"  # color of the deformed grid
COLUMNS = ("fixed", "moving, initially aligned", "warped", "fixed | moving", "fixed | warped", "deformation")
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))


@dataclass(frozen=True)
class Plane:
    """A registration in one plane through the middle of the fixed image; superior or anterior is at the top.

    name: ``axial``, ``coronal`` or ``sagittal``.
    images: one for each of COLUMNS, (rows, columns) from 0 to 1; the last one is the background of the deformation.
    positions: (rows, columns, 2), where the deformation, without the initial alignment, moves each pixel: column and row;
        NaN outside of the image.
    """

    name: str
    images: tuple[np.ndarray, ...]
    positions: np.ndarray


def cut_planes(
    fixed: sitk.Image,
    moving: sitk.Image,
    warped: sitk.Image,
    displacement: Callable[[Grid], np.ndarray],
    initial: np.ndarray,
) -> tuple[list[Plane], float]:
    """A registration in three planes along the LPS axes, in physical aspect ratio.

    Args:
        displacement: from a grid to the displacement of its voxels, (D, H, W, 3) mm LPS, the initial alignment included.
        initial: (4, 4) of the initial alignment, maps fixed points to moving points (LPS, mm).
    Returns:
        the planes, and mm a pixel.
    """
    longest = max(n * s for n, s in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True))
    spacing = max(min(fixed.GetSpacing()), longest / LONGEST_PIXELS)
    grid = Grid.of(fixed).axis_aligned(spacing)
    back = np.linalg.inv(initial)
    shown = [(fixed, sitk.Transform()), (moving, affine_transform(initial)), (warped, sitk.Transform())]
    windows = [percentile_window(subsample(sitk.GetArrayViewFromImage(image)), 1, 99.5) for image, _ in shown]
    planes = []
    for name, axis in PLANES:
        across, up = (a for a in range(3) if a != axis)
        cut, size = _middle(grid, axis), (grid.size[across], grid.size[up])
        f, m, w = (_cut(i, t, cut, axis, window) for (i, t), window in zip(shown, windows, strict=True))
        # The deformation without the initial alignment, in fixed space.
        points = cut.to_physical(np.stack(np.indices(cut.shape)[::-1], -1)) + displacement(cut)
        index = np.take(grid.to_index(apply_matrix(back, points)), 0, axis=2 - axis)[..., [across, up]]
        index[(index < 0).any(-1) | (index > np.array(size) - 1).any(-1)] = np.nan
        if up == 2:  # superior at the top
            f, m, w = (image[::-1] for image in (f, m, w))
            index[..., 1] = size[1] - 1 - index[..., 1]
        images = (f, m, w, checkerboard(f, m, SQUARES), checkerboard(f, w, SQUARES), f)
        planes.append(Plane(name, images, index))
    return planes, spacing


def field_displacement(field: sitk.Image) -> Callable[[Grid], np.ndarray]:
    """The displacement of a field (vectors, mm LPS) on any grid, for :func:`cut_planes`."""
    return lambda grid: sitk.GetArrayFromImage(sitk.Resample(field, grid.empty_image(), sitk.Transform()))


def write_preview(fixed: sitk.Image, moving: sitk.Image, result, path: Path) -> None:
    """Renders the middle of the fixed image as PNG.

    Args:
        result: of :func:`DivRegNetLib.register`.
    """

    def displacement(grid: Grid) -> np.ndarray:
        return sitk.GetArrayFromImage(displacement_on(result.transform, grid))

    planes, spacing = cut_planes(fixed, moving, result.warped, displacement, result.initial)
    height, width = (max(plane.images[0].shape[i] for plane in planes) for i in (0, 1))
    gap = max(width, height) // 12  # takes the titles
    canvas = np.zeros((len(PLANES) * (height + gap), len(COLUMNS) * width), np.float32)
    every = max(round(GRID_MM / spacing), 2)
    lines, corners = [], []
    for row, plane in enumerate(planes):
        rows, columns = plane.images[0].shape
        top = row * (height + gap) + gap + (height - rows) // 2
        for column, image in enumerate(plane.images):
            left = column * width + (width - columns) // 2
            canvas[top : top + rows, left : left + columns] = image
        positions = plane.positions + np.array([left, top])
        lines += [*positions[:, ::every].swapaxes(0, 1), *positions[::every]]
        corners.append(top)

    titles = [((column + 0.5) * width, gap / 2, title) for column, title in enumerate(COLUMNS)]
    names = [(1, top, plane.name) for plane, top in zip(planes, corners, strict=True)]
    picture = _drawn(canvas, lines, titles, names)  # an error in drawing is not an error in writing
    atomic.write_atomically(path, lambda part: part.write_bytes(picture))


def _drawn(canvas: np.ndarray, lines: list[np.ndarray], titles: list[tuple], names: list[tuple]) -> bytes:
    """A PNG of a canvas (rows, columns) from 0 to 1 with lines and texts, PIXELS wide.

    Args:
        lines: each (n, 2), column and row of the canvas; NaN interrupts a line.
        titles, names: (column, row, text); a title is centered there, the name of a plane stands on it.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = PIXELS / canvas.shape[1]
    size = PIXELS, round(canvas.shape[0] * scale)
    gray = Image.fromarray((255 * canvas).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    finer = Image.new(
        "L", (2 * size[0], 2 * size[1])
    )  # lines are drawn at twice the resolution, so that they are smooth
    pen = ImageDraw.Draw(finer)
    for line in lines:
        known = np.isfinite(line).all(1)
        for part in np.split(line, np.flatnonzero(np.diff(known)) + 1):
            if len(part) > 1 and np.isfinite(part).all():
                pen.line([tuple(point) for point in (2 * scale * (part + 0.5)).tolist()], fill=255, width=2)
    picture = Image.composite(Image.new("RGB", size, LINES), gray.convert("RGB"), finer.reduce(2))
    pen = ImageDraw.Draw(picture)
    for (x, y, text), points, anchor in (*((t, 14, "mm") for t in titles), *((n, 11, "ld") for n in names)):
        pen.text((x * scale, y * scale), text, fill="white", font=ImageFont.load_default(points), anchor=anchor)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=COMPRESSION)
    return file.getvalue()


def _middle(grid: Grid, axis: int) -> Grid:
    """The slice through the middle of an axis; whole volumes would need a hundred times the memory."""
    first, size = np.zeros(3), list(grid.size)
    first[axis], size[axis] = size[axis] // 2, 1
    matrix = grid.matrix.copy()
    matrix[:3, 3] = grid.to_physical(first)
    return Grid(tuple(size), matrix)


def _cut(image: sitk.Image, transform: sitk.Transform, cut: Grid, axis: int, window: tuple[float, float]) -> np.ndarray:
    """An image on a slice through a transform, (rows, columns) from 0 to 1 between the ends of a window."""
    values = sitk.Resample(image, cut.empty_image(), transform, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    return stretch(np.take(sitk.GetArrayFromImage(values), 0, axis=2 - axis), window)


def checkerboard(
    one: np.ndarray, other: np.ndarray, squares: int = 8, *, side: int | None = None, first: int = 0
) -> np.ndarray:
    """Two arrays of one shape (any number of axes) in alternate blocks: where they match, edges continue across blocks.

    Args:
        squares: blocks along the longest side.
        side: of a block, in elements along each axis; None: as ``squares`` says.
        first: where the arrays begin along their first axis, if they are parts of larger ones.
    Raises:
        ValueError: the shapes differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"a checkerboard needs arrays of one shape, got {one.shape} and {other.shape}")
    side = side or max(-(-max(one.shape) // squares), 1)
    starts = (first, *[0] * (one.ndim - 1))
    parity = sum(np.ix_(*((np.arange(n) + start) // side for n, start in zip(one.shape, starts, strict=True)))) % 2
    return np.where(parity == 0, one, other)
