"""Directions of edges of two images correlated: by FFT for all shifts at once, and for single maps with a gradient.

The squared cosine of the angle between two directions n and m is the inner product of the tensors ``n n^T`` and ``m m^T``.
Less the third that it is by chance, it is the inner product of these tensors without their trace, which have five components.
Its sum over all pairs of edges that a map brings into one cell is therefore a sum of five correlations. It does not depend on
the contrast and needs no center, so that a piece is found anywhere in a whole.
"""

import math

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.registration.alignment import transforms
from DivRegNetLib.registration.alignment.evidence import Edges
from DivRegNetLib.registration.alignment.settings import AlignmentSettings
from DivRegNetLib.registration.alignment.similarity import UNIT

CHUNK = 2**17  # cells times rotations at a time


class Correlation:
    """The edges of the larger image as a field of tensors, and those of the smaller one, the *piece*, as points.

    voxel: side of a cell, normalized.
    """

    def __init__(self, edges: Edges, voxels: float, settings: AlignmentSettings) -> None:
        """
        Args:
            voxels: cells along the extent; fewer where the larger image would take too many.
        """
        self.swapped = edges.sides[1].spread < edges.sides[0].spread
        piece, whole = edges.sides[::-1] if self.swapped else edges.sides
        every = settings.correlation_every
        self.points, self.directions = piece.points[:3, ::every], piece.directions[:, ::every]
        self.middle = (self.points.amin(1) + self.points.amax(1)) / 2
        self.points = self.points - self.middle[:, None]
        self.first, self.last = whole.points[:3].amin(1), whole.points[:3].amax(1)
        self.reach = float(self.points.square().sum(0).quantile(0.98).sqrt())
        room = [float(x) for x in self.last - self.first]
        cells = math.prod(x + self.reach for x in room) * (settings.radius * voxels) ** 3
        self.voxel = max(cells / settings.correlation_cells, 1.0) ** (1 / 3) / (settings.radius * voxels)
        # The field goes around: beyond the whole there are enough cells that the piece does not meet both of its ends.
        self.size = [_smooth_size(math.ceil((x + 1.2 * self.reach) / self.voxel) + 1) for x in room]
        field = _tensors(whole.points[None, :3] - self.first[:, None], whole.directions, self.voxel, self.size)
        frequencies = [torch.fft.fftfreq(n) for n in self.size[:0:-1]]
        frequencies.append(torch.fft.rfftfreq(self.size[0]))
        squares = sum(f.square().view([-1 if a == axis else 1 for a in range(3)]) for axis, f in enumerate(frequencies))
        blur = torch.exp(-2 * (math.pi * settings.correlation_sigma) ** 2 * squares)
        self.spectrum = torch.fft.rfftn(field, dim=(2, 3, 4)) * blur
        self.field = torch.fft.irfftn(self.spectrum, s=self.size[::-1], dim=(2, 3, 4))
        # 1 for a piece that is compared with itself, more or less.
        self.unit = float(field.square().sum()) * len(self.points[0]) / len(whole.points[0])

    def best_shifts(self, turns: Tensor) -> tuple[Tensor, Tensor]:
        """The map with the best shift after each of (K, 3, 3) float64 rotations, proper or not, fixed -> moving.

        Returns:
            (K, 4, 4) maps of normalized coordinates, fixed -> moving, and (K,) scores.
        """
        there, (x, y, _) = turns.transpose(1, 2) if self.swapped else turns, self.size
        scores, shifts = [], []
        for part in there.to(torch.float32).split(max(CHUNK // math.prod(self.size), 1)):
            piece = _tensors(part @ self.points, part @ self.directions, self.voxel, self.size)
            product = (torch.fft.rfftn(piece, dim=(2, 3, 4)).conj() * self.spectrum).sum(1)
            score, index = torch.fft.irfftn(product, s=self.size[::-1], dim=(1, 2, 3)).flatten(1).max(1)
            scores.append(score / self.unit)
            shifts.append(torch.stack((index % x, index // x % y, index // (x * y)), 1))
        shift = torch.cat(shifts)
        over = shift > (self.last - self.first + 0.6 * self.reach) / self.voxel
        shift = (shift - over * torch.tensor(self.size)).double() * self.voxel + self.first.double()
        maps = torch.eye(4, dtype=torch.float64).repeat(len(turns), 1, 1)
        maps[:, :3, :3] = there
        maps[:, :3, 3] = shift - there @ self.middle.double()
        return transforms.inverse(maps) if self.swapped else maps, torch.cat(scores).double()

    def evaluate(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (K,) of rigid maps (K, 4, 4), and their gradients (K, 3, 4) along generators D of ``map (I + D)``."""
        with torch.enable_grad():
            at = maps.detach().requires_grad_()
            there = (transforms.inverse(at) if self.swapped else at).to(torch.float32)
            turns = there[:, :3, :3]
            points = turns @ (self.points + self.middle[:, None]) + there[:, :3, 3:] - self.first[:, None]
            cells = (points / self.voxel).transpose(0, 1)[None, :, None]
            found = fields.sample(self.field, cells, padding="zeros")[0, :, 0]
            own = _components(turns @ self.directions)
            scores = (found.transpose(0, 1) * own).sum((1, 2)).double() / self.unit
            gradient = torch.autograd.grad(scores.sum(), at)[0]
        return scores.detach(), (maps.transpose(1, 2) @ gradient)[:, :3]


def _components(directions: Tensor) -> Tensor:
    """(K, 5, N): tensors of (K, 3, N) directions, less their trace."""
    x, y, z = directions.unbind(1)
    root = 2**0.5
    parts = root * x * y, root * x * z, root * y * z, (x * x - y * y) / root, (2 * z * z - x * x - y * y) / 6**0.5
    return torch.stack(parts, 1)


def _tensors(points: Tensor, directions: Tensor, cell: float, size: list[int]) -> Tensor:
    """(K, 5, D, H, W): tensors of directions (..., 3, N), gathered in the cells (x, y, z: ``size``) of points (K, 3, N)."""
    i, j, k = (torch.remainder((points[:, a] / cell).round().long(), size[a]) for a in range(3))
    cells = (i + size[0] * (j + size[1] * k))[:, None].expand(-1, 5, -1)
    # Whole numbers, so that no sum depends on its order.
    total = torch.zeros(len(points), 5, math.prod(size), dtype=torch.int64)
    total.scatter_add_(2, cells, (_components(directions.expand_as(points)) * UNIT).long())
    return (total / UNIT).view(len(points), 5, *size[::-1])


def _smooth_size(count: int) -> int:
    """The next number without a prime factor above 5, which an FFT is fast for."""
    while True:
        rest = count
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return count
        count += 1
