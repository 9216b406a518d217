"""Pictures of a pair on one grid, for TensorBoard and the figures of experiments."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from DivRegNetLib.core import fields

LINES_EVERY = 5  # voxels between the lines of a deformed grid
CONTOUR = "#ffcc00"


def plane(image: Tensor, axis: int = 0, at: float = 0.5) -> np.ndarray:
    """A slice (rows, columns) of an image (1, 1, D, H, W) perpendicular to D, H or W (axis 0, 1, 2), with the head up."""
    number = int((image.shape[2 + axis] - 1) * at)
    cut = image[0, 0].select(axis, number).detach().float().cpu().numpy()
    return cut if axis == 0 else cut[::-1]


def show(axes: Axes, image: Tensor, title: str = "", labels: Tensor | None = None, at: float = 0.5) -> None:
    """Draws an axial slice in gray, and the outline of labels (1, 1, D, H, W)."""
    axes.imshow(plane(image, at=at), cmap="gray", interpolation="nearest")
    if labels is not None and (inside := plane(labels, at=at) > 0).any():
        axes.contour(inside, levels=[0.5], colors=CONTOUR, linewidths=0.7)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def show_grid(axes: Axes, displacement: Tensor, title: str = "", at: float = 0.5) -> None:
    """Draws an axial slice of the deformed grid; displacement (1, 3, D, H, W) in voxels."""
    points = fields.identity(tuple(displacement.shape[2:]), like=displacement) + displacement
    x, y = (plane(points[:, c : c + 1], at=at) for c in (0, 1))
    for lines in ((x[::LINES_EVERY].T, y[::LINES_EVERY].T), (x[:, ::LINES_EVERY], y[:, ::LINES_EVERY])):
        axes.plot(*lines, color="black", linewidth=0.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


@torch.no_grad()
def picture(fixed: Tensor, moving: Tensor, displacement: Tensor, title: str = "") -> Figure:
    """Fixed, moving and warped image and the deformed grid, side by side.

    Args:
        fixed, moving: (1, 1, D, H, W).
        displacement: (1, 3, D, H, W) in voxels.
    """
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    for one, image, name in zip(axes, (fixed, moving, fields.warp(moving, displacement)), ("fixed", "moving", "warped"),
                                strict=False):  # fmt: skip
        show(one, image, name)
    show_grid(axes[3], displacement, "deformation")
    figure.suptitle(title, fontsize=9)
    return figure
