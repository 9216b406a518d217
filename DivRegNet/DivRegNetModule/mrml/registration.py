"""A registration of nodes: from nodes to the library's inputs, and from its result to nodes."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetModule.mrml import transforms, volumes
from DivRegNetModule.mrml.checks import check_nodes
from DivRegNetModule.mrml.geometry import vtk_image
from DivRegNetModule.mrml.scene import add_node, all_or_nothing, is_a

if TYPE_CHECKING:
    import slicer

    from DivRegNetLib.result import Result


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
        ModelError, DeviceError, Cancelled: see :func:`DivRegNetLib.register`.
    The scene is as it was before if anything is raised.
    """
    from DivRegNetLib import register

    outputs = {"warped_node": warped_node, "transform_node": transform_node, "inverse_node": inverse_node}
    check_nodes(fixed_node, moving_node, **outputs)
    inputs = images_from_nodes(fixed_node, moving_node, **options)
    result = register(inputs.fixed, inputs.moving, **inputs.options)
    return nodes_from_result(result, fixed_node, moving_node, **outputs)


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
    masks = {
        "fixed_mask": volumes.mask_image(fixed_mask, "fixed", scene),
        "moving_mask": volumes.mask_image(moving_mask, "moving", scene),
    }
    if is_a(align, "vtkMRMLNode"):
        align = transforms.initial_transform(align, moving_node)
    given = {name: mask for name, mask in masks.items() if mask is not None}
    images = (volumes.volume_image(node) for node in (fixed_node, moving_node))
    return Inputs(*images, {"align": align, **given, **options})


def nodes_from_result(
    result: "Result",
    fixed_node,
    moving_node,
    *,
    warped_node=None,
    transform_node=None,
    inverse_node=None,
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
    scene = fixed_node.GetScene()
    fixed_name, moving_name = fixed_node.GetName(), moving_node.GetName()
    # All that needs memory is made before any node is touched.
    warped = vtk_image(result.warped, moving_node.GetImageData().GetScalarType())
    forward = transforms.grid_transform(result.transform)
    inverse = None if inverse_node is None else transforms.grid_transform(result.inverse)
    attributes = {
        "Model": result.card.name,
        "ModelVersion": result.card.version,
        "Settings": json.dumps(result.settings, allow_nan=False),
        "Quality": json.dumps(result.quality, allow_nan=False),
    }
    with all_or_nothing(scene, outputs.values()):
        if warped_node is None:
            warped_node = add_node(scene, "vtkMRMLScalarVolumeNode", f"{moving_name} warped to {fixed_name}")
        volumes.fill_volume(warped_node, warped, Grid.of(result.warped).ras_matrix)
        volumes.show_like(warped_node, moving_node)
        if transform_node is None:
            transform_node = add_node(scene, "vtkMRMLTransformNode", f"{moving_name} to {fixed_name}")
        transforms.fill_transform(transform_node, forward, fixed_node, moving_node, attributes)
        if inverse_node is True:
            inverse_node = add_node(scene, "vtkMRMLTransformNode", f"{fixed_name} to {moving_name}")
        if inverse_node is not None:
            transforms.fill_transform(inverse_node, inverse, moving_node, fixed_node, attributes)
    return Registration(warped_node, transform_node, inverse_node, result.quality, result)
