"""MRML nodes in, nodes out: the one file of the library that knows 3D Slicer. Works in Slicer and on ``slicer-core``.

Everything is done in world coordinates. A volume's grid is its IJKToRAS matrix under all of its parent transforms;
linear parents are folded into the matrix, a volume under a non-linear one is first resampled in world coordinates.

What comes out is in world coordinates too, that is without a parent transform:

* the warped volume lies on the world grid of the fixed volume;
* the transform node takes the moving image's world to the fixed image's world. It holds, as its transform *from*
  parent, a displacement on the fixed grid (RAS, mm) that leads from fixed to moving points: what resampling needs. A
  moving volume without a parent goes under it as it is. If the moving volume has parents, the topmost of these goes
  under it, as the registration is to come last;
* the inverse node, where one is asked for, takes fixed to moving: what the fixed volume is put under. Its
  displacement lies on the moving grid.

Both transform nodes reference the volumes in Slicer's own roles, and have the attributes ``DivRegNet.Model``,
``DivRegNet.ModelVersion``, ``DivRegNet.Settings`` and ``DivRegNet.Quality`` (the last two are JSON).
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk
from vtk.util import numpy_support

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, affine_transform, apply_matrix
from DivRegNetLib.errors import InputError

if TYPE_CHECKING:
    from DivRegNetLib.result import Result

ATTRIBUTE = "DivRegNet."
OUTPUT_TRANSFORMS = ("vtkMRMLTransformNode", "vtkMRMLGridTransformNode")
CARRIED = ("vtkMRMLSegmentationNode", "vtkMRMLMarkupsNode", "vtkMRMLModelNode", "vtkMRMLVolumeNode")


@dataclass(frozen=True)
class Inputs:
    """What :func:`DivRegNetLib.registration.pipeline.register` and :class:`DivRegNetLib.run.worker.Worker` take.

    fixed, moving: on their world grids (LPS).
    options: keyword arguments; masks are images, ``align`` a name or a linear transform of fixed to moving points (LPS).
    """

    fixed: sitk.Image
    moving: sitk.Image
    options: dict[str, Any]


@dataclass(frozen=True)
class Registration:
    """The nodes of a registration, its quality card and all else that was found.

    inverse_node: None unless it was asked for.
    quality: see :func:`DivRegNetLib.quality.metrics.quality`.
    """

    warped_node: "slicer.vtkMRMLScalarVolumeNode"
    transform_node: "slicer.vtkMRMLTransformNode"
    inverse_node: "slicer.vtkMRMLTransformNode | None"
    quality: dict
    result: "Result"


def register_nodes(
    fixed_node, moving_node, *, warped_node=None, transform_node=None, inverse_node=None, **options
) -> Registration:
    """Registers the moving to the fixed volume, in this process and at once.

    Args:
        fixed_node, moving_node: vtkMRMLScalarVolumeNode, in one scene.
        warped_node, transform_node: take the outputs; None makes new nodes in the scene of the inputs.
        inverse_node: None: no inverse; True: a new node; or a node that takes it.
        options: see :func:`images_from_nodes`.
    Raises:
        InputError: a node, mask or option that cannot be used; the message says which, why and what to do.
        ModelError, DeviceError, Cancelled: see :func:`DivRegNetLib.registration.pipeline.register`.
    The scene is as it was before if anything is raised.
    """
    from DivRegNetLib.registration.pipeline import register

    outputs = {"warped_node": warped_node, "transform_node": transform_node, "inverse_node": inverse_node}
    check_nodes(fixed_node, moving_node, **outputs)
    inputs = images_from_nodes(fixed_node, moving_node, **options)
    result = register(inputs.fixed, inputs.moving, **inputs.options)
    return nodes_from_result(result, fixed_node, moving_node, **outputs)


def check_nodes(fixed_node, moving_node, *, warped_node=None, transform_node=None, inverse_node=None) -> None:
    """Whether these nodes can be the inputs and the outputs of a registration; arguments as of :func:`register_nodes`.

    Raises:
        InputError: they cannot; names the node and the remedy.
    """
    for node, role in ((fixed_node, "fixed"), (moving_node, "moving")):
        _check_volume(node, role)
    if fixed_node is moving_node:
        raise InputError(f"{_name(fixed_node)} is chosen as fixed and as moving volume; choose two different volumes")
    scene = fixed_node.GetScene()
    _check_scene(moving_node, scene)
    if warped_node is not None:
        if not _is_scalar_volume(warped_node):
            raise InputError(f"{_name(warped_node)} cannot hold the warped volume; choose a scalar volume or a new one")
        if warped_node is fixed_node or warped_node is moving_node:
            raise InputError(f"{_name(warped_node)} is an input and would be overwritten; choose another warped volume")
        _check_scene(warped_node, scene)
    outputs = [node for node in (transform_node, inverse_node) if node is not None and node is not True]
    for node in outputs:
        if not _is_a(node, "vtkMRMLTransformNode") or node.GetClassName() not in OUTPUT_TRANSFORMS:
            raise InputError(f"{_name(node)} cannot hold a displacement field; choose a general transform or a new one")
        _check_scene(node, scene)
        for volume in (fixed_node, moving_node):
            if node in _parents(volume):
                raise InputError(
                    f"{_name(volume)} is under the transform {_name(node)}, which would be overwritten; "
                    "take it out from there or choose another output transform"
                )
    if len(outputs) == 2 and outputs[0] is outputs[1]:
        raise InputError(f"{_name(outputs[0])} is chosen for the transform and for its inverse; choose two nodes")


def images_from_nodes(
    fixed_node, moving_node, *, fixed_mask=None, moving_mask=None, align="affine", **options
) -> Inputs:
    """The images and options of a registration, in world coordinates. The scene is only read.

    Args:
        fixed_node, moving_node: vtkMRMLScalarVolumeNode, in one scene.
        fixed_mask, moving_mask: a label map node (non-zero counts), a pair (segmentation node, segment id), or None.
        align: the name of an initial alignment, or a linear transform node that would bring the moving volume near to
            the fixed one if it were put under it.
        options: the other fields of :class:`~DivRegNetLib.options.Options`, and ``progress``; passed on.
    Raises:
        InputError: as :func:`check_nodes`, or a mask or an initial transform that cannot be used.
    """
    check_nodes(fixed_node, moving_node)
    scene = fixed_node.GetScene()
    masks = {"fixed_mask": _mask(fixed_mask, "fixed", scene), "moving_mask": _mask(moving_mask, "moving", scene)}
    if _is_a(align, "vtkMRMLNode"):
        align = _initial_transform(align, moving_node)
    given = {name: mask for name, mask in masks.items() if mask is not None}
    return Inputs(_volume_image(fixed_node), _volume_image(moving_node), {"align": align, **given, **options})


def nodes_from_result(
    result: "Result",
    fixed_node,
    moving_node,
    *,
    warped_node=None,
    transform_node=None,
    inverse_node=None,
) -> Registration:
    """Puts what a registration of the images of two nodes gave into nodes: all of it or, if anything fails, nothing.

    Args:
        result: what came of the images that :func:`images_from_nodes` made of the same two nodes.
        fixed_node, moving_node, warped_node, transform_node, inverse_node: as of :func:`register_nodes`.
    Raises:
        InputError: as :func:`check_nodes`.
    The scene is as it was before if anything is raised.
    """
    check_nodes(
        fixed_node, moving_node, warped_node=warped_node, transform_node=transform_node, inverse_node=inverse_node
    )
    scene = fixed_node.GetScene()
    fixed_name, moving_name = fixed_node.GetName(), moving_node.GetName()
    # All that needs memory is made before any node is touched.
    warped = _vtk_image(result.warped, moving_node.GetImageData().GetScalarType())
    forward = _grid_transform(result.transform)
    inverse = None if inverse_node is None else _grid_transform(result.inverse)
    attributes = {
        "Model": result.card.name,
        "ModelVersion": result.card.version,
        "Settings": json.dumps(result.settings, allow_nan=False),
        "Quality": json.dumps(result.quality, allow_nan=False),
    }
    with _all_or_nothing(scene, [warped_node, transform_node, inverse_node]):
        if warped_node is None:
            warped_node = _new(scene, "vtkMRMLScalarVolumeNode", f"{moving_name} warped to {fixed_name}")
        _fill_volume(warped_node, warped, Grid.of(result.warped).ras_matrix)
        _show_like(warped_node, moving_node)
        if transform_node is None:
            transform_node = _new(scene, "vtkMRMLTransformNode", f"{moving_name} to {fixed_name}")
        _fill_transform(transform_node, forward, fixed_node, moving_node, attributes)
        if inverse_node is True:
            inverse_node = _new(scene, "vtkMRMLTransformNode", f"{fixed_name} to {moving_name}")
        if inverse_node is not None:
            _fill_transform(inverse_node, inverse, moving_node, fixed_node, attributes)
    return Registration(warped_node, transform_node, inverse_node, result.quality, result)


def apply_to(transform_node, nodes: Iterable, *, harden: bool = True, reference_node=None) -> list:
    """Carries along what belongs to the moving image: copies of nodes, moved by a transform; the nodes stay as they are.

    The nodes' own parent transforms count, and come first. Label maps and segmentations are resampled by nearest
    neighbor, in their own resolution; segments keep their ids, names and colors. Other volumes are resampled linearly.

    Args:
        transform_node: as made by :func:`register_nodes`, or any other.
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
    if not _is_a(transform_node, "vtkMRMLTransformNode"):
        raise InputError(f"{_name(transform_node)} is no transform; choose the transform of a registration")
    scene = transform_node.GetScene()
    _check_scene(transform_node, scene)
    if reference_node is not None:
        _check_volume(reference_node, "reference")
        _check_scene(reference_node, scene)
    nodes = list(nodes)
    for node in nodes:
        if not any(_is_a(node, kind) for kind in CARRIED):
            raise InputError(
                f"{_name(node)} cannot be carried along; choose segmentations, markups, models, volumes or label maps"
            )
        _check_scene(node, scene)
        if transform_node in _parents(node):
            raise InputError(f"{_name(node)} is under the transform {_name(transform_node)} already; leave it out")
        if _is_a(node, "vtkMRMLVolumeNode") and _is_empty(node.GetImageData()):
            raise InputError(f"the volume {_name(node)} is empty; load an image into it or leave it out")
    with _all_or_nothing(scene, []):
        return [_carry(node, transform_node, harden, reference_node) for node in nodes]


