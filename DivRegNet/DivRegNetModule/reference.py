"""A result measured with what a person has drawn: segmentations (Dice) and landmarks."""

import numpy as np
import SimpleITK as sitk
import slicer.util

from DivRegNetLib.errors import InputError
from DivRegNetLib.quality import metrics
from DivRegNetModule import _, mrml

LPS_FROM_RAS = np.array([-1.0, -1.0, 1.0])


def landmarks(fixed_node, moving_node, result) -> dict:
    """Mean target registration error, mm, before and after.

    Args:
        fixed_node, moving_node: point lists, paired by order; world coordinates count.
        result: with ``transform``, fixed -> moving points (LPS).
    Returns:
        ``{"landmark_error_mm": {"before", "after"}}``.
    Raises:
        ValueError: the lists are empty or differ in length.
    """
    fixed, moving = (
        slicer.util.arrayFromMarkupsControlPoints(node, world=True).reshape(-1, 3) * LPS_FROM_RAS
        for node in (fixed_node, moving_node)
    )
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
        result: with ``warped`` on the fixed grid and ``transform``, fixed -> moving points (LPS).
    Returns:
        ``{"dice": {"before", "after"}}``.
    Raises:
        ValueError: no segment of the same name, or all of them are empty.
    """
    fixed, moving = (_segments(node) for node in (fixed_node, moving_node))
    if not fixed.keys() & moving.keys():
        raise ValueError(_("The segmentations have no segment of the same name, so that no overlap was measured."))
    before, after = [], []
    for name in sorted(fixed.keys() & moving.keys()):
        try:
            still, moved = (
                mrml.segment_image(n, i) for n, i in ((fixed_node, fixed[name]), (moving_node, moving[name]))
            )
        except InputError:  # an empty segment
            continue
        still = _on(still, result.warped, sitk.Transform())
        if still.any():
            before.append(metrics.dice(still, _on(moved, result.warped, sitk.Transform())))
            after.append(metrics.dice(still, _on(moved, result.warped, result.transform)))
    if not after:
        raise ValueError(_("The segments are empty on the fixed volume, so that no overlap was measured."))
    return {"dice": {"before": float(np.mean(before)), "after": float(np.mean(after))}}


def _segments(node) -> dict[str, str]:
    """Name -> id of the segments."""
    segmentation = node.GetSegmentation()
    ids = [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]
    return {segmentation.GetSegment(i).GetName(): i for i in ids}


def _on(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform) -> np.ndarray:
    """An image of 0 and 1 on a grid, through a transform of grid to image points; (D, H, W) bool."""
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, transform, sitk.sitkNearestNeighbor, 0)) > 0
