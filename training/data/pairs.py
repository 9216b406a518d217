"""Pairs of images that training and validation look at, and the random deformations they are made with.

Every random number of a pair comes from one generator, so a step's pairs depend on the seed and the step alone. Lengths
are in voxels of the cohort's grid, points and components in x, y, z order (see DivRegNetLib/core/fields.py).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from DivRegNetLib.core import fields


@dataclass(frozen=True)
class Pair:
    """Two images on one grid, and what is known of how they correspond.

    fixed, moving: (1, 1, D, H, W) normalized.
    brain: (1, 1, D, H, W) float, 1 inside the fixed skull, where that is known.
    truth: (1, 3, D, H, W) displacement from fixed to moving voxels, where it is known.
    fixed_labels, moving_labels: (1, 1, D, H, W) uint8, where both have the same classes.
    """

    fixed: Tensor
    moving: Tensor
    brain: Tensor | None = None
    truth: Tensor | None = None
    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Pair":
        """Images and deformation in another floating-point type."""
        kinds = {k: getattr(self, k) for k in ("fixed", "moving", "brain", "truth")}
        return replace(self, **{k: None if t is None else t.to(dtype) for k, t in kinds.items()})

    def part(self, side: int, random: "Random") -> "Pair":
        """A cube of ``side`` voxels anywhere in the pair, or as much of it as there is; what moves into it from outside is
        missing."""
        cut = []
        for n in self.fixed.shape[2:]:
            start = random.index(max(n - side, 0) // 2 + 1) * 2
            cut.append(slice(start, start + side))
        return Pair(**{k: None if t is None else t[(..., *cut)].contiguous() for k, t in vars(self).items()})


class Random:
    """Draws from one generator on one device."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def number(self, low: float, high: float) -> float:
        return self.uniform(low, high, 1).item()

    def chance(self, probability: float) -> bool:
        return self.number(0, 1) < probability

    def index(self, count: int) -> int:
        """A whole number from 0 to ``count - 1``."""
        return int(self.number(0, count - 1e-6))

    def choice(self, options):
        return options[self.index(len(options))]


def ffd(shape: tuple[int, int, int], spacing: float, sd: float, random: Random) -> Tensor:
    """Free-form deformation: cubic B-splines with N(0, sd) control points every ``spacing`` voxels, (1, 3, D, H, W).

    Source: Rueckert et al., IEEE TMI 1999; the phantoms of arXiv 1908.08767 use 20 mm and 6 mm.
    """
    bases = [bspline_basis(n, spacing, random.device) for n in shape]
    control = random.normal(3, *(b.shape[1] for b in bases)) * sd
    for basis in reversed(bases):  # last axis first; each turn moves the finished axis to the front of the three
        control = torch.einsum("cijk,nk->cnij", control, basis)
    return control[None]


def bspline_basis(n: int, spacing: float, device: torch.device) -> Tensor:
    """(n, controls): weight of each control point at each voxel."""
    x = torch.arange(n, device=device) / spacing
    t, first = x.frac(), x.floor().long()
    weights = torch.stack(
        ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6), 1
    )
    basis = torch.zeros(n, int(first.max()) + 4, device=device)
    return basis.scatter_(1, first[:, None] + torch.arange(4, device=device), weights)


def random_affine(random: Random, degrees: float, shift: float, scale: float, shear: float) -> tuple[Tensor, Tensor]:
    """A 3x3 matrix and a shift (voxels), each parameter uniform up to plus or minus its limit."""
    turn, stretch = random.uniform(-1, 1, 3) * degrees * torch.pi / 180, torch.zeros(3, 3, device=random.device)
    skew = torch.zeros(3, 3, device=random.device)
    for angle, (i, j) in zip(turn, ((0, 1), (0, 2), (1, 2)), strict=True):
        skew[i, j], skew[j, i] = angle, -angle
        stretch[i, j] = stretch[j, i] = random.number(-shear, shear)
    stretch += torch.diag(random.uniform(-scale, scale, 3))
    return torch.linalg.matrix_exp(skew) @ torch.linalg.matrix_exp(stretch), random.uniform(-shift, shift, 3)


def transform(points: Tensor, matrix: Tensor, shift: Tensor, center: Tensor) -> Tensor:
    """Points (1, 3, D, H, W) through ``matrix (p - center) + center + shift``."""
    moved = torch.einsum("ij,njdhw->nidhw", matrix, points - center)
    return moved + center + shift.view(1, 3, 1, 1, 1)


def untransform(points: Tensor, matrix: Tensor, shift: Tensor, center: Tensor) -> Tensor:
    """The inverse of :func:`transform`."""
    return transform(points - shift.view(1, 3, 1, 1, 1), torch.linalg.inv(matrix), 0 * shift, center)


@dataclass(frozen=True)
class Augmentation:
    """Random translation and rotation of both images, as in arXiv 1908.08767; each uniform up to plus or minus its limit.

    degrees, shift_mm: of both images alike.
    apart_degrees, apart_mm: of the moving image alone: what an affine alignment leaves over.
    """

    degrees: float = 10.0
    shift_mm: float = 10.0
    apart_degrees: float = 0.0
    apart_mm: float = 0.0


def augment(pair: Pair, augmentation: Augmentation, spacing: float, random: Random) -> Pair:
    """The pair turned and moved; a known deformation and the labels follow.

    Args:
        spacing: mm per voxel.
    """
    a, shape = augmentation, pair.fixed.shape[2:]
    if a == Augmentation(0, 0, 0, 0):
        return pair
    center = (torch.tensor(shape[::-1], device=pair.fixed.device).float().view(1, 3, 1, 1, 1) - 1) / 2
    at = fields.identity(tuple(shape), like=pair.fixed)
    place, placed_by = random_affine(random, a.degrees, a.shift_mm / spacing, 0, 0)
    rest, rest_by = random_affine(random, a.apart_degrees, a.apart_mm / spacing, 0, 0)
    fixed_points = transform(at, place, placed_by, center)
    moving_points = transform(fixed_points, rest, rest_by, center)

    def look(image: Tensor | None, points: Tensor, mode: str) -> Tensor | None:
        return (
            None if image is None else fields.sample(image.float(), points, mode=mode, padding="zeros").to(image.dtype)
        )

    truth = None
    if pair.truth is not None:  # from a turned fixed voxel to the moving voxel that shows the same
        there = fixed_points + fields.sample(pair.truth, fixed_points)
        truth = untransform(untransform(there, rest, rest_by, center), place, placed_by, center) - at
    return Pair(
        look(pair.fixed, fixed_points, "bilinear"),
        look(pair.moving, moving_points, "bilinear"),
        look(pair.brain, fixed_points, "nearest"),
        truth,
        look(pair.fixed_labels, fixed_points, "nearest"),
        look(pair.moving_labels, moving_points, "nearest"),
    )
