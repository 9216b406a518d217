"""From the panel's parameters to a request; what is refused, said before the run; what is offered; models and cards."""

from textwrap import shorten

import slicer

from DivRegNetLib.errors import InputError, ModelError
from DivRegNetLib.models import DEFAULT, Card, card_files, find, read_card
from DivRegNetLib.registration.landmark_alignment import align_landmarks
from DivRegNetModule import _
from DivRegNetModule.fit import VolumeFacts
from DivRegNetModule.mrml.carrying import FIXED, MOVING
from DivRegNetModule.mrml.checks import CARRIED, check_volume, is_scalar_volume
from DivRegNetModule.mrml.geometry import is_empty
from DivRegNetModule.mrml.markups import pairs
from DivRegNetModule.mrml.scene import all_nodes, is_a, parent_transforms
from DivRegNetModule.mrml.transforms import ATTRIBUTE, initial_transform
from DivRegNetModule.run import LANDMARKS, Request
from DivRegNetModule.sequences import check_sequence

DICOM_MODALITY = "DICOM.Modality"
LINE_CHARACTERS = 58
NODES = ("fixedVolume", "movingVolume", "movingSequence", "initialTransform", "fixedMask", "movingMask", "warpedVolume",
         "transform", "inverse", "fixedSegmentation", "movingSegmentation", "fixedLandmarks", "movingLandmarks")  # fmt: skip
"""The parameters that are a node or None."""
SWAPPED = (("fixedVolume", "movingVolume"), ("fixedMask", "movingMask"), ("fixedSegment", "movingSegment"),
           ("fixedSegmentation", "movingSegmentation"), ("fixedLandmarks", "movingLandmarks"))  # fmt: skip


def request(parameters) -> Request:
    """What the parameter node asks for.

    Args:
        parameters: DivRegNetParameterNode.
    """
    p = parameters
    inverse = (p.inverse or True) if p.giveInverse else None
    return Request(
        fixed=p.fixedVolume,
        moving=p.movingVolume,
        warped=p.warpedVolume,
        transform=p.transform,
        inverse=inverse,
        also=[node for node in p.alsoApplyTo if node],
        options=options(p)
        | {
            "fixed_mask": mask(p.fixedMask, p.fixedSegment),
            "moving_mask": mask(p.movingMask, p.movingSegment),
            "align": p.initialTransform if p.alignment.value == "transform" else p.alignment.value,
        },
        segmentations=(p.fixedSegmentation, p.movingSegmentation),
        landmarks=(p.fixedLandmarks, p.movingLandmarks),
    )


def options(parameters) -> dict:
    """The options that hold for any pair."""
    p = parameters
    return {
        "model": p.model or DEFAULT,
        "method": p.method.value,
        "device": p.device or "auto",
        "effort": p.effort.value,
        "refine": p.refineSteps,
        "interpolation": p.interpolation.value,
        "default_value": None if p.fillAutomatic else p.fillValue,
        "spacing": p.workingSpacing or None,
    }


def mask(node, segment: str):
    """A mask as the library takes it: None, a label map node, an ROI, or (segmentation node, segment id)."""
    return (node, segment) if is_a(node, "vtkMRMLSegmentationNode") else node


def problems(parameters) -> list[str]:
    """What would be refused, in sentences, before anything runs; empty if Register can be pressed."""
    p = parameters
    if p is None or not p.fixedVolume or not p.movingVolume:
        return [_("Choose a fixed and a moving volume first.")]
    found = []
    asked = request(p)
    for check in (asked.check, lambda: _check_alignment(p), lambda: _check_masks(p)):
        try:
            check()
        except InputError as error:
            found.append(sentence(str(error)))
    return found


def sequence_problems(parameters) -> list[str]:
    """As :func:`problems`, for a registration of a sequence."""
    p = parameters
    if p is None or not p.fixedVolume or not p.movingSequence:
        return [_("Choose a fixed volume and a moving sequence first.")]
    if p.alignment.value == "transform" or p.alignment.value.startswith(LANDMARKS):
        return [_("Choose an initial alignment that is computed from the images.")]
    try:
        check_sequence(p.fixedVolume, p.movingSequence)
    except InputError as error:
        return [sentence(str(error))]
    return []


