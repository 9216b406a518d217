"""Gauss-Newton equations of an image pair: information matrix and force at every voxel.

Where L is the pointwise mutual information, the force that raises its mean is ``L_m grad m`` on the moving image and
``-L_f grad f`` on the fixed one; the two are added, as in Vercauteren et al., "Symmetric log-domain diffeomorphic
registration", MICCAI 2008. The Fisher information ``E[L_m^2 | f] grad m grad m^T + E[L_f^2 | m] grad f grad f^T`` replaces
the Hessian. docs/method.md has the derivation.

A displacement at half the resolution of the images does not need every voxel: a step samples one voxel of the images for
each voxel of the displacement's grid, and the next step another one. Intensities are not averaged, as that would mix tissues.

Axis order and units as in :mod:`DivRegNetLib.core.fields`. Nothing here is differentiated, nothing waits for a GPU, and no
shape depends on the data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.features import FeatureEquations, Valid
from DivRegNetLib.registration.variational.histograms import histogram_rows, to_bins, write_tables
from DivRegNetLib.registration.variational.schedule import sampling_offsets
from DivRegNetLib.registration.variational.settings import Level, VariationalSettings

NOT_COUNTED = 2.0**30  # a column beyond all histograms


class Equations:
    """The equations of a pair at one level, for any displacement."""

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        settings: VariationalSettings,
        level: Level,
        valid: Valid | None = None,
        features: Sequence[FeatureEquations] = (),
    ) -> None:
        """
        Args:
            fixed, moving: (N, 1, D, H, W) in [0, 1], sides multiples of ``level.shrink * settings.stride``.
            valid: where the images were measured, see :func:`eroded`; None: everywhere.
            features: whose equations are added to those of mutual information.
        """
        self.features = features
        images = (fixed, moving) if valid is None else (fixed, moving, *(v.to(fixed.dtype) for v in valid))
        if level.shrink > 1:
            images = F.avg_pool3d(torch.cat(images, 1), level.shrink).split(1, 1)
        fixed, moving = images[:2]
        self.settings, self.level, self.stride = settings, level, settings.stride
        counted = None if valid is None else images[2] > settings.validity_threshold
        block = self.stride * (level.block // self.stride)
        self.rows, self.layout = histogram_rows(fixed, block, settings.bins, counted)
        self.tables = fixed.new_zeros(5, self.layout.cells + 1)
        self.offsets = sampling_offsets(self.stride)
        # All that is sampled after a displacement: intensity, gradient, measured fraction. Gradients are per voxel of the
        # displacement's grid.
        self.moving = torch.cat((moving, gradient(moving, self.stride), *images[3:]), 1)
        self.fixed_gradient = gradient(fixed, self.stride)

    def __call__(self, displacement: Tensor | None, number: int = 0) -> Tensor:
        """Information and force at each voxel of the displacement's grid.

        Args:
            displacement: (N, 3, d, h, w) in voxels of its grid, ``stride`` times coarser than the level's images; None: the
                identity.
            number: of the step, which decides the voxels that are sampled.
        Returns:
            (N, 9, d, h, w): xx, yy, zz, xy, xz, yz of the information and x, y, z of the force, in voxels of the
            displacement's grid. For the swapped pair the information is the same and the force the opposite.
        """
        warped, cell = self._sample(displacement, number)
        moving_gradient = warped[:, 1:4]
        if displacement is not None:  # chain rule: the gradient of the warped image
            along = _differences(displacement)
            moving_gradient = torch.addcmul(moving_gradient, along[:, :, 0], warped[:, 1:2], value=0.5)
            moving_gradient.addcmul_(along[:, :, 1], warped[:, 2:3], value=0.5)
            moving_gradient.addcmul_(along[:, :, 2], warped[:, 3:4], value=0.5)
        normal = _normal(moving_gradient, self.fixed_gradient[self._sampled(number)], self._values(cell))
        for terms in self.features:
            normal += terms(displacement, number)
        return normal

    def objective(self, displacement: Tensor | None) -> Tensor:
        """(N,): mean pointwise mutual information of the voxels that step 0 samples and that are counted, less the energy of
        the features, in nats."""
        _, cell = self._sample(displacement, 0)
        counted = (cell != self.layout.cells).flatten(1).sum(1).clamp_min_(1)
        information = self._values(cell)[4].flatten(1).sum(1) / counted
        return information - sum(terms.energy(displacement) for terms in self.features)

    def _sampled(self, number: int) -> tuple:
        """Index of the voxels of the images that a step samples."""
        return (..., *(slice(o, None, self.stride) for o in self.offsets[number % len(self.offsets)]))

    def _sample(self, displacement: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        """At the sampled voxels the warped moving channels (N, 4 or 5, d, h, w), and the cell of the joint histograms that
        each falls into, (N, 1, d, h, w) int64."""
        warped = self._warped(displacement, number)
        column = to_bins(warped[:, :1], self.settings.bins)
        rows = self.rows[self._sampled(number)]
        if warped.shape[1] == 4:
            return warped, rows + column.long()
        column = torch.where(warped[:, 4:] > self.settings.validity_threshold, column, NOT_COUNTED)
        return warped, (rows + column.long()).clamp_(max=self.layout.cells)

    def _warped(self, displacement: Tensor | None, number: int) -> Tensor:
        """The warped moving channels at the sampled voxels, (N, 4 or 5, d, h, w)."""
        if displacement is None:
            return self.moving[self._sampled(number)]
        x, y, z = self.offsets[number % len(self.offsets)][::-1]
        # Distance of the sampled voxel from the center of the voxel of the displacement's grid, in voxels of that grid.
        distance = [(o + 0.5) / self.stride - 0.5 for o in (x, y, z)]
        offset = fields.constants(*(o / self.stride for o in (x, y, z)), like=displacement).view(1, 3, 1, 1, 1)
        return fields.sample_displaced(self.moving, fields.shifted(displacement + offset, *distance), self.stride)

    def _values(self, cell: Tensor) -> Tensor:
        """(5, N, 1, d, h, w): the entries of the tables for each voxel, see :func:`write_tables`."""
        write_tables(cell, self.layout, self.settings, self.tables)
        return self.tables.index_select(1, cell.flatten()).view(-1, *cell.shape)


def _normal(m: Tensor, f: Tensor, values: Tensor) -> Tensor:
    """Information and force of each voxel, (N, 9, d, h, w), see :meth:`Equations.__call__`.

    Args:
        m, f: gradients of the warped moving and the fixed image along x, y, z, (N, 3, d, h, w).
        values: (5, N, 1, d, h, w), see :meth:`Equations._values`.
    """
    along_m, along_f, info_m, info_f, _ = values
    by_m, by_f = m * info_m, f * info_f
    normal = m.new_empty(len(m), 9, *m.shape[2:])
    # Diagonal; xy and xz; yz.
    for out, a, b in ((slice(0, 3), slice(0, 3), slice(0, 3)), (slice(3, 5), slice(0, 1), slice(1, 3)), (5, 1, 2)):
        torch.mul(m[:, a], by_m[:, b], out=normal[:, out]).addcmul_(f[:, a], by_f[:, b])
    torch.mul(m, along_m, out=normal[:, 6:]).addcmul_(f, along_f, value=-1)
    return normal


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


def gradient(image: Tensor, scale: float = 1.0) -> Tensor:
    """Central differences of an image (N, 1, D, H, W) along x, y, z, times a factor: (N, 3, D, H, W); 0 at the border."""
    differences = _differences(image)[:, :, 0]
    return differences if scale == 2 else differences.mul_(scale / 2)


def _differences(image: Tensor) -> Tensor:
    """``image(x + 1) - image(x - 1)`` of (N, C, D, H, W) along x, y, z: (N, 3, C, D, H, W); 0 at the border."""
    differences = image.new_zeros(len(image), 3, *image.shape[1:])
    for axis, dim in enumerate((4, 3, 2)):
        inner, out = image.shape[dim] - 2, differences[:, axis]
        if inner > 0:
            torch.sub(image.narrow(dim, 2, inner), image.narrow(dim, 0, inner), out=out.narrow(dim, 1, inner))
    return differences
