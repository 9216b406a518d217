"""Whether nodes can be used: each function raises an InputError that names the node and the remedy."""

from DivRegNetLib.errors import InputError
from DivRegNetModule.mrml.geometry import is_empty
from DivRegNetModule.mrml.scene import is_a, name_of, parent_transforms

OUTPUT_TRANSFORMS = ("vtkMRMLTransformNode", "vtkMRMLGridTransformNode")
CARRIED = ("vtkMRMLSegmentationNode", "vtkMRMLMarkupsNode", "vtkMRMLModelNode", "vtkMRMLVolumeNode")


def check_nodes(fixed_node, moving_node, *, warped_node=None, transform_node=None, inverse_node=None) -> None:
    """Whether these nodes can be the inputs and the outputs of a registration.

    Args:
        fixed_node, moving_node, warped_node, transform_node, inverse_node: as of
            :func:`DivRegNetModule.mrml.register_nodes`.
    Raises:
        InputError: they cannot; names the node and the remedy.
    """
    for node, role in ((fixed_node, "fixed"), (moving_node, "moving")):
        check_volume(node, role)
    if fixed_node is moving_node:
        raise InputError(f"{name_of(fixed_node)} is chosen as fixed and as moving volume; choose two different volumes")
    scene = fixed_node.GetScene()
    check_scene(moving_node, scene)
    if warped_node is not None:
        if not is_scalar_volume(warped_node):
            raise InputError(
                f"{name_of(warped_node)} cannot hold the warped volume; choose a scalar volume or a new one"
            )
        if warped_node is fixed_node or warped_node is moving_node:
            raise InputError(
                f"{name_of(warped_node)} is an input and would be overwritten; choose another warped volume"
            )
        check_scene(warped_node, scene)
    outputs = [node for node in (transform_node, inverse_node) if node is not None and node is not True]
    for node in outputs:
        if not is_a(node, "vtkMRMLTransformNode") or node.GetClassName() not in OUTPUT_TRANSFORMS:
            raise InputError(
                f"{name_of(node)} cannot hold a displacement field; choose a general transform or a new one"
            )
        check_scene(node, scene)
        for volume in (fixed_node, moving_node):
            if node in parent_transforms(volume):
                raise InputError(
                    f"{name_of(volume)} is under the transform {name_of(node)}, which would be overwritten; "
                    "take it out from there or choose another output transform"
                )
    if len(outputs) == 2 and outputs[0] is outputs[1]:
        raise InputError(f"{name_of(outputs[0])} is chosen for the transform and for its inverse; choose two nodes")


def check_volume(node, role: str) -> None:
    """Raises InputError unless the node is a scalar volume, in a scene, with voxels of one component."""
    if node is None:
        raise InputError(f"there is no {role} volume; choose one")
    if not is_a(node, "vtkMRMLNode"):
        raise InputError(f"the {role} volume must be a volume node, got {node!r:.80}")
    if is_a(node, "vtkMRMLLabelMapVolumeNode"):
        raise InputError(
            f"{name_of(node)} is a label map, which has no intensities to register; choose a scalar volume as {role} "
            "volume, and carry label maps along with the transform"
        )
    image = node.GetImageData() if is_a(node, "vtkMRMLVolumeNode") else None
    if not is_scalar_volume(node) or (image is not None and image.GetNumberOfScalarComponents() > 1):
        raise InputError(f"{name_of(node)} is no scalar volume; choose, as {role} volume, one with one value per voxel")
    if is_empty(image):
        raise InputError(f"the {role} volume {name_of(node)} is empty; load an image into it or choose another")
    if node.GetScene() is None:
        raise InputError(f"the {role} volume {name_of(node)} is in no scene; add it to one or choose another")


def check_carried(node, transform_node) -> None:
    """Raises InputError unless a transform node can be applied to a copy of the node."""
    if not any(is_a(node, kind) for kind in CARRIED):
        raise InputError(
            f"{name_of(node)} cannot be carried along; choose segmentations, markups, models, volumes or label maps"
        )
    check_scene(node, transform_node.GetScene())
    if transform_node in parent_transforms(node):
        raise InputError(f"{name_of(node)} is under the transform {name_of(transform_node)} already; leave it out")
    if is_a(node, "vtkMRMLVolumeNode") and is_empty(node.GetImageData()):
        raise InputError(f"the volume {name_of(node)} is empty; load an image into it or leave it out")


def check_scene(node, scene) -> None:
    """Raises InputError unless a node is in a scene."""
    if scene is None or node.GetScene() is not scene:
        raise InputError(f"{name_of(node)} is not in the scene of the other nodes; add it to that scene")


def is_scalar_volume(node) -> bool:
    """Whether a node is a volume of intensities: no label map, no vectors or tensors."""
    others = ("vtkMRMLLabelMapVolumeNode", "vtkMRMLTensorVolumeNode", "vtkMRMLVectorVolumeNode")
    return is_a(node, "vtkMRMLScalarVolumeNode") and not any(node.IsA(kind) for kind in others)
