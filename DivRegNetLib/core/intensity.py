"""Intensities: windows for showing images, and the normalization that a network was trained with."""

from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

if TYPE_CHECKING:
    from torch import Tensor

QUANTILE_VOXELS = 200_000  # at most about as many are used to compute percentiles
LEVELS = 256  # bins of the histogram of the scheme "balanced"
AIR_HU = -1024.0
PADDING_HU = -1500.0  # scanners mark voxels outside the field of view by a value below this, such as -2000 or -3024


def subsample(values: np.ndarray) -> np.ndarray:
    """Evenly spaced values of an array, (n,), enough to compute its percentiles."""
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
    """The image, with the padding of a CT replaced by its next higher value.

    The lowest value counts as padding if it is below PADDING_HU and no other value is far below air.
    """
    values = sitk.GetArrayViewFromImage(image)
    low = values.min()
    if low > PADDING_HU:
        return image
    others = values[values != low]
    if not len(others) or others.min() < AIR_HU - 100:
        return image
    filled = sitk.GetImageFromArray(np.where(values == low, others.min(), values))
    filled.CopyInformation(image)
    return filled


def _limits(values: "Tensor") -> "tuple[Tensor, Tensor]":
    """The 0.5th percentile of the values, and the 99.5th of the foreground, which are the values above their mean."""
    if values.is_cuda:
        return _limits_by_sorting(values)
    foreground = values[values > values.mean()]
    return _quantile(values, 0.005), _quantile(foreground if len(foreground) else values, 0.995)


def _limits_by_sorting(values: "Tensor") -> "tuple[Tensor, Tensor]":
    """The same without a wait for the number of foreground values."""
    ordered, count = values.sort().values, len(values)
    of_foreground = (values > values.mean()).sum()
    of_foreground = of_foreground.where(of_foreground > 0, count)
    high = count - of_foreground + (0.995 * (of_foreground.double() - 1)).round().long()
    return ordered[round(0.005 * (count - 1))], ordered.gather(0, high[None])[0]


def _quantile(values: "Tensor", share: float) -> "Tensor":
    return values.kthvalue(1 + round(share * (len(values) - 1))).values


def _between(image: "Tensor", low: "Tensor", high: "Tensor") -> "Tensor":
    import torch

    return ((image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)).clamp(0, 1)


def _robust(image: "Tensor", values: "Tensor") -> "Tensor":
    """The interval of :func:`_limits` is mapped linearly to [0, 1] and clipped."""
    return _between(image, *_limits(values))


def _balanced(image: "Tensor", values: "Tensor") -> "Tensor":
    """As ``robust``, then a quarter of the way to an equalized histogram, in which no bin counts for more than 5 % of the
    values, so that air does not dominate. The soft tissues of a CT then differ by more than a bin of a joint histogram."""
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


def normalize(image: "Tensor", scheme: str, measured: "Tensor | None" = None) -> "Tensor":
    """An image (1, 1, D, H, W) float in the normalization that a model card names.

    Args:
        measured: (1, 1, D, H, W) bool: the voxels that the normalization is computed from; None: all.
    Raises:
        ValueError: unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown intensity normalization {scheme!r}, known are {', '.join(SCHEMES)}")
    every = slice(None, None, max(image.numel() // QUANTILE_VOXELS, 1))
    values = image.flatten()[every]
    chosen = values if measured is None else values[measured.flatten()[every]]
    return SCHEMES[scheme](image, chosen if len(chosen) else values)