def segment_image(node, segment_id: str) -> sitk.Image:
    """One segment of a segmentation node as an image of 0 and 1 on its world grid (LPS); the node is only read.

    Raises:
        InputError: there is no such segment, or it is empty.
    """
    segmentation = node.GetSegmentation()
    segment = segmentation.GetSegment(segment_id) if segmentation else None
    if segment is None:
        raise InputError(f"the segmentation {_name(node)} has no segment {segment_id!r}; choose one that it has")
    _register_representations()
    binary = slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName()
    source = node
    if not segmentation.ContainsRepresentation(binary):
        copy = slicer.vtkSegmentation()
        copy.DeepCopy(segmentation)
        copy.CreateRepresentation(binary)
        source = slicer.vtkMRMLSegmentationNode()
        source.SetAndObserveSegmentation(copy)
    image = slicer.vtkOrientedImageData()
    if not source.GetBinaryLabelmapRepresentation(segment_id, image) or _is_empty(image):
        raise InputError(f"the segment {segment.GetName()!r} of {_name(node)} is empty; draw it or leave the mask out")
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return _world_image(image, slicer.util.arrayFromVTKMatrix(matrix), node, linear=False)


# --- nodes to images


def _volume_image(node) -> sitk.Image:
    """A volume on its world grid; label maps are resampled, if at all, by nearest neighbor."""
    matrix = slicer.util.arrayFromVTKMatrix(_ijk_to_ras(node))
    return _world_image(node.GetImageData(), matrix, node, linear=not _is_a(node, "vtkMRMLLabelMapVolumeNode"))


