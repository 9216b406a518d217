"""The result of a run in the scene as one HTML page."""

from pathlib import Path

import numpy as np
import vtk
from vtk.util import numpy_support

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.quality.report import Registration, write_report
from DivRegNetModule.mrml.geometry import FLIP
from DivRegNetModule.mrml.volumes import volume_image_steps
from DivRegNetModule.steps import Steps


def report_steps(outcome, path: Path) -> Steps[Path]:
    """Writes the page.

    Args:
        outcome: DivRegNetModule.run.Outcome, whose nodes are still in the scene.
    Raises:
        InputError: the file cannot be written.
    """
    fixed = yield from volume_image_steps(outcome.fixed)
    moving = yield from volume_image_steps(outcome.moving)
    warped = yield from volume_image_steps(outcome.registration.warped_node)
    transform = outcome.registration.transform_node.GetTransformFromParent()
    rows = [(row["label"], row["before"], row["after"]) for row in outcome.quality.get("landmarks", ())]
    registration = Registration(
        fixed=fixed,
        moving=moving,
        warped=warped,
        displacement=lambda grid: _displacement(transform, grid),
        initial=outcome.initial,
        quality=outcome.quality,
        settings=outcome.settings,
        seconds=outcome.timings,
        warnings=tuple(outcome.notes),
        names=(outcome.fixed.GetName(), outcome.moving.GetName()),
        landmarks=rows,
    )
    yield
    write_report(registration, path)
    return path


def _displacement(transform: vtk.vtkAbstractTransform, grid: Grid) -> np.ndarray:
    """How a transform (RAS) moves the voxels of a grid, (D, H, W, 3) mm LPS."""
    k, j, i = np.indices(grid.shape)
    start = grid.to_physical(np.stack([i, j, k], -1)).reshape(-1, 3) * FLIP
    points, moved = vtk.vtkPoints(), vtk.vtkPoints()
    points.SetData(numpy_support.numpy_to_vtk(np.ascontiguousarray(start), deep=1))
    moved.SetDataTypeToDouble()
    transform.TransformPoints(points, moved)
    displacement = numpy_support.vtk_to_numpy(moved.GetData()) - start
    return (displacement * FLIP).reshape(*grid.shape, 3)
