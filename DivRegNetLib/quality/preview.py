"""The picture of a registration: fixed, moving, warped, both interleaved, and the deformed grid, in three planes."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, affine_transform, apply_matrix
from DivRegNetLib.core.intensity import percentile_window, stretch, subsample
from DivRegNetLib.io import atomic

GRID_MM = 10.0
SQUARES = 6  # of a checkerboard, along the longer side
INCHES = 15.6  # width of the picture
COLUMNS = ("fixed", "moving, initially aligned", "warped", "fixed | moving", "fixed | warped", "deformation")
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))


def write_preview(fixed: sitk.Image, moving: sitk.Image, result, path: Path) -> None:
    """Renders the middle of the fixed image, along the LPS axes and in physical aspect ratio, as PNG.

    Args:
        result: of :func:`DivRegNetLib.register`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    spacing = max(
        min(fixed.GetSpacing()), max(n * s for n, s in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True)) / 320
    )
    grid = Grid.of(fixed).axis_aligned(spacing)
    back = np.linalg.inv(result.initial)
    shown = [
        (fixed, sitk.Transform()),
        (moving, affine_transform(result.initial)),
        (result.warped, sitk.Transform()),
    ]
    windows = [percentile_window(subsample(sitk.GetArrayViewFromImage(image)), 1, 99.5) for image, _ in shown]
    planes = [(plane, axis, *(a for a in range(3) if a != axis)) for plane, axis in PLANES]
    width, height = (max(grid.size[p[i]] for p in planes) for i in (2, 3))
    gap = max(width, height) // 12  # takes the titles
    canvas = np.zeros((len(PLANES) * (height + gap), len(COLUMNS) * width), np.float32)
    every = max(round(GRID_MM / spacing), 2)
    lines, corners = [], []
    for row, (_, axis, across, up) in enumerate(planes):
        cut, size = _middle(grid, axis), (grid.size[across], grid.size[up])
        f, start, w = (_cut(i, t, cut, axis, window) for (i, t), window in zip(shown, windows, strict=True))
        # What the deformation does beyond the initial alignment, seen in the fixed space.
        field = sitk.Resample(result.transform.GetDisplacementField(), cut.empty_image(), sitk.Transform())
        points = cut.to_physical(np.stack(np.indices(cut.shape)[::-1], -1)) + sitk.GetArrayViewFromImage(field)
        index = np.take(grid.to_index(apply_matrix(back, points)), 0, axis=2 - axis)[..., [across, up]]
        index[(index < 0).any(-1) | (index > np.array(size) - 1).any(-1)] = np.nan
        if up == 2:  # superior at the top
            f, start, w = (image[::-1] for image in (f, start, w))
            index[..., 1] = size[1] - 1 - index[..., 1]
        top = row * (height + gap) + gap + (height - size[1]) // 2
        images = (f, start, w, checkerboard(f, start, SQUARES), checkerboard(f, w, SQUARES), f)
        for column, image in enumerate(images):
            left = column * width + (width - size[0]) // 2
            canvas[top : top + size[1], left : left + size[0]] = image
        index += (left, top)
        lines += [*index[:, ::every].swapaxes(0, 1), *index[::every]]
        corners.append(top)

    # One axes and one image: matplotlib takes seconds to lay out eighteen.
    figure = Figure(figsize=(INCHES, INCHES * canvas.shape[0] / canvas.shape[1]), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.add_collection(LineCollection(lines, colors="#ffc04d", linewidths=0.6))
    for column, title in enumerate(COLUMNS):
        axes.text((column + 0.5) * width, gap / 2, title, color="white", fontsize=10, ha="center", va="center")
    for (plane, *_), top in zip(planes, corners, strict=True):
        axes.text(1, top, plane, color="white", fontsize=8, va="bottom")
    atomic.write_atomically(path, lambda part: figure.savefig(part, dpi=100, facecolor="black"))


def _middle(grid: Grid, axis: int) -> Grid:
    """The one slice across the middle of an axis: volumes would need a hundred times the memory."""
    first, size = np.zeros(3), list(grid.size)
    first[axis], size[axis] = size[axis] // 2, 1
    matrix = grid.matrix.copy()
    matrix[:3, 3] = grid.to_physical(first)
    return Grid(tuple(size), matrix)


def _cut(image: sitk.Image, transform: sitk.Transform, cut: Grid, axis: int, window: tuple[float, float]) -> np.ndarray:
    """An image on a slice through a transform, (rows, columns) from 0 to 1 between the ends of a window."""
    values = sitk.Resample(image, cut.empty_image(), transform, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    return stretch(np.take(sitk.GetArrayFromImage(values), 0, axis=2 - axis), window)


def checkerboard(one: np.ndarray, other: np.ndarray, squares: int = 8) -> np.ndarray:
    """Two arrays of one shape (any number of axes) in alternate blocks: where they match, edges go on across blocks.

    Args:
        squares: blocks along the longest side; blocks have the same number of elements along each axis.
    Raises:
        ValueError: the shapes differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"a checkerboard needs arrays of one shape, got {one.shape} and {other.shape}")
    side = max(-(-max(one.shape) // squares), 1)
    parity = sum(np.ix_(*(np.arange(n) // side for n in one.shape))) % 2
    return np.where(parity == 0, one, other)