def _world_image(image: vtk.vtkImageData, matrix: np.ndarray, node, *, linear: bool) -> sitk.Image:
    """An image with its (4, 4) index-to-RAS matrix, under the parents of a node, on its world grid."""
    parent = node.GetParentTransformNode()
    if parent is not None and parent.IsTransformToWorldLinear():
        matrix = _matrix_to_world(parent) @ matrix
    elif parent is not None:
        image, matrix = _reslice(image, matrix, _to_world(parent), linear=linear)
    extent = image.GetExtent()
    size = image.GetDimensions()
    origin = apply_matrix(matrix, extent[::2])
    matrix = matrix.copy()
    matrix[:3, 3] = origin
    try:
        grid = Grid(size, LPS_FROM_RAS @ matrix)
    except ValueError as error:
        raise InputError(f"the geometry of {_name(node)} cannot be used: {error}; repair it") from error
    array = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(size[::-1])
    return grid.image(array.view(array.dtype.str))  # plain int64 for VTK's long long, which SimpleITK does not know


def _mask(mask, name: str, scene) -> sitk.Image | None:
    """A mask as an image on its world grid; None stays None."""
    if mask is None:
        return None
    node, segment = mask if isinstance(mask, tuple) and len(mask) == 2 else (mask, None)
    wanted = "vtkMRMLLabelMapVolumeNode" if segment is None else "vtkMRMLSegmentationNode"
    if not _is_a(node, wanted):
        raise InputError(
            f"{_name(node)} cannot be the {name} mask; choose a label map, or a segmentation and one of its segments"
        )
    _check_scene(node, scene)
    if segment is not None:
        return segment_image(node, segment)
    if _is_empty(node.GetImageData()):
        raise InputError(f"the {name} mask {_name(node)} is empty; draw it or leave it out")
    return _volume_image(node)


