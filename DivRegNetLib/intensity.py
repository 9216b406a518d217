"""Intensity normalisation: what a network was trained on is what it must be given."""

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

QUANTILE_VOXELS = 200_000
LEVELS = 256  # of brightness that are told apart where they are counted
AIR_HU = -1024.0
PADDING_HU = -1500.0  # what scanners fill up with is this low, -2000 or -3024 for instance, and stands alone


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


def _robust(image: Tensor) -> Tensor:
    """Darkest 0.5 % of the image -> 0, brightest 0.5 % of its foreground (voxels above the mean) -> 1, clipped."""
    values = image.flatten()
    values = values[:: max(values.numel() // QUANTILE_VOXELS, 1)]
    low = torch.quantile(values, 0.005)
    foreground = values[values > values.mean()]
    high = torch.quantile(foreground if len(foreground) else values, 0.995)
    return ((image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)).clamp(0, 1)


def _balanced(image: Tensor) -> Tensor:
    """As ``robust``, then a quarter of the way towards every brightness being equally common (but for what fills more than
    5 % of the image, such as air): a CT's soft tissues then differ by more than a bin of a histogram."""
    image = _robust(image)
    at = image * LEVELS
    below = at.int().clamp_(max=LEVELS - 1)
    common = torch.bincount(below.flatten(), minlength=LEVELS).double()
    common = common.clamp(max=0.05 * image.numel())
    share = (torch.cat((common.new_zeros(1), common.cumsum(0))) / common.sum()).to(image.dtype)
    rank = share[:-1][below].addcmul_(at.sub_(below), share.diff()[below])
    return torch.lerp(image, rank, 0.25)


SCHEMES = {"robust": _robust, "balanced": _balanced}
"""Name in a model card -> function from (1, 1, D, H, W) to the same shape."""


def normalise(image: Tensor, scheme: str) -> Tensor:
    """An image (1, 1, D, H, W) float as a network of this normalisation expects it.

    Raises:
        ValueError: unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown intensity normalisation {scheme!r}, known are {', '.join(SCHEMES)}")
    return SCHEMES[scheme](image)
