"""Gauss-Newton equations of an image pair: information matrix and force at every voxel.

Where L is the pointwise mutual information, the force that raises its mean is ``L_m grad m`` on the moving image and
``-L_f grad f`` on the fixed one; the two are added, as in Vercauteren et al., "Symmetric log-domain diffeomorphic
registration", MICCAI 2008. The Fisher information ``E[L_m^2 | f] grad m grad m^T + E[L_f^2 | m] grad f grad f^T`` replaces
the Hessian. docs/method.md has the derivation.

A displacement at half the resolution of the images does not need every voxel: a step samples one voxel of the images for
each voxel of the displacement's grid, and the next step another one; or it samples all of them, and averages the equations of
those that belong to a voxel of that grid. Intensities are not averaged, as that would mix tissues.

Axis order and units as in :mod:`DivRegNetLib.core.fields`. Nothing here is differentiated, nothing waits for a GPU, and no
shape depends on the data.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.core.torch_state import computed_in_parts
from DivRegNetLib.registration.variational.features import FeatureEquations, Valid
from DivRegNetLib.registration.variational.histograms import histogram_rows, to_bins, write_tables
from DivRegNetLib.registration.variational.schedule import sampling_offsets
from DivRegNetLib.registration.variational.settings import Level, VariationalSettings


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
        self.settings, self.level = settings, level
        self.stride = 1 if level.all_voxels else settings.stride  # of the voxels that a step samples
        counted = None if valid is None else images[2] > settings.validity_threshold
        block = self.stride * (level.block // self.stride)
        self.rows, self.layout = histogram_rows(fixed, block, settings.bins, counted)
        self.offsets = sampling_offsets(self.stride)
        self.sampled = [n // self.stride for n in fixed.shape[2:]]
        # All that is sampled after a displacement: intensity in bins, gradient, measured fraction. Gradients are per voxel of
        # the displacement's grid.
        channels = torch.cat((to_bins(moving, settings.bins), gradient(moving, settings.stride), *images[3:]), 1)
        self.moving = fields.Sampler(channels) if self.stride > 1 else channels
        self.fixed_gradient = gradient(fixed, settings.stride)
        # Written to again and again.
        self.tables = fixed.new_zeros(5, self.layout.cells + settings.bins)
        self.along = fixed.new_zeros(len(fixed), 3, 3, *self.sampled) if self.stride > 1 else None
        self.slices = fields.slices_at_once(math.prod(self.sampled[1:]), like=fixed, multiple=settings.stride)

    def __call__(self, displacement: Tensor | None, number: int = 0) -> Tensor:
        """Information and force at each voxel of the displacement's grid.

        Args:
            displacement: (N, 3, d, h, w) in voxels of its grid, ``settings.stride`` times coarser than the level's images;
                None: the identity.
            number: of the step, which decides the voxels that are sampled.
        Returns:
            (N, 12, d, h, w): three rows of xx, xy, xz of the information and x of the force, in voxels of the
            displacement's grid. For the swapped pair the information is the same and the force the opposite.
        """
        sampled, along = self._at_sampled(displacement)
        warped, cell = self._sample(sampled, along, number)
        write_tables(cell, self.layout, self.settings, self.tables)
        fixed_gradient = self.fixed_gradient[self._sampled(number)]

        def normal_from(start: int) -> Tensor:
            part = slice(start, start + self.slices)
            moving_gradient = warped[:, 1:4, part]
            if displacement is not None:
                there = _differences(sampled, part) if along is None else along[:, :, :, part]
                moving_gradient = _after(moving_gradient, there)
            return self._normal(cell[:, :, part], moving_gradient, fixed_gradient[:, :, part])

        normal = fields.joined(computed_in_parts(normal_from, range(0, self.sampled[0], self.slices)), 2)
        for terms in self.features:
            normal.add_(terms(displacement, number))
        return normal

    def _normal(self, cell: Tensor, moving_gradient: Tensor, fixed_gradient: Tensor) -> Tensor:
        """The equations of mutual information of some slices of the sampled voxels, (N, 12, d, h, w) as of :meth:`__call__`."""
        along_m, along_f, info_m, info_f = self._values(cell, 4)
        normal = self._products(moving_gradient, info_m, along_m)
        normal = self._products(fixed_gradient, info_f, along_f, normal).flatten(1, 2)
        ratio = self.settings.stride // self.stride
        return normal if ratio == 1 else F.avg_pool3d(normal, ratio)

    def _products(self, gradient: Tensor, information: Tensor, along: Tensor, plus: Tensor | None = None) -> Tensor:
        """``information * g g^T`` and ``along * g`` of a gradient g, as rows of four, (N, 3, 4, d, h, w), added to ``plus``."""
        rows, columns = gradient[:, :, None], (gradient * information)[:, None]
        if plus is None:
            plus = gradient.new_empty(len(gradient), 3, 4, *gradient.shape[2:])
            torch.mul(rows, columns, out=plus[:, :, :3])
            torch.mul(gradient, along, out=plus[:, :, 3])
            return plus
        plus[:, :, :3].addcmul_(rows, columns)
        plus[:, :, 3].addcmul_(gradient, along)
        return plus

    def objective(self, displacement: Tensor | None) -> Tensor:
        """(N,): mean pointwise mutual information of the voxels that step 0 samples and that are counted, less the energy of
        the features, in nats."""
        _, cell = self._sample(*self._at_sampled(displacement), 0)
        counted = (cell < self.layout.cells).flatten(1).sum(1).clamp_min_(1)
        write_tables(cell, self.layout, self.settings, self.tables)
        information = self._values(cell, 5)[4].flatten(1).sum(1) / counted
        return information - sum(terms.energy(displacement) for terms in self.features)

    def _at_sampled(self, displacement: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A displacement on the grid of the sampled voxels, in voxels of it, and its differences there, if they are kept."""
        if displacement is None:
            return None, None
        sampled = fields.resize(displacement, self.sampled)
        return sampled, None if self.along is None else fields.differences(sampled, self.along)

    def _sampled(self, number: int) -> tuple:
        """Index of the voxels of the images that a step samples."""
        return (..., *(slice(o, None, self.stride) for o in self.offsets[number % len(self.offsets)]))

    def _sample(self, displacement: Tensor | None, along: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        """At the sampled voxels the warped moving channels (N, 4 or 5, d, h, w), and the cell of the joint histograms that
        each falls into, (N, 1, d, h, w) int64."""
        warped = self._warped(displacement, along, number)
        cell = self.rows[self._sampled(number)] + warped[:, :1].long()
        if warped.shape[1] == 5:
            cell.masked_fill_(warped[:, 4:] <= self.settings.validity_threshold, self.layout.cells)
        return warped, cell

    def _warped(self, displacement: Tensor | None, along: Tensor | None, number: int) -> Tensor:
        """The warped moving channels at the sampled voxels, (N, 4 or 5, d, h, w)."""
        if self.stride == 1:
            return self.moving if displacement is None else fields.sample_displaced(self.moving, displacement)
        if displacement is None:
            return self.moving.image[self._sampled(number)]
        x, y, z = self.offsets[number % len(self.offsets)][::-1]
        moved = displacement + fields.constants(*(o / self.stride for o in (x, y, z)), like=along).view(1, 3, 1, 1, 1)
        # To the sampled voxel from the center of the voxel of the displacement's grid, in twice its voxels, as differences
        # span two.
        distance = fields.constants(*((o + 0.5) / self.stride / 2 - 0.25 for o in (x, y, z)), like=along)
        distance = distance.view(1, 1, 3).expand(len(along), -1, -1)
        moved = torch.baddbmm(moved.flatten(1)[:, None], distance, along.flatten(2)).view_as(displacement)
        return self.moving.displaced(moved, self.stride)

    def _values(self, cell: Tensor, rows: int) -> Tensor:
        """(rows, N, 1, d, h, w): the first entries of the tables for each voxel, see :func:`write_tables`."""
        return self.tables[:rows].index_select(1, cell.flatten()).view(-1, *cell.shape)


def gradient(image: Tensor, scale: float = 1.0) -> Tensor:
    """Central differences of an image (N, 1, D, H, W) along x, y, z, times a factor: (N, 3, D, H, W); 0 at the border."""
    differences = fields.differences(image)[:, :, 0]
    return differences if scale == 2 else differences.mul_(scale / 2)


def _after(gradient: Tensor, along: Tensor) -> Tensor:
    """The gradient of a warped image, by the chain rule, (N, 3, d, h, w).

    Args:
        gradient: of the image, (N, 3, d, h, w), where the displacement takes the voxels.
        along: differences of the displacement, (N, 3, 3, d, h, w), see :func:`fields.differences`.
    """
    x, y, z = gradient.split(1, 1)
    after = torch.addcmul(gradient, along[:, :, 0], x, value=0.5)
    return after.addcmul_(along[:, :, 1], y, value=0.5).addcmul_(along[:, :, 2], z, value=0.5)


def _differences(displacement: Tensor, part: slice) -> Tensor:
    """Those of a displacement (N, 3, D, H, W) in some of its slices, (N, 3, 3, d, h, w)."""
    first = max(part.start - 1, 0)
    around = fields.differences(displacement[:, :, first : part.stop + 1])
    return around[:, :, :, part.start - first : part.stop - first]
