"""A result measured with what a person has drawn: segmentations (Dice) and landmarks."""

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.quality import metrics
from DivRegNetModule import _, mrml
from DivRegNetModule.mrml.geometry import control_points


def landmarks(fixed_node, moving_node, result) -> dict:
    """Mean target registration error, mm, before and after.

    Args:
        fixed_node, moving_node: point lists, paired by order; world coordinates count.
        result: with ``transform``, which maps fixed points to moving points (LPS, mm).
    Returns:
        ``{"landmark_error_mm": {"before", "after"}}``.
    Raises:
        ValueError: the lists are empty or differ in length.
    """
    fixed, moving = control_points(fixed_node), control_points(moving_node)
    if not len(fixed):
        raise ValueError(_("The landmark lists are empty, so that no landmark error was measured."))
    before, after = (
        float(metrics.landmark_error(fixed, moving, transform).mean()) for transform in (None, result.transform)
    )
    return {"landmark_error_mm": {"before": before, "after": after}}


def dice(fixed_node, moving_node, result) -> dict:
    """Mean Dice over the segments that both segmentations have, by name, before and after, on the fixed grid.

    Args:
        fixed_node, moving_node: segmentation nodes.
        result: with ``warped`` on the fixed grid, and ``transform``, which maps fixed points to moving points (LPS, mm).
    Returns:
        ``{"dice": {"before", "after"}}``.
    Raises:
        ValueError: no segment of the same name, or all of them are empty.
    """
    fixed, moving = (dict(mrml.segments(node)) for node in (fixed_node, moving_node))
    common = sorted(fixed.keys() & moving.keys())
    if not common:
        raise ValueError(_("The segmentations have no segment of the same name, so that no overlap was measured."))
    before, after = [], []
    for name in common:
        try:
            fixed_segment = mrml.segment_image(fixed_node, fixed[name])
            moving_segment = mrml.segment_image(moving_node, moving[name])
        except InputError:  # an empty segment
            continue
        target = _sampled(fixed_segment, result.warped, sitk.Transform())
        if target.any():
            before.append(metrics.dice(target, _sampled(moving_segment, result.warped, sitk.Transform())))
            after.append(metrics.dice(target, _sampled(moving_segment, result.warped, result.transform)))
    if not after:
        raise ValueError(_("The segments are empty on the fixed volume, so that no overlap was measured."))
    return {"dice": {"before": float(np.mean(before)), "after": float(np.mean(after))}}


def _sampled(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform) -> np.ndarray:
    """An image of 0 and 1 on a grid, through a transform of grid to image points; (D, H, W) bool."""
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, transform, sitk.sitkNearestNeighbor, 0)) > 0
