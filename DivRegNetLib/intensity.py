"""Intensity normalisation: what a network was trained on is what it must be given."""

import torch
from torch import Tensor

QUANTILE_VOXELS = 200_000


def _robust(image: Tensor) -> Tensor:
    """Darkest 0.5 % of the image -> 0, brightest 0.5 % of its foreground (voxels above the mean) -> 1, clipped."""
    values = image.flatten()
    values = values[:: max(values.numel() // QUANTILE_VOXELS, 1)]
    low = torch.quantile(values, 0.005)
    foreground = values[values > values.mean()]
    high = torch.quantile(foreground if len(foreground) else values, 0.995)
    return ((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


SCHEMES = {"robust": _robust}
"""Name in a model card -> function from (1, 1, D, H, W) to the same shape."""


def normalise(image: Tensor, scheme: str) -> Tensor:
    """An image (1, 1, D, H, W) float as a network of this normalisation expects it.

    Raises:
        ValueError: unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown intensity normalisation {scheme!r}, known are {', '.join(SCHEMES)}")
    return SCHEMES[scheme](image)
