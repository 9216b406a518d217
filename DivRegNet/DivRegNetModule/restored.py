"""The result of an earlier registration, from what was saved with the scene."""

import json

import numpy as np
import slicer

from DivRegNetLib.errors import InputError
from DivRegNetModule.inputs import made_for
from DivRegNetModule.mrml import Registration
from DivRegNetModule.mrml.markups import pairs
from DivRegNetModule.mrml.scene import Changes
from DivRegNetModule.mrml.transforms import ATTRIBUTE
from DivRegNetModule.run import Outcome


def outcome_of(parameters) -> Outcome | None:
    """The result that the parameters name, without changes that could be undone; None if there is none of these volumes.

    Args:
        parameters: DivRegNetParameterNode.
    """
    p = parameters
    inputs = [p.fixedVolume, p.movingVolume]
    if None in (*inputs, p.warpedVolume, p.transform) or not (
        made_for(p.warpedVolume) == made_for(p.transform) == inputs
    ):
        return None
    try:
        texts = [p.transform.GetAttribute(ATTRIBUTE + name) for name in ("Quality", "Settings", "Initial")]
        quality, settings, initial = (json.loads(text) for text in texts)
    except (TypeError, ValueError):  # of an earlier version, or damaged
        return None
    inverse = p.inverse if p.inverse is not None and made_for(p.inverse) == inputs[::-1] else None
    return Outcome(
        fixed=p.fixedVolume,
        moving=p.movingVolume,
        registration=Registration(p.warpedVolume, p.transform, inverse, quality),
        carried=[],
        quality=quality,
        pairs=_pairs(p),
        notes=[],
        seconds=None,
        settings=settings,
        timings={},
        initial=np.array(initial, float).reshape(4, 4),
        error_map=None,
        changes=Changes(slicer.mrmlScene),
    )


def _pairs(p):
    """The landmarks that the result was measured with, if they are still there."""
    if p.fixedLandmarks is None or p.movingLandmarks is None:
        return None
    try:
        return pairs(p.fixedLandmarks, p.movingLandmarks)
    except InputError:
        return None
