"""Volumes and masks: nodes to images, and images to nodes."""

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk

from DivRegNetLib.errors import InputError
from DivRegNetModule.mrml.checks import check_scene
from DivRegNetModule.mrml.geometry import ijk_to_ras, is_empty, world_image
from DivRegNetModule.mrml.scene import copy_display, is_a, name_of
from DivRegNetModule.mrml.segments import segment_image


def volume_image(node) -> sitk.Image:
    """A volume on its world grid (LPS); label maps are resampled, if at all, by nearest neighbor."""
    linear = not is_a(node, "vtkMRMLLabelMapVolumeNode")
    return world_image(node.GetImageData(), ijk_to_ras(node), node, linear=linear)


def mask_image(mask, role: str, scene) -> sitk.Image | None:
    """A mask on its world grid (LPS); None stays None.

    Args:
        mask: a label map node, a pair (segmentation node, segment id), or None.
        role: ``fixed`` or ``moving``.
    Raises:
        InputError: it is of another class, of another scene, or empty.
    """
    if mask is None:
        return None
    node, segment = mask if isinstance(mask, tuple) and len(mask) == 2 else (mask, None)
    wanted = "vtkMRMLLabelMapVolumeNode" if segment is None else "vtkMRMLSegmentationNode"
    if not is_a(node, wanted):
        raise InputError(
            f"{name_of(node)} cannot be the {role} mask; choose a label map, or a segmentation and one of its segments"
        )
    check_scene(node, scene)
    if segment is not None:
        return segment_image(node, segment)
    if is_empty(node.GetImageData()):
        raise InputError(f"the {role} mask {name_of(node)} is empty; draw it or leave it out")
    return volume_image(node)


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
