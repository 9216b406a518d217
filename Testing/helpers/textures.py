"""Textured images, the same in another contrast, and known deformations of them."""

import math

import torch
from torch.nn import functional as F

from DivRegNetLib.core import fields


def textured(shape, seed: int = 0) -> torch.Tensor:
    """Blobs of about four voxels, (1, 1, D, H, W), 0 to 1."""
    coarse = torch.rand(1, 1, *(max(n // 4, 2) for n in shape), generator=torch.Generator().manual_seed(seed))
    return to_unit(fields.smooth(F.interpolate(coarse, size=shape, mode="trilinear"), 1.0))


def to_unit(image: torch.Tensor) -> torch.Tensor:
    return (image - image.min()) / (image.max() - image.min())


def other_contrast(image: torch.Tensor) -> torch.Tensor:
    """Not monotone: dark and bright become dark and middling, what was between becomes bright."""
    return to_unit(0.8 * torch.sin(math.pi * image) + 0.2 * image)


def deformed(shape, mean: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A moving image, the same deformed and in another contrast, and the displacement, of ``mean`` voxels."""
    moving = textured(shape, seed)
    knots = torch.randn(1, 3, 3, 3, 3, generator=torch.Generator().manual_seed(100 + seed))
    displacement = F.interpolate(knots, size=shape, mode="trilinear", align_corners=True)
    displacement = displacement / displacement.norm(dim=1).mean() * mean
    return moving, other_contrast(fields.warp(moving, displacement)), displacement


def inner(field: torch.Tensor) -> torch.Tensor:
    """Without four voxels at each border, which may have come from outside."""
    return field[..., 4:-4, 4:-4, 4:-4]