def _initial_transform(node, moving_node) -> sitk.AffineTransform:
    """A linear transform node, under its own parents, as the map from fixed to moving points (LPS, mm)."""
    if not _is_a(node, "vtkMRMLTransformNode") or not node.IsTransformToWorldLinear():
        raise InputError(f"{_name(node)} is no linear transform; choose one, or another initial alignment")
    _check_scene(node, moving_node.GetScene())
    if node in _parents(moving_node):
        raise InputError(
            f"{_name(moving_node)} is under the transform {_name(node)} already, which counts; choose no initial "
            "alignment, or take the volume out of the transform"
        )
    return affine_transform(LPS_FROM_RAS @ np.linalg.inv(_matrix_to_world(node)) @ LPS_FROM_RAS)


# --- results to nodes


def _vtk_image(image: sitk.Image, scalar_type: int) -> vtk.vtkImageData:
    """The voxels of an image, of any number of components, without its geometry."""
    components = image.GetNumberOfComponentsPerPixel()
    copy = vtk.vtkImageData()
    copy.SetDimensions(image.GetSize())
    copy.AllocateScalars(scalar_type, components)
    values = sitk.GetArrayViewFromImage(image)
    voxels = numpy_support.vtk_to_numpy(copy.GetPointData().GetScalars())
    voxels[...] = values.reshape(voxels.shape)
    return copy


def _grid_transform(transform: sitk.DisplacementFieldTransform) -> "slicer.vtkOrientedGridTransform":
    """A displacement field (LPS, mm) as VTK's (RAS, mm); single precision, a 10,000th of a mm, halves the memory."""
    field = transform.GetDisplacementField()
    matrix, spacing = Grid.of(field).ras_matrix, np.array(Grid.of(field).spacing)
    image = _vtk_image(field, vtk.VTK_FLOAT)
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


