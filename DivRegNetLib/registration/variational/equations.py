"""Gauss-Newton equations of an image pair: information matrix and force at every voxel.

Where L is the pointwise mutual information, the force that raises its mean is ``L_m grad m`` on the moving image and
``-L_f grad f`` on the fixed one; the two are added, as in Vercauteren et al., "Symmetric log-domain diffeomorphic
registration", MICCAI 2008. The Fisher information ``E[L_m^2 | f] grad m grad m^T + E[L_f^2 | m] grad f grad f^T`` replaces
the Hessian. docs/method.md has the derivation.

A displacement at half the resolution of the images does not need every voxel: a step samples one voxel of the images for
each voxel of the displacement's grid, and the next step another one. Intensities are not averaged, as that would mix tissues.

Axis order and units as in :mod:`DivRegNetLib.core.fields`. Nothing here is differentiated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.features import FeatureEquations, Features
from DivRegNetLib.registration.variational.histograms import histogram_rows, pointwise_tables
from DivRegNetLib.registration.variational.schedule import sampling_offsets
from DivRegNetLib.registration.variational.settings import Level, VariationalSettings
from DivRegNetLib.registration.variational.solver import COMPONENTS

Valid = tuple[Tensor, Tensor]
"""Where the fixed and the moving image were measured, each (N, 1, D, H, W), bool or the measured fraction of a voxel."""


class Equations:
    """The equations of a pair at one level, for any displacement."""

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        settings: VariationalSettings,
        level: Level,
        valid: Valid | None = None,
        features: Sequence[Features] = (),
    ) -> None:
        """
        Args:
            fixed, moving: (N, 1, D, H, W) in [0, 1], sides multiples of ``level.shrink * settings.stride``.
            valid: where the images were measured; None: everywhere.
            features: whose equations are added to those of mutual information.
        """
        shape = tuple(n // (level.shrink * settings.stride) for n in fixed.shape[2:])
        self.features = [FeatureEquations(f, shape, valid, settings.validity_threshold) for f in features]

        def shrunk(image: Tensor) -> Tensor:
            return F.avg_pool3d(image, level.shrink) if level.shrink > 1 else image

        fixed, moving = shrunk(fixed), shrunk(moving)
        self.settings, self.level, self.stride = settings, level, settings.stride
        block = self.stride * (level.block // self.stride)
        self.rows, self.blocks = histogram_rows(fixed, block, settings.bins)
        self.fixed_gradient, self.fixed_valid = torch.cat(gradient(fixed), 1), None
        self.offsets = sampling_offsets(self.stride)
        channels = [moving, *gradient(moving)]
        if valid is not None:
            self.fixed_valid, moving_valid = (shrunk(_eroded(v).to(moving.dtype)) for v in valid)
            channels.append(moving_valid)
        self.moving = torch.cat(channels, 1)  # all that is sampled after a displacement

    def __call__(self, displacement: Tensor | None, number: int = 0) -> tuple[Tensor, Tensor]:
        """Information and force at each voxel of the displacement's grid.

        Args:
            displacement: (N, 3, d, h, w) in voxels of its grid, ``stride`` times coarser than the level's images; None: the
                identity.
            number: of the step, which decides the voxels that are sampled.
        Returns:
            (N, 9, d, h, w): xx, yy, zz, xy, xz, yz of the information and x, y, z of the force, in voxels of the
            displacement's grid. For the swapped pair the information is the same and the force the opposite.
            (N,): mean pointwise mutual information of the voxels that count, less the energy of the features, in nats.
        """
        offset = self.offsets[number % len(self.offsets)]
        sampled = (..., *(slice(o, None, self.stride) for o in offset))
        rows, fixed_gradient = self.rows[sampled], self.fixed_gradient[sampled]
        warped = self._warped(displacement, offset, rows.shape[2:])
        moving, moving_gradient = warped[:, :1], warped[:, 1:4]
        if displacement is not None:  # chain rule: the gradient of the warped image
            moving_gradient = moving_gradient + torch.cat(
                [(slope * moving_gradient).sum(1, keepdim=True) for slope in gradient(displacement)], 1
            )
        counted = None
        if self.fixed_valid is not None:
            threshold = self.settings.validity_threshold
            counted = (self.fixed_valid[sampled] > threshold) & (warped[:, 4:] > threshold)
        normal, information = moving.new_empty((len(rows), 9, *rows.shape[2:])), []
        for i in range(len(rows)):
            of_pair = None if counted is None else counted[i, 0]
            tables, cell = pointwise_tables(rows[i, 0], moving[i, 0], self.blocks, self.settings, of_pair)
            values = tables.index_select(1, cell.flatten()).view(-1, *cell.shape)
            _write_equations(moving_gradient[i], fixed_gradient[i], values, normal[i])
            information.append(values[4].sum() / (cell.numel() if counted is None else of_pair.sum().clamp_min(1)))
        units = normal.new_tensor([self.stride**2] * 6 + [self.stride] * 3).view(-1, 1, 1, 1)
        normal, objective = normal.mul_(units), torch.stack(information)
        for terms in self.features:
            of_features, energy = terms(displacement)
            normal, objective = normal.add_(of_features), objective - energy
        return normal, objective

    def _warped(self, displacement: Tensor | None, offset: tuple[int, int, int], shape: tuple[int, ...]) -> Tensor:
        """The warped moving image, its gradient and, where given, its measured fraction, at the sampled voxels:
        (N, 4 or 5, d, h, w)."""
        if displacement is None:
            return self.moving[(..., *(slice(o, None, self.stride) for o in offset))]
        x, y, z = offset[::-1]
        # Distance of the sampled voxel from the center of the voxel of the displacement's grid, in voxels of that grid.
        distance = [(o + 0.5) / self.stride - 0.5 for o in (x, y, z)]
        points = fields.identity(shape, like=displacement) + fields.shifted(displacement, *distance)
        return fields.sample(self.moving, points * self.stride + points.new_tensor((x, y, z)).view(1, 3, 1, 1, 1))


def _write_equations(m: Tensor, f: Tensor, values: Tensor, out: Tensor) -> None:
    """Writes information and force of each voxel, (9, d, h, w), in voxels of the images.

    Args:
        m, f: gradients of the warped moving and the fixed image along x, y, z, (3, d, h, w).
        values: (5, d, h, w), entries of :func:`pointwise_tables` for each voxel.
    """
    along_m, along_f, info_m, info_f, _ = values
    by_m, by_f = (m * info_m).unbind(), (f * info_f).unbind()
    m, f, out = m.unbind(), f.unbind(), out.unbind()
    for n, (a, b) in enumerate(COMPONENTS):
        torch.mul(m[a], by_m[b], out=out[n]).addcmul_(f[a], by_f[b])
    for a in range(3):
        torch.mul(m[a], along_m, out=out[6 + a]).addcmul_(f[a], along_f, value=-1)


def _eroded(valid: Tensor) -> Tensor:
    """(N, 1, D, H, W) bool without its outermost voxels, whose differences would reach across its edge; unchanged where
    nothing else would be left."""
    inner = valid.clone()
    for dim in (2, 3, 4):
        before = inner.clone()
        inner.narrow(dim, 0, valid.shape[dim] - 1).logical_and_(before.narrow(dim, 1, valid.shape[dim] - 1))
        inner.narrow(dim, 1, valid.shape[dim] - 1).logical_and_(before.narrow(dim, 0, valid.shape[dim] - 1))
    return inner if inner.any() else valid


def gradient(image: Tensor) -> list[Tensor]:
    """Central differences along x, y, z, each of the shape (N, C, D, H, W) of the image; 0 at the border."""
    differences = []
    for dim in (4, 3, 2):
        inner = image.shape[dim] - 2
        out = torch.zeros_like(image)
        torch.sub(image.narrow(dim, 2, inner), image.narrow(dim, 0, inner), out=out.narrow(dim, 1, inner)).div_(2)
        differences.append(out)
    return differences
