"""Volumes and masks: nodes to images, and images to nodes."""

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, apply_matrix
from DivRegNetLib.errors import InputError
from DivRegNetModule import _
from DivRegNetModule.mrml.checks import check_scene
from DivRegNetModule.mrml.geometry import ijk_to_ras, is_empty, world_image_steps
from DivRegNetModule.mrml.scene import copy_display, is_a, name_of
from DivRegNetModule.mrml.segments import segment_image_steps
from DivRegNetModule.steps import Steps, finish

ROI_VOXELS = 8  # along each side of a box that stands for an ROI: exact, since its voxels end where the box does


def volume_image(node) -> sitk.Image:
    """As :func:`volume_image_steps`, at once."""
    return finish(volume_image_steps(node))


def volume_image_steps(node) -> Steps[sitk.Image]:
    """A volume on its world grid (LPS); label maps are resampled, if at all, by nearest neighbor."""
    linear = not is_a(node, "vtkMRMLLabelMapVolumeNode")
    return (yield from world_image_steps(node.GetImageData(), ijk_to_ras(node), node, linear=linear))


def mask_image_steps(mask, scene) -> Steps[sitk.Image | None]:
    """A mask on its world grid (LPS); None stays None.

    Args:
        mask: a label map node, a box (markups ROI node), a pair (segmentation node, segment id), or None.
    Raises:
        InputError: it is of another class, of another scene, or empty.
    """
    if mask is None:
        return None
    node, segment = mask if isinstance(mask, tuple) and len(mask) == 2 else (mask, None)
    if segment is not None and is_a(node, "vtkMRMLSegmentationNode"):
        check_scene(node, scene)
        return (yield from segment_image_steps(node, segment))
    if segment is None and is_a(node, "vtkMRMLMarkupsROINode"):
        check_scene(node, scene)
        return roi_image(node)
    if segment is not None or not is_a(node, "vtkMRMLLabelMapVolumeNode"):
        text = _("{name} cannot be a mask; choose a label map, an ROI, or a segmentation and one of its segments")
        raise InputError(text.format(name=name_of(node)))
    check_scene(node, scene)
    if is_empty(node.GetImageData()):
        raise InputError(_("the mask {name} is empty; draw it or leave it out").format(name=name_of(node)))
    return (yield from volume_image_steps(node))


def roi_image(node) -> sitk.Image:
    """A markups ROI as an image of ones that fills its box, in world coordinates (LPS).

    Raises:
        InputError: the box has no volume, or is under a transform that is not linear.
    """
    parent = node.GetParentTransformNode()
    if parent is not None and not parent.IsTransformToWorldLinear():
        text = _("the ROI {name} is under a transform that is not linear; take it out from there")
        raise InputError(text.format(name=name_of(node)))
    size = np.array(node.GetSize(), float)  # the side lengths of the box, along its own axes
    matrix = slicer.util.arrayFromVTKMatrix(node.GetObjectToWorldMatrix()) @ np.diag([*size / ROI_VOXELS, 1.0])
    first = np.full(3, 0.5 - ROI_VOXELS / 2)  # the center of the first voxel; the box is centered on its own origin
    matrix[:3, 3] = apply_matrix(matrix, first)
    try:
        grid = Grid((ROI_VOXELS,) * 3, LPS_FROM_RAS @ matrix)
    except ValueError as error:
        text = _("the ROI {name} has no volume; draw it or leave it out")
        raise InputError(text.format(name=name_of(node))) from error
    return grid.image(np.ones(grid.shape, np.uint8))


def fill_volume(node, image: vtk.vtkImageData, matrix: np.ndarray) -> None:
    """Gives a volume its voxels and its world grid, a (4, 4) index-to-RAS matrix."""
    with slicer.util.NodeModify(node):
        node.SetAndObserveTransformNodeID(None)
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrix))
        node.SetAndObserveImageData(image)


def show_like(node, model) -> None:
    """What its values mean, and, for a volume that has no display yet, the colors, window and level of another."""
    node.SetVoxelValueQuantity(model.GetVoxelValueQuantity())
    node.SetVoxelValueUnits(model.GetVoxelValueUnits())
    if node.GetDisplayNode() is None:
        if model.GetDisplayNode() is None:
            node.CreateDefaultDisplayNodes()
        else:
            copy_display(node, model)