def _fill_volume(node, image: vtk.vtkImageData, matrix: np.ndarray) -> None:
    """Gives a volume its voxels and its world grid, a (4, 4) index-to-RAS matrix."""
    with slicer.util.NodeModify(node):
        node.SetAndObserveTransformNodeID(None)
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrix))
        node.SetAndObserveImageData(image)


def _show_like(node, model) -> None:
    """Colors, window and level of another volume, for one that has no display yet; and what its values mean."""
    node.SetVoxelValueQuantity(model.GetVoxelValueQuantity())
    node.SetVoxelValueUnits(model.GetVoxelValueUnits())
    if node.GetDisplayNode() is None:
        if model.GetDisplayNode() is None:
            node.CreateDefaultDisplayNodes()
        else:
            _copy_display(node, model)


def _copy_display(node, model) -> None:
    """Display nodes like those of another node, colors included."""
    scene = node.GetScene()
    for i in range(model.GetNumberOfDisplayNodes()):
        shown = model.GetNthDisplayNode(i)
        if shown is not None:
            display = scene.AddNewNodeByClass(shown.GetClassName())
            display.CopyContent(shown)
            display.CopyReferences(shown)
            node.AddAndObserveDisplayNodeID(display.GetID())


def _fill_transform(node, transform, fixed_node, moving_node, attributes: dict[str, str]) -> None:
    """Gives a transform node its transform from parent, and the record of where it comes from."""
    with slicer.util.NodeModify(node):
        node.SetAndObserveTransformNodeID(None)
        node.SetAndObserveTransformFromParent(transform)
        node.SetNodeReferenceID(node.GetFixedNodeReferenceRole(), fixed_node.GetID())
        node.SetNodeReferenceID(node.GetMovingNodeReferenceRole(), moving_node.GetID())
        for name, value in attributes.items():
            node.SetAttribute(ATTRIBUTE + name, value)


@contextmanager
def _all_or_nothing(scene, reused: list) -> Iterator[None]:
    """Undoes, if the body raises, the nodes it added to the scene and what it changed in nodes already there."""
    before = {node.GetID() for node in _nodes(scene)}
    backups = []
    for node in reused:
        if node is not None and node is not True:
            backup = node.CreateNodeInstance()
            backup.CopyContent(node, False)
            backup.CopyReferences(node)
            backups.append((node, backup))
    try:
        yield
    except BaseException:
        for node, backup in backups:
            with slicer.util.NodeModify(node):
                node.CopyContent(backup, False)
                node.CopyReferences(backup)
        for node in [node for node in _nodes(scene) if node.GetID() not in before]:
            scene.RemoveNode(node)
        raise


# --- carrying nodes along


def _carry(node, transform_node, harden: bool, reference_node):
    """A copy of one node, moved."""
    scene = node.GetScene()
    fixed = transform_node.GetNodeReference(transform_node.GetFixedNodeReferenceRole())
    name = f"{node.GetName()} warped" + (f" to {fixed.GetName()}" if fixed is not None else "")
    _register_representations()
    copy = _new(scene, node.GetClassName(), name)
    copy.CopyContent(node)
    _copy_display(copy, node)
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
    if copy.IsA("vtkMRMLSegmentationNode") and fixed is not None and not _is_empty(fixed.GetImageData()):
        copy.SetReferenceImageGeometryParameterFromVolumeNode(fixed)
    return copy


def _composed(node, transform_node) -> vtk.vtkGeneralTransform:
    """The parents of a node, then a transform node and its parents."""
    transform = vtk.vtkGeneralTransform()
    transform.PostMultiply()
    if node.GetParentTransformNode() is not None:
        transform.Concatenate(_to_world(node.GetParentTransformNode()))
    transform.Concatenate(_to_world(transform_node))
    return transform


