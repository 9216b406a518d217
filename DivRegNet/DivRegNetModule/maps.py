"""Maps of a registration as volumes with a color scale: length of the displacement, Jacobian determinant, expected error."""

from collections.abc import Iterator

import numpy as np
import slicer
import slicer.util
import vtk
from vtk.util import numpy_support

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.quality.expected_error import calibration
from DivRegNetLib.quality.maps import displacement_length, jacobian_determinant_slabs
from DivRegNetModule import _
from DivRegNetModule.mrml.scene import add_node, automatic_levels_off
from DivRegNetModule.steps import Steps, slabs

LENGTH, JACOBIAN, ERROR = "displacement length", "Jacobian determinant", "expected error"
COLORS = {
    LENGTH: "vtkMRMLColorTableNodeFileViridis.txt",
    JACOBIAN: "vtkMRMLColorTableNodeFileDivergingBlueRed.txt",
    ERROR: "vtkMRMLColorTableNodeFileInferno.txt",
}
NOTHING_KNOWN = 1e-6  # mm, below which the map of the expected error is transparent
ROLE = "DivRegNet.mapped"
JACOBIAN_BYTES = 100  # a voxel, while its Jacobian determinant is computed


def map_steps(transform_node, kind: str) -> Steps:
    """A new volume in the scene with a map of a transform's displacement field, which includes the initial alignment.

    Args:
        transform_node: as made by :func:`DivRegNetModule.mrml.register_nodes`.
        kind: LENGTH (mm) or JACOBIAN.
    """
    grid_transform = transform_node.GetTransformFromParentAs("vtkOrientedGridTransform", True, True)
    image = grid_transform.GetDisplacementGrid()
    size = image.GetDimensions()
    field = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(*size[::-1], 3)
    matrix = slicer.util.arrayFromVTKMatrix(grid_transform.GetGridDirectionMatrix()) @ np.diag(
        [*image.GetSpacing(), 1.0]
    )
    matrix[:3, 3] = image.GetOrigin()
    values = vtk.vtkImageData()
    values.SetDimensions(size)
    values.AllocateScalars(vtk.VTK_FLOAT, 1)
    array = numpy_support.vtk_to_numpy(values.GetPointData().GetScalars()).reshape(size[::-1])
    largest, start = 0.0, 0
    for part in _parts(field, Grid(size, matrix), kind):  # in RAS, as the field is
        array[start : start + len(part)] = part
        largest, start = max(largest, float(part.max())), start + len(part)
        yield
    return _add(transform_node, kind, values, matrix, (0.0, largest if kind == LENGTH else 2.0))  # 1: no change


def error_map_steps(outcome) -> Steps:
    """A new volume in the scene with the map of the expected error (mm), transparent where nothing is known.

    The scale reaches at least to the smallest expected error of a red verdict, so that a good result looks good.

    Args:
        outcome: :class:`DivRegNetModule.run.Outcome` that has a map.
    """
    image, matrix = outcome.error_map
    largest = image.GetScalarRange()[1]
    yield
    numbers = outcome.quality.get("evidence")
    red = calibration().limits(numbers)[1] if numbers else 0.0
    copy = vtk.vtkImageData()
    copy.DeepCopy(image)
    node = _add(outcome.registration.transform_node, ERROR, copy, matrix, (0.0, max(red, largest)))
    display = node.GetDisplayNode()
    display.SetThreshold(NOTHING_KNOWN, max(largest, 2 * NOTHING_KNOWN))
    display.ApplyThresholdOn()
    return node


def _parts(field: np.ndarray, grid: Grid, kind: str) -> Iterator[np.ndarray]:
    """The map in consecutive parts of a few slices."""
    if kind == LENGTH:
        for start, end in slabs(len(field), 2 * field[:1].nbytes):
            yield displacement_length(field[start:end])
        return
    step = next(end - start for start, end in slabs(len(field), JACOBIAN_BYTES * field[0].size))
    yield from jacobian_determinant_slabs(field, grid, step)


def _add(transform_node, kind: str, image: vtk.vtkImageData, matrix: np.ndarray, window: tuple[float, float]):
    """The map as a volume node, with colors for a range of values and a color legend."""
    title = {
        LENGTH: _("{name}: displacement (mm)"),
        JACOBIAN: _("{name}: Jacobian determinant"),
        ERROR: _("{name}: expected error (mm)"),
    }[kind]
    scene = transform_node.GetScene()
    node = add_node(scene, "vtkMRMLScalarVolumeNode", title.format(name=transform_node.GetName()))
    node.SetNodeReferenceID(ROLE, transform_node.GetID())
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrix))
    node.SetAndObserveImageData(image)
    display = scene.AddNewNodeByClass("vtkMRMLScalarVolumeDisplayNode")
    display.SetAndObserveColorNodeID(COLORS[kind])
    automatic_levels_off(display)
    low, high = window
    display.SetWindowLevelMinMax(low, max(high, low + 1e-3))
    display.SetInterpolate(True)
    node.SetAndObserveDisplayNodeID(display.GetID())
    slicer.vtkSlicerColorLogic.AddDefaultColorLegendDisplayNode(node)
    return node
