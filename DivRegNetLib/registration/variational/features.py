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
from DivRegNetLib.similarity.descriptors import mind_ssc

DESCRIPTOR_STRIDE = 2  # voxels of a level's images per descriptor, along each axis
USUAL_DIFFERENCE = 0.05  # mean squared difference of a channel of descriptors after an affine alignment, at edges

Valid = tuple[Tensor, Tensor]
"""Where the fixed and the moving image were measured, each (N, 1, D, H, W), bool or the measured fraction of a voxel."""

SMALLEST_PROBABILITY = 1e-8  # whose logarithm is taken
SMALLEST_SUM = 1e-20  # that is divided by


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


class FeatureEquations:
    """The equations of a pair's features at one level, for any displacement."""

    def __init__(
        self,
        features: Features,
        shape: tuple[int, int, int],
        valid: Valid | None = None,
        threshold: float = 0.5,
        finer: int = 1,
        reach: int = 1,
    ) -> None:
        """
        Args:
            shape: (D, H, W) to which features are averaged, or interpolated: that of the level's displacements, or ...
            finer: ... a grid that displacements are so many times finer than. Equations then hold for all voxels of a cube.
            valid: where the fixed and the moving image were measured, (N, 1, ...) on any grid that covers the images.
            threshold: a voxel counts where more than this fraction of it, and of those around it, was measured.
            reach: how many voxels around it; 1 is what differences need.
        """
        self.shape, self.finer, self.parts = tuple(shape), finer, features.parts
        self.weight, self.measured, self.trust = features.weight, valid is not None, 1.0
        # The gradient of the mean is a quarter of the differences of the sum: with the fixed features times ``factor``, one
        # number is left to multiply information and force by.
        self.factor = 4 * finer
        fixed, moving = (resized(x, shape) for x in (features.fixed, features.moving))
        self.fixed = fixed * self.factor
        self.scale = features.weight * self.parts / self.factor**2
        inside = ()
        if valid is not None:
            both = within(torch.cat([resized(v.to(fixed.dtype), shape) for v in valid]), reach, threshold).chunk(2)
            self.scale, *inside = self.scale * both[0], both[1].to(fixed.dtype)
        self.untrusted = self.scale
        parts = (torch.cat((moving[:, i :: self.parts], *inside), 1) for i in range(self.parts))
        self.moving = [fields.Sampler(part) for part in parts]
        # Differences along x, y and z, which stay 0 at the border, and that of the two images.
        self.differences = fixed.new_zeros(len(fixed), 4, *self.fixed[:, :: self.parts].shape[1:])

    def __call__(self, displacement: Tensor | None, number: int = 0) -> Tensor:
        """Information and force at each voxel.

        Args:
            displacement: (N, 3, d, h, w) in voxels of the level's grid; None: the identity.
            number: of the step, which decides the channels that are used.
        Returns:
            (N, 12, d, h, w): three rows of xx, xy, xz of the information and x of the force, in voxels of the level's grid.
        """
        fixed, warped, scale = self._warped(displacement, number % self.parts)
        both = torch.add(warped, fixed, alpha=1 / self.factor)
        parts = self.differences[:, :, : both.shape[1]]
        fields.differences(both, parts[:, :3])
        torch.sub(fixed, warped, alpha=self.factor, out=parts[:, 3])
        first, *others = parts.unbind(2)
        normal = first[:, :3, None] * first[:, None]
        for channel in others:
            normal.addcmul_(channel[:, :3, None], channel[:, None])
        normal = normal.flatten(1, 2).mul_(scale)
        return normal if self.finer == 1 else F.interpolate(normal, scale_factor=self.finer, mode="nearest")

    def trust_regions(self, displacement: Tensor | None, rate: float, window: float) -> None:
        """From now on regions count by how well the features agree there, and the pair by how much is left to agree on.

        With d the mean squared difference of a channel, weighted by the squared gradients of the features: that of the whole
        image, and d(x) that around a voxel, the weight is multiplied by d / USUAL_DIFFERENCE, and divided among the regions
        in proportion to ``exp(-rate * d(x) / d)``.

        Args:
            displacement: of which the differences are taken, as of :meth:`__call__`.
            window: standard deviation of the Gaussian around a voxel, in voxels of the features' grid.
        """
        self.scale, edges, squares = self.untrusted, 0.0, 0.0
        for part in range(self.parts):
            fixed, warped, scale = self._warped(displacement, part)
            fixed = fixed / self.factor
            edges = edges + fields.differences(fixed + warped).square_().sum((1, 2))[:, None] * scale
            squares = squares + fixed.sub_(warped).square_().mean(1, keepdim=True) / self.parts
        around, there = fields.smooth(torch.cat((squares * edges, edges), 1), window).split(1, 1)
        mean = _total(squares * edges) / _total(edges).clamp_min_(SMALLEST_SUM)
        shares = (-rate * around / (there * mean).clamp_min_(SMALLEST_SUM)).exp_()
        level = _total(edges) / _total(shares * edges).clamp_min_(SMALLEST_SUM)
        self.trust = shares * (level * mean / USUAL_DIFFERENCE)
        self.scale = self.untrusted * self.trust

    def energy(self, displacement: Tensor | None) -> Tensor:
        """(N,): mean energy of the voxels that count, in nats."""
        energy, counted = 0.0, None
        for part in range(self.parts):
            fixed, warped, scale = self._warped(displacement, part)
            squares = (fixed - self.factor * warped).square().sum(1, keepdim=True)
            energy = energy + self.weight / (2 * self.factor**2) * squares
            counted = scale > 0 if self.measured else torch.ones_like(squares, dtype=torch.bool)
        return (energy * counted * self.trust).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)

    def _warped(self, displacement: Tensor | None, part: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """The fixed features of one part times ``factor``, the warped moving ones, and what information and force of each
        voxel are multiplied by, (N, 1, d, h, w) or a number."""
        fixed, moving = self.fixed[:, part :: self.parts], self.moving[part]
        channels = moving.image
        if displacement is not None:
            channels = moving.displaced(fields.resize(displacement, self.shape))
        if not self.measured:
            return fixed, channels, self.scale
        return fixed, channels[:, :-1], self.scale * channels[:, -1:]


def descriptors(
    fixed: Tensor,
    moving: Tensor,
    settings: VariationalSettings,
    level: Level,
    valid: Valid | None = None,
    displacement: Tensor | None = None,
) -> FeatureEquations:
    """The equations of the MIND-SSC descriptors of a pair at one level.

    The descriptors are those of the level's images, averaged over cubes of DESCRIPTOR_STRIDE voxels a side: they reach further
    than that, and single ones are noisy.

    Args:
        fixed, moving, valid: as of :class:`~DivRegNetLib.registration.variational.equations.Equations`.
        displacement: with which the level begins, and by which regions are trusted; None: the identity.
    """
    images = torch.cat((fixed, moving))
    images = F.avg_pool3d(images, level.shrink) if level.shrink > 1 else images
    finer = DESCRIPTOR_STRIDE // settings.stride
    if any(n % DESCRIPTOR_STRIDE for n in images.shape[2:]):
        finer = 1
    grid = tuple(n // (settings.stride * finer) for n in images.shape[2:])
    reliable = None
    if valid is not None:
        valid = tuple(resized(v.to(images.dtype), grid) for v in valid)
        reliable = within(torch.cat(valid), 1, settings.validity_threshold).to(images.dtype)
        reliable = F.interpolate(reliable, images.shape[2:]) > 0.5
    channels = resized(mind_ssc(images, floor=settings.descriptor_floor, valid=reliable), grid)
    weight = settings.descriptor_weight * level.descriptors
    features = Features(*channels.chunk(2), weight=weight, parts=settings.descriptor_parts)
    # A descriptor reaches two voxels of the images, which are one of its grid, and differences another one.
    equations = FeatureEquations(features, grid, valid, settings.validity_threshold, finer, reach=2)
    equations.trust_regions(displacement, settings.descriptor_trust, settings.descriptor_region)
    return equations


def _total(values: Tensor) -> Tensor:
    """(N, 1, 1, 1, 1): the sum of each image."""
    return values.sum((1, 2, 3, 4), keepdim=True)


def within(measured: Tensor, reach: int, threshold: float) -> Tensor:
    """(N, 1, D, H, W) bool: voxels all of whose surroundings were measured; a border of the array is none.

    Args:
        measured: (N, 1, D, H, W), the fraction of each voxel.
        reach: of the surroundings, voxels.
        threshold: larger fractions are enough.
    """
    return F.max_pool3d(-measured, 2 * reach + 1, 1, reach) < -threshold


def eroded(*valid: Tensor) -> tuple[Tensor, ...]:
    """Bool images (N, 1, D, H, W) without their outermost voxels, whose differences would reach across an edge; each is
    unchanged where nothing else would be left."""
    whole = torch.stack(valid)
    inner = whole.clone()
    for dim in (3, 4, 5):
        before, last = inner.clone(), inner.shape[dim] - 1
        inner.narrow(dim, 0, last).logical_and_(before.narrow(dim, 1, last))
        inner.narrow(dim, 1, last).logical_and_(before.narrow(dim, 0, last))
    left = inner.flatten(1).any(1).view(-1, 1, 1, 1, 1, 1)
    return torch.where(left, inner, whole).unbind()


def resized(features: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(N, C, D, H, W) on another grid of the same extent: averaged where that is coarser, interpolated where it is finer."""
    if tuple(features.shape[2:]) == tuple(shape):
        return features
    if all(n % m == 0 for n, m in zip(features.shape[2:], shape, strict=True)):
        return F.avg_pool3d(features, tuple(n // m for n, m in zip(features.shape[2:], shape, strict=True)))
    return F.interpolate(features, size=tuple(shape), mode="trilinear", align_corners=False)