def _harden_volume(node, to_world: vtk.vtkAbstractTransform, reference_node) -> None:
    """Resamples a volume or label map, once, whatever it is under."""
    grid = None if reference_node is None else Grid.of(_volume_image(reference_node))
    linear = not node.IsA("vtkMRMLLabelMapVolumeNode")
    background = [node.GetImageBackgroundScalarComponentAsDouble(c) if linear else 0.0 for c in range(4)]
    matrix = slicer.util.arrayFromVTKMatrix(_ijk_to_ras(node))
    image, matrix = _reslice(node.GetImageData(), matrix, to_world, linear=linear, background=background, grid=grid)
    matrix[:3, 3] = apply_matrix(matrix, image.GetExtent()[::2])
    image.SetExtent([bound for n in image.GetDimensions() for bound in (0, n - 1)])  # MRML's images start at 0
    _fill_volume(node, image, matrix)


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
        if not _is_empty(image):
            images[image.GetAddressAsString("")] = image
    for image in images.values():
        matrix = vtk.vtkMatrix4x4()
        image.GetImageToWorldMatrix(matrix)
        fractional = source == slicer.vtkSegmentationConverter.GetFractionalLabelmapRepresentationName()
        background = [image.GetScalarRange()[0] if fractional else 0.0] * 4
        indices = slicer.util.arrayFromVTKMatrix(matrix)
        moved, _ = _reslice(image, indices, to_world, linear=fractional, background=background)
        image.DeepCopy(moved)
        image.SetGeometryFromImageToWorldMatrix(matrix)
    segmentation.InvalidateNonSourceRepresentations()
    for name in contained:
        if name != source:
            segmentation.CreateRepresentation(name)


def _register_representations() -> None:
    """Without what Slicer's Segmentations module does at start, no segment can be copied on plain slicer-core."""
    factory = slicer.vtkSegmentationConverterFactory.GetInstance()
    if factory.ConstructRepresentationObjectByClass("vtkOrientedImageData") is None:
        slicer.vtkSlicerSegmentationsModuleLogic().SetMRMLScene(slicer.vtkMRMLScene())


def _reslice(
    image: vtk.vtkImageData,
    matrix: np.ndarray,
    to_world: vtk.vtkAbstractTransform,
    *,
    linear: bool,
    background=(0.0, 0.0, 0.0, 0.0),
    grid: Grid | None = None,
) -> tuple[vtk.vtkImageData, np.ndarray]:
    """An image moved by a transform, resampled.

    Args:
        image: of any extent and number of components; its own geometry is ignored.
        matrix: (4, 4), index -> RAS before the transform.
        to_world: RAS before -> RAS after.
        linear: interpolation; otherwise nearest neighbor.
        grid: to sample on; None: the axes of ``matrix``, and all of the moved image.
    Returns:
        the image and its (4, 4) index-to-RAS matrix; without ``grid`` the extent need not start at 0.
    """
    if grid is not None:
        target, extent = grid.ras_matrix, [bound for n in grid.size for bound in (0, n - 1)]
    else:
        target, extent = matrix.copy(), _moved_extent(image, matrix, to_world)
    to_index = vtk.vtkGeneralTransform()  # of the output -> of the input
    to_index.PostMultiply()
    to_index.Concatenate(slicer.util.vtkMatrixFromArray(target))
    to_index.Concatenate(to_world.GetInverse())
    to_index.Concatenate(slicer.util.vtkMatrixFromArray(np.linalg.inv(matrix)))
    flat = vtk.vtkImageData()
    flat.ShallowCopy(image)
    flat.SetOrigin(0, 0, 0)
    flat.SetSpacing(1, 1, 1)
    flat.SetDirectionMatrix(1, 0, 0, 0, 1, 0, 0, 0, 1)
    reslice = vtk.vtkImageReslice()
    reslice.SetInputData(flat)
    reslice.SetResliceTransform(to_index)
    reslice.SetInterpolationMode(vtk.VTK_RESLICE_LINEAR if linear else vtk.VTK_RESLICE_NEAREST)
    reslice.SetBackgroundColor(background)
    reslice.SetOutputDimensionality(3)
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputSpacing(1, 1, 1)
    reslice.SetOutputExtent(extent)
    reslice.TransformInputSamplingOff()
    reslice.Update()
    return reslice.GetOutput(), target


