"""Scores of a registration, for training, the experiments and the benchmark.

Every figure comes from :mod:`DivRegNetLib.quality.metrics`, as those of a quality card do; this module gives them the names
that tables, logs and model cards use.
"""

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.quality import metrics
from DivRegNetLib.similarity.mutual_information import nmi
from training.data.pairs import Pair

OVERLAP = {"Dice": "dice", "ASD mm": "asd", "HD mm": "hd", "HD95 mm": "hd95"}
"""Name here -> name in :mod:`DivRegNetLib.quality.metrics`."""


def of_transform(
    transform: sitk.Transform,
    fixed_labels: sitk.Image,
    moving_labels: sitk.Image,
    *,
    truth: sitk.Image | None = None,
    inside: np.ndarray | None = None,
    landmarks: tuple[np.ndarray, np.ndarray] | None = None,
    each: bool = False,
) -> dict[str, float]:
    """Scores of a transform that maps fixed points to moving points (LPS, mm).

    Args:
        fixed_labels, moving_labels: label maps, each on its own grid; 0 is background.
        truth: the true displacement, a vector image (LPS, mm) on the grid of ``fixed_labels``.
        inside: (D, H, W) bool on the same grid, where the error is measured; None: inside the fixed labels.
        landmarks: (n, 3) LPS mm in the fixed and in the moving image.
        each: also return ``Dice of N`` for each label N of the fixed image.
    Returns:
        ``Dice``, ``ASD mm``, ``HD mm`` and ``HD95 mm``, means over the labels of the fixed image (a label that is absent from
        the warped label map has Dice 0 and no distance); ``error mm``, the mean distance to the true displacement;
        ``TRE mm``, the mean landmark error. Scores that cannot be computed are left out.
    """
    scores = _label_scores(transform, fixed_labels, moving_labels, each)
    if truth is not None:
        inside = sitk.GetArrayViewFromImage(fixed_labels) > 0 if inside is None else inside
        found = displacement_on(transform, Grid.of(fixed_labels))
        error = sitk.GetArrayFromImage(found) - sitk.GetArrayViewFromImage(truth)
        scores["error mm"] = float(np.linalg.norm(error, axis=-1)[inside].mean())
    if landmarks is not None:
        scores["TRE mm"] = float(metrics.landmark_error(*landmarks, transform).mean())
    return scores


def _label_scores(transform: sitk.Transform, fixed: sitk.Image, moving: sitk.Image, each: bool) -> dict[str, float]:
    warped = sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor, 0)
    overlap = metrics.label_overlap(fixed, sitk.Cast(warped, fixed.GetPixelID()))["labels"]
    labels = sorted(set(np.unique(sitk.GetArrayViewFromImage(fixed)).tolist()) - {0})
    known = {name: [overlap[str(n)][key] for n in labels] for name, key in OVERLAP.items()}
    known = {name: [v for v in values if v is not None] for name, values in known.items()}
    means = {name: float(np.mean(values)) for name, values in known.items() if values}
    return means | ({f"Dice of {n}": overlap[str(n)]["dice"] for n in labels} if each else {})


def displacement_on(transform: sitk.Transform, grid: Grid) -> sitk.Image:
    """The displacement (LPS, mm) of a transform at every voxel of a grid, as a vector image."""
    return sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, grid.size, grid.origin, grid.spacing, grid.direction
    )


@torch.no_grad()
def of_displacement(
    pair: Pair, displacement: Tensor, spacing: float, *, union: bool = False, surfaces: bool = False
) -> dict[str, float]:
    """Scores of a displacement on the grid of a training pair.

    Args:
        displacement: (1, 3, D, H, W) in voxels of ``spacing`` mm, from fixed to moving points.
        union: score all labels as one.
        surfaces: also compute ``ASD mm``, ``HD mm`` and ``HD95 mm``, which takes longer than Dice.
    Returns:
        ``Dice``, the mean over the labels that either label map has, or ``NMI`` where the pair has no labels; ``error mm``,
        the mean distance to the true displacement inside the fixed labels (everywhere where there are none), if that is
        known; ``folded %``, the share of voxels whose Jacobian determinant is not positive.
    """
    scores = {}
    inside = torch.ones_like(pair.fixed, dtype=torch.bool)
    if pair.fixed_labels is None:
        warped = fields.warp(pair.moving, displacement)
        scores["NMI"] = nmi(pair.fixed.cpu().numpy(), warped.cpu().numpy())
    else:
        inside = pair.fixed_labels > 0
        labels = pair.moving_labels.to(displacement)
        warped = fields.warp(labels, displacement, mode="nearest", padding="zeros")
        both = [x[0, 0].cpu().numpy().astype(np.int64) for x in (pair.fixed_labels, warped)]
        scores |= _array_scores(*((x > 0).astype(np.int64) if union else x for x in both), spacing, surfaces)
    if pair.truth is not None:
        scores["error mm"] = fields.length(displacement - pair.truth)[inside].mean().item() * spacing
    return scores | {"folded %": metrics.jacobian_statistics(displacement)["folded_percent"]}


def _array_scores(fixed: np.ndarray, warped: np.ndarray, spacing: float, surfaces: bool) -> dict[str, float]:
    """Means over the labels of either of two label maps (D, H, W); NaN where there is none."""
    grid = Grid(fixed.shape[::-1], np.diag([spacing, spacing, spacing, 1.0]))
    found = []
    for label in sorted(set(np.unique(fixed).tolist()) | set(np.unique(warped).tolist())):
        if label:
            one, other = fixed == label, warped == label
            found.append({"dice": metrics.dice(one, other)})
            found[-1] |= metrics.surface_distances(one, other, grid) if surfaces else {}
    keys = OVERLAP.items() if surfaces else [("Dice", "dice")]
    return {name: float(np.mean([s[key] for s in found])) if found else float("nan") for name, key in keys}
