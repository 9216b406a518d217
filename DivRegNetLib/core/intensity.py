"""Intensities: windows for showing images, and the normalization that a network was trained with."""

from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

if TYPE_CHECKING:
    from torch import Tensor

QUANTILE_VOXELS = 200_000
LEVELS = 256  # of brightness that are told apart where they are counted
AIR_HU = -1024.0
PADDING_HU = -1500.0  # what scanners fill up with is this low, -2000 or -3024 for instance, and stands alone


def subsample(values: np.ndarray) -> np.ndarray:
    """Some of the values of an array, (n,), evenly spread: enough for its percentiles, and quickly sorted."""
    flat = values.ravel()
    return flat[:: max(len(flat) // QUANTILE_VOXELS, 1)]


def percentile_window(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The intensities at two percentiles of some values, between which an image is shown or compared."""
    return tuple(np.percentile(values, [low, high]))


def stretch(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Intensities from 0 (at the lower end of a window and below) to 1 (at its upper end and above)."""
    low, high = window
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1)


def without_padding(image: sitk.Image) -> sitk.Image:
    """The image, its lowest value replaced by the next where that is the padding of a CT: far below air, nothing near."""
    values = sitk.GetArrayViewFromImage(image)
    low = values.min()
    if low > PADDING_HU:
        return image
    rest = values[values != low].min()
    if rest < AIR_HU - 100:
        return image
    filled = sitk.GetImageFromArray(np.where(values == low, rest, values))
    filled.CopyInformation(image)
    return filled


def _limits(values: "Tensor") -> "tuple[Tensor, Tensor]":
    """Where the darkest 0.5 % of the values end, and the brightest 0.5 % of the foreground (those above their mean) begin."""
    foreground = values[values > values.mean()]
    return _quantile(values, 0.005), _quantile(foreground if len(foreground) else values, 0.995)


def _quantile(values: "Tensor", share: float) -> "Tensor":
    return values.kthvalue(1 + round(share * (len(values) - 1))).values


def _between(image: "Tensor", low: "Tensor", high: "Tensor") -> "Tensor":
    import torch

    return ((image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)).clamp(0, 1)


def _robust(image: "Tensor", values: "Tensor") -> "Tensor":
    """What is darkest in the values -> 0, what is brightest in their foreground -> 1, clipped."""
    return _between(image, *_limits(values))


def _balanced(image: "Tensor", values: "Tensor") -> "Tensor":
    """As ``robust``, then a quarter of the way towards every brightness being equally common (but for those that more than
    5 % of the values have, such as air's): a CT's soft tissues then differ by more than a bin of a histogram."""
    import torch

    limits = _limits(values)
    at, of_values = (_between(x, *limits).mul_(LEVELS) for x in (image, values))
    common = torch.bincount(of_values.int().clamp_(max=LEVELS - 1), minlength=LEVELS).double()
    common = common.clamp(max=0.05 * len(values))
    share = (torch.cat((common.new_zeros(1), common.cumsum(0))) / common.sum()).to(image.dtype)
    below = at.int().clamp_(max=LEVELS - 1)
    rank = share[:-1][below].addcmul_(at - below, share.diff()[below])
    return torch.lerp(at.div_(LEVELS), rank, 0.25)


SCHEMES = {"robust": _robust, "balanced": _balanced}
"""Name in a model card -> function of an image (1, 1, D, H, W) and of some of its values (n,), to the image's shape."""


def normalize(image: "Tensor", scheme: str, seen: "Tensor | None" = None) -> "Tensor":
    """An image (1, 1, D, H, W) float as a network of this normalization expects it.

    Args:
        seen: (1, 1, D, H, W) bool: where the image has been measured, which alone decides; None: everywhere.
    Raises:
        ValueError: unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown intensity normalization {scheme!r}, known are {', '.join(SCHEMES)}")
    every = slice(None, None, max(image.numel() // QUANTILE_VOXELS, 1))
    values = image.flatten()[every]
    measured = values if seen is None else values[seen.flatten()[every]]
    return SCHEMES[scheme](image, measured if len(measured) else values)
