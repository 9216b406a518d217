"""Methods that turn a pair of images on the working grid into a displacement, and sequences of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from DivRegNetLib.registration.refine import refine as _refine


@dataclass(frozen=True)
class Images:
    """What every method gets: a pair on the working grid, the moving image initially aligned.

    fixed, moving: (1, 1, D, H, W) float32, normalized.
    valid: (1, 1, D, H, W) bool each: where the fixed and the moving image were measured.
    fixed_mask, moving_mask: (1, 1, D, H, W) bool, or None: what the user wants to be looked at.
    """

    fixed: Tensor
    moving: Tensor
    valid: tuple[Tensor, Tensor]
    fixed_mask: Tensor | None = None
    moving_mask: Tensor | None = None


def deform(images: Images, names, variational, regnet, progress: Callable[[float], None]) -> Tensor:
    masks = (images.fixed_mask, images.moving_mask)
    f, m = (x if k is None else x * k for x, k in zip((images.fixed, images.moving), masks, strict=True))
    f, m = (x.contiguous(memory_format=torch.channels_last_3d) for x in (f, m))
    return regnet(f, m, images.valid).contiguous()


def refine(images: Images, displacement: Tensor, settings, progress: Callable[[float], None]) -> Tensor:
    masks = (images.fixed_mask, images.moving_mask)
    valid = tuple(v if mask is None else v & mask for v, mask in zip(images.valid, masks, strict=True))
    return _refine(images.fixed, images.moving, displacement, steps=settings, valid=valid, progress=progress)
