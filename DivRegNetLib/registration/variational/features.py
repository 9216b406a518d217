"""Gauss-Newton terms of features: what is alike in two images whatever their contrasts, beside mutual information.

A feature is a channel that has the same value at corresponding voxels of both images: the probability of a class of
tissue (:mod:`DivRegNetLib.similarity.classes`), or a channel of a descriptor (:func:`descriptors`). With features f and,
after the displacement, m, the energy of a voxel is ``weight / 2 * sum_c (f_c - m_c)^2`` in nats: minus the logarithm of a
normal density of variance ``1 / weight``. Its Gauss-Newton equations are

    A = weight * sum_c g_c g_c^T,    b = weight * sum_c (f_c - m_c) g_c,

with g_c the mean of the gradients of f_c and m_c, so that the swapped pair has the opposite force (as in Vercauteren et
al., "Symmetric log-domain diffeomorphic registration", MICCAI 2008). They are added to the equations of mutual information.

Axis order and units as in :mod:`DivRegNetLib.core.fields`. Nothing here is differentiated.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.settings import Level, VariationalSettings
from DivRegNetLib.similarity.descriptors import believable, mind_ssc

DESCRIPTOR_STRIDE = 2  # voxels of a level's images per descriptor, along each axis

Valid = tuple[Tensor, Tensor]
"""Where the fixed and the moving image were measured, each (N, 1, D, H, W), bool or the measured fraction of a voxel."""

SMALLEST_PROBABILITY = 1e-8  # whose logarithm is taken


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a pair, on the grid of the images or a coarser one.

    fixed, moving: (N, C, d, h, w).
    weight: of the squared difference at a voxel of the displacement's grid, in nats.
    stride: voxels of the images per voxel of the features, along each axis.
    parts: into which the channels are divided; each step uses one of them, with ``parts`` times the weight, in turn.
    """

    fixed: Tensor
    moving: Tensor
    weight: float = 1.0
    stride: int = 1
    parts: int = 1

    def extended(self, shape: tuple[int, int, int]) -> "Features":
        """For images that were padded at the far end of D, H and W to ``shape``: the border is repeated."""
        more = [n // self.stride - m for n, m in zip(shape, self.fixed.shape[2:], strict=True)]
        return replace(self, **{k: fields.extended(getattr(self, k), more) for k in ("fixed", "moving")})

    def of_classes(self, weight: float, temperature: float) -> "Features":
        """Probabilities of classes with another weight and another softmax temperature: to the power ``1 / temperature``,
        and normalized over the channels. The lower the temperature, the closer to the most probable class alone."""
        if temperature == 1:
            return replace(self, weight=weight)
        sharp = ((p.clamp_min(SMALLEST_PROBABILITY).log() / temperature).softmax(1) for p in (self.fixed, self.moving))
        return Features(*sharp, weight, self.stride)


def normal_equations(fixed: Tensor, warped: Tensor, weight: float, counted: Tensor | None = None) -> Tensor:
    """Information and force of features at every voxel.

    Args:
        fixed, warped: (N, C, D, H, W), the moving features after the displacement.
        weight: see :class:`Features`.
        counted: (N, 1, D, H, W) bool, the voxels that count; None: all. Differences do not reach across their edge.
    Returns:
        (N, 9, D, H, W): xx, yy, zz, xy, xz, yz of the information and x, y, z of the force, in voxels.
    """
    difference, both = fixed - warped, fixed + warped
    slopes = both.new_zeros(len(both), 3, *both.shape[1:])  # central differences of the mean, 0 at the border
    for slope, dim in zip(slopes.unbind(1), (4, 3, 2), strict=True):
        inner = both.shape[dim] - 2
        if inner > 0:
            middle = slope.narrow(dim, 1, inner)
            torch.sub(both.narrow(dim, 2, inner), both.narrow(dim, 0, inner), out=middle)
            if counted is not None:
                middle.mul_(counted.narrow(dim, 2, inner) & counted.narrow(dim, 0, inner))
    slopes.mul_(0.25)
    normal = both.new_empty(len(both), 9, *both.shape[2:])
    # Diagonal; xy and xz; yz; force.
    for out, one, other in (
        (slice(0, 3), slopes, slopes),
        (slice(3, 5), slopes[:, :1], slopes[:, 1:]),
        (slice(5, 6), slopes[:, 1:2], slopes[:, 2:]),
        (slice(6, 9), slopes, difference[:, None]),
    ):
        torch.sum(one * other, 2, out=normal[:, out])
    return normal.mul_(weight if counted is None else weight * counted)


class FeatureEquations:
    """The equations of a pair's features at one level, for any displacement."""

    def __init__(
        self,
        features: Features,
        shape: tuple[int, int, int],
        valid: tuple[Tensor, Tensor] | None = None,
        threshold: float = 0.5,
        finer: int = 1,
    ) -> None:
        """
        Args:
            shape: (D, H, W) to which features are averaged, or interpolated: that of the level's displacements, or ...
            finer: ... a grid that displacements are so many times finer than. Equations then hold for all voxels of a cube.
            valid: where the fixed and the moving image were measured, (N, 1, ...) on any grid that covers the images.
            threshold: a voxel counts where at least this fraction of it was measured.
        """
        self.weight, self.threshold, self.parts = features.weight, threshold, features.parts
        self.shape, self.finer = tuple(shape), finer
        self.fixed, self.moving = (resized(x, shape) for x in (features.fixed, features.moving))
        self.valid = None if valid is None else tuple(resized(v.to(self.fixed.dtype), shape) for v in valid)

    def __call__(self, displacement: Tensor | None, number: int = 0) -> Tensor:
        """Information and force at each voxel, (N, 9, d, h, w), see :func:`normal_equations`.

        Args:
            displacement: (N, 3, d, h, w) in voxels of the level's grid; None: the identity.
            number: of the step, which decides the channels that are used.
        """
        part = slice(number % self.parts, None, self.parts)
        warped, counted = self._warped(displacement, part)
        normal = normal_equations(self.fixed[:, part], warped, self.weight * self.parts, counted)
        if self.finer == 1:
            return normal
        normal[:, :6].div_(self.finer**2)  # per squared voxel of the displacement's grid
        normal[:, 6:].div_(self.finer)
        return F.interpolate(normal, scale_factor=self.finer, mode="nearest")

    def energy(self, displacement: Tensor | None) -> Tensor:
        """(N,): mean energy of the voxels that count, in nats."""
        warped, counted = self._warped(displacement)
        return _mean(self.weight / 2 * (self.fixed - warped).square().sum(1, keepdim=True), counted)

    def _warped(self, displacement: Tensor | None, part: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """The warped moving features of some channels, and the voxels that count (N, 1, d, h, w), or None."""
        channels = self.moving[:, part]
        channels = channels if self.valid is None else torch.cat((channels, self.valid[1]), 1)
        if displacement is not None:
            channels = fields.warp(channels, fields.resize(displacement, self.shape))
        if self.valid is None:
            return channels, None
        counted = (self.valid[0] > self.threshold) & (channels[:, -1:] > self.threshold)
        return channels[:, :-1], counted


def descriptors(
    fixed: Tensor, moving: Tensor, settings: VariationalSettings, level: Level, valid: Valid | None = None
) -> FeatureEquations:
    """The equations of the MIND-SSC descriptors of a pair at one level.

    The descriptors are those of the level's images, averaged over cubes of DESCRIPTOR_STRIDE voxels a side: they reach further
    than that, and single ones are noisy.

    Args:
        fixed, moving, valid: as of :class:`~DivRegNetLib.registration.variational.equations.Equations`.
    """
    images = torch.cat((fixed, moving))
    images = F.avg_pool3d(images, level.shrink) if level.shrink > 1 else images
    finer = DESCRIPTOR_STRIDE // settings.stride
    if any(n % DESCRIPTOR_STRIDE for n in images.shape[2:]):
        finer = 1
    grid = tuple(n // (settings.stride * finer) for n in images.shape[2:])
    within = known = None
    if valid is not None:
        measured = torch.cat([resized(v.to(images.dtype), tuple(images.shape[2:])) for v in valid])
        within = believable(measured > settings.validity_threshold)
        known = resized(within.to(images.dtype), grid).chunk(2)
    channels = resized(mind_ssc(images, floor=settings.descriptor_floor, valid=within), grid)
    weight = settings.descriptor_weight * level.descriptors
    features = Features(*channels.chunk(2), weight=weight, parts=settings.descriptor_parts)
    return FeatureEquations(features, grid, known, settings.validity_threshold, finer)


def _mean(energy: Tensor, counted: Tensor | None) -> Tensor:
    if counted is None:
        return energy.flatten(1).mean(1)
    return (energy * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)


def resized(features: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(N, C, D, H, W) on another grid of the same extent: averaged where that is coarser, interpolated where it is finer."""
    if tuple(features.shape[2:]) == tuple(shape):
        return features
    if all(n % m == 0 for n, m in zip(features.shape[2:], shape, strict=True)):
        return F.avg_pool3d(features, tuple(n // m for n, m in zip(features.shape[2:], shape, strict=True)))
    return F.interpolate(features, size=tuple(shape), mode="trilinear", align_corners=False)
