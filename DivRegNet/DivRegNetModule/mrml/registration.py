"""A registration of nodes: from nodes to the library's inputs, and from its result to nodes."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
import vtk

from DivRegNetLib.core.grid import Grid
from DivRegNetModule import _
from DivRegNetModule.mrml import transforms, volumes
from DivRegNetModule.mrml.carrying import FIXED, MOVING
from DivRegNetModule.mrml.checks import check_nodes
from DivRegNetModule.mrml.geometry import vtk_image_steps
from DivRegNetModule.mrml.scene import add_node, all_or_nothing, is_a
from DivRegNetModule.steps import Steps, finish

if TYPE_CHECKING:
    import slicer

    from DivRegNetLib.result import Result
    from DivRegNetLib.run.worker.protocol import ResultFiles


@dataclass(frozen=True)
class Inputs:
    """What :func:`DivRegNetLib.register` and :class:`DivRegNetLib.run.worker.Worker` take.

    fixed, moving: on their world grids (LPS).
    options: keyword arguments; masks are images, ``align`` is a name, or a linear transform that maps fixed points to
        moving points (LPS, mm).
    """

    fixed: sitk.Image
    moving: sitk.Image
    options: dict[str, Any]


@dataclass(frozen=True)
class Registration:
    """The nodes of a registration, its quality card and its whole result.

    inverse_node: None unless it was asked for.
    quality: see :func:`DivRegNetLib.quality.metrics.quality`.
    result: None where it was computed in another process.
    """

    warped_node: "slicer.vtkMRMLScalarVolumeNode"
    transform_node: "slicer.vtkMRMLTransformNode"
    inverse_node: "slicer.vtkMRMLTransformNode | None"
    quality: dict
    result: "Result | None" = None


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
        ModelError, DeviceError, Cancelled: see :func:`DivRegNetLib.register`.
    The scene is as it was before if anything is raised.
    """
    from DivRegNetLib import register

    outputs = {"warped_node": warped_node, "transform_node": transform_node, "inverse_node": inverse_node}
    check_nodes(fixed_node, moving_node, **outputs)
    inputs = images_from_nodes(fixed_node, moving_node, **options)
    result = register(inputs.fixed, inputs.moving, **inputs.options)
    return nodes_from_result(result, fixed_node, moving_node, **outputs)


def images_from_nodes(fixed_node, moving_node, **options) -> Inputs:
    """As :func:`images_from_nodes_steps`, at once."""
    return finish(images_from_nodes_steps(fixed_node, moving_node, **options))


def images_from_nodes_steps(
    fixed_node, moving_node, *, fixed_mask=None, moving_mask=None, align="affine", **options
) -> Steps[Inputs]:
    """The images and options of a registration, in world coordinates. The scene is only read.

    Args:
        fixed_node, moving_node: vtkMRMLScalarVolumeNode, in one scene.
        fixed_mask, moving_mask: a label map node (non-zero counts), a markups ROI node, a pair (segmentation node,
            segment id), or None.
        align: the name of an initial alignment, or a linear transform node that would bring the moving volume near to
            the fixed one if it were put under it.
        options: the other fields of :class:`~DivRegNetLib.options.Options`, and ``progress``; passed on.
    Raises:
        InputError: as :func:`check_nodes`, or a mask or an initial transform that cannot be used.
    """
    check_nodes(fixed_node, moving_node)
    scene = fixed_node.GetScene()
    if is_a(align, "vtkMRMLNode"):
        align = transforms.initial_transform(align, moving_node)
    given = {}
    for role, mask in (("fixed", fixed_mask), ("moving", moving_mask)):
        image = yield from volumes.mask_image_steps(mask, scene)
        if image is not None:
            given[f"{role}_mask"] = image
    fixed = yield from volumes.volume_image_steps(fixed_node)
    moving = yield from volumes.volume_image_steps(moving_node)
    return Inputs(fixed, moving, {"align": align, **given, **options})


@dataclass(frozen=True)
class Content:
    """A result in VTK's form: all that needs memory, made before any node is touched.

    warped, matrix: voxels of the warped volume, and their (4, 4) index-to-RAS matrix.
    forward, inverse: displacement fields, from parent; the inverse may be None.
    quality: the quality card.
    attributes: of the transform nodes.
    error_map: voxels of the map of the expected error (mm), and their (4, 4) index-to-RAS matrix; None where there is none.
    """

    warped: vtk.vtkImageData
    matrix: np.ndarray
    forward: "slicer.vtkOrientedGridTransform"
    inverse: "slicer.vtkOrientedGridTransform | None"
    quality: dict
    attributes: dict[str, str]
    error_map: tuple[vtk.vtkImageData, np.ndarray] | None = None


