"""Landmarks: the points of two lists, paired."""

from dataclasses import dataclass

import numpy as np
import slicer
import slicer.util

from DivRegNetLib.io.landmarks import match_labels
from DivRegNetModule import _
from DivRegNetModule.mrml.geometry import FLIP


@dataclass(frozen=True)
class Pairs:
    """Corresponding points of two lists.

    labels: n names.
    fixed, moving: (n, 3) LPS mm, in world coordinates.
    notes: sentences about points that were left out.
    """

    labels: tuple[str, ...]
    fixed: np.ndarray
    moving: np.ndarray
    notes: tuple[str, ...] = ()


def pairs(fixed_node, moving_node) -> Pairs:
    """Pairs the points of two lists: by label where both have labels in common, each once, otherwise by order.

    Points that have no partner, or were not placed in one of the lists, are left out in both, and named.
    """
    fixed, moving = _points(fixed_node), _points(moving_node)
    matches = match_labels(*([label for label, _point in points] for points in (fixed, moving)))
    notes = []
    if matches is None:
        text = _(
            "'{fixed}' has {n} points and '{moving}' has {m}, with no labels in common, so that no landmark error was measured."
        )
        values = {"fixed": fixed_node.GetName(), "n": len(fixed), "moving": moving_node.GetName(), "m": len(moving)}
        notes.append(text.format(**values))
        matches = []
    elif alone := [label for k, points in enumerate((fixed, moving)) for i, (label, _point) in enumerate(points)
                   if i not in {match[k] for match in matches}]:  # fmt: skip
        text = _("Landmarks were left out, since only one of the lists has their label: {labels}.")
        notes.append(text.format(labels=", ".join(alone)))
    placed = [(i, j) for i, j in matches if fixed[i][1] is not None and moving[j][1] is not None]
    if unplaced := [fixed[i][0] for i, j in matches if (i, j) not in placed]:
        text = _("Landmarks were left out, since they are not placed in both lists: {labels}.")
        notes.append(text.format(labels=", ".join(unplaced)))
    points = (
        np.array([points[match[k]][1] for match in placed]).reshape(-1, 3) * FLIP
        for k, points in enumerate((fixed, moving))
    )
    return Pairs(tuple(fixed[i][0] for i, _j in placed), *points, tuple(notes))


def _points(node) -> list[tuple[str, list[float] | None]]:
    """(label, position in the world, RAS, or None where it was not placed) of each control point."""
    points = []
    for i in range(node.GetNumberOfControlPoints()):
        position = [0.0, 0.0, 0.0]
        node.GetNthControlPointPositionWorld(i, position)
        defined = node.GetNthControlPointPositionStatus(i) == slicer.vtkMRMLMarkupsNode.PositionDefined
        points.append((node.GetNthControlPointLabel(i), position if defined else None))
    return points
