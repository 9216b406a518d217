"""Transforms: an initial alignment from a node, and a displacement field into a node."""

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk
from vtk.util import numpy_support

from DivRegNetLib.core.composites import displacement_on, field_grid
from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, affine_transform
from DivRegNetLib.errors import InputError
from DivRegNetModule import _
from DivRegNetModule.mrml.checks import check_scene
from DivRegNetModule.mrml.geometry import matrix_to_world, vtk_image_steps
from DivRegNetModule.mrml.scene import is_a, name_of, parent_transforms
from DivRegNetModule.steps import Steps, finish, slabs

ATTRIBUTE = "DivRegNet."


def initial_transform(node, moving_node) -> sitk.AffineTransform:
    """A linear transform node, under its own parents, as an initial alignment: maps fixed points to moving points (LPS,
    mm).

    Raises:
        InputError: it is not linear, of another scene, or the moving volume is under it already.
    """
    if not is_a(node, "vtkMRMLTransformNode") or not node.IsTransformToWorldLinear():
        text = _("{name} is no linear transform; choose one, or another initial alignment")
        raise InputError(text.format(name=name_of(node)))
    check_scene(node, moving_node.GetScene())
    if node in parent_transforms(moving_node):
        text = _(
            "{name} is under the transform {transform} already, which counts; choose no initial alignment, or take the "
            "volume out of the transform"
        )
        raise InputError(text.format(name=name_of(moving_node), transform=name_of(node)))
    return affine_transform(LPS_FROM_RAS @ np.linalg.inv(matrix_to_world(node)) @ LPS_FROM_RAS)


def grid_transform(transform: sitk.Transform, grid: Grid | None = None) -> "slicer.vtkOrientedGridTransform":
    """A displacement field, or a result's transform on a grid, (LPS, mm) as VTK's (RAS, mm).

    Args:
        grid: None: that of the displacement field.
    """
    if transform.GetTransformEnum() == sitk.sitkDisplacementField:
        field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
    else:
        field = displacement_on(transform, grid or field_grid(transform))
    return finish(grid_transform_steps(sitk.GetArrayViewFromImage(field), Grid.of(field)))


def grid_transform_steps(field: np.ndarray, grid: Grid) -> Steps["slicer.vtkOrientedGridTransform"]:
    """A displacement field as VTK's (RAS, mm); single precision, a 10,000th of a mm, halves the memory.

    Args:
        field: (D, H, W, 3) mm, LPS.
    """
    matrix, spacing = grid.ras_matrix, np.array(grid.spacing)
    image = yield from vtk_image_steps(field, vtk.VTK_FLOAT)
    displacement = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(field.shape)
    for start, end in slabs(len(displacement), displacement[:1].nbytes):
        displacement[start:end, ..., :2] *= -1
        yield
    image.SetSpacing(spacing)
    image.SetOrigin(matrix[:3, 3])
    directions = np.eye(4)
    directions[:3, :3] = matrix[:3, :3] / spacing
    transform = slicer.vtkOrientedGridTransform()
    transform.SetGridDirectionMatrix(slicer.util.vtkMatrixFromArray(directions))
    transform.SetDisplacementGridData(image)
    transform.SetInterpolationModeToCubic()  # what it will be when Slicer has saved and loaded it
    return transform


def fill_transform(node, transform, fixed_node, moving_node, attributes: dict[str, str]) -> None:
    """Gives a transform node its transform from parent, and the record of where it comes from."""
    with slicer.util.NodeModify(node):
        node.SetAndObserveTransformNodeID(None)
        node.SetAndObserveTransformFromParent(transform)
        node.SetNodeReferenceID(node.GetFixedNodeReferenceRole(), fixed_node.GetID())
        node.SetNodeReferenceID(node.GetMovingNodeReferenceRole(), moving_node.GetID())
        for name, value in attributes.items():
            node.SetAttribute(ATTRIBUTE + name, value)
