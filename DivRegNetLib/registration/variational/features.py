"""Gauss-Newton terms of features: what is alike in two images whatever their contrasts, beside mutual information.

A feature is a channel that has the same value at corresponding voxels of both images: the probability of a class of
tissue (:mod:`DivRegNetLib.similarity.classes`), or a channel of a descriptor (:func:`descriptors`). With features f and, after the displacement,
m, the energy of a voxel is ``weight / 2 * sum_c (f_c - m_c)^2`` in nats: minus the logarithm of a normal density of variance
``1 / weight``. Its Gauss-Newton equations are

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
from DivRegNetLib.registration.variational.solver import COMPONENTS
from DivRegNetLib.similarity.descriptors import believable, mind_ssc

Valid = tuple[Tensor, Tensor]
"""Where the fixed and the moving image were measured, each (N, 1, D, H, W), bool or the measured fraction of a voxel."""


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


def normal_equations(fixed: Tensor, warped: Tensor, weight: float, counted: Tensor | None = None) -> Tensor:
    """Information and force of features at every voxel.

    Args:
        fixed, warped: (N, C, D, H, W), the moving features after the displacement.
        weight: see :class:`Features`.
        counted: (N, 1, D, H, W) bool, the voxels that count; None: all. Differences do not reach across their edge.
    Returns:
        (N, 9, D, H, W): xx, yy, zz, xy, xz, yz of the information and x, y, z of the force, in voxels.
    """
    difference, mean = fixed - warped, (fixed + warped) / 2
    slopes = [torch.zeros_like(mean) for _ in range(3)]
    for slope, dim in zip(slopes, (4, 3, 2), strict=True):  # central differences, 0 at the border
        inner = mean.shape[dim] - 2
        if inner > 0:
            middle = slope.narrow(dim, 1, inner)
            torch.sub(mean.narrow(dim, 2, inner), mean.narrow(dim, 0, inner), out=middle).div_(2)
            if counted is not None:
                middle.mul_(counted.narrow(dim, 2, inner) & counted.narrow(dim, 0, inner))
    scale = weight if counted is None else weight * counted.to(mean.dtype)[:, 0]
    rows = [(slopes[a] * slopes[b]).sum(1) for a, b in COMPONENTS] + [(difference * g).sum(1) for g in slopes]
    return torch.stack([row * scale for row in rows], 1)


class FeatureEquations:
    """The equations of a pair's features at one level, for any displacement."""

    def __init__(
        self,
        features: Features,
        shape: tuple[int, int, int],
        valid: tuple[Tensor, Tensor] | None = None,
        threshold: float = 0.5,
    ) -> None:
        """
        Args:
            shape: (D, H, W) of the level's displacements; features are averaged, or interpolated, to this grid.
            valid: where the fixed and the moving image were measured, (N, 1, ...) on any grid that covers the images.
            threshold: a voxel counts where at least this fraction of it was measured.
        """
        self.weight, self.threshold, self.parts = features.weight, threshold, features.parts
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
        return normal_equations(self.fixed[:, part], warped, self.weight * self.parts, counted)

    def energy(self, displacement: Tensor | None) -> Tensor:
        """(N,): mean energy of the voxels that count, in nats."""
        warped, counted = self._warped(displacement)
        return _mean(self.weight / 2 * (self.fixed - warped).square().sum(1, keepdim=True), counted)

    def _warped(self, displacement: Tensor | None, part: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """The warped moving features of some channels, and the voxels that count (N, 1, d, h, w), or None."""
        channels = self.moving[:, part]
        channels = channels if self.valid is None else torch.cat((channels, self.valid[1]), 1)
        if displacement is not None:
            channels = fields.warp(channels, displacement)
        if self.valid is None:
            return channels, None
        counted = (self.valid[0] > self.threshold) & (channels[:, -1:] > self.threshold)
        return channels[:, :-1], counted


def descriptors(
    fixed: Tensor, moving: Tensor, settings: VariationalSettings, level: Level, valid: Valid | None = None
) -> FeatureEquations:
    """The equations of the MIND-SSC descriptors of a pair at one level.

    The descriptors are those of the level's images, averaged to the displacement's grid.

    Args:
        fixed, moving, valid: as of :class:`~DivRegNetLib.registration.variational.equations.Equations`.
    """
    images = torch.cat((fixed, moving))
    images = F.avg_pool3d(images, level.shrink) if level.shrink > 1 else images
    grid = tuple(n // settings.stride for n in images.shape[2:])
    within = known = None
    if valid is not None:
        measured = torch.cat([resized(v.to(images.dtype), tuple(images.shape[2:])) for v in valid])
        within = believable(measured > settings.validity_threshold)
        known = resized(within.to(images.dtype), grid).chunk(2)
    channels = resized(mind_ssc(images, floor=settings.descriptor_floor, valid=within), grid)
    weight = settings.descriptor_weight * level.descriptors
    features = Features(*channels.chunk(2), weight=weight, parts=settings.descriptor_parts)
    return FeatureEquations(features, grid, known, settings.validity_threshold)


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
