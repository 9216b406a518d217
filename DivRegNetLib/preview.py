"""The picture of a registration: fixed, moving, warped, both interleaved, and the deformed grid, in three planes."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib import files
from DivRegNetLib.geometry import Grid, affine_transform

GRID_MM = 10.0
TILES = 6
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))


def write_preview(fixed: sitk.Image, moving: sitk.Image, result, path: Path) -> None:
    """Renders the middle of the fixed image, along the LPS axes and in physical aspect ratio, as PNG.

    Args:
        result: of :func:`DivRegNetLib.pipeline.register`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spacing = max(
        min(fixed.GetSpacing()), max(n * s for n, s in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True)) / 320
    )
    grid = Grid.of(fixed).axis_aligned(spacing)
    reference = grid.empty_image()

    def on_grid(image: sitk.Image, transform: sitk.Transform) -> np.ndarray:
        shown = sitk.GetArrayFromImage(
            sitk.Resample(sitk.Cast(image, sitk.sitkFloat32), reference, transform, sitk.sitkLinear, 0.0)
        )
        low, high = np.percentile(shown, [1, 99.5])
        return np.clip((shown - low) / max(high - low, 1e-6), 0, 1)

    here = sitk.Transform()
    start = on_grid(moving, affine_transform(result.initial))
    f, w = on_grid(fixed, here), on_grid(result.warped, here)
    field = sitk.GetArrayFromImage(
        sitk.Resample(result.transform.GetDisplacementField(), reference, here, sitk.sitkLinear, 0.0)
    )
    # What the deformation does beyond the initial alignment, seen in the fixed space.
    points = grid.to_physical(np.stack(np.indices(grid.shape)[::-1], -1))
    back = np.linalg.inv(result.initial)
    deformed = (points + field) @ back[:3, :3].T + back[:3, 3]

    columns = ("fixed", "moving, initially aligned", "warped", "fixed | moving", "fixed | warped", "deformation")
    figure = Figure(figsize=(2.6 * len(columns), 8.2), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PLANES), len(columns))
    for row, (plane, axis) in zip(axes, PLANES, strict=True):
        middle = grid.size[axis] // 2

        def cut(volume: np.ndarray, axis: int = axis, middle: int = middle) -> np.ndarray:
            return np.take(volume, middle, axis=2 - axis)

        across, up = (a for a in range(3) if a != axis)
        extent = (-0.5, grid.size[across] - 0.5, grid.size[up] - 0.5, -0.5)
        images = (f, start, w, _checkerboard(f, start), _checkerboard(f, w), f)
        for axes_of, title, image in zip(row, columns, images, strict=True):
            axes_of.imshow(cut(image), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
            axes_of.set_axis_off()
            if up == 2:  # superior at the top
                axes_of.invert_yaxis()
            if axis == 2:
                axes_of.set_title(title, color="white", fontsize=10)
        row[0].text(0.02, 0.02, plane, color="white", fontsize=8, transform=row[0].transAxes)
        every = max(round(GRID_MM / spacing), 2)
        index = np.stack([cut(c) for c in np.moveaxis(grid.to_index(deformed), -1, 0)])
        for lines in (index[:, ::every], index.swapaxes(1, 2)[:, ::every]):
            for line in np.moveaxis(lines, 1, 0):
                row[-1].plot(line[across], line[up], color="#ffc04d", linewidth=0.6)
        row[-1].set_xlim(extent[:2])
    files.write_whole(path, lambda part: figure.savefig(part, dpi=100, facecolor="black"))


def _checkerboard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two volumes (D, H, W) interleaved in blocks, about ``TILES`` along the longest side."""
    side = max(max(a.shape) // TILES, 1)
    odd = sum(i // side for i in np.indices(a.shape)) % 2
    return np.where(odd == 1, b, a)
