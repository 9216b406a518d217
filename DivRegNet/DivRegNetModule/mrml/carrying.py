"""Carrying along what belongs to the moving image: copies of nodes, moved by a transform."""

from collections.abc import Iterable

import slicer
import slicer.util
import vtk

from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.errors import InputError
from DivRegNetModule import _
from DivRegNetModule.mrml.checks import check_carried, check_scene, check_volume
from DivRegNetModule.mrml.geometry import ijk_to_ras, is_empty, reslice_steps, transform_to_world
from DivRegNetModule.mrml.scene import all_nodes, all_or_nothing, display_nodes, is_a, name_of
from DivRegNetModule.mrml.segments import register_representations
from DivRegNetModule.mrml.volumes import fill_volume, volume_image
from DivRegNetModule.steps import Steps, finish

SOURCE, FIXED, MOVING = "DivRegNet.source", "DivRegNet.fixed", "DivRegNet.moving"
"""Node reference roles of what a registration made: the node that was copied, the fixed and the moving volume."""


def apply_to(transform_node, nodes: Iterable, *, harden: bool = True, reference_node=None) -> list:
    """Moves copies of nodes by a transform; the nodes stay as they are.

    The nodes' own parent transforms count, and come first. Label maps and segmentations are resampled by nearest
    neighbor, in their own resolution; segments keep their ids, names and colors. Other volumes are resampled linearly.
    Copies are shown or hidden as the nodes are.

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
        text = _("{name} is no transform; choose the transform of a registration")
        raise InputError(text.format(name=name_of(transform_node)))
    scene = transform_node.GetScene()
    check_scene(transform_node, scene)
    if reference_node is not None:
        check_volume(reference_node, "reference")
        check_scene(reference_node, scene)
    nodes = list(nodes)
    for node in nodes:
        check_carried(node, scene, transform_node)
    grid = None if reference_node is None else Grid.of(volume_image(reference_node))
    fixed = transform_node.GetNodeReference(transform_node.GetFixedNodeReferenceRole())
    to_world = transform_to_world(transform_node) if harden else None
    with all_or_nothing(scene):
        placed = []
        for node in nodes:
            copy = place_copy(finish(copy_steps(node, to_world, grid)), node, fixed)
            if not harden:
                copy.SetAndObserveTransformNodeID(transform_node.GetID())
            placed.append(copy)
        return placed


def copy_steps(node, transform: vtk.vtkAbstractTransform | None, grid: Grid | None) -> Steps:
    """A copy of a node, in no scene, moved by the node's parents and then by a transform.

    Args:
        transform: world to world (RAS); None: the parents alone.
        grid: on which volumes and label maps are sampled (LPS); None: their own axes.
    """
    register_representations()
    copy = node.CreateNodeInstance()
    copy.CopyContent(node)
    yield
    to_world = _composed(node.GetParentTransformNode(), transform)
    if copy.IsA("vtkMRMLVolumeNode"):
        if transform is not None or node.GetParentTransformNode() is not None:
            yield from _harden_volume(copy, to_world, grid)
    elif copy.IsA("vtkMRMLSegmentationNode") and copy.GetSegmentation().IsSourceRepresentationImageData():
        yield from _harden_segmentation(copy, to_world)
    else:
        copy.ApplyTransform(to_world)
        yield
    return copy


def place_copy(copy, node, fixed_node, target=None):
    """Puts what :func:`copy_steps` made into the scene, shown or hidden like the node it is a copy of.

    Args:
        fixed_node: the volume to which the copy was moved, or None.
        target: a node of the same class that takes the content, and is shown as before; None: a new node.
    """
    scene = node.GetScene()
    if copy.IsA("vtkMRMLSegmentationNode") and fixed_node is not None and not is_empty(fixed_node.GetImageData()):
        copy.SetReferenceImageGeometryParameterFromVolumeNode(fixed_node)
    if target is not None:
        with slicer.util.NodeModify(target):
            target.SetAndObserveTransformNodeID(None)
            target.CopyContent(copy, False)
    else:
        name = _("{name} warped").format(name=node.GetName())
        if fixed_node is not None:
            name = _("{moving} warped to {fixed}").format(moving=node.GetName(), fixed=fixed_node.GetName())
        copy.SetName(scene.GenerateUniqueName(name))
        # Before it is in the scene: modules that observe the scene give a node without displays one of their own, which is
        # shown (vtkSlicerMarkupsLogic::OnMRMLSceneNodeAdded).
        for shown in display_nodes(node):
            display = scene.AddNewNodeByClass(shown.GetClassName())
            display.CopyContent(shown)
            display.CopyReferences(shown)
            copy.AddAndObserveDisplayNodeID(display.GetID())
        target = _add_quietly(scene, copy)
        if not display_nodes(node):
            for display in display_nodes(target):
                scene.RemoveNode(display)
    target.SetNodeReferenceID(SOURCE, node.GetID())
    if fixed_node is not None:
        target.SetNodeReferenceID(FIXED, fixed_node.GetID())
    return target


def _add_quietly(scene, node):
    """Adds a node; the list that the user places points in stays the active one (the Markups module changes it)."""
    selection = scene.GetFirstNodeByClass("vtkMRMLSelectionNode")
    active = None if selection is None else selection.GetActivePlaceNodeID()
    added = scene.AddNode(node)
    if selection is not None:
        selection.SetReferenceActivePlaceNodeID(active)
    return added


def earlier_copy(node, fixed_node):
    """The copy of a node that an earlier registration to the same fixed volume made; None if there is none."""
    for candidate in all_nodes(node.GetScene()):
        ours = candidate.GetNodeReferenceID(SOURCE) == node.GetID() and candidate.GetNodeReference(FIXED) is fixed_node
        if ours and candidate.GetClassName() == node.GetClassName():
            return candidate
    return None


def _composed(parent_node, transform: vtk.vtkAbstractTransform | None) -> vtk.vtkGeneralTransform:
    """What a parent transform node (or None) and its parents do, then a transform (or None)."""
    composed = vtk.vtkGeneralTransform()
    composed.PostMultiply()
    if parent_node is not None:
        composed.Concatenate(transform_to_world(parent_node))
    if transform is not None:
        composed.Concatenate(transform)
    return composed


def _harden_volume(node, to_world: vtk.vtkAbstractTransform, grid: Grid | None) -> Steps[None]:
    """Resamples a volume or label map, once, whatever it is under."""
    linear = not node.IsA("vtkMRMLLabelMapVolumeNode")
    background = [node.GetImageBackgroundScalarComponentAsDouble(c) if linear else 0.0 for c in range(4)]
    image, matrix = yield from reslice_steps(
        node.GetImageData(), ijk_to_ras(node), to_world, linear=linear, background=background, grid=grid
    )
    matrix[:3, 3] = apply_matrix(matrix, image.GetExtent()[::2])
    image.SetExtent([bound for n in image.GetDimensions() for bound in (0, n - 1)])  # MRML's images start at 0
    fill_volume(node, image, matrix)


def _harden_segmentation(node, to_world: vtk.vtkAbstractTransform) -> Steps[None]:
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
        moved, _matrix = yield from reslice_steps(image, indices, to_world, linear=fractional, background=background)
        image.ShallowCopy(moved)
        image.SetGeometryFromImageToWorldMatrix(matrix)
    segmentation.InvalidateNonSourceRepresentations()
    for name in contained:
        if name != source:
            yield from _create_representation(segmentation, name)


def _create_representation(segmentation, name: str) -> Steps[None]:
    """As ``vtkSegmentation.CreateRepresentation``, segment by segment: all at once takes seconds."""
    source = segmentation.GetSourceRepresentationName()
    for i in range(segmentation.GetNumberOfSegments()):
        segment = segmentation.GetNthSegment(i)
        alone, one = slicer.vtkSegmentation(), slicer.vtkSegment()
        alone.SetSourceRepresentationName(source)
        one.SetName(segment.GetName())
        one.SetLabelValue(segment.GetLabelValue())
        one.AddRepresentation(source, segment.GetRepresentation(source))
        alone.AddSegment(one, "one")
        if alone.CreateRepresentation(name):
            segment.AddRepresentation(name, alone.GetSegment("one").GetRepresentation(name))
        yield
