"""Transforms: an initial alignment from a node, and a displacement field into a node."""

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk
from vtk.util import numpy_support

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, affine_transform
from DivRegNetLib.errors import InputError
from DivRegNetModule.mrml.checks import check_scene
from DivRegNetModule.mrml.geometry import matrix_to_world, vtk_image
from DivRegNetModule.mrml.scene import is_a, name_of, parent_transforms

ATTRIBUTE = "DivRegNet."


def initial_transform(node, moving_node) -> sitk.AffineTransform:
    """A linear transform node, under its own parents, as an initial alignment: maps fixed points to moving points (LPS,
    mm).

    Raises:
        InputError: it is not linear, of another scene, or the moving volume is under it already.
    """
    if not is_a(node, "vtkMRMLTransformNode") or not node.IsTransformToWorldLinear():
        raise InputError(f"{name_of(node)} is no linear transform; choose one, or another initial alignment")
    check_scene(node, moving_node.GetScene())
    if node in parent_transforms(moving_node):
        raise InputError(
            f"{name_of(moving_node)} is under the transform {name_of(node)} already, which counts; choose no initial "
            "alignment, or take the volume out of the transform"
        )
    return affine_transform(LPS_FROM_RAS @ np.linalg.inv(matrix_to_world(node)) @ LPS_FROM_RAS)


def grid_transform(transform: sitk.DisplacementFieldTransform) -> "slicer.vtkOrientedGridTransform":
    """A displacement field (LPS, mm) as VTK's (RAS, mm); single precision, a 10,000th of a mm, halves the memory."""
    field = transform.GetDisplacementField()
    matrix, spacing = Grid.of(field).ras_matrix, np.array(Grid.of(field).spacing)
    image = vtk_image(field, vtk.VTK_FLOAT)
    numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())[:, :2] *= -1
    image.SetSpacing(spacing)
    image.SetOrigin(matrix[:3, 3])
    directions = np.eye(4)
    directions[:3, :3] = matrix[:3, :3] / spacing
    grid = slicer.vtkOrientedGridTransform()
    grid.SetGridDirectionMatrix(slicer.util.vtkMatrixFromArray(directions))
    grid.SetDisplacementGridData(image)
    grid.SetInterpolationModeToCubic()  # what it will be when Slicer has saved and loaded it
    return grid


def fill_transform(node, transform, fixed_node, moving_node, attributes: dict[str, str]) -> None:
    """Gives a transform node its transform from parent, and the record of where it comes from."""
    with slicer.util.NodeModify(node):
        node.SetAndObserveTransformNodeID(None)
        node.SetAndObserveTransformFromParent(transform)
        node.SetNodeReferenceID(node.GetFixedNodeReferenceRole(), fixed_node.GetID())
        node.SetNodeReferenceID(node.GetMovingNodeReferenceRole(), moving_node.GetID())
        for name, value in attributes.items():
            node.SetAttribute(ATTRIBUTE + name, value)
