"""Carrying along what belongs to the moving image: copies of nodes, moved by a transform."""

from collections.abc import Iterable

import slicer
import slicer.util
import vtk

from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.errors import InputError
from DivRegNetModule.mrml.checks import check_carried, check_scene, check_volume
from DivRegNetModule.mrml.geometry import ijk_to_ras, is_empty, reslice, transform_to_world
from DivRegNetModule.mrml.scene import add_node, all_or_nothing, copy_display, is_a, name_of
from DivRegNetModule.mrml.segments import register_representations
from DivRegNetModule.mrml.volumes import fill_volume, volume_image


def apply_to(transform_node, nodes: Iterable, *, harden: bool = True, reference_node=None) -> list:
    """Moves copies of nodes by a transform; the nodes stay as they are.

    The nodes' own parent transforms count, and come first. Label maps and segmentations are resampled by nearest
    neighbor, in their own resolution; segments keep their ids, names and colors. Other volumes are resampled linearly.

    Args:
        transform_node: as made by :func:`DivRegNetModule.mrml.register_nodes`, or any other.
        nodes: segmentations, markups, models, volumes and label maps of the same scene.
        harden: False leaves the copies under the transform instead of applying it.
        reference_node: a volume (usually the fixed one) on whose world grid volumes and label maps are sampled; None
            keeps their own axes and spacing and whatever extent the transform gives them.
    Returns:
        the copies, in the order of ``nodes``, named after the fixed volume where the transform references one.
    Raises:
        InputError: a node that cannot be transformed or is empty, no node, or nodes of different scenes.
    The scene is as it was before if anything is raised.
    """
    if not is_a(transform_node, "vtkMRMLTransformNode"):
        raise InputError(f"{name_of(transform_node)} is no transform; choose the transform of a registration")
    scene = transform_node.GetScene()
    check_scene(transform_node, scene)
    if reference_node is not None:
        check_volume(reference_node, "reference")
        check_scene(reference_node, scene)
    nodes = list(nodes)
    for node in nodes:
        check_carried(node, transform_node)
    with all_or_nothing(scene):
        return [_carry(node, transform_node, harden, reference_node) for node in nodes]


def _carry(node, transform_node, harden: bool, reference_node):
    """A copy of one node, moved."""
    scene = node.GetScene()
    fixed = transform_node.GetNodeReference(transform_node.GetFixedNodeReferenceRole())
    name = f"{node.GetName()} warped" + (f" to {fixed.GetName()}" if fixed is not None else "")
    register_representations()
    copy = add_node(scene, node.GetClassName(), name)
    copy.CopyContent(node)
    copy_display(copy, node)
    copy.SetAndObserveTransformNodeID(node.GetTransformNodeID())
    if not harden:
        copy.HardenTransform()  # its own parents alone
        copy.SetAndObserveTransformNodeID(transform_node.GetID())
        return copy
    if copy.IsA("vtkMRMLVolumeNode"):
        copy.SetAndObserveTransformNodeID(None)
        _harden_volume(copy, _composed(node, transform_node), reference_node)
    elif copy.IsA("vtkMRMLSegmentationNode") and copy.GetSegmentation().IsSourceRepresentationImageData():
        copy.SetAndObserveTransformNodeID(None)
        _harden_segmentation(copy, _composed(node, transform_node))
    else:
        copy.HardenTransform()
        copy.SetAndObserveTransformNodeID(transform_node.GetID())
        copy.HardenTransform()
    if copy.IsA("vtkMRMLSegmentationNode") and fixed is not None and not is_empty(fixed.GetImageData()):
        copy.SetReferenceImageGeometryParameterFromVolumeNode(fixed)
    return copy


def _composed(node, transform_node) -> vtk.vtkGeneralTransform:
    """The parents of a node, then a transform node and its parents."""
    transform = vtk.vtkGeneralTransform()
    transform.PostMultiply()
    if node.GetParentTransformNode() is not None:
        transform.Concatenate(transform_to_world(node.GetParentTransformNode()))
    transform.Concatenate(transform_to_world(transform_node))
    return transform


def _harden_volume(node, to_world: vtk.vtkAbstractTransform, reference_node) -> None:
    """Resamples a volume or label map, once, whatever it is under."""
    grid = None if reference_node is None else Grid.of(volume_image(reference_node))
    linear = not node.IsA("vtkMRMLLabelMapVolumeNode")
    background = [node.GetImageBackgroundScalarComponentAsDouble(c) if linear else 0.0 for c in range(4)]
    image, matrix = reslice(
        node.GetImageData(), ijk_to_ras(node), to_world, linear=linear, background=background, grid=grid
    )
    matrix[:3, 3] = apply_matrix(matrix, image.GetExtent()[::2])
    image.SetExtent([bound for n in image.GetDimensions() for bound in (0, n - 1)])  # MRML's images start at 0
    fill_volume(node, image, matrix)


def _harden_segmentation(node, to_world: vtk.vtkAbstractTransform) -> None:
    """Resamples every label map of a segmentation, by nearest neighbor.

    Slicer's own hardening cuts off parts of oblique label maps under a non-linear transform: it takes the box of the
    output from two corners in world coordinates.
    """
    segmentation = node.GetSegmentation()
    source = segmentation.GetSourceRepresentationName()
    contained: list[str] = []  # what is made from the source goes when the source changes
    segmentation.GetContainedRepresentationNames(contained)
    images = {}  # segments that do not overlap share one
    for i in range(segmentation.GetNumberOfSegments()):
        image = segmentation.GetNthSegment(i).GetRepresentation(source)
        if not is_empty(image):
            images[image.GetAddressAsString("")] = image
    fractional = source == slicer.vtkSegmentationConverter.GetFractionalLabelmapRepresentationName()
    for image in images.values():
        matrix = vtk.vtkMatrix4x4()
        image.GetImageToWorldMatrix(matrix)
        background = [image.GetScalarRange()[0] if fractional else 0.0] * 4
        indices = slicer.util.arrayFromVTKMatrix(matrix)
        moved, _ = reslice(image, indices, to_world, linear=fractional, background=background)
        image.DeepCopy(moved)
        image.SetGeometryFromImageToWorldMatrix(matrix)
    segmentation.InvalidateNonSourceRepresentations()
    for name in contained:
        if name != source:
            segmentation.CreateRepresentation(name)