def content_of_result(result: "Result", scalar_type: int, *, inverse: bool) -> Content:
    """A result of this process in VTK's form.

    Args:
        scalar_type: of VTK, of the moving volume.
        inverse: whether the inverse transform is wanted.
    """
    return Content(
        finish(vtk_image_steps(sitk.GetArrayViewFromImage(result.warped), scalar_type)),
        Grid.of(result.warped).ras_matrix,
        transforms.grid_transform(result.transform, Grid.of(result.warped)),
        transforms.grid_transform(result.inverse) if inverse else None,
        result.quality,
        _attributes(result),
    )


def content_of_files(files: "ResultFiles", scalar_type: int, *, inverse: bool) -> Steps[Content]:
    """A worker's result in VTK's form, read slab by slab: never more than the nodes will hold."""
    warped = yield from vtk_image_steps(files.array("warped"), scalar_type)
    grids = []
    for name in ("transform", "inverse")[: 2 if inverse else 1]:
        grids.append((yield from transforms.grid_transform_steps(files.array(name), files.grid(name))))
    matrix = files.grid("warped").ras_matrix
    error_map = None
    if files.holds("error_map"):
        image = yield from vtk_image_steps(files.array("error_map"), vtk.VTK_FLOAT)
        error_map = image, files.grid("error_map").ras_matrix
    return Content(
        warped, matrix, grids[0], grids[1] if inverse else None, files.quality, _attributes(files), error_map
    )


def _attributes(result) -> dict[str, str]:
    return {
        "Model": result.card.name,
        "ModelVersion": result.card.version,
        "Settings": json.dumps(result.settings, allow_nan=False),
        "Quality": json.dumps(result.quality, allow_nan=False),
        "Initial": json.dumps(result.initial.tolist()),
    }


def nodes_from_result(
    result: "Result", fixed_node, moving_node, *, warped_node=None, transform_node=None, inverse_node=None
) -> Registration:
    """Puts the result of registering two nodes into nodes: all of it or, if anything fails, nothing.

    Args:
        result: of the images that :func:`images_from_nodes` made of the same two nodes.
        fixed_node, moving_node, warped_node, transform_node, inverse_node: as of :func:`register_nodes`.
    Raises:
        InputError: as :func:`check_nodes`.
    The scene is as it was before if anything is raised.
    """
    outputs = {"warped_node": warped_node, "transform_node": transform_node, "inverse_node": inverse_node}
    check_nodes(fixed_node, moving_node, **outputs)
    scalar_type = moving_node.GetImageData().GetScalarType()
    content = content_of_result(result, scalar_type, inverse=inverse_node is not None)
    return fill_nodes(content, fixed_node, moving_node, **outputs, result=result)


def fill_nodes(
    content: Content,
    fixed_node,
    moving_node,
    *,
    warped_node=None,
    transform_node=None,
    inverse_node=None,
    result: "Result | None" = None,
) -> Registration:
    """As :func:`nodes_from_result`, of what was prepared."""
    outputs = {"warped_node": warped_node, "transform_node": transform_node, "inverse_node": inverse_node}
    check_nodes(fixed_node, moving_node, **outputs)
    scene = fixed_node.GetScene()
    names = {"fixed": fixed_node.GetName(), "moving": moving_node.GetName()}
    with all_or_nothing(scene, outputs.values()):
        if warped_node is None:
            warped_node = add_node(scene, "vtkMRMLScalarVolumeNode", _("{moving} warped to {fixed}").format(**names))
        volumes.fill_volume(warped_node, content.warped, content.matrix)
        volumes.show_like(warped_node, moving_node)
        warped_node.SetNodeReferenceID(FIXED, fixed_node.GetID())
        warped_node.SetNodeReferenceID(MOVING, moving_node.GetID())
        if transform_node is None:
            transform_node = add_node(scene, "vtkMRMLTransformNode", _("{moving} to {fixed}").format(**names))
        transforms.fill_transform(transform_node, content.forward, fixed_node, moving_node, content.attributes)
        if inverse_node is True:
            inverse_node = add_node(scene, "vtkMRMLTransformNode", _("{fixed} to {moving}").format(**names))
        if inverse_node is not None:
            transforms.fill_transform(inverse_node, content.inverse, moving_node, fixed_node, content.attributes)
    return Registration(warped_node, transform_node, inverse_node, content.quality, result)
