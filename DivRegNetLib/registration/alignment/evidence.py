"""Evidence by which candidates are compared: whether edges have the same directions, which nothing has maximized.

It is the same as ``fixed edges`` and ``warped edges`` of :mod:`DivRegNetLib.quality.evidence`, but of many linear maps at
once, at points on edges, without warping an image.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.quality.evidence import squared_cosine
from DivRegNetLib.registration.alignment import transforms
from DivRegNetLib.registration.alignment.pyramid import Look
from DivRegNetLib.registration.alignment.settings import AlignmentSettings
from DivRegNetLib.registration.alignment.similarity import Frame


class Edges:
    """The strongest edges of two images, in normalized coordinates."""

    def __init__(
        self, fixed: Look, moving: Look, frames: tuple[Frame, Frame], settings: AlignmentSettings, both: Callable = map
    ) -> None:
        """
        Args:
            both: what is done with both images, such as ``map``.
        """
        looks, self.floor, self.both = (fixed, moving), settings.edge_floor, both
        gradients = [_gradient(look, frame) for look, frame in zip(looks, frames, strict=True)]
        self.sides = [
            _Side(looks[own], gradients[own], frames[own], looks[1 - own], gradients[1 - own], frames[1 - own],
                  settings)
            for own in (0, 1)
        ]  # fmt: skip

    def agreement(self, maps: Tensor, every: int = 1) -> Tensor:
        """(K,): mean squared cosine of the angle between the edges of both images, (K, 4, 4) maps.

        On the strongest edges of the fixed image and on those of the moving one, of which each side counts as much as it has
        edges inside the other image's field of view; where that is less than a tenth of either's there is no agreement.
        Edges that meet none stronger than the floor count as across.

        Args:
            every: only every so many of the points is looked at, which is cheaper.
        """

        def agreement(side: _Side, other: _Side, there: Tensor) -> tuple[Tensor, Tensor]:
            gradient, known = side.look_up(there, every)
            gradient = there[:, :3, :3].transpose(1, 2).to(torch.float32) @ gradient
            # A map that stretches an image by s has s times its gradients.
            stretch = torch.linalg.det(there[:, :3, :3]).abs().pow(1 / 3).to(torch.float32)[:, None, None]
            own_directions = side.directions[None, :, ::every]
            cosine = squared_cosine(own_directions, gradient, self.floor * other.strength * stretch)[:, 0]
            return (cosine * known).double().mean(1), known.double().mean(1)

        found = self.both(agreement, self.sides, self.sides[::-1], (maps, transforms.inverse(maps)))
        totals, shares = (torch.stack(x) for x in zip(*found, strict=True))
        total = totals.sum(0)
        return torch.where(shares.amax(0) > 0.1, total / shares.sum(0).clamp_min(1e-9), total.new_zeros(()))


class _Side:
    """Points on the strongest edges of one image, and the gradients of the other.

    points: (4, N) homogeneous. directions: (3, N) unit vectors. strength: length of the gradient at strong edges.
    spread: volume of the box around the points, normalized.
    """

    def __init__(self, own: Look, own_gradient, own_frame: Frame, other: Look, gradient, frame: Frame, settings):
        points, directions, self.strength = _strongest(own, own_gradient, own_frame, settings)
        self.points = torch.tensor(np.c_[points, np.ones(len(points))].T, dtype=torch.float32)
        self.directions = torch.tensor(directions, dtype=torch.float32)
        self.spread = float(np.prod(np.ptp(points, 0)))
        to_index = other.grid.inverse_matrix @ frame.matrix
        to_index[:3, 3] += 1  # of the padded image
        self.to_index = torch.tensor(to_index)
        padded = np.concatenate((np.pad(gradient, ((0, 0), (1, 1), (1, 1), (1, 1))), other.known[None]))
        self.field = torch.tensor(padded, dtype=torch.float32)[None]

    def look_up(self, maps: Tensor, every: int = 1) -> tuple[Tensor, Tensor]:
        """Gradients (K, 3, N) of the other image at the points under maps, and where it is known (K, N)."""
        index = (self.to_index @ maps)[:, :3].to(torch.float32) @ self.points[:, ::every]
        found = fields.sample(self.field, index.transpose(0, 1)[None, :, None])[0, :, 0]
        return found[:3].transpose(0, 1), (found[3] > 0.99).to(torch.float32)


def _gradient(look: Look, frame: Frame) -> np.ndarray:
    """(3, D, H, W) gradient by normalized coordinates of the image, smoothed by a voxel of its coarsest axis."""
    spacing = np.array(look.grid.spacing)
    sigma = [float(x) for x in spacing.max() / spacing]
    values = fields.smooth(torch.from_numpy(look.values)[None, None], *sigma)[0, 0].numpy()
    by_index = [np.gradient(values, axis=a) if values.shape[a] > 1 else np.zeros_like(values) for a in (2, 1, 0)]
    to_index = (look.grid.inverse_matrix @ frame.matrix)[:3, :3]
    return np.einsum("ij,i...->j...", to_index, np.stack(by_index))


def _strongest(look: Look, gradient: np.ndarray, frame: Frame, settings: AlignmentSettings):
    """Points (n, 3) on the content's edges that are strongest for their surroundings, directions (3, n), strength.

    For their surroundings, since the skin's edges alone do not tell how a head is turned.
    """
    length = np.sqrt((gradient**2).sum(0))
    inner = np.zeros_like(look.content)
    inner[1:-1, 1:-1, 1:-1] = True
    inside = look.content & inner if (look.content & inner).any() else look.content
    both = torch.from_numpy(np.stack((length * inside, inside)).astype(np.float32))[None]
    around = fields.smooth(both, settings.edge_surroundings)[0].numpy()
    relative = length / (around[0] / np.maximum(around[1], 1e-3) + 0.2 * length[inside].mean() + 1e-20)
    chosen = np.argwhere(inside & (relative >= np.quantile(relative[inside], 1 - settings.edge_share)))
    chosen = chosen[:: max(round(len(chosen) / settings.edge_points), 1)]
    k, j, i = chosen.T
    points = (look.grid.to_physical(chosen[:, ::-1]) - frame.center) / frame.radius
    directions = gradient[:, k, j, i] / np.maximum(length[k, j, i], 1e-20)
    return points, directions, max(float(np.quantile(length[inside], 1 - settings.edge_share / 2)), 1e-12)
