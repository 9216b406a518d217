"""How two volumes differ from the images that a model is meant for. The sentences inform and never block."""

from dataclasses import dataclass

import numpy as np

from DivRegNetLib.models import Card
from DivRegNetModule import _

AIR_HU, BONE_HU = -900.0, 200.0
THICK_SLICES = 3.0  # times the model's spacing
SMALLEST_VOXELS = 24  # of the model's grid, along the shortest side
FIELD_OF_VIEW_MM = {"head": (90, 400), "brain": (90, 400), "abdomen": (60, 700), "liver": (60, 700)}
"""Anatomy in a card -> plausible shortest and longest side of a volume that shows it."""
FAMILIES = {"CT": ("CT", "CBCT", "CTA"), "MR": ("MR", "MRI", "T1", "T2", "PD", "FLAIR", "T1C", "DWI", "MRA")}
"""Modality as DICOM names it or as guessed from intensities -> the modalities of a card that belong to it."""


@dataclass(frozen=True)
class VolumeFacts:
    """What is known of a volume before it is registered.

    size: voxels along i, j, k.
    spacing: mm along i, j, k.
    low, high: smallest and largest value.
    modality: as DICOM says (``CT``, ``MR``, ...), empty where unknown.
    """

    name: str
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    low: float
    high: float
    modality: str = ""

    @property
    def extent(self) -> tuple[float, ...]:
        """Side lengths in mm."""
        return tuple(n * s for n, s in zip(self.size, self.spacing, strict=True))


def guess_modality(volume: VolumeFacts) -> str:
    """``CT``, ``MR``, another DICOM modality, or empty: from DICOM if it is known, else guessed from the range of values.

    CT in Hounsfield units reaches from air to bone; MR magnitude has no negative values. CT that is stored with an
    offset looks like MR, so a guess of MR is never held against a model for CT.
    """
    if volume.modality:
        return volume.modality
    if volume.low <= AIR_HU and volume.high >= BONE_HU:
        return "CT"
    return ""


def complaints(card: Card, fixed: VolumeFacts, moving: VolumeFacts) -> list[str]:
    """Sentences about how the volumes differ from the card, the card's own limits last; empty where they do not."""
    sentences, spacing = [], card.working_spacing(fixed, moving)
    for volume in (fixed, moving):
        sentences += [
            *_modality_complaint(card, volume),
            *_spacing_complaint(spacing, volume),
            *_field_of_view_complaint(card, spacing, volume),
        ]
    return [*sentences, card.limits] if sentences and card.limits else sentences


def _modality_complaint(card: Card, volume: VolumeFacts) -> list[str]:
    guess = guess_modality(volume)
    known = {str(m).upper() for m in card.modalities}
    if not guess or not known or guess.upper() in known or known & set(FAMILIES.get(guess.upper(), ())):
        return []
    text = _("'{name}' looks like {guess}, but the model was trained on {trained}.")
    return [text.format(name=volume.name, guess=guess, trained=", ".join(map(str, card.modalities)))]


def _spacing_complaint(spacing: float, volume: VolumeFacts) -> list[str]:
    if max(volume.spacing) <= THICK_SLICES * spacing:
        return []
    text = _(
        "The slices of '{name}' are {thick:.3g} mm apart and the model works at {model:.3g} mm: expect less accuracy "
        "across the slices."
    )
    return [text.format(name=volume.name, thick=max(volume.spacing), model=spacing)]


def _field_of_view_complaint(card: Card, spacing: float, volume: VolumeFacts) -> list[str]:
    smallest, largest = min(volume.extent), max(volume.extent)
    if smallest < SMALLEST_VOXELS * spacing:
        text = _("'{name}' is only {mm:.0f} mm thick, which is little context for the model.")
        return [text.format(name=volume.name, mm=smallest)]
    low, high = next((r for word, r in FIELD_OF_VIEW_MM.items() if word in card.anatomy.lower()), (0, np.inf))
    if smallest < low or largest > high:
        text = _("'{name}' covers {sides} mm, which is unusual for an image of the {anatomy}.")
        sides = " x ".join(f"{mm:.0f}" for mm in volume.extent)
        return [text.format(name=volume.name, sides=sides, anatomy=card.anatomy)]
    return []


def memory_text(card: Card, fixed_node, moving_node, spacing: float, refine: int) -> str:
    """How much memory a registration of two volume nodes takes, and on which grid it works.

    Args:
        spacing: of the working grid, mm; 0: the model's.
    """
    from DivRegNetLib.registration import memory
    from DivRegNetModule.mrml.geometry import local_grid

    fixed, moving = local_grid(fixed_node), local_grid(moving_node)
    asked = max(spacing or card.working_spacing(fixed, moving), memory.FINEST_MM)
    estimate = memory.estimate(card, fixed, moving, spacing=spacing or None, refine=refine)
    finest = memory.working_grid(card, fixed, asked).spacing[0]
    values = {
        "device": memory.text(estimate.device),
        "host": memory.text(estimate.host),
        "size": " x ".join(map(str, estimate.working)),
        "mm": finest,
        "asked": spacing or asked,
    }
    if finest > max(spacing, asked) * 1.001 or (spacing and asked > spacing):
        text = _(
            "About {device} on the device and {host} in main memory. {asked:.2g} mm is too fine for a volume of this size: "
            "the deformation is computed at {mm:.2g} mm ({size} voxels)."
        )
    else:
        text = _("About {device} on the device and {host} in main memory ({size} voxels of {mm:.2g} mm)")
    return text.format(**values)