def sentence(text: str) -> str:
    """The library's messages start small and have no full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", ")")) else ".")


def _check_alignment(p) -> None:
    if p.alignment.value == "transform":
        if not p.initialTransform:
            raise InputError(_("choose the initial transform, or another initial alignment"))
        initial_transform(p.initialTransform, p.movingVolume)
    if p.alignment.value.startswith(LANDMARKS):
        if not p.fixedLandmarks or not p.movingLandmarks:
            raise InputError(_("choose the fixed and the moving landmarks, or another initial alignment"))
        found = pairs(p.fixedLandmarks, p.movingLandmarks)
        align_landmarks(found.fixed, found.moving, p.alignment.value.removeprefix(LANDMARKS))


def _check_masks(p) -> None:
    for node in (p.fixedMask, p.movingMask):
        if is_a(node, "vtkMRMLLabelMapVolumeNode") and is_empty(node.GetImageData()):
            raise InputError(_("the mask {name} is empty; draw it or leave it out").format(name=repr(node.GetName())))
        if is_a(node, "vtkMRMLSegmentationNode") and not node.GetSegmentation().GetNumberOfSegments():
            raise InputError(
                _("the mask {name} has no segment; draw one or leave it out").format(name=repr(node.GetName()))
            )


def registrable(scene) -> list:
    """The volumes of a scene that can be registered, in its order: what a program made itself comes not first."""
    volumes = []
    for node in all_nodes(scene):
        if node.GetClassName() == "vtkMRMLScalarVolumeNode" and not node.GetHideFromEditors():
            try:
                check_volume(node, "moving")
            except InputError:
                continue
            if node.GetNodeReferenceID(FIXED) is None:
                volumes.append(node)
    return volumes


def hidden_from(parameters, scene) -> dict[str, list[str]]:
    """Name of a selector -> ids of the nodes that it must not offer, since they would be refused."""
    p = parameters
    volumes = [n for n in all_nodes(scene) if is_a(n, "vtkMRMLVolumeNode")]
    refused = [n for n in volumes if is_scalar_volume(n) and not _can_be_registered(n)]
    nonlinear = [n for n in all_nodes(scene) if is_a(n, "vtkMRMLTransformNode") and not n.IsTransformToWorldLinear()]
    inputs = [n for n in (p.fixedVolume, p.movingVolume) if n]
    parents = [t for n in inputs for t in parent_transforms(n)]
    carried = [n for n in all_nodes(scene) if any(is_a(n, kind) for kind in CARRIED)]
    own = [n for n in (p.fixedVolume, p.warpedVolume) if n]
    not_carried = own + [
        n
        for n in carried
        if (is_a(n, "vtkMRMLVolumeNode") and is_empty(n.GetImageData()))
        or (p.transform is not None and p.transform in parent_transforms(n))
        or is_a(n, "vtkMRMLMarkupsROINode")
    ]
    nodes = {
        "fixedSelector": refused,
        "movingSelector": refused,
        "warpedSelector": inputs,
        "transformSelector": parents,
        "inverseSelector": parents,
        "initialTransformSelector": nonlinear,
        "alsoApplyToSelector": not_carried,
    }
    chosen = {  # stays visible, so that the selector shows what the parameter says
        "fixedSelector": [p.fixedVolume],
        "movingSelector": [p.movingVolume],
        "warpedSelector": [p.warpedVolume],
        "transformSelector": [p.transform],
        "inverseSelector": [p.inverse],
        "initialTransformSelector": [p.initialTransform],
        "alsoApplyToSelector": p.alsoApplyTo,
    }
    return {name: sorted({n.GetID() for n in nodes[name] if n not in chosen[name]}) for name in nodes}


def _can_be_registered(node) -> bool:
    try:
        check_volume(node, "moving")
    except InputError:
        return False
    return True


def foreign_outputs(parameters) -> list[str]:
    """The output parameters that hold what the module made for other volumes: it would be lost if it were overwritten."""
    p, names = parameters, []
    for name, node in (("warpedVolume", p.warpedVolume), ("transform", p.transform), ("inverse", p.inverse)):
        if node is None:
            continue
        wanted, volumes = [p.fixedVolume, p.movingVolume], made_for(node)
        if volumes is not None and volumes != (wanted[::-1] if name == "inverse" else wanted):
            names.append(name)
    return names


def made_for(node) -> list | None:
    """The fixed and the moving volume of a warped volume or a transform that the module made (for an inverse, the other way
    round); None for any other node."""
    if is_a(node, "vtkMRMLTransformNode"):
        ours = node.GetAttribute(ATTRIBUTE + "Model") is not None
        roles = (node.GetFixedNodeReferenceRole(), node.GetMovingNodeReferenceRole())
    else:
        ours, roles = node.GetNodeReferenceID(FIXED) is not None, (FIXED, MOVING)
    return [node.GetNodeReference(role) for role in roles] if ours else None


def models() -> list[tuple[str, str]]:
    """(text, name) of every model found, the default one first."""
    names = sorted(card_files(), key=lambda name: (name != DEFAULT, name))
    summaries = (getattr(card(name), "summary", _("the card cannot be read")) for name in names)
    return [(f"{name}: {summary}", name) for name, summary in zip(names, summaries, strict=True)]


def card(name: str) -> Card | None:
    """The card of a model, None if there is no such model or its card is damaged."""
    try:
        return read_card(find(name or DEFAULT))
    except ModelError:
        return None


def card_lines(name: str) -> tuple[str, str]:
    """A model's card: in two short lines, what it is for and what it was trained on; and at length, for a tooltip.

    What is wrong with the card, where it cannot be read.
    """
    try:
        known = read_card(find(name or DEFAULT))
    except ModelError as error:
        return str(error), str(error)
    skulls = {"whole": _("with skull"), "stripped": _("skull-stripped"), "either": _("with or without skull")}
    modalities = ", ".join(map(str, known.modalities))
    phrases = [
        _("For {modalities} of the {anatomy}").format(modalities=modalities, anatomy=known.anatomy),
        skulls.get(known.skull, ""),
        f"{known.spacing_mm:g} mm" if known.spacing_mm else _("any resolution"),
        _("version {version}").format(version=known.version),
        _("guided by {count} classes").format(count=len(known.classes) - 1) if known.classes else "",
    ]
    made_for = ", ".join(phrase for phrase in phrases if phrase)
    trained = _("Trained on {data}").format(data=known.training.get("data", _("data that the card does not name")))
    scores = ", ".join(f"{task} {score:g}" for task, score in known.scores.items() if isinstance(score, int | float))
    words = [_("Good for: {what}").format(what=known.good_for)] if known.good_for else []
    words += [_("Limits: {what}").format(what=known.limits)] if known.limits else []
    words += [_("Classes: {names}").format(names=", ".join(map(str, known.classes[1:])))] if known.classes else []
    parts = [made_for, *words, trained, _("License: {license}").format(license=known.license)]
    if scores:
        parts.append(_("Reached: {scores}").format(scores=scores))
    return f"{made_for}\n{shorten(trained, LINE_CHARACTERS, placeholder=' …')}", "\n\n".join(parts)


def facts(node) -> VolumeFacts:
    """What is known of a volume node; its parent transforms do not count."""
    image = node.GetImageData()
    low, high = image.GetScalarRange()
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(node.GetScene())
    item = hierarchy.GetItemByDataNode(node) if hierarchy else 0
    modality = hierarchy.GetItemAttribute(item, DICOM_MODALITY) if item else ""
    return VolumeFacts(node.GetName(), image.GetDimensions(), node.GetSpacing(), low, high, modality or "")
