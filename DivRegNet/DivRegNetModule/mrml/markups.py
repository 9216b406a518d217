"""Landmarks: the points of two lists, paired."""

from dataclasses import dataclass

import numpy as np
import slicer
import slicer.util

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
    """Pairs the points of two lists: by label where both have the same labels, each once, otherwise by order.

    Points that were not placed in one of the lists are left out in both, and named.
    """
    fixed, moving = _points(fixed_node), _points(moving_node)
    names = [[label for label, _point in points] for points in (fixed, moving)]
    if len(set(names[0])) == len(names[0]) and sorted(names[0]) == sorted(names[1]):
        by_label = dict(moving)
        moving = [(label, by_label[label]) for label, _point in fixed]
    placed = [(a, p, q) for (a, p), (_b, q) in zip(fixed, moving, strict=False) if p is not None and q is not None]
    notes = []
    if len(fixed) != len(moving):
        text = _("'{fixed}' has {n} points and '{moving}' has {m}; they are paired by their order as far as possible.")
        values = {"fixed": fixed_node.GetName(), "n": len(fixed), "moving": moving_node.GetName(), "m": len(moving)}
        notes.append(text.format(**values))
    left_out = min(len(fixed), len(moving)) - len(placed)
    if left_out:
        text = _("{n} landmarks were left out, since they are not placed in both lists.")
        notes.append(text.format(n=left_out))
    points = (np.array([pair[i] for pair in placed]).reshape(-1, 3) * FLIP for i in (1, 2))
    return Pairs(tuple(pair[0] for pair in placed), *points, tuple(notes))


def _points(node) -> list[tuple[str, list[float] | None]]:
    """(label, position in the world, RAS, or None where it was not placed) of each control point."""
    points = []
    for i in range(node.GetNumberOfControlPoints()):
        position = [0.0, 0.0, 0.0]
        node.GetNthControlPointPositionWorld(i, position)
        defined = node.GetNthControlPointPositionStatus(i) == slicer.vtkMRMLMarkupsNode.PositionDefined
        points.append((node.GetNthControlPointLabel(i), position if defined else None))
    return points
