"""From the panel's parameters to a request, and what is said of models and volumes before it."""

from textwrap import shorten

import slicer

from DivRegNetLib.errors import ModelError
from DivRegNetLib.models import DEFAULT, Card, card_files, find, read_card
from DivRegNetModule import _
from DivRegNetModule.fit import VolumeFacts
from DivRegNetModule.run import Request

DICOM_MODALITY = "DICOM.Modality"
LINE_CHARACTERS = 58


def request(parameters) -> Request:
    """What the parameter node asks for.

    Args:
        parameters: DivRegNetParameterNode.
    """
    p = parameters
    inverse = (p.inverse or True) if p.giveInverse else None
    align = p.initialTransform if p.alignment.value == "transform" else p.alignment.value
    return Request(
        fixed=p.fixedVolume,
        moving=p.movingVolume,
        warped=p.warpedVolume,
        transform=p.transform,
        inverse=inverse,
        also=[node for node in p.alsoApplyTo if node],
        options={
            "fixed_mask": mask(p.fixedMask, p.fixedSegment),
            "moving_mask": mask(p.movingMask, p.movingSegment),
            "align": align,
            "model": p.model or DEFAULT,
            "device": p.device or "auto",
            "refine": p.refineSteps,
            "interpolation": p.interpolation.value,
            "default_value": None if p.fillAutomatic else p.fillValue,
            "spacing": p.workingSpacing or None,
        },
        segmentations=(p.fixedSegmentation, p.movingSegmentation),
        landmarks=(p.fixedLandmarks, p.movingLandmarks),
    )


def mask(node, segment: str):
    """A mask as the library takes it: None, a label map node, or (segmentation node, segment id)."""
    return (node, segment) if node is not None and node.IsA("vtkMRMLSegmentationNode") else node


def why_not(parameters) -> str:
    """Why Register cannot be pressed yet, in a sentence; empty if it can."""
    p = parameters
    if p is None or not p.fixedVolume or not p.movingVolume:
        return _("Choose a fixed and a moving volume first.")
    for node in (p.fixedVolume, p.movingVolume):
        if node.IsA("vtkMRMLLabelMapVolumeNode"):
            text = _("'{name}' is a label map, which has no intensities to register. Choose an image; label maps can be "
                     "carried along under 'Also apply to'.")  # fmt: skip
            return text.format(name=node.GetName())
        if node.GetImageData() is None:
            return _("'{name}' is empty. Load an image into it or choose another.").format(name=node.GetName())
    if p.fixedVolume is p.movingVolume:
        return _("Fixed and moving volume are the same. Choose two different volumes.")
    if p.alignment.value == "transform" and not p.initialTransform:
        return _("Choose the initial transform, or another initial alignment.")
    return ""


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
    skull = skulls.get(known.skull, "")
    made_for = _("For {modalities} of the {what}, {mm}, version {version}").format(
        modalities=", ".join(map(str, known.modalities)),
        what=f"{known.anatomy} {skull}".strip(),
        mm=f"{known.spacing_mm:g} mm" if known.spacing_mm else _("any resolution"),
        version=known.version,
    )
    trained = _("Trained on {data}").format(data=known.training.get("data", _("data that the card does not name")))
    scores = ", ".join(f"{task} {score:g}" for task, score in known.scores.items() if isinstance(score, int | float))
    words = [_("Good for: {what}").format(what=known.good_for)] if known.good_for else []
    words += [_("Limits: {what}").format(what=known.limits)] if known.limits else []
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
