"""Whether nodes can be used: each function raises an InputError that names the node and the remedy."""

from DivRegNetLib.errors import InputError
from DivRegNetModule import _
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
        text = _("{name} is chosen as fixed and as moving volume; choose two different volumes")
        raise InputError(text.format(name=name_of(fixed_node)))
    scene = fixed_node.GetScene()
    check_scene(moving_node, scene)
    if warped_node is not None:
        if not is_scalar_volume(warped_node):
            text = _("{name} cannot hold the warped volume; choose a scalar volume or a new one")
            raise InputError(text.format(name=name_of(warped_node)))
        if warped_node is fixed_node or warped_node is moving_node:
            text = _("{name} is an input and would be overwritten; choose another warped volume")
            raise InputError(text.format(name=name_of(warped_node)))
        check_scene(warped_node, scene)
    outputs = [node for node in (transform_node, inverse_node) if node is not None and node is not True]
    for node in outputs:
        if not is_a(node, "vtkMRMLTransformNode") or node.GetClassName() not in OUTPUT_TRANSFORMS:
            text = _("{name} cannot hold a displacement field; choose a general transform or a new one")
            raise InputError(text.format(name=name_of(node)))
        check_scene(node, scene)
        for volume in (fixed_node, moving_node):
            if node in parent_transforms(volume):
                text = _(
                    "{volume} is under the transform {transform}, which would be overwritten; take it out from there or "
                    "choose another output transform"
                )
                raise InputError(text.format(volume=name_of(volume), transform=name_of(node)))
    if len(outputs) == 2 and outputs[0] is outputs[1]:
        text = _("{name} is chosen for the transform and for its inverse; choose two nodes")
        raise InputError(text.format(name=name_of(outputs[0])))


def check_volume(node, role: str) -> None:
    """Raises InputError unless the node is a scalar volume, in a scene, with several slices of one value per voxel.

    Args:
        role: ``fixed``, ``moving`` or ``reference``, for the message.
    """
    name = name_of(node)
    if node is None:
        missing = {
            "fixed": _("there is no fixed volume; choose one"),
            "moving": _("there is no moving volume; choose one"),
            "reference": _("there is no reference volume; choose one"),
        }
        raise InputError(missing[role])
    if not is_a(node, "vtkMRMLNode"):
        wrong = {
            "fixed": _("the fixed volume must be a volume node, got {what}"),
            "moving": _("the moving volume must be a volume node, got {what}"),
            "reference": _("the reference volume must be a volume node, got {what}"),
        }
        raise InputError(wrong[role].format(what=f"{node!r:.80}"))
    if is_a(node, "vtkMRMLLabelMapVolumeNode"):
        text = _(
            "{name} is a label map, which has no intensities to register; choose a scalar volume as fixed and as moving "
            "volume, and carry label maps along with the transform"
        )
        raise InputError(text.format(name=name))
    image = node.GetImageData() if is_a(node, "vtkMRMLVolumeNode") else None
    if not is_scalar_volume(node) or (image is not None and image.GetNumberOfScalarComponents() > 1):
        text = _("{name} is no scalar volume; choose, as fixed and as moving volume, one with one value per voxel")
        raise InputError(text.format(name=name))
    if is_empty(image):
        empty = {
            "fixed": _("the fixed volume {name} is empty; load an image into it or choose another"),
            "moving": _("the moving volume {name} is empty; load an image into it or choose another"),
            "reference": _("the reference volume {name} is empty; load an image into it or choose another"),
        }
        raise InputError(empty[role].format(name=name))
    if min(image.GetDimensions()) < 2:
        text = _("{name} has a single slice; choose, as fixed and as moving volume, one with several slices")
        raise InputError(text.format(name=name))
    if node.GetScene() is None:
        alone = {
            "fixed": _("the fixed volume {name} is in no scene; add it to one or choose another"),
            "moving": _("the moving volume {name} is in no scene; add it to one or choose another"),
            "reference": _("the reference volume {name} is in no scene; add it to one or choose another"),
        }
        raise InputError(alone[role].format(name=name))


def check_carried(node, scene, transform_node=None) -> None:
    """Raises InputError unless a copy of the node can be moved by a transform.

    Args:
        scene: in which the node must be.
        transform_node: that the node must not be under; None: a new one.
    """
    if not any(is_a(node, kind) for kind in CARRIED):
        text = _("{name} cannot be carried along; choose segmentations, markups, models, volumes or label maps")
        raise InputError(text.format(name=name_of(node)))
    check_scene(node, scene)
    if transform_node is not None and transform_node in parent_transforms(node):
        text = _("{name} is under the transform {transform} already; leave it out")
        raise InputError(text.format(name=name_of(node), transform=name_of(transform_node)))
    if is_a(node, "vtkMRMLVolumeNode") and is_empty(node.GetImageData()):
        text = _("the volume {name} is empty; load an image into it or leave it out")
        raise InputError(text.format(name=name_of(node)))


def check_scene(node, scene) -> None:
    """Raises InputError unless a node is in a scene."""
    if scene is None or node.GetScene() is not scene:
        text = _("{name} is not in the scene of the other nodes; add it to that scene")
        raise InputError(text.format(name=name_of(node)))


def is_scalar_volume(node) -> bool:
    """Whether a node is a volume of intensities: no label map, no vectors or tensors."""
    others = ("vtkMRMLLabelMapVolumeNode", "vtkMRMLTensorVolumeNode", "vtkMRMLVectorVolumeNode")
    return is_a(node, "vtkMRMLScalarVolumeNode") and not any(node.IsA(kind) for kind in others)
