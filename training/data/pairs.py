"""Pairs of images for training and validation, and their augmentation by random affine maps.

Lengths are in voxels of the cohort's grid, points and components in x, y, z order (see DivRegNetLib/core/fields.py).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from training.data.randomness import Random


@dataclass(frozen=True)
class Pair:
    """Two images on one grid, and what is known about their correspondence.

    fixed, moving: (1, 1, D, H, W), normalized.
    brain: (1, 1, D, H, W) float, 1 inside the skull of the fixed image, where that is known.
    truth: (1, 3, D, H, W) true displacement from fixed to moving voxels, where it is known.
    fixed_labels, moving_labels: (1, 1, D, H, W) uint8, where both images have label maps with the same classes.
    """

    fixed: Tensor
    moving: Tensor
    brain: Tensor | None = None
    truth: Tensor | None = None
    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Pair":
        """The pair with images and displacement in another floating-point type."""
        kinds = {k: getattr(self, k) for k in ("fixed", "moving", "brain", "truth")}
        return replace(self, **{k: None if t is None else t.to(dtype) for k, t in kinds.items()})

    def part(self, side: int, random: Random) -> "Pair":
        """A random cube of ``side`` voxels, cut off where the pair is smaller.

        What the true displacement takes from outside the cube is missing in its moving image.
        """
        cut = []
        for n in self.fixed.shape[2:]:
            start = random.index(max(n - side, 0) // 2 + 1) * 2
            cut.append(slice(start, start + side))
        return Pair(**{k: None if t is None else t[(..., *cut)].contiguous() for k, t in vars(self).items()})


def random_affine(random: Random, degrees: float, shift: float, scale: float, shear: float) -> tuple[Tensor, Tensor]:
    """A 3x3 matrix and a shift in voxels; each parameter is uniform between minus and plus its limit."""
    turn, stretch, skew = random.few(-1, 1, 3) * degrees * torch.pi / 180, torch.zeros(3, 3), torch.zeros(3, 3)
    for angle, (i, j) in zip(turn, ((0, 1), (0, 2), (1, 2)), strict=True):
        skew[i, j], skew[j, i] = angle, -angle
        sheared = random.number(-shear, shear)
        stretch[i, j].fill_(sheared)
        stretch[j, i].fill_(sheared)
    stretch += torch.diag(random.few(-scale, scale, 3))
    matrix = torch.linalg.matrix_exp(skew) @ torch.linalg.matrix_exp(stretch)
    return matrix.to(random.device), random.few(-shift, shift, 3).to(random.device)


def transform(points: Tensor, matrix: Tensor, shift: Tensor, center: Tensor) -> Tensor:
    """Points (1, 3, D, H, W) through ``matrix (p - center) + center + shift``."""
    moved = torch.einsum("ij,njdhw->nidhw", matrix, points - center)
    return moved + center + shift.view(1, 3, 1, 1, 1)


def untransform(points: Tensor, matrix: Tensor, shift: Tensor, center: Tensor) -> Tensor:
    """The inverse of :func:`transform`."""
    inverse = torch.linalg.inv_ex(matrix).inverse  # without a check, for which a GPU would have to be waited for
    return transform(points - shift.view(1, 3, 1, 1, 1), inverse, 0 * shift, center)


def center_of(shape: tuple[int, int, int], *, like: Tensor) -> Tensor:
    """The center of a (D, H, W) grid, (1, 3, 1, 1, 1) in voxels."""
    return fields.constants(*((n - 1) / 2 for n in shape[::-1]), like=like).view(1, 3, 1, 1, 1)


@dataclass(frozen=True)
class Augmentation:
    """Random rotation and translation, as in arXiv 1908.08767; each is uniform between minus and plus its limit.

    degrees, shift_mm: applied to both images alike.
    apart_degrees, apart_mm: applied to the moving image in addition, like the residual of an affine alignment.
    """

    degrees: float = 10.0
    shift_mm: float = 10.0
    apart_degrees: float = 0.0
    apart_mm: float = 0.0


def augment(pair: Pair, augmentation: Augmentation, spacing: float, random: Random) -> Pair:
    """The pair under a random rotation and translation; a known displacement and the labels follow.

    Args:
        spacing: mm per voxel.
    """
    a, shape = augmentation, pair.fixed.shape[2:]
    if a == Augmentation(0, 0, 0, 0):
        return pair
    at = fields.identity(tuple(shape), like=pair.fixed)
    center = center_of(tuple(shape), like=at)
    place, placed_by = random_affine(random, a.degrees, a.shift_mm / spacing, 0, 0)
    rest, rest_by = random_affine(random, a.apart_degrees, a.apart_mm / spacing, 0, 0)
    fixed_points = transform(at, place, placed_by, center)
    moving_points = transform(fixed_points, rest, rest_by, center)

    def sampled(image: Tensor | None, points: Tensor, mode: str) -> Tensor | None:
        if image is None:
            return None
        return fields.sample(image.float(), points, mode=mode, padding="zeros").to(image.dtype)

    truth = None
    if pair.truth is not None:  # from a rotated fixed voxel to the moving voxel of the same anatomy
        there = fixed_points + fields.sample(pair.truth, fixed_points)
        truth = untransform(untransform(there, rest, rest_by, center), place, placed_by, center) - at
    return Pair(
        sampled(pair.fixed, fixed_points, "bilinear"),
        sampled(pair.moving, moving_points, "bilinear"),
        sampled(pair.brain, fixed_points, "nearest"),
        truth,
        sampled(pair.fixed_labels, fixed_points, "nearest"),
        sampled(pair.moving_labels, moving_points, "nearest"),
    )