def _moved_extent(image: vtk.vtkImageData, matrix: np.ndarray, to_world: vtk.vtkAbstractTransform) -> list[int]:
    """The voxels, along an image's own axes, that hold all of it after a transform (from a lattice of its points)."""
    extent = np.reshape(image.GetExtent(), (3, 2))
    axes = [np.linspace(first - 0.5, last + 0.5, 12) for first, last in extent]
    points = apply_matrix(matrix, np.stack(np.meshgrid(*axes), -1).reshape(-1, 3))
    moved = np.array([to_world.TransformPoint(point) for point in points])
    index = apply_matrix(np.linalg.inv(matrix), moved)
    low, high = np.floor(index.min(0) + 1e-3), np.ceil(index.max(0) - 1e-3)
    return [int(bound) for pair in zip(low, high, strict=True) for bound in pair]


# --- small things


def _check_volume(node, role: str) -> None:
    """Raises InputError unless the node is a scalar volume, in a scene, with voxels of one component."""
    if node is None:
        raise InputError(f"there is no {role} volume; choose one")
    if not _is_a(node, "vtkMRMLNode"):
        raise InputError(f"the {role} volume must be a volume node, got {node!r:.80}")
    if _is_a(node, "vtkMRMLLabelMapVolumeNode"):
        raise InputError(
            f"{_name(node)} is a label map, which has no intensities to register; choose a scalar volume as {role} "
            "volume, and carry label maps along with the transform"
        )
    image = node.GetImageData() if _is_a(node, "vtkMRMLVolumeNode") else None
    if not _is_scalar_volume(node) or (image is not None and image.GetNumberOfScalarComponents() > 1):
        raise InputError(f"{_name(node)} is no scalar volume; choose, as {role} volume, one with one value per voxel")
    if _is_empty(image):
        raise InputError(f"the {role} volume {_name(node)} is empty; load an image into it or choose another")
    if node.GetScene() is None:
        raise InputError(f"the {role} volume {_name(node)} is in no scene; add it to one or choose another")


def _check_scene(node, scene) -> None:
    if scene is None or node.GetScene() is not scene:
        raise InputError(f"{_name(node)} is not in the scene of the other nodes; add it to that scene")


def _is_a(node, kind: str) -> bool:
    return isinstance(node, slicer.vtkMRMLNode) and bool(node.IsA(kind))


def _is_scalar_volume(node) -> bool:
    others = ("vtkMRMLLabelMapVolumeNode", "vtkMRMLTensorVolumeNode", "vtkMRMLVectorVolumeNode")
    return _is_a(node, "vtkMRMLScalarVolumeNode") and not any(node.IsA(kind) for kind in others)


def _is_empty(image: vtk.vtkImageData | None) -> bool:
    return image is None or min(image.GetDimensions()) < 1 or image.GetPointData().GetScalars() is None


def _name(node) -> str:
    return repr(node.GetName() or node.GetID()) if isinstance(node, slicer.vtkMRMLNode) else repr(node)[:80]


def _new(scene, kind: str, name: str):
    return scene.AddNewNodeByClass(kind, scene.GenerateUniqueName(name))


def _nodes(scene) -> list:
    return [scene.GetNthNode(i) for i in range(scene.GetNumberOfNodes())]


def _parents(node) -> list:
    """The transform nodes a node is under, nearest first."""
    found = []
    while (node := node.GetParentTransformNode()) is not None and node not in found:
        found.append(node)
    return found


def _ijk_to_ras(node) -> vtk.vtkMatrix4x4:
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrix


def _matrix_to_world(transform_node) -> np.ndarray:
    """(4, 4) RAS matrix of a linear transform node and its parents, to world."""
    matrix = vtk.vtkMatrix4x4()
    transform_node.GetMatrixTransformToWorld(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def _to_world(transform_node) -> vtk.vtkGeneralTransform:
    """What a transform node and its parents do, to world."""
    transform = vtk.vtkGeneralTransform()
    transform_node.GetTransformToWorld(transform)
    return transform
