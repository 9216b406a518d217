"""Measures of a registration by segments (Dice) and landmarks that a person has drawn. No torch here."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.points import map_points
from DivRegNetLib.quality.metrics import dice_of_counts
from DivRegNetLib.result import Result
from DivRegNetLib.words import marker

_ = marker("quality.references")

SLAB_VOXELS = 4_000_000  # that are counted at a time


@dataclass(frozen=True)
class Segments:
    """The segments of one image.

    layers: label maps, each on a grid of its own; segments that overlap are in different ones.
    values: name of a segment -> its layer and its value there.
    """

    layers: tuple[sitk.Image, ...]
    values: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class References:
    """Segments and landmarks that a registration is measured with; each pair may be missing.

    fixed_segments, moving_segments: paired by name.
    fixed_points, moving_points: (n, 3) LPS mm, paired by order.
    labels: n names of the points.
    """

    fixed_segments: Segments | None = None
    moving_segments: Segments | None = None
    fixed_points: np.ndarray | None = None
    moving_points: np.ndarray | None = None
    labels: tuple[str, ...] = ()


def measure(references: References, result: Result) -> tuple[dict, list[str]]:
    """Scores of a result by the references, and sentences about what could not be measured.

    Returns:
        entries of a quality card: ``dice`` ``{"before", "after"}``, the mean over ``segments``, a dictionary from name to
        the same; ``landmark_error_mm`` ``{"before", "after"}``, the mean over ``landmarks``, a list of
        ``{"label", "before", "after"}``; and the sentences.
    """
    scores, notes = {}, []
    if references.fixed_segments is not None and references.moving_segments is not None:
        segments = _dice(references.fixed_segments, references.moving_segments, result)
        if segments:
            scores["segments"] = segments
            scores["dice"] = {s: float(np.mean([v[s] for v in segments.values()])) for s in ("before", "after")}
        elif references.fixed_segments.values.keys() & references.moving_segments.values.keys():
            notes.append(_("The segments are empty on the fixed volume, so that no overlap was measured."))
        else:
            notes.append(_("The segmentations have no segment of the same name, so that no overlap was measured."))
    if references.fixed_points is not None and references.moving_points is not None:
        fixed, moving = references.fixed_points, references.moving_points
        if len(fixed) != len(moving) or not len(fixed):
            text = _("There are {fixed} fixed and {moving} moving landmarks, so that no landmark error was measured.")
            notes.append(text.format(fixed=len(fixed), moving=len(moving)))
        else:
            before = np.linalg.norm(fixed - moving, axis=1)
            after = np.linalg.norm(map_points(result.transform, fixed) - moving, axis=1)
            rows = zip(references.labels or map(str, range(1, len(fixed) + 1)), before, after, strict=True)
            scores["landmarks"] = [{"label": n, "before": float(b), "after": float(a)} for n, b, a in rows]
            scores["landmark_error_mm"] = {"before": float(before.mean()), "after": float(after.mean())}
    return scores, notes


def _dice(fixed: Segments, moving: Segments, result: Result) -> dict[str, dict[str, float]]:
    """Dice of the segments of the same name, on the fixed grid, before and after. Each layer is resampled once, and
    each pair of layers takes one pass over the voxels, for any number of segments."""
    common = [name for name in fixed.values if name in moving.values]
    pairs = {(fixed.values[name][0], moving.values[name][0]) for name in common}
    resampled = {}
    for layer in {m for _, m in pairs}:
        for stage, transform in (("before", sitk.Transform()), ("after", result.transform)):
            resampled[layer, stage] = _on_grid(moving.layers[layer], result.warped, transform)
    scores: dict[str, dict[str, float]] = {}
    for f, m in pairs:
        target = _on_grid(fixed.layers[f], result.warped, sitk.Transform())
        names = [n for n in common if fixed.values[n][0] == f and moving.values[n][0] == m]
        for stage in ("before", "after"):
            counts, of_fixed, of_moving = _joint_counts(target, resampled[m, stage])
            for name in names:
                a, b = fixed.values[name][1], moving.values[name][1]
                if of_fixed.get(a, 0):  # an empty segment has no overlap to measure
                    scores.setdefault(name, {})[stage] = dice_of_counts(
                        counts.get((a, b), 0), of_fixed[a], of_moving.get(b, 0)
                    )
    return {name: scores[name] for name in common if name in scores}


def _on_grid(labels: sitk.Image, grid: sitk.Image, transform: sitk.Transform) -> sitk.Image:
    return sitk.Resample(labels, grid, transform, sitk.sitkNearestNeighbor, 0)


def _joint_counts(
    one: sitk.Image, other: sitk.Image
) -> tuple[dict[tuple[int, int], int], dict[int, int], dict[int, int]]:
    """Number of voxels of each pair of labels that occurs, and of each label of one and of the other image."""
    a, b = (sitk.GetArrayViewFromImage(image) for image in (one, other))
    counts: dict[tuple[int, int], int] = {}
    step = max(SLAB_VOXELS // max(a[0].size, 1), 1)
    for start in range(0, len(a), step):
        slabs = (x[start : start + step].ravel() for x in (a, b))
        (values_a, index_a), (values_b, index_b) = (np.unique(slab, return_inverse=True) for slab in slabs)
        joint, numbers = np.unique(index_a * len(values_b) + index_b, return_counts=True)
        for i, n in zip(joint.tolist(), numbers.tolist(), strict=True):
            key = int(values_a[i // len(values_b)]), int(values_b[i % len(values_b)])
            counts[key] = counts.get(key, 0) + n
    of_one: dict[int, int] = {}
    of_other: dict[int, int] = {}
    for (label, other_label), n in counts.items():
        of_one[label] = of_one.get(label, 0) + n
        of_other[other_label] = of_other.get(other_label, 0) + n
    return counts, of_one, of_other
